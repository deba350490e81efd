"""PEFT adapters (https://github.com/huggingface/peft), read into a parameter tree.

The tensors say which layers are adapted: ranks that differ from layer to layer are padded to the
largest, and a layer without an adapter has rank 0 and the factor 0. `peft_writing` writes them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.errors import UserError
from jaxft.formats.adapter_config import ranks_and_scales
from jaxft.formats.peft_contents import Contents, check_whole, read_contents
from jaxft.formats.peft_whole import dense_in, with_whole
from jaxft.formats.peft_writing import check_exportable, save_adapter
from jaxft.formats.safetensors import Stored
from jaxft.methods import known_dtype
from jaxft.runtime.storage import fetched
from jaxft.tree import PyTree, flatten_with_paths, map_with_paths
from jaxft.vocabulary import EMBEDDING, training_tokens, with_room
from jaxft.weights import DoRA, LoRA, Site, VeRA, Weight, is_adapter, is_weight, projections

__all__ = ["check_exportable", "load_adapter", "save_adapter", "saved_leaves"]


def load_adapter(
    params: PyTree,
    folder: str | Path,
    *,
    names: Mapping[str, str] | None = None,
    dtype: str = "float32",
) -> PyTree:
    """Puts a PEFT adapter in the places of the kernels it adapts: LoRA, rsLoRA, DoRA or VeRA.

    Modules saved whole (`modules_to_save`, biases) take the place of the base's leaves, as does the base's own
    embedding where PEFT stored it; a tied head becomes an array of its own where the adapter holds a head or an
    embedding that PEFT unties. Returns the new tree, which remembers them: `save_adapter` writes them back.

    Args:
        params: the base's tree, without adapters.
        folder: holds adapter_config.json and adapter_model.safetensors; may be a URL (gs://, s3://).
        names: {path: module name with {layer}}; by default those of the family whose tree it is.
        dtype: that of the adapter's arrays.

    Raises:
        UserError: a damaged folder (also by its manifest), an unknown kind or option, a tensor too many, missing, or
            of a shape that does not fit the base, or one that holds NaN or infinite numbers.
    """
    folder = fetched(folder)
    for path, leaf in flatten_with_paths(params, is_leaf=is_weight):
        if is_adapter(leaf):
            raise UserError(f"load_adapter: {path} is adapted already: call jaxft.merge first")
    options, contents, table, modules = read_contents(params, folder, names)
    contents.dtype = known_dtype(dtype, "load_adapter")
    check_whole(contents, options, modules, folder)
    params = with_whole(params, contents, options, table)
    if contents.tokens:
        params = with_room(params, 1 + max(map(max, contents.tokens.values())))
    leaves = dict(flatten_with_paths(params, is_leaf=is_weight))
    places: dict[str, dict[int, str]] = {}
    for module in contents.parts:
        path, layer = modules[module]
        places.setdefault(path, {})[layer or 0] = module
    read = _vera if options["peft_type"] == "VERA" else _lora
    made, shared = read(options, contents, places, leaves, folder)
    tree = map_with_paths(lambda path, leaf: made.get(path, leaf), params, is_leaf=is_weight)
    return _with_tokens(tree, contents) | shared


def saved_leaves(
    params: PyTree, folder: str | Path, *, names: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """Paths of the leaves that an adapter holds whole: what `save_adapter` takes as `trained`.

    Args:
        params: the base's tree, with or without the adapter.
        folder: the adapter's.
        names: as of `load_adapter`.
    """
    _, contents, _, _ = read_contents(params, fetched(folder), names)
    return tuple(dict.fromkeys(path for path, _ in dense_in(contents, params)))


def _with_tokens(params: PyTree, contents: Contents) -> PyTree:
    """The tree with the rows of tokens that the file holds."""
    leaves, rows = dict(flatten_with_paths(params, is_leaf=is_weight)), {}
    for path, stored in contents.rows.items():
        hidden = leaves[path].shape[1 if path == EMBEDDING else 0]
        if stored.shape[1:] != (hidden,):
            raise UserError(
                f"{stored.file}: {stored.name} has shape {list(stored.shape)}, the base's rows have {hidden} numbers"
            )
        rows[path] = contents.read(stored)
    return (
        training_tokens(params, contents.tokens, rows=rows, dtype=contents.dtype)
        if rows
        else params
    )


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
    contents: Contents,
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
                values[part][layer] = contents.read(stored).T
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
    contents: Contents,
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
            d[layer], g[layer] = (contents.read(parts[f"vera_lambda_{x}"]) for x in "db")
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
    options: Mapping[str, Any], contents: Contents, sites: list[Site], folder: Path
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
        read[part.lower()] = jnp.array(contents.read(stored).T.astype(contents.dtype))
    return {"vera": read}
