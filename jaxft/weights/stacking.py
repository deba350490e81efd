"""Adapted trees over one base put side by side as a bank, and one of them exchanged."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.errors import UserError
from jaxft.tree import flatten_with_paths, in_layers, map_with_paths
from jaxft.weights.bank import SLOTS, Bank, Slots
from jaxft.weights.base import bind, is_adapter, is_weight, replace
from jaxft.weights.dora import DoRA
from jaxft.weights.lora import LoRA
from jaxft.weights.saved import SHARED
from jaxft.weights.vera import VeRA

Parts = dict[str, jax.Array]
ROOM = {"a_rows": (-2, -1), "b": (-2, -1), "d": (-1,), "g": (-1,), "ratio": (-1,), "scale": ()}
"""The axes of an adapter's own parts, that of the layers left out."""


def stacked(
    params: Mapping[str, Any],
    adapted: Mapping[str, Mapping[str, Any]],
    *,
    slots: int = 0,
    rank: int = 0,
    paths: Iterable[str] = (),
    ratios: bool = False,
    dtype: Any = jnp.float32,
) -> dict[str, Any]:
    """The tree of the base with a `Bank` at each kernel that an adapter targets; what `stack_adapters` gives.

    Args:
        params: the base's tree.
        adapted: {name: the same tree with adapters}.
        slots: how many indices the bank has, at least one for each name.
        rank: the least rank of its arrays.
        paths: kernels that have room even if no adapter targets them.
        ratios: whether there is room for DoRA even if there is none.
        dtype: of the bank's arrays.

    Raises:
        UserError: a tree with another base, with leaves of its own besides adapters, or with adapters that a bank does
            not hold.
    """
    slots = max(slots, len(adapted))
    members = {name: members_of(params, tree, name) for name, tree in adapted.items()}
    shared, ends = _projections(adapted, members, dtype)
    leaves = dict(flatten_with_paths(params, is_leaf=is_weight))
    found: dict[str, dict[int, Parts]] = {path: {} for path in paths}
    for index, (name, tree) in enumerate(adapted.items()):
        for path, weight in members[name].items():
            parts = parts_of(weight, tree, ends[name], shared)
            found.setdefault(path, {})[index] = parts
    tied = _tied(members)
    banks = {
        path: _bank(path, leaves[path], parts, slots, rank, ratios, tied.get(path, False), dtype)
        for path, parts in found.items()
    }
    tree = map_with_paths(lambda path, leaf: banks.get(path, leaf), params, is_leaf=is_weight)
    names = (*adapted, *[None] * (slots - len(adapted)))
    record = Slots(names, tuple(dict.fromkeys(end for end in ends.values() if end[1])))
    return tree | ({"vera": shared} if shared else {}) | {SLOTS: record}


def members_of(
    params: Mapping[str, Any], tree: Mapping[str, Any], name: str
) -> dict[str, LoRA | VeRA]:
    """{path: adapter} of a tree over the base `params`. Raises UserError as `stacked` does."""
    base = _leaves(params)
    found, own = {}, _leaves(tree)
    for path in [*base, *own]:
        if path not in own or path not in base:
            where = "lacks" if path in base else "has"
            raise UserError(f"adapter {name!r}: its tree {where} {path}: it is of another base")
        leaf = own[path]
        if not is_adapter(leaf):
            if not _same(leaf, base[path]):
                raise UserError(
                    f"adapter {name!r} has a {path} of its own (saved whole, or of another base): a bank holds "
                    "adapters alone: jaxft.merge makes a model of it"
                )
            continue
        if not isinstance(leaf, (LoRA, VeRA)) or is_adapter(leaf.base):
            kind = f"{type(leaf).__name__} over {type(leaf.base).__name__}"
            raise UserError(f"adapter {name!r}: {path} is {kind}, which a bank does not hold")
        if not _same(leaf.base, base[path]):
            raise UserError(f"adapter {name!r}: {path} is over another base")
        found[path] = leaf
    return found


def parts_of(
    weight: LoRA | VeRA, tree: Mapping[str, Any], ends: tuple[int, int], shared: Mapping[str, Any]
) -> Parts:
    """An adapter's parts as a bank has them, of their true sizes; VeRA's d among the columns of all projections."""
    if isinstance(weight, VeRA):
        columns = shared["a"].shape[-1]
        before = [(0, 0)] * (weight.d.ndim - 1)
        d = jnp.pad(weight.d, [*before, (ends[0], columns - ends[0] - weight.d.shape[-1])])
        return {"d": d, "g": weight.g}
    plain = weight.as_lora()
    parts = {"a_rows": jnp.swapaxes(plain.a, -1, -2), "b": plain.b, "scale": plain.scale}
    if isinstance(weight, DoRA):
        bound = bind(weight, tree)
        # Layer by layer: a quantized base must not stand dense as a whole.
        ratio = jax.lax.map(DoRA.ratio, bound) if weight.b.ndim == 3 else bound.ratio()
        parts["ratio"] = ratio
    return parts


def written(
    bank: Mapping[str, Any], index: int, tree: Mapping[str, Any] | None, name: str | None
) -> dict[str, Any]:
    """The bank with another adapter at an index, or with none where `tree` is None. Nothing is compiled twice.

    Raises:
        UserError: an adapter for which the bank has no room: the path and what it lacks.
    """
    record: Slots = bank[SLOTS]
    own: dict[str, Parts] = {}
    if tree is not None:
        assert name is not None
        own = _parts_that_fit(bank, tree, name)

    def one(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, Bank):
            return leaf
        lead = leaf.scale.shape[:-1]
        values = {
            part: _fitted(own.get(path, {}).get(part), part, getattr(leaf, part), lead)
            for part in ROOM
            if getattr(leaf, part) is not None
        }
        parts = {part: getattr(leaf, part) for part in values}
        return replace(leaf, **_exchanged(parts, values, jnp.int32(index), len(lead)))

    exchanged = map_with_paths(one, dict(bank), is_leaf=is_weight)
    names = (*record.names[:index], name, *record.names[index + 1 :])
    return exchanged | {SLOTS: Slots(names, record.projections)}


def _parts_that_fit(
    bank: Mapping[str, Any], tree: Mapping[str, Any], name: str
) -> dict[str, Parts]:
    """{path: parts} of an adapter for which the bank has room."""
    base = map_with_paths(
        lambda _, leaf: leaf.base if isinstance(leaf, Bank) else leaf, bank, is_leaf=is_weight
    )
    banks = {path: leaf for path, leaf in _leaves(bank).items() if isinstance(leaf, Bank)}
    members = members_of(base, tree, name)
    shared, ends = bank.get("vera", {}), (0, 0)
    if any(isinstance(weight, VeRA) for weight in members.values()):
        ends = _known_projections(bank, tree["vera"], name)
    own = {}
    for path, weight in members.items():
        if path not in banks:
            raise UserError(f"adapter {name!r}: the bank has no room at {path}: stack it anew")
        own[path] = parts_of(weight, tree, ends, shared)
        _require_room(banks[path], own[path], f"adapter {name!r}: {path}")
        if getattr(weight, "tie_adapters", False) != banks[path].tie_adapters:
            raise UserError(f"adapter {name!r}: {path} differs from the bank's in tie_adapters")
    return own


def _require_room(bank: Bank, parts: Parts, where: str) -> None:
    for part, value in parts.items():
        room = getattr(bank, part)
        if room is None:
            name = part.removesuffix("_rows")
            raise UserError(f"{where}: the bank has no room for its {name}: stack it anew")
        if part == "b" and value.shape[-2] > room.shape[-2]:
            raise UserError(
                f"{where} has rank {value.shape[-2]}, and the bank's is {room.shape[-2]}: stack it anew"
            )


def _known_projections(
    bank: Mapping[str, Any], own: Mapping[str, Any], name: str
) -> tuple[int, int]:
    """Where VeRA's projections stand among those of the bank. Raises UserError where they do not."""
    for start, end in bank[SLOTS].projections:
        (rows, rank), columns = own["a"].shape, own["b"].shape[-1]
        a, b = bank["vera"]["a"][:rows, start:end], bank["vera"]["b"][start:end, :columns]
        if rank == end - start and _same({"a": a, "b": b}, dict(own)):
            return start, end
    raise UserError(f"adapter {name!r}: its VeRA projections are not in the bank: stack it anew")


def _leaves(params: Mapping[str, Any]) -> dict[str, Any]:
    """{path: leaf} of the model's own weights and arrays."""
    found = flatten_with_paths(params, is_leaf=is_weight)
    return {path: leaf for path, leaf in found if path.split("/")[0] not in SHARED}


def _same(left: Any, right: Any) -> bool:
    """Whether two leaves are one, or hold the same numbers."""
    if left is right:
        return True
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=False)
    return _kind(left) == _kind(right) and all(
        one is other or np.array_equal(one, other) for one, other in pairs
    )


def _kind(leaf: Any) -> tuple[Any, list[Any]]:
    shapes = [(part.shape, part.dtype) for part in jax.tree.leaves(leaf)]
    return jax.tree.structure(leaf), shapes


def _tied(members: Mapping[str, Mapping[str, Any]]) -> dict[str, bool]:
    """{path: tie_adapters}. Raises UserError where adapters of one embedding differ in it."""
    found: dict[str, tuple[bool, str]] = {}
    for name, weights in members.items():
        for path, weight in weights.items():
            own = getattr(weight, "tie_adapters", False)
            first = found.setdefault(path, (own, name))
            if first[0] != own:
                raise UserError(
                    f"adapters {first[1]!r} and {name!r} differ in tie_adapters at {path}: one bank cannot hold both"
                )
    return {path: own for path, (own, _) in found.items()}


def _projections(
    adapted: Mapping[str, Mapping[str, Any]], members: Mapping[str, Mapping[str, Any]], dtype: Any
) -> tuple[dict[str, jax.Array], dict[str, tuple[int, int]]]:
    """All pairs of VeRA's projections beside one another, each once, and (start, end) of each adapter's own."""
    pairs: list[Mapping[str, Any]] = []
    ends: dict[str, tuple[int, int]] = {}
    for name, tree in adapted.items():
        ends[name] = (0, 0)
        if not any(isinstance(weight, VeRA) for weight in members[name].values()):
            continue
        own = {part: tree["vera"][part].astype(dtype) for part in ("a", "b")}
        known = next((place for place, pair in enumerate(pairs) if _same(pair, own)), len(pairs))
        pairs += [own] if known == len(pairs) else []
        start = sum(pair["a"].shape[-1] for pair in pairs[:known])
        ends[name] = (start, start + own["a"].shape[-1])
    if not pairs:
        return {}, ends
    rows = max(pair["a"].shape[0] for pair in pairs)
    columns = max(pair["b"].shape[-1] for pair in pairs)
    a = [jnp.pad(pair["a"], ((0, rows - len(pair["a"])), (0, 0))) for pair in pairs]
    b = [jnp.pad(pair["b"], ((0, 0), (0, columns - pair["b"].shape[-1]))) for pair in pairs]
    return {"a": jnp.concatenate(a, axis=-1), "b": jnp.concatenate(b, axis=0)}, ends


def _bank(
    path: str,
    base: Any,
    members: Mapping[int, Parts],
    slots: int,
    rank: int,
    ratios: bool,
    tie_adapters: bool,
    dtype: Any,
) -> Bank:
    """The bank of a kernel: the members' parts behind one another, each padded to the largest."""
    shape = tuple(base.shape)
    in_stack = in_layers(path) and len(shape) == 3
    if len(shape) != 2 + in_stack:
        raise UserError(f"{path} {shape} is no matrix (in, out): a bank does not hold its adapters")
    lead, (rows, columns) = shape[:-2], shape[-2:]
    ranks = [parts["b"].shape[-2] for parts in members.values() if "b" in parts]
    names = {part for parts in members.values() for part in parts} | {"scale"}
    names |= {"a_rows", "b"} if rank or not names & {"b", "d"} else set()
    names |= {"ratio"} if ratios else set()
    largest = max([rank, *ranks, 1])
    sizes = [parts["d"].shape[-1] for parts in members.values() if "d" in parts]
    room = {"scale": (), "a_rows": (largest, rows), "b": (largest, columns), "ratio": (columns,)}
    room |= {"d": (max(sizes, default=0),), "g": (columns,)}

    def whole(part: str) -> jax.Array:
        kind = jnp.float32 if part in ("scale", "ratio") else dtype
        like = jax.ShapeDtypeStruct((*lead, slots, *room[part]), kind)
        each = [_fitted(members.get(k, {}).get(part), part, like, lead) for k in range(slots)]
        return jnp.stack(each, axis=len(lead))

    parts = {part: whole(part) for part in sorted(names)}
    return Bank(base, **parts, tie_adapters=tie_adapters)


def _fitted(value: jax.Array | None, part: str, whole: Any, lead: Sequence[int]) -> jax.Array:
    """One adapter's part, padded to the bank's; where it has none, what changes nothing."""
    shape = (*lead, *whole.shape[len(lead) + 1 :])
    if value is None:
        return jnp.full(shape, 1.0 if part == "ratio" else 0.0, whole.dtype)
    value = value.astype(whole.dtype)
    more = [(0, size - own) for size, own in zip(shape, value.shape, strict=True)]
    return value if value.shape == shape else jnp.pad(value, more)


@functools.partial(jax.jit, static_argnames="axis")
def _exchanged(parts: Parts, values: Parts, index: jax.Array, axis: int) -> Parts:
    """The parts with the values at an index of an axis."""
    return {
        name: jax.lax.dynamic_update_index_in_dim(part, values[name], index, axis)
        for name, part in parts.items()
    }
