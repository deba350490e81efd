"""What stands in a PEFT adapter's file: each tensor's place in the tree, checked against the configuration."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.errors import UserError, nearest
from jaxft.formats.adapter_config import (
    is_saved,
    matches_list,
    read_adapter_config,
    targeted,
    tokens_of,
    unknown_target,
)
from jaxft.formats.adapter_file import open_adapter
from jaxft.formats.multimodal import PREFIXES
from jaxft.formats.naming import as_in, modules_in, names_in
from jaxft.formats.safetensors import FLOATS, Stored, finite
from jaxft.models.families import Tensor
from jaxft.tree import PyTree, flatten_with_paths
from jaxft.vocabulary import EMBEDDING, HEAD
from jaxft.weights import bare, is_tied_head, is_weight

PREFIX = "base_model.model."
# Older files carry the adapter's name ("default") or a `.weight` where newer ones do not.
PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_(embedding_)?[AB]|lora_magnitude_vector|vera_lambda_[bd])"
    r"(\.default)?(\.weight)?"
)
DENSE = re.compile(
    r"(?P<module>.+?)(?P<inner>(\.token_adapter)?\.base_layer|\.original_module|\.modules_to_save(\.default)?)?"
    r"\.(?P<leaf>weight|bias)"
)
TOKENS = re.compile(r"(?P<module>.+?)\.token_adapter\.trainable_tokens_delta(\.default)?")
PROJECTION = re.compile(r"base_model\.vera_(?P<part>[AB])(\.default)?")
KERNELS = ("/kernel", "/embedding")
PARTS = {"lora_embedding_A": "lora_A", "lora_embedding_B": "lora_B"}
Modules = Mapping[str, tuple[str, int | None]]
Place = tuple[str, int | None]


@dataclasses.dataclass
class Contents:
    """An adapter's tensors in order.

    Attributes:
        parts: {(module): {part: tensor}} of the adapters.
        dense: {(path, layer): tensor} of leaves saved whole.
        carried: the base's own weights, which PEFT stores beside an adapted or a resized embedding or head.
        projections: VeRA's A and B.
        rows: {path: rows of tokens} of the embedding and the head, and tokens: {path: whose they are}.
        dtype: of the arrays that are made of them.
    """

    parts: dict[str, dict[str, Stored]] = dataclasses.field(default_factory=dict)
    dense: dict[Place, Stored] = dataclasses.field(default_factory=dict)
    carried: dict[Place, Stored] = dataclasses.field(default_factory=dict)
    projections: dict[str, Stored] = dataclasses.field(default_factory=dict)
    rows: dict[str, Stored] = dataclasses.field(default_factory=dict)
    tokens: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    dtype: Any = np.float32

    def read(self, stored: Stored) -> np.ndarray:
        """An adapter's tensor, as a view of the file; UserError where it is not finite."""
        return finite(stored, self.dtype)


def read_contents(
    params: PyTree, folder: Path, names: Mapping[str, str] | None
) -> tuple[dict[str, Any], Contents, dict[str, Tensor], Modules]:
    """(the configuration, what stands in the file, {path: tensor}, {module: (path, layer)})."""
    options = read_adapter_config(folder)
    stored = open_adapter(folder)
    table = names_in(params, names)
    table = table if names else as_in((name.removeprefix(PREFIX) for name in stored), table)
    modules = modules_in(table, params)
    if options.get("ensure_weight_tying") and is_tied(params):
        options = _widened(options, modules, [name.removeprefix(PREFIX) for name in stored])
    contents = _sort(stored, options, table, modules, folder, is_tied(params))
    return options, contents, table, modules


def is_tied(params: PyTree) -> bool:
    """Whether the tree's head is its embedding, under whatever adapter."""
    head = dict(flatten_with_paths(params, is_leaf=is_weight)).get(HEAD)
    return is_tied_head(bare(head))


def _widened(options: Mapping[str, Any], modules: Modules, stored: list[str]) -> dict[str, Any]:
    """The options under `ensure_weight_tying`: what means the embedding or the head tied to it means both.

    That is, both where the file has both: PEFT does not tie them in every family.
    """
    pair = [module for module, (path, _) in modules.items() if path in (EMBEDDING, HEAD)]
    wider, targets = dict(options), options["target_modules"]
    if any(is_saved(options, module) for module in pair):
        also = [module for module in pair if f"{module}.weight" in stored]
        wider["modules_to_save"] = [*options["modules_to_save"], *also]
    also = [m for m in pair if any(name.startswith(f"{m}.lora_") for name in stored)]
    if isinstance(targets, list) and any(matches_list(targets, module) for module in pair):
        wider["target_modules"] = [*targets, *also]
    elif isinstance(targets, str) and targeted(options, pair, ()):
        wider["target_modules"] = "|".join([f"(?:{targets})", *map(re.escape, also)])
    return wider


def _sort(
    stored: Mapping[str, Stored],
    options: Mapping[str, Any],
    table: Mapping[str, Tensor],
    modules: Modules,
    folder: Path,
    tied: bool,
) -> Contents:
    """Gives each tensor of the file its place; UserError for one that has none."""
    contents = Contents()
    for full, tensor in stored.items():
        name = full.removeprefix(PREFIX)
        if tensor.dtype not in FLOATS:
            raise UserError(
                f"{tensor.file}: {full} is {tensor.dtype}; jaxft reads {', '.join(FLOATS)}"
            )
        if (found := TOKENS.fullmatch(name)) and found["module"] in modules:
            contents.rows[modules[found["module"]][0]] = tensor
        elif found := PROJECTION.fullmatch(full):
            contents.projections[found["part"]] = tensor
        elif (found := PART.fullmatch(name)) and found["module"] in modules:
            part = PARTS.get(found["part"], found["part"])
            contents.parts.setdefault(found["module"], {})[part] = tensor
        elif (found := DENSE.fullmatch(name)) and found["module"] in modules:
            path, layer = modules[found["module"]]
            if found["leaf"] == "bias":
                path = f"{path.rpartition('/')[0]}/bias"
                if path not in table:
                    raise UserError(f"{tensor.file}: {full}: the base has no bias there")
            _place(contents, tensor, found, (path, layer), options, folder)
        else:
            module = (PART.fullmatch(name) or DENSE.fullmatch(name) or {"module": name})["module"]
            raise UserError(f"{folder}: the tensor {full} is not used: {_why_not(module, modules)}")
    _check_tokens(contents, options, modules, folder, tied)
    return contents


def _why_not(module: str, modules: Modules) -> str:
    """Why a module of an adapter is none of the tree's."""
    among_others = any(name.startswith(PREFIXES) for name in modules)
    if among_others and not module.startswith(PREFIXES):
        return (
            "it is of another part of the model than its text, and jaxft reads adapters of the text alone: keep "
            "target_modules to it, as '.*language_model.*q_proj' does"
        )
    return f"the base has no such module{nearest(module, modules)}"


def _place(
    contents: Contents,
    tensor: Stored,
    found: re.Match[str],
    place: Place,
    options: Mapping[str, Any],
    folder: Path,
) -> None:
    """Puts a tensor that is no adapter's with those saved whole, or with the base's own."""
    inner = found["inner"] or ""
    biased = found["leaf"] == "bias" and options["bias"] != "none"
    if inner == ".original_module":
        return  # the base's own, which PEFT stores beside a module saved whole
    if is_saved(options, found["module"]) or biased:
        # `save_embedding_layers` stores a module saved whole a second time, as its wrapper names it.
        if not inner or place not in contents.dense:
            contents.dense[place] = tensor
    elif inner.endswith(".base_layer") or (not inner and place[0] in (EMBEDDING, HEAD)):
        contents.carried[place] = tensor
    else:
        raise UserError(
            f"{folder}: the tensor {tensor.name} is not used: nothing in modules_to_save means it"
        )


def _check_tokens(
    contents: Contents, options: Mapping[str, Any], modules: Modules, folder: Path, tied: bool
) -> None:
    """Gives the rows their tokens. UserError for rows that are missing, too many, or of nothing that is named."""
    pair = {module: path for module, (path, _) in modules.items() if path in (EMBEDDING, HEAD)}
    embedding = next((module for module, path in pair.items() if path == EMBEDDING), "")
    named = {pair[m]: ids for m, ids in tokens_of(options, pair, embedding).items()}
    module_of = {path: module for module, path in pair.items()}
    rows, one = contents.rows, len({tuple(sorted(ids)) for ids in named.values()}) == 1
    if tied and one and EMBEDDING in named:  # PEFT ties the two, and writes them once or twice
        named.pop(HEAD, None)
        if HEAD in rows and EMBEDDING in rows:
            if not np.array_equal(rows[HEAD].read(), rows[EMBEDDING].read()):
                raise UserError(
                    f"{folder}: {rows[HEAD].name} differs from {rows[EMBEDDING].name}, and the two are tied"
                )
            del rows[HEAD]
    for path in named.keys() - rows.keys():
        raise UserError(
            f"{folder}: {PREFIX}{module_of[path]}.token_adapter.trainable_tokens_delta is missing, which "
            "trainable_token_indices names"
        )
    for path, stored in rows.items():
        if path not in named:
            raise UserError(
                f"{folder}: the tensor {stored.name} is not used: trainable_token_indices does not name it"
            )
        if stored.shape[0] != len(named[path]):
            raise UserError(
                f"{stored.file}: {stored.name} has {stored.shape[0]} rows, and trainable_token_indices names "
                f"{len(named[path])} tokens"
            )
    contents.tokens |= named


def check_whole(
    contents: Contents,
    options: Mapping[str, Any],
    modules: Modules,
    folder: Path,
) -> None:
    """What the configuration announces is in the file, and nothing else.

    Raises:
        UserError: a tensor is missing, is not used, or is of a module that the base lacks.
    """
    wanted = {"lora_A", "lora_B", *(["lora_magnitude_vector"] if options.get("use_dora") else [])}
    wanted = {"vera_lambda_b", "vera_lambda_d"} if options["peft_type"] == "VERA" else wanted
    for module, parts in contents.parts.items():
        for part in wanted.symmetric_difference(parts):
            what = "is missing" if part in wanted else "is not used by this kind of adapter"
            raise UserError(f"{folder}: the tensor {PREFIX}{module}.{part} {what}")
    if not contents.parts:
        raise UserError(f"{folder}: adapter_model.safetensors holds no adapter")
    targets = options["target_modules"]
    kernels = {m: path for m, (path, _) in modules.items() if path.endswith(KERNELS)}
    projections = {module for module, path in kernels.items() if "_proj/" in path}
    meant = set() if targets is None else targeted(options, kernels, projections)
    # As in PEFT, some of the targets may mean nothing: one list of names serves many families.
    if isinstance(targets, list) and not meant and (unknown := unknown_target(targets, modules)):
        raise UserError(f"{folder}: target_modules: the base has no module {unknown}")
    for module, place in modules.items():
        named = module in meant
        if named and module not in contents.parts:
            raise UserError(
                f"{folder}: the adapter of {module} is missing, which target_modules names"
            )
        if targets is not None and not named and module in contents.parts:
            raise UserError(
                f"{folder}: the adapter of {module} is not used: target_modules does not name it"
            )
        if is_saved(options, module) and place not in contents.dense:
            raise UserError(
                f"{folder}: {PREFIX}{module}.weight is missing, which modules_to_save names"
            )
