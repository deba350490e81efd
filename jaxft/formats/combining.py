"""Adapters' folders made one: `jaxft merge` of several, or of one that is stored otherwise.

Only the adapters' files are read: their base is not needed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.errors import UserError, counted, row_of, shown
from jaxft.formats.adapter_config import FILE, ranks_and_scales, read_adapter_config
from jaxft.formats.adapter_file import open_adapter
from jaxft.formats.companions import companions
from jaxft.formats.manifest import TRAINED_ON, note, put, trained_over
from jaxft.formats.merge import merge_folder
from jaxft.formats.peft_contents import DENSE, PART, PARTS, PREFIX
from jaxft.formats.peft_writing import card, read_quantization, write_adapter
from jaxft.formats.safetensors import Lazy, Stored, finite
from jaxft.formats.storing import CODES, store_folder
from jaxft.formats.trained_base import trained_on_chats
from jaxft.methods import known_dtype
from jaxft.runtime.storage import fetched, local
from jaxft.runtime.untrusted import file_of, read_json
from jaxft.weights.combining import (
    MAJORITIES,
    WAYS,
    Update,
    Way,
    combined,
    distance,
    random_keep,
)


@dataclasses.dataclass(frozen=True)
class Folder:
    """A LoRA as it lies in a folder.

    Attributes:
        path: the folder.
        options: adapter_config.json, whole.
        updates: {module: its update}.
        endings: {module: how its two tensors are called, A before B}.
        carried: {name: tensor} of the base's own weights, which PEFT stores beside an adapted embedding.
    """

    path: Path
    options: Mapping[str, Any]
    updates: Mapping[str, Update]
    endings: Mapping[str, tuple[str, str]]
    carried: Mapping[str, Stored]


def merge_adapters(
    adapters: Sequence[str | Path],
    output: str | Path,
    model: str | Path = "",
    quantize: str = "none",
    dtype: str = "",
    **how: Any,
) -> float:
    """Merges one adapter or several into a model, or several into one adapter: what `jaxft merge` does.

    Args:
        adapters: PEFT folders.
        output: a new or empty folder.
        model: the base; "": an adapter is written.
        quantize: as of `merge_folder`.
        dtype: what to store.
        how: of `combine_folders`, as far as it is given.

    Raises:
        UserError: what `merge_folder` and `combine_folders` raise, or several adapters without weights.
    """
    if not model and quantize != "none":
        raise UserError("--quantize writes a model: name its base by --model")
    if dtype == CODES and (model or how or len(adapters) > 1):
        raise UserError(
            "--dtype int8 stores one adapter as it is: write what is combined first, and store that"
        )
    if len(adapters) == 1 and not how:
        if model:
            return merge_folder(model, adapters[0], output, quantize, dtype)
        return store_folder(adapters[0], output, dtype)
    if len(adapters) > 1 and "weights" not in how:
        even = ",".join([f"{1 / len(adapters):.3g}"] * len(adapters))
        raise UserError(
            f"--weights is missing: one number for each of the {len(adapters)} adapters, as --weights {even}"
        )
    how = {"weights": [1.0], **how}
    if not model:
        return combine_folders(adapters, output, dtype=dtype, **how)
    with tempfile.TemporaryDirectory() as folder:
        one = Path(folder) / "combined"
        combine_folders(adapters, one, **how)
        return merge_folder(model, one, output, quantize, dtype)


def combine_folders(
    adapters: Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float],
    combine: str = "cat",
    density: float = 0.0,
    rank: int = 0,
    majority: str = "total",
    seed: int = 0,
    dtype: str = "",
) -> float:
    """Writes one LoRA for the weighted sum of several, as PEFT's `add_weighted_adapter` makes it.

    A module that only some adapt is combined of those. The result has scale 1 in every module, whatever the first
    adapter scaled by (PEFT leaves `use_rslora` of the first on, and so multiplies by the root of the rank).

    Args:
        adapters: PEFT folders of LoRAs over one base.
        output: a new or empty folder.
        weights: one number an adapter; also negative.
        combine: a name of `jaxft.weights.combining.WAYS`; one adapter alone is only scaled.
        density: the share of numbers that stay, in (0, 1], where the way prunes; 0: not given.
        rank: of the result, where an SVD makes it; 0: the largest of the adapters'.
        majority: how a sign is elected: total | frequency.
        seed: of what is pruned at random.
        dtype: of the stored tensors: float32 | bfloat16 | float16; "": float32.

    Returns:
        How far the products of what is stored are from the weighted sum of the adapters', relative to it: Frobenius
        norms over all modules together.

    Raises:
        UserError: adapters of different bases or kinds, ranks that the way needs equal, or what it does not take.
    """
    way = _way(combine, density, rank, majority)
    kind = np.dtype(known_dtype(dtype or "float32", "--dtype"))
    target = local(output, "an adapter that is written")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: is not empty; jaxft overwrites nothing: name a new folder")
    if len(weights) != len(adapters):
        raise UserError(
            f"--weights has {counted(len(weights), 'number')} for {counted(len(adapters), 'adapter')}: "
            "one each, as --weights 0.5,0.5"
        )
    folders = [_read(fetched(adapter)) for adapter in adapters]
    _check_one_base(folders)
    modules = list(dict.fromkeys(name for folder in folders for name in folder.updates))
    made, far, size = dict[str, Update](), 0.0, 0.0
    for module in modules:
        having = [(f, w) for f, w in zip(folders, weights, strict=True) if module in f.updates]
        updates, shares = [f.updates[module] for f, _ in having], [w for _, w in having]
        keep = random_keep(density, seed, module)
        one = _combined(module, combine, updates, shares, way, rank, density, majority, keep)
        made[module] = stored = _stored(module, one, kind)
        apart, whole = distance(stored, updates, shares)
        far, size = math.hypot(far, apart), math.hypot(size, whole)
    _write(target, folders, made, kind, f"LoRA, {_told(folders, weights, combine)}")
    deviation = far / size if size else 0.0
    print(
        f"wrote {output}: {_told(folders, weights, combine)}, {_rank(made)}, "
        f"{deviation:.2g} of its size away from the weighted sum"
    )
    return deviation


def _told(folders: Sequence[Folder], weights: Sequence[float], combine: str) -> str:
    terms = " + ".join(f"{w:g} {f.path.name}" for w, f in zip(weights, folders, strict=True))
    return terms + (f" by {combine}" if len(folders) > 1 else "")


def _rank(made: Mapping[str, Update]) -> str:
    ranks = sorted({one.rank for one in made.values()})
    return f"rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")


def _way(name: str, density: float, rank: int, majority: str) -> Way:
    """The row, once what goes with it is checked."""
    way: Way = row_of(WAYS, name, "--combine")
    row_of(dict.fromkeys(MAJORITIES), majority, "--majority")
    if way.pruned and not 0 < density <= 1:
        raise UserError(
            f"--combine {name} needs --density, the share of numbers that stay: above 0, to 1"
        )
    others = (
        ("--density", density, way.pruned, "prunes nothing"),
        ("--rank", rank, way.whole, "makes no SVD"),
        ("--majority", majority != "total", way.elected, "elects no signs"),
    )
    for flag, given, taken, why in others:
        if given and not taken:
            raise UserError(f"{flag} goes with other ways: --combine {name} {why}")
    return way


def _combined(
    module: str,
    name: str,
    updates: Sequence[Update],
    weights: Sequence[float],
    way: Way,
    rank: int,
    density: float,
    majority: str,
    keep: Any,
) -> Update:
    shapes = {(len(one.a), one.b.shape[1]) for one in updates}
    if len(shapes) > 1:
        raise UserError(
            f"{module}: is {' and '.join(f'{i} x {o}' for i, o in sorted(shapes))} (in x out) in these adapters: "
            "they are of different bases"
        )
    try:
        return combined(
            updates, weights, way, rank=rank, density=density, majority=majority, keep=keep
        )
    except UserError as error:
        raise UserError(
            f"--combine {name} needs equal ranks: {module} {error}; svd, ties_svd and cat do not"
        ) from error


def _stored(module: str, one: Update, dtype: np.dtype) -> Update:
    """What will be read again of an update that is stored in `dtype`."""
    with np.errstate(over="ignore"):
        a, b = (part.astype(dtype).astype(np.float32) for part in (one.a, one.b))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UserError(f"--dtype {dtype}: {module} holds numbers that it cannot: take bfloat16")
    return Update(a, b, one.scale)


def _read(path: Path) -> Folder:
    """A LoRA's folder; UserError for what is none, or holds more than low-rank updates."""
    options = read_adapter_config(path)
    options["revision"] = read_json(file_of(path, FILE, "an adapter")).get("revision")
    refused = {
        "peft_type": options["peft_type"] != "LORA",
        "use_dora": options.get("use_dora"),
        "modules_to_save": options["modules_to_save"],
        "bias": options["bias"] != "none",
        "trainable_token_indices": options.get("trainable_token_indices"),
    }
    for option, present in refused.items():
        if present:
            raise UserError(
                f"{path}: {option} = {shown(options[option])}: only plain LoRAs are combined; merge this one into "
                "the model (--model M --adapter DIR alone)"
            )
    parts: dict[str, dict[str, Stored]] = {}
    endings: dict[str, dict[str, str]] = {}
    carried = dict[str, Stored]()
    for name, stored in open_adapter(path).items():
        inner = name.removeprefix(PREFIX)
        if found := PART.fullmatch(inner):
            part = PARTS.get(found["part"], found["part"])
            parts.setdefault(found["module"], {})[part] = stored
            endings.setdefault(found["module"], {})[part] = inner.removeprefix(found["module"])
        elif (found := DENSE.fullmatch(inner)) and found["inner"] in (None, ".base_layer"):
            carried[name] = stored
        else:
            raise UserError(f"{path}: the tensor {shown(name)} is not used")
    if not parts:
        raise UserError(f"{path}: adapter_model.safetensors holds no adapter")
    sizes = ranks_and_scales(options, list(parts))
    updates = {module: _update(path, module, parts[module], *sizes[module]) for module in parts}
    named = {module: (found["lora_A"], found["lora_B"]) for module, found in endings.items()}
    return Folder(path, options, updates, named, carried)


def _update(
    path: Path, module: str, parts: Mapping[str, Stored], rank: int, scale: float
) -> Update:
    """One module's, checked: a and b are there and of its rank."""
    for part, axis in (("lora_A", 0), ("lora_B", 1)):
        if part not in parts:
            raise UserError(f"{path}: the tensor {PREFIX}{module}.{part} is missing")
        shape = parts[part].shape
        if len(shape) != 2 or shape[axis] != rank:
            raise UserError(
                f"{path}: {parts[part].name} has shape {list(shape)}, but {module} has rank {rank}"
            )
    a, b = (finite(parts[part], np.float32).astype(np.float32).T for part in ("lora_A", "lora_B"))
    return Update(a, b, scale)


def _check_one_base(folders: Sequence[Folder]) -> None:
    """UserError where two adapters say that they are over different bases.

    Their manifests' digests of it say so, what it was quantized to, or its name: of an owner and a name, or of a path,
    the name counts.
    """
    first = folders[0]
    for other in folders[1:]:
        digests = [trained_over(folder.path) for folder in (first, other)]
        names = [str(f.options["base_model_name_or_path"] or "") for f in (first, other)]
        if all(digests):
            differ = digests[0] != digests[1]
        else:
            ends = {name.rstrip("/").rsplit("/", 1)[-1].casefold() for name in names if name}
            differ = len(ends) > 1
        if differ or read_quantization(first.path) != read_quantization(other.path):
            told = (
                f"{f.path} ({n or 'not named'})" for f, n in zip((first, other), names, strict=True)
            )
            raise UserError(f"adapters of different bases: {' and '.join(told)}")
        for option in ("fan_in_fan_out", "ensure_weight_tying"):
            if bool(first.options.get(option)) != bool(other.options.get(option)):
                raise UserError(f"{other.path}: {option} is not as in {first.path}")


def _write(
    output: Path, folders: Sequence[Folder], made: Mapping[str, Update], kind: np.dtype, what: str
) -> None:
    first = folders[0]
    options = _options(folders, made)
    tensors = dict[str, Lazy]()
    endings = {name: ends for folder in reversed(folders) for name, ends in folder.endings.items()}
    for module, one in made.items():
        for ending, array in zip(endings[module], (one.a.T, one.b.T), strict=True):
            make = functools.partial(np.asarray, array, kind)
            tensors[f"{PREFIX}{module}{ending}"] = Lazy(array.shape, kind, make)
    for name, stored in _carried(folders).items():
        tensors[name] = Lazy(stored.shape, stored.numpy, stored.read)
    said = card(options, what, read_quantization(first.path))
    write_adapter(output, options, tensors, said, trained_over(first.path))
    chats = {trained_on_chats(folder.path) for folder in folders}
    put(output, _companions(folders))
    if len(chats) == 1 and (how := chats.pop()) is not None:
        note(output, **{TRAINED_ON: "chats" if how else "texts"})


def _options(folders: Sequence[Folder], made: Mapping[str, Update]) -> dict[str, Any]:
    """adapter_config.json: the first adapter's, with the targets of all and the ranks that were made."""
    options = dict(folders[0].options)
    targets = [folder.options["target_modules"] for folder in folders]
    narrowed = ("exclude_modules", "layers_to_transform", "layers_pattern")
    wide = all(isinstance(one, list) for one in targets) and not any(
        folder.options[option] for folder in folders for option in narrowed
    )
    rank = max(one.rank for one in made.values())
    return {
        **options,
        **dict.fromkeys(narrowed),
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "target_modules": sorted({t for one in targets for t in one}) if wide else sorted(made),
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "init_lora_weights": True,
        "rank_pattern": {re.escape(n): one.rank for n, one in made.items() if one.rank != rank},
        "alpha_pattern": {re.escape(n): one.rank for n, one in made.items() if one.rank != rank},
    }


def _carried(folders: Sequence[Folder]) -> dict[str, Stored]:
    """The base's own weights that any of them stores; UserError where two differ."""
    found = dict[str, Stored]()
    for folder in folders:
        for name, stored in folder.carried.items():
            other = found.setdefault(name, stored)
            if other.shape != stored.shape or not np.array_equal(other.read(), stored.read()):
                raise UserError(
                    f"{folder.path}: {name}, the base's own, differs from {other.file.parent}'s: adapters of "
                    "different bases"
                )
    return found


def _companions(folders: Sequence[Folder]) -> dict[str, bytes | None]:
    """What stands beside the adapters (tokenizer, templates), where all that have a file have the same."""
    beside = [companions(folder.path) for folder in folders]
    same, apart = dict[str, bytes | None](), []
    for name in sorted({name for one in beside for name in one}):
        contents = {one[name] for one in beside if name in one}
        if len(contents) == 1:
            same[name] = contents.pop()
        else:
            apart.append(name)
    if apart:
        print(
            f"jaxft: left out, because the adapters have different ones: {', '.join(apart)}",
            file=sys.stderr,
        )
    return same
