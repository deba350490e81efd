"""The leaves that a PEFT adapter holds whole, put into the tree, which remembers them.

PEFT's `modules_to_save` and biases take the place of the base's leaves. Beside an adapted or resized embedding or
head it stores the base's own weight, which it copies over the base's when it reads: so it is here, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.errors import UserError
from jaxft.formats.adapter_config import is_saved
from jaxft.formats.naming import slices_in
from jaxft.formats.peft_contents import Contents, Place, is_tied
from jaxft.formats.safetensors import Stored, finite
from jaxft.models.families import Tensor
from jaxft.runtime.processes import to_host
from jaxft.tree import PyTree, flatten_with_paths, map_with_paths
from jaxft.vocabulary import EMBEDDING, HEAD, with_room
from jaxft.weights import Saved, bind, is_weight, materialize, places, remember, saved_in

ROUNDING = 2.0**-7  # of bfloat16, the coarsest that files have
BLOCK = 4096  # rows that are compared at once
Values = dict[str, dict[int | None, np.ndarray]]


def with_whole(
    params: PyTree, contents: Contents, options: Mapping[str, Any], table: Mapping[str, Tensor]
) -> PyTree:
    """The tree with the leaves that the adapter holds whole, and a record of them."""
    leaves = dict(flatten_with_paths(params, is_leaf=is_weight))
    own = _base_values(contents, leaves, table, is_tied(params))
    params = _put(params, {path: _filled(leaves[path], x, params) for path, x in own.items()})
    dense: Values = {}
    kinds: dict[str, Any] = {}
    for (path, layer), stored in dense_in(contents, params).items():
        kinds[path] = _common(kinds.get(path, leaves[path].dtype), stored)
        array = finite(_fitting(stored, leaves[path], path, table, layer), kinds[path])
        dense.setdefault(path, {})[layer] = array.T if table[path].transposed else array
    made = {path: _filled(leaves[path], x, params, kinds[path]) for path, x in dense.items()}
    if EMBEDDING in made and HEAD not in dict.fromkeys(path for path, _ in contents.dense):
        head = bind(params["head"]["kernel"], params)  # which goes on as the embedding was
        made |= {HEAD: materialize(head)} if is_tied(params) else {}
    params = remember(_put(params, made), _record(contents, options, table, params))
    if {EMBEDDING, HEAD} & {*own, *made}:
        params = with_room(
            params, 0
        )  # a head that the file leaves out is resized as the embedding was
        _check_sizes(params, contents)
    return params


def _check_sizes(params: PyTree, contents: Contents) -> None:
    """UserError where embedding and head of a resized vocabulary do not have the same tokens."""
    leaves = dict(flatten_with_paths(params, is_leaf=is_weight))
    rows, columns = leaves[EMBEDDING].shape[0], leaves[HEAD].shape[-1] if HEAD in leaves else None
    if columns is not None and columns != rows:
        file = next(iter((contents.carried | contents.dense).values())).file
        raise UserError(
            f"{file}: its embedding has rows for {rows} tokens, and its head for {columns}"
        )


def dense_in(contents: Contents, params: PyTree) -> dict[Place, Stored]:
    """What the adapter holds whole; the head only where it is no longer the embedding."""
    found = dict(contents.dense)
    pair = [found.get((path, None)) for path in (EMBEDDING, HEAD)]
    if pair[0] and pair[1] and is_tied(params) and np.array_equal(pair[0].read(), pair[1].read()):
        del found[HEAD, None]
    return found


def _put(params: PyTree, made: Mapping[str, jax.Array]) -> PyTree:
    return map_with_paths(lambda path, leaf: made.get(path, leaf), params, is_leaf=is_weight)


def _record(
    contents: Contents, options: Mapping[str, Any], table: Mapping[str, Tensor], params: PyTree
) -> Saved:
    leaves = dict(flatten_with_paths(params, is_leaf=is_weight))
    sizes = {path: leaf.shape[0] for path, leaf in leaves.items()}
    dense = list(dense_in(contents, params))
    slices = slices_in(table, params)
    whole = [
        (path, layer)
        for path, layer in dense
        if not path.endswith("/bias")
        or is_saved(options, next(module for module, place in slices(path) if place == layer))
    ]
    bias = options["bias"] if options["bias"] in ("none", "all") else "only"
    return dataclasses.replace(
        saved_in(params),
        whole=places(whole, sizes),
        beside=places(contents.carried, sizes),
        bias=bias,
        projection_seed=options.get("projection_prng_key", 0),
    )


def _base_values(
    contents: Contents, leaves: Mapping[str, Any], table: Mapping[str, Tensor], tied: bool
) -> Values:
    """The base's own weights in the file, where the file's differ from the base's."""
    values: Values = {}
    seen: dict[Place, Stored] = {}
    for (path, layer), stored in contents.carried.items():
        path = EMBEDDING if tied and path == HEAD else path  # one weight by two names
        leaf, other = leaves[path], seen.setdefault((path, layer), stored)
        if is_weight(leaf):
            raise UserError(
                f"{stored.file}: {stored.name} is dense, and the base's kernel is quantized: give the dense base"
            )
        value = finite(_fitting(stored, leaf, path, table, layer), leaf.dtype)
        if other is not stored and not np.array_equal(other.read(), value):
            raise UserError(
                f"{stored.file}: {stored.name} differs from {other.name}, and the base ties the two"
            )
        same, near = _compared(value, leaf if layer is None else leaf[layer], table[path])
        if tied and path == EMBEDDING and not near:
            raise UserError(
                f"{stored.file}: {stored.name} is not this base's: the adapter is another's"
            )
        if not same:
            values.setdefault(path, {})[layer] = value.T if table[path].transposed else value
    return values


def _compared(value: np.ndarray, leaf: Any, tensor: Tensor) -> tuple[bool, bool]:
    """Whether a stored weight is the base's, and whether most of its rows are, up to rounding.

    A base whose vocabulary was enlarged has the old rows and new ones of its own. Of shapes alone nothing is known.
    """
    if isinstance(leaf, jax.core.Tracer):
        return True, True
    base = to_host(leaf).T if tensor.transposed else to_host(leaf)
    same, near = value.shape == base.shape, 0
    rows = min(
        len(value), len(base)
    )  # an old row has its place also where there are more or fewer of them
    value, base = value[:rows], base[:rows]
    for start in range(0, len(value), BLOCK):
        mine, theirs = value[start : start + BLOCK], base[start : start + BLOCK]
        same = same and np.array_equal(mine.astype(base.dtype), theirs)
        mine, theirs = mine.astype(np.float32), theirs.astype(np.float32)
        close = np.isclose(mine, theirs, rtol=ROUNDING, atol=1e-6)
        near += int(close.reshape(len(close), -1).all(axis=1).sum())
    return same, 2 * near >= rows


def _common(dtype: Any, stored: Stored) -> Any:
    """The dtype that holds the base's numbers and the file's: theirs where it is one, else float32."""
    return jnp.dtype(dtype) if jnp.dtype(dtype) == stored.numpy else jnp.dtype("float32")


def _fitting(
    stored: Stored, leaf: Any, path: str, table: Mapping[str, Tensor], layer: int | None
) -> Stored:
    """The tensor; UserError where its shape is not that of the base's leaf."""
    shape = tuple(leaf.shape if layer is None else leaf.shape[1:])
    wanted = shape[::-1] if table[path].transposed else shape
    resized = path in (EMBEDDING, HEAD) and stored.shape[1:] == wanted[1:] and stored.shape[0] > 0
    if stored.shape != wanted and not resized:
        raise UserError(
            f"{stored.file}: {stored.name} has shape {list(stored.shape)}, the base {list(wanted)}"
        )
    return stored


def _filled(
    leaf: Any, values: Mapping[int | None, np.ndarray], params: PyTree, dtype: Any = None
) -> jax.Array:
    """A leaf in which these layers, or all of it, are exchanged."""
    dtype = dtype or leaf.dtype
    layers = sorted(layer for layer in values if layer is not None)
    if not layers:
        return jnp.array(values[None], dtype)
    stacked = np.stack([values[layer] for layer in layers]).astype(dtype, copy=False)
    if len(layers) == leaf.shape[0]:
        return jnp.array(stacked)
    base = materialize(bind(leaf, params)).astype(dtype)
    return base.at[jnp.array(layers)].set(jnp.array(stacked))
