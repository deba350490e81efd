"""Attention over sequences that are divided among devices: keys go round a ring (arXiv 2310.01889).

Each of C devices holds a C-th of every sequence. The sequence is cut into 2 C chunks, and for attention alone device c
takes chunks c and 2 C - 1 - c (the "zigzag" order of striped attention's followers): under a causal mask every device
then has the same work at every step of the ring, two products of chunk by chunk, where the natural order leaves half
of the devices idle. Queries stay; keys, values and what decides the mask travel, and in the backward pass the
gradients of keys and values with them. The result is exact: partial softmaxes are joined by their log-sum-exp.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxft.kernels.attention import FLOOR, MASKED, Branches, _capped, _delta, _grouped, _product
from jaxft.kernels.splash import FOREVER
from jaxft.mesh import ACTIVATION_SPECS, BATCH
from jaxft.tree import first_match

AXIS = "context"
BLOCK_ELEMENTS = 2**26  # of the scores that are computed at once on a device: 256 MiB in float32

Marks = Mapping[str, Int[Array, "batch length"]]


class _Chunk(NamedTuple):
    """One chunk's keys as they travel: key, value (batch, key_heads, length, head_dim), and what decides the mask."""

    key: Array
    value: Array
    marks: Marks


class _Partial(NamedTuple):
    """Attention over some of the keys: its output in float32, and the log-sum-exp of the scores (..., length, 1)."""

    output: Array
    log_sum_exp: Array


def ring_attention(
    query: Float[Array, "batch heads length head_dim"],
    key: Float[Array, "batch key_heads length head_dim"],
    value: Float[Array, "batch key_heads length head_dim"],
    query_segments: Int[Array, "batch length"],
    key_segments: Int[Array, "batch length"],
    *,
    window: int | Int[Array, ""] | None = None,
    softcap: float | None = None,
    scale: float,
    branches: Branches | None = None,
) -> Float[Array, "batch heads length head_dim"]:
    """`attention` on the mesh in force, whose axis `context` divides the length. The mask is the same.

    The length must divide into twice as many chunks as the axis has devices. What the backward pass keeps
    bears the names that `attention` gives.
    """
    index = jnp.arange(query_segments.shape[1], dtype=jnp.int32)[None, :]
    marks = {"segments": query_segments, "keys": key_segments}
    marks["index"] = jnp.broadcast_to(index, query_segments.shape)
    if branches is not None:
        marks |= branches._asdict()
    limit = jnp.asarray(FOREVER if window is None else window, jnp.int32)
    return _ring(query, key, value, marks, limit, softcap, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _ring(
    query: Array,
    key: Array,
    value: Array,
    marks: Marks,
    window: Array,
    softcap: float | None,
    scale: float,
) -> Array:
    return _forward(query, key, value, marks, window, softcap, scale)[0]


def _forward(
    query: Array,
    key: Array,
    value: Array,
    marks: Marks,
    window: Array,
    softcap: float | None,
    scale: float,
) -> tuple[Array, tuple[Any, ...]]:
    heads, rows = first_match(ACTIVATION_SPECS, "heads"), PartitionSpec(BATCH, AXIS)
    output, log_sum_exp = jax.shard_map(
        functools.partial(_forward_here, softcap=softcap, scale=scale),
        in_specs=(heads, heads, heads, rows, PartitionSpec()),
        out_specs=(heads, heads),
        check_vma=False,
    )(query, key, value, marks, window)
    output = checkpoint_name(output, "attention_output")
    log_sum_exp = checkpoint_name(log_sum_exp, "attention_log_sum_exp")
    return output, (query, key, value, marks, window, output, log_sum_exp)


def _backward(
    softcap: float | None, scale: float, residuals: tuple[Any, ...], cotangent: Array
) -> Any:
    heads, rows = first_match(ACTIVATION_SPECS, "heads"), PartitionSpec(BATCH, AXIS)
    local: Any = functools.partial(_backward_here, softcap=softcap, scale=scale)
    gradients = jax.shard_map(
        local,
        in_specs=(heads, heads, heads, rows, PartitionSpec(), heads, heads, heads),
        out_specs=(heads, heads, heads),
        check_vma=False,
    )(*residuals, cotangent)
    return (*gradients, None, None)


_ring.defvjp(_forward, _backward)


def _forward_here(
    query: Array,
    key: Array,
    value: Array,
    marks: Marks,
    window: Array,
    *,
    softcap: float | None,
    scale: float,
) -> tuple[Array, Array]:
    """One device's part: the output of its queries and their log-sum-exp, in the natural order."""
    index, size = jax.lax.axis_index(AXIS), jax.lax.axis_size(AXIS)
    queries, own = _stack(*_to_zigzag((_grouped(query, key), marks)))
    chunks = _stack(*_to_zigzag(_Chunk(key, value, marks)))

    def part(half: Any, chunk: _Chunk) -> _Partial:
        rows, ids = _pick((queries, own), half)
        return _attend(rows, ids, chunk, window, softcap, scale)

    def add(done: _Partial, half: Any, chunk: _Chunk) -> _Partial:
        joined = _join(_pick(done, half), part(half, chunk))
        return jax.tree.map(lambda all_, one: all_.at[half].set(one), done, joined)

    def step(carry: tuple[Any, ...], shift: Array) -> tuple[Any, None]:
        done, chunks = carry
        following = _shift(chunks, size)  # sent while this step computes
        side = jnp.where(shift <= index, 0, 1)  # whether these keys stand before ours or behind
        done = add(done, 1, _pick(chunks, 0))
        done = add(done, side, _pick(chunks, side))
        return (done, following), None

    following = _shift(chunks, size)
    first, last = part(0, _pick(chunks, 0)), part(1, _pick(chunks, 1))
    done = add(_stack(first, last), 1, _pick(chunks, 0))
    (done, _), _ = jax.lax.scan(step, (done, following), jnp.arange(1, size, dtype=jnp.int32))
    natural = _from_zigzag(_Partial(done.output.astype(query.dtype), done.log_sum_exp))
    return _ungrouped(natural.output), _ungrouped(natural.log_sum_exp)


def _backward_here(
    query: Array,
    key: Array,
    value: Array,
    marks: Marks,
    window: Array,
    output: Array,
    log_sum_exp: Array,
    cotangent: Array,
    *,
    softcap: float | None,
    scale: float,
) -> tuple[Array, Array, Array]:
    """The gradients of this device's queries, keys and values."""
    index, size = jax.lax.axis_index(AXIS), jax.lax.axis_size(AXIS)
    delta = _delta(output, cotangent)
    parts = [_grouped(x, key) for x in (query, cotangent, log_sum_exp, delta)]
    rows: Any = _stack(*_to_zigzag((parts, marks)))
    chunks = _stack(*_to_zigzag(_Chunk(key, value, marks)))
    zeros = functools.partial(jnp.zeros_like, dtype=jnp.float32)
    sums: tuple[Array, ...] = (zeros(rows[0][0]), zeros(chunks.key), zeros(chunks.value))

    def add(sums: tuple[Array, ...], chunks: _Chunk, half: Any, side: Any) -> tuple[Array, ...]:
        (own, ids), chunk = _pick(rows, half), _pick(chunks, side)
        query, key, value = _attend_backward(own, ids, chunk, window, softcap, scale)
        slots = (half, side, side)
        parts = zip(sums, slots, (query, key, value), strict=True)
        return tuple(total.at[index].add(part) for total, index, part in parts)

    def step(carry: tuple[Any, ...], shift: Array) -> tuple[Any, None]:
        (d_query, d_key, d_value), chunks = carry
        following = _shift(chunks, size)
        side = jnp.where(shift <= index, 0, 1)
        sums = add((d_query, d_key, d_value), chunks, 1, 0)
        d_query, *travelling = add(sums, chunks, side, side)
        return ((d_query, *_shift(travelling, size)), following), None

    following = _shift(chunks, size)
    for half, side in ((0, 0), (1, 0), (1, 1)):
        sums = add(sums, chunks, half, side)
    sums = (sums[0], *_shift(sums[1:], size))
    shifts = jnp.arange(1, size, dtype=jnp.int32)
    (sums, _), _ = jax.lax.scan(step, (sums, following), shifts)
    d_query, d_key, d_value = _from_zigzag(sums)
    d_query = _ungrouped(d_query).astype(query.dtype)
    return d_query, d_key.astype(key.dtype), d_value.astype(value.dtype)


def _attend(
    query: Array,
    marks: Marks,
    chunk: _Chunk,
    window: Array,
    softcap: float | None,
    scale: float,
) -> _Partial:
    """Attention of a chunk of queries over a chunk of keys, in blocks of queries."""

    def block(piece: tuple[Array, Marks]) -> _Partial:
        rows, ids = piece
        scores = _product("BKGTH,BKSH->BKGTS", rows, chunk.key) * scale
        scores = jnp.where(_seen(ids, chunk.marks, window), _capped(scores, softcap)[0], MASKED)
        highest = jnp.maximum(scores.max(axis=-1, keepdims=True), FLOOR)
        weights = jnp.exp(scores - highest)
        total = jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)
        output = _product("BKGTS,BKSH->BKGTH", weights.astype(chunk.value.dtype), chunk.value)
        return _Partial(output / total, highest + jnp.log(total))

    size = _block_length(query, chunk.key)
    pieces = (_blocks(query, size, -2), _blocks_of(marks, size))
    done = jax.lax.map(block, pieces)
    return _Partial(*(_unblocks(x, -2) for x in done))


def _attend_backward(
    parts: Sequence[Array],
    marks: Marks,
    chunk: _Chunk,
    window: Array,
    softcap: float | None,
    scale: float,
) -> tuple[Array, Array, Array]:
    """What a chunk of queries gives to its own gradient and to those of a chunk's keys and values, in float32.

    `parts` are the queries, the output's cotangent, the log-sum-exp, and the sums of output times cotangent.
    """

    def block(sums: tuple[Array, Array], piece: Any) -> tuple[Any, Array]:
        rows, d_rows, log_sum_exp, delta, ids = piece
        scores, tanh = _capped(_product("BKGTH,BKSH->BKGTS", rows, chunk.key) * scale, softcap)
        weights = jnp.exp(jnp.where(_seen(ids, chunk.marks, window), scores, MASKED) - log_sum_exp)
        d_weights = _product("BKGTH,BKSH->BKGTS", d_rows, chunk.value)
        d_scores = weights * (d_weights - delta) * scale
        d_scores = d_scores if tanh is None else d_scores * (1.0 - jnp.square(tanh))
        weights, d_scores = weights.astype(chunk.value.dtype), d_scores.astype(rows.dtype)
        d_key = sums[0] + _product("BKGTS,BKGTH->BKSH", d_scores, rows)
        d_value = sums[1] + _product("BKGTS,BKGTH->BKSH", weights, d_rows)
        return (d_key, d_value), _product("BKGTS,BKSH->BKGTH", d_scores, chunk.key)

    size = _block_length(parts[0], chunk.key)
    pieces = [_blocks(x, size, -2) for x in parts]
    zeros = (jnp.zeros(chunk.key.shape, jnp.float32), jnp.zeros(chunk.value.shape, jnp.float32))
    (d_key, d_value), d_query = jax.lax.scan(block, zeros, (*pieces, _blocks_of(marks, size)))
    return _unblocks(d_query, -2), d_key, d_value


def _seen(queries: Marks, keys: Marks, window: Array) -> Bool[Array, "batch 1 1 length key_length"]:
    """Which keys a query sees: `attention`'s mask, by what each token bears."""

    def distance(name: str) -> Array:
        return queries[name][:, :, None] - keys[name][:, None, :]

    segments = queries["segments"][:, :, None]
    seen = (segments == keys["keys"][:, None, :]) & (segments != 0) & (distance("index") >= 0)
    if "numbers" not in queries:
        return (seen & (distance("index") < window))[:, None, None]
    seen = seen & ((keys["numbers"][:, None, :] == 0) | (distance("numbers") == 0))
    return (seen & (distance("positions") < window))[:, None, None]


def _join(left: _Partial, right: _Partial) -> _Partial:
    """Attention over both sets of keys."""
    whole = jnp.logaddexp(left.log_sum_exp, right.log_sum_exp)
    output = sum(part.output * jnp.exp(part.log_sum_exp - whole) for part in (left, right))
    return _Partial(jnp.asarray(output), whole)


def _block_length(query: Array, key: Array) -> int:
    """Queries at once: the most that divide the chunk and keep their scores below BLOCK_ELEMENTS."""
    batch, key_heads, group, length, _ = query.shape
    most = max(1, BLOCK_ELEMENTS // (batch * key_heads * group * key.shape[-2]))
    return next(size for size in range(min(most, length), 0, -1) if length % size == 0)


def _blocks(x: Array, size: int, axis: int) -> Array:
    """The axis cut into blocks, which come first."""
    axis = axis % x.ndim
    cut = x.reshape(*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(cut, axis, 0)


def _blocks_of(marks: Marks, size: int) -> Marks:
    return {name: _blocks(ids, size, -1) for name, ids in marks.items()}


def _unblocks(x: Array, axis: int) -> Array:
    """The inverse of `_blocks`; the axis is that of the result."""
    back = jnp.moveaxis(x, 0, axis % (x.ndim - 1))
    axis = axis % (x.ndim - 1)
    return back.reshape(*back.shape[:axis], -1, *back.shape[axis + 2 :])


def _ungrouped(x: Array) -> Array:
    batch, key_heads, group, length, width = x.shape
    return x.reshape(batch, key_heads * group, length, width)


def _stack(*trees: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _pick(tree: Any, half: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[half], tree)


def _shift(tree: Any, size: int) -> Any:
    """Everything to the next device of the ring."""
    ring = [(index, (index + 1) % size) for index in range(size)]
    return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, AXIS, ring), tree)


def _routes(size: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(from, to) of the even and of the odd chunks: device d has 2 d and 2 d + 1, j goes to j or 2 C - 1 - j."""

    def home(chunk: int) -> int:
        return chunk if chunk < size else 2 * size - 1 - chunk

    return (
        [(index, home(2 * index)) for index in range(size)],
        [(index, home(2 * index + 1)) for index in range(size)],
    )


def _length_axis(leaf: Array) -> int:
    """(batch, length), or (..., length, width)."""
    return 1 if leaf.ndim == 2 else leaf.ndim - 2


def _to_zigzag(tree: Any) -> tuple[Any, Any]:
    """A device's lower and upper chunk, of arrays in the natural order."""
    size, index = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    to_even, to_odd = _routes(size)

    def move(leaf: Array) -> tuple[Array, Array]:
        first, second = jnp.split(leaf, 2, axis=_length_axis(leaf))
        even = jax.lax.ppermute(first, AXIS, to_even)
        odd = jax.lax.ppermute(second, AXIS, to_odd)
        is_even = index % 2 == 0
        return jnp.where(is_even, even, odd), jnp.where(is_even, odd, even)

    leaves, structure = jax.tree.flatten(tree)
    halves = list(zip(*map(move, leaves), strict=True))
    return jax.tree.unflatten(structure, halves[0]), jax.tree.unflatten(structure, halves[1])


def _from_zigzag(tree: Any) -> Any:
    """The natural order again, of arrays whose first axis tells the lower chunk from the upper."""
    size, index = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    back = [[(to, at) for at, to in route] for route in _routes(size)]

    def move(leaf: Array) -> Array:
        low, high = leaf[0], leaf[1]
        is_even = index % 2 == 0
        even = jax.lax.ppermute(jnp.where(is_even, low, high), AXIS, back[0])
        odd = jax.lax.ppermute(jnp.where(is_even, high, low), AXIS, back[1])
        return jnp.concatenate([even, odd], axis=_length_axis(low))

    return jax.tree.map(move, tree)
