"""PEFT adapters (https://github.com/huggingface/peft), read into a parameter tree.

The tensors say which layers are adapted: ranks that differ from layer to layer are padded to the
largest, and a layer without an adapter has rank 0 and the factor 0. `peft_writing` writes them.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.errors import UserError, nearest
from jaxft.formats.adapter_config import (
    is_saved,
    ranks_and_scales,
    read_adapter_config,
    targeted,
    unknown_target,
)
from jaxft.formats.naming import modules_in, names_in
from jaxft.formats.peft_writing import check_exportable, save_adapter
from jaxft.formats.safetensors import FLOATS, Stored, open_folder
from jaxft.methods import known_dtype
from jaxft.models.families import Tensor
from jaxft.places import fetched
from jaxft.tree import PyTree, flatten_with_paths, map_with_paths
from jaxft.weights import (
    DoRA,
    LoRA,
    Site,
    Tied,
    VeRA,
    Weight,
    bind,
    is_weight,
    materialize,
    projections,
)

__all__ = ["check_exportable", "load_adapter", "save_adapter", "saved_leaves"]

PREFIX = "base_model.model."
# Older files carry the adapter's name ("default") or a `.weight` where newer ones do not.
PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_(embedding_)?[AB]|lora_magnitude_vector|vera_lambda_[bd])"
    r"(\.default)?(\.weight)?"
)
DENSE = re.compile(
    r"(?P<module>.+?)(?P<inner>\.base_layer|\.original_module|\.modules_to_save(\.default)?)?"
    r"\.(?P<leaf>weight|bias)"
)
PROJECTION = re.compile(r"base_model\.vera_(?P<part>[AB])(\.default)?")
KERNELS = ("/kernel", "/embedding")
PARTS = {"lora_embedding_A": "lora_A", "lora_embedding_B": "lora_B"}


@dataclasses.dataclass
class _Contents:
    """An adapter's tensors in order.

    Attributes:
        parts: {(module): {part: tensor}} of the adapters.
        dense: {(path, layer): tensor} of leaves saved whole.
        carried: the base's own weights, which PEFT stores beside an adapted embedding or head.
        projections: VeRA's A and B.
        dtype: of the arrays that are made of them.
    """

    parts: dict[str, dict[str, Stored]] = dataclasses.field(default_factory=dict)
    dense: dict[tuple[str, int | None], Stored] = dataclasses.field(default_factory=dict)
    carried: dict[tuple[str, int | None], Stored] = dataclasses.field(default_factory=dict)
    projections: dict[str, Stored] = dataclasses.field(default_factory=dict)
    dtype: Any = np.float32


def load_adapter(
    params: PyTree,
    folder: str | Path,
    *,
    names: Mapping[str, str] | None = None,
    dtype: str = "float32",
) -> PyTree:
    """Puts a PEFT adapter in the places of the kernels it adapts: LoRA, rsLoRA, DoRA or VeRA.

    Modules saved whole (`modules_to_save`, biases) take the place of the base's leaves; a tied head
    becomes an array of its own where the adapter holds a head or an embedding that PEFT unties. Returns the new tree.

    Args:
        params: the base's tree, without adapters.
        folder: holds adapter_config.json and adapter_model.safetensors; may be a URL (gs://, s3://).
        names: {path: module name with {layer}}; by default those of the family whose tree it is.
        dtype: that of the adapter's arrays.

    Raises:
        UserError: a damaged folder (also by its manifest), an unknown kind or option, a tensor too many, missing, or
            of a shape that does not fit the base.
    """
    folder = fetched(folder)
    options = read_adapter_config(folder)
    table = names_in(params, names)
    modules = modules_in(table, params)
    for path, leaf in flatten_with_paths(params, is_leaf=is_weight):
        if isinstance(leaf, LoRA | VeRA):
            raise UserError(f"load_adapter: {path} is adapted already: call jaxft.merge first")
    contents = _sort(open_folder(folder, "adapter_model"), options, table, modules, folder)
    contents.dtype = known_dtype(dtype, "load_adapter")
    _check_whole(contents, options, table, modules, folder)
    params = _with_dense(params, contents, table)
    leaves = dict(flatten_with_paths(params, is_leaf=is_weight))
    places: dict[str, dict[int, str]] = {}
    for module in contents.parts:
        path, layer = modules[module]
        places.setdefault(path, {})[layer or 0] = module
    read = _vera if options["peft_type"] == "VERA" else _lora
    made, shared = read(options, contents, places, leaves, folder)
    tree = map_with_paths(lambda path, leaf: made.get(path, leaf), params, is_leaf=is_weight)
    return tree | shared


def saved_leaves(
    params: PyTree, folder: str | Path, *, names: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """Paths of the leaves that an adapter holds whole: what `save_adapter` takes as `trained`.

    Args:
        params: the base's tree, with or without the adapter.
        folder: the adapter's.
        names: as of `load_adapter`.
    """
    folder = fetched(folder)
    options = read_adapter_config(folder)
    table = names_in(params, names)
    modules = modules_in(table, params)
    contents = _sort(open_folder(folder, "adapter_model"), options, table, modules, folder)
    return tuple(dict.fromkeys(path for path, _ in contents.dense))


def _sort(
    stored: Mapping[str, Stored],
    options: Mapping[str, Any],
    table: Mapping[str, Tensor],
    modules: Mapping[str, tuple[str, int | None]],
    folder: Path,
) -> _Contents:
    """Gives each tensor of the file its place; UserError for one that has none."""
    contents = _Contents()
    biases = {tensor.module: path for path, tensor in table.items() if path.endswith("/bias")}
    for full, tensor in stored.items():
        name = full.removeprefix(PREFIX)
        if tensor.dtype not in FLOATS:
            raise UserError(
                f"{tensor.file}: {full} is {tensor.dtype}; jaxft reads {', '.join(FLOATS)}"
            )
        if found := PROJECTION.fullmatch(full):
            contents.projections[found["part"]] = tensor
        elif (found := PART.fullmatch(name)) and found["module"] in modules:
            part = PARTS.get(found["part"], found["part"])
            contents.parts.setdefault(found["module"], {})[part] = tensor
        elif (found := DENSE.fullmatch(name)) and found["module"] in modules:
            if found["inner"] == ".original_module":
                continue  # the base's own, which PEFT stores beside a module saved whole
            path, layer = modules[found["module"]]
            if found["leaf"] == "bias":
                generic = table[path].module
                if generic not in biases:
                    raise UserError(f"{tensor.file}: {full}: the base has no bias there")
                path = biases[generic]
            whole = is_saved(options, found["module"]) or (
                found["leaf"] == "bias" and options["bias"] != "none"
            )
            if not whole and found["inner"] != ".base_layer":
                raise UserError(
                    f"{folder}: the tensor {full} is not used: nothing in modules_to_save means it"
                )
            (contents.dense if whole else contents.carried)[path, layer] = tensor
        else:
            module = (PART.fullmatch(name) or DENSE.fullmatch(name) or {"module": name})["module"]
            raise UserError(
                f"{folder}: the tensor {full} is not used: the base has no such module"
                f"{nearest(module, modules)}"
            )
    return contents


def _check_whole(
    contents: _Contents,
    options: Mapping[str, Any],
    table: Mapping[str, Tensor],
    modules: Mapping[str, tuple[str, int | None]],
    folder: Path,
) -> None:
    """What the configuration announces is in the file, and nothing else."""
    wanted = {"lora_A", "lora_B", *(["lora_magnitude_vector"] if options.get("use_dora") else [])}
    wanted = {"vera_lambda_b", "vera_lambda_d"} if options["peft_type"] == "VERA" else wanted
    for module, parts in contents.parts.items():
        for part in wanted.symmetric_difference(parts):
            what = "is missing" if part in wanted else "is not used by this kind of adapter"
            raise UserError(f"{folder}: the tensor {PREFIX}{module}.{part} {what}")
    if not contents.parts:
        raise UserError(f"{folder}: adapter_model.safetensors holds no adapter")
    targets = options["target_modules"]
    if isinstance(targets, list) and (unknown := unknown_target(targets, modules)):
        raise UserError(f"{folder}: target_modules: the base has no module {unknown}")
    kernels = {m: path for m, (path, _) in modules.items() if path.endswith(KERNELS)}
    projections = {module for module, path in kernels.items() if "_proj/" in path}
    meant = set() if targets is None else targeted(options, kernels, projections)
    for module, (path, layer) in modules.items():
        named = module in meant
        if named and module not in contents.parts:
            raise UserError(
                f"{folder}: the adapter of {module} is missing, which target_modules names"
            )
        if targets is not None and not named and module in contents.parts:
            raise UserError(
                f"{folder}: the adapter of {module} is not used: target_modules does not name it"
            )
        if is_saved(options, module) and (path, layer) not in contents.dense:
            raise UserError(
                f"{folder}: {PREFIX}{module}.weight is missing, which modules_to_save names"
            )


def _with_dense(params: PyTree, contents: _Contents, table: Mapping[str, Tensor]) -> PyTree:
    """The tree with the leaves that the adapter holds whole."""
    leaves = dict(flatten_with_paths(params, is_leaf=is_weight))
    read: dict[str, dict[int | None, np.ndarray]] = {}
    for (path, layer), stored in contents.dense.items():
        read.setdefault(path, {})[layer] = _dense_value(stored, leaves[path], table[path], layer)
    for (path, layer), stored in contents.carried.items():
        value = _dense_value(stored, leaves[path], table[path], layer)
        base = materialize(bind(leaves[path], params))
        base = base if layer is None else base[layer]
        if not np.array_equal(value.astype(base.dtype), np.asarray(base)):
            if any(isinstance(leaf, Tied) for leaf in leaves.values()):
                raise UserError(
                    f"{stored.file}: {stored.name} is not this base's: the adapter is another's"
                )
            read.setdefault(path, {})[layer] = value
    for path, leaf in leaves.items():
        if isinstance(leaf, Tied) and "/".join(leaf.path) in read:
            embedding = read["/".join(leaf.path)][None]
            if path not in read:
                read[path] = {None: np.asarray(materialize(leaf.bind(params)))}
            elif np.array_equal(read[path][None], embedding.T):
                del read[path]
    made = {path: _replaced(leaves[path], values) for path, values in read.items()}
    return map_with_paths(lambda path, leaf: made.get(path, leaf), params, is_leaf=is_weight)


def _dense_value(stored: Stored, leaf: Any, tensor: Tensor, layer: int | None) -> np.ndarray:
    shape = tuple(leaf.shape if layer is None else leaf.shape[1:])
    wanted = shape[::-1] if tensor.transposed else shape
    if stored.shape != wanted:
        raise UserError(
            f"{stored.file}: {stored.name} has shape {list(stored.shape)}, the base {list(wanted)}"
        )
    return stored.read().T if tensor.transposed else stored.read()


def _replaced(leaf: Any, values: Mapping[int | None, np.ndarray]) -> jax.Array:
    if None in values:
        return jnp.array(values[None])
    dtype = jnp.promote_types(leaf.dtype, next(iter(values.values())).dtype)
    filled = np.array(leaf, dtype)
    for layer, value in values.items():
        filled[layer] = value
    return jnp.array(filled)


def _sizes(leaf: Any) -> tuple[bool, int, int, int]:
    """(stacked, layers, in, out) of a kernel."""
    stacked = len(leaf.shape) == 3
    return stacked, leaf.shape[0] if stacked else 1, leaf.shape[-2], leaf.shape[-1]


def _fill(shape: Sequence[int], values: Mapping[int, Any], stacked: bool, dtype: Any) -> jax.Array:
    """Each layer's values in the first places of zeros (layers, ...), if they are stacked."""
    layers, *rest = shape
    filled = np.zeros((layers, *rest), dtype)
    for layer, value in values.items():
        places: tuple[int | slice, ...] = (layer, *(slice(size) for size in value.shape))
        filled[places] = value
    return jnp.array(filled if stacked else filled[0])


def _expect_shape(stored: Stored, shape: tuple[int, ...], base: Any) -> None:
    if stored.shape != shape:
        raise UserError(
            f"{stored.file}: {stored.name} has shape {list(stored.shape)}, but the base's kernel "
            f"{list(base.shape[-2:])} (in, out) needs {list(shape)}"
        )


def _lora(
    options: Mapping[str, Any],
    contents: _Contents,
    places: Mapping[str, Mapping[int, str]],
    leaves: Mapping[str, Any],
    folder: Path,
) -> tuple[dict[str, Weight], dict[str, Any]]:
    """{path: LoRA or DoRA}, and nothing shared."""
    made: dict[str, Weight] = {}
    sizes = ranks_and_scales(options, list(contents.parts))
    for path, modules in places.items():
        leaf = leaves[path]
        stacked, layers, rows, columns = _sizes(leaf)
        ranks, scales = [0] * layers, np.zeros(layers, np.float32)
        parts_of_lora = ("lora_A", "lora_B", "lora_magnitude_vector")
        values: dict[str, dict[int, np.ndarray]] = {part: {} for part in parts_of_lora}
        fill = functools.partial(_fill, stacked=stacked, dtype=contents.dtype)
        for layer, module in modules.items():
            parts = contents.parts[module]
            rank, scale = sizes[module]
            _expect_shape(parts["lora_A"], (rank, rows), leaf)
            _expect_shape(parts["lora_B"], (columns, rank), leaf)
            if "lora_magnitude_vector" in parts:
                _expect_shape(parts["lora_magnitude_vector"], (columns,), leaf)
            ranks[layer], scales[layer] = rank, scale
            for part, stored in parts.items():
                values[part][layer] = stored.read().T
        common: dict[str, Any] = {
            "base": leaf,
            "a": fill((layers, rows, max(ranks)), values["lora_A"]),
            "b": fill((layers, max(ranks), columns), values["lora_B"]),
            "scale": jnp.array(scales if stacked else scales[0]),
            "dropout": float(options["lora_dropout"]),
            "ranks": tuple(ranks),
        }
        if options["use_dora"]:
            common["magnitude"] = fill((layers, columns), values["lora_magnitude_vector"])
            made[path] = DoRA(**common)
        else:
            made[path] = LoRA(**common)
    return made, {}


def _vera(
    options: Mapping[str, Any],
    contents: _Contents,
    places: Mapping[str, Mapping[int, str]],
    leaves: Mapping[str, Any],
    folder: Path,
) -> tuple[dict[str, Weight], dict[str, Any]]:
    """{path: VeRA}, and the projections: those of the file, or drawn from its seed."""
    made: dict[str, Weight] = {}
    sites = []
    rank = options["r"]
    for path, modules in places.items():
        leaf = leaves[path]
        stacked, layers, _, columns = _sizes(leaf)
        d, g = {}, {}
        for layer, module in modules.items():
            parts = contents.parts[module]
            _expect_shape(parts["vera_lambda_d"], (rank,), leaf)
            _expect_shape(parts["vera_lambda_b"], (columns,), leaf)
            d[layer], g[layer] = parts["vera_lambda_d"].read(), parts["vera_lambda_b"].read()
        ranks = tuple(rank if layer in modules else 0 for layer in range(layers))
        sites.append(Site(path, leaf, leaf, jax.random.key(0), ranks, (), stacked))
        common: dict[str, Any] = {
            "base": leaf,
            "d": _fill((layers, rank), d, stacked, contents.dtype),
            "g": _fill((layers, columns), g, stacked, contents.dtype),
            "dropout": float(options["vera_dropout"]),
            "ranks": ranks,
        }
        made[path] = VeRA(**common)
    return made, _projections(options, contents, sites, folder)


def _projections(
    options: Mapping[str, Any], contents: _Contents, sites: list[Site], folder: Path
) -> dict[str, Any]:
    if not contents.projections and not options["save_projection"]:
        return projections(sites, seed=options["projection_prng_key"])
    rows, columns = (max(site.matrix_shape[axis] for site in sites) for axis in (0, 1))
    shapes = {"A": (options["r"], rows), "B": (columns, options["r"])}
    read = {}
    for part, shape in shapes.items():
        if part not in contents.projections:
            raise UserError(
                f"{folder}: base_model.vera_{part} is missing, though save_projection is true"
            )
        stored = contents.projections[part]
        if stored.shape != shape:
            raise UserError(
                f"{stored.file}: {stored.name} has shape {list(stored.shape)}, "
                f"the base needs {list(shape)}"
            )
        read[part.lower()] = jnp.array(stored.read().T.astype(contents.dtype))
    return {"vera": read}
