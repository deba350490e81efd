"""Causal attention with grouped query heads, packed segments, a sliding window and a soft cap.

`attention_reference` is the plain definition and serves decoding; `attention` is the same for
training: it walks over blocks of queries, never computes the scores above the diagonal of blocks,
and keeps the output and the log-sum-exp instead of the probabilities (FlashAttention 2, arXiv
2307.08691). On a TPU the library's kernel does the same (`splash.py`), for the masks and shapes
that it takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxft.kernels import splash
from jaxft.kernels.heads import joined_heads, split_heads
from jaxft.kernels.platform import by_platform

MASKED = -1e30  # the score of a key that is not seen: finite, so that no row gives NaN
FLOOR = -1e20  # the least maximum of a row: a row that sees nothing then has probabilities 0
MOST_BLOCKS = 8  # the loop over blocks is unrolled: this bounds the time to compile
LEAST_BLOCK = 128


class Branches(NamedTuple):
    """Continuations that stand one after the other in a segment behind the beginning that they share.

    Attributes:
        numbers: (batch, length) int32: 0 is the shared beginning, which all see; a token of another branch
            is seen by that branch alone.
        positions: (batch, length) int32 of each token in the sequence that it continues. In a segment with
            branches a window counts these, because other branches may lie between.
    """

    numbers: Int[Array, "batch length"]
    positions: Int[Array, "batch length"]


def attention_reference(
    query: Float[Array, "batch heads length head_dim"],
    key: Float[Array, "batch key_heads key_length head_dim"],
    value: Float[Array, "batch key_heads key_length head_dim"],
    query_segments: Int[Array, "batch length"],
    key_segments: Int[Array, "batch key_length"],
    *,
    offset: int | Int[Array, ""] | Int[Array, " batch"] = 0,
    window: int | Int[Array, ""] | None = None,
    softcap: float | None = None,
    scale: float,
    branches: Branches | None = None,
) -> Float[Array, "batch heads length head_dim"]:
    """softmax(scale q k^T, masked) v, the whole score matrix at once.

    Query i stands at index `offset + i` among the keys and sees key j if j <= index,
    index - j < `window`, and their segments are equal and not 0. A query that sees nothing gets 0.
    With `branches` (as many queries as keys) it must also be in the key's branch, or the key in
    branch 0, and the window counts positions.
    `softcap` bounds the scores before the mask: softcap tanh(score / softcap) (gemma 2).
    The softmax is computed in float32; the result has the dtype of `query`.
    """
    scores = jnp.einsum(
        "BKGTH,BKSH->BKGTS", _grouped(query, key), key, preferred_element_type=jnp.float32
    )
    scores = _capped(scores * scale, softcap)[0]
    first = jnp.broadcast_to(jnp.asarray(offset, jnp.int32), query_segments.shape[:1])
    index = first[:, None] + jnp.arange(query.shape[2], dtype=jnp.int32)[None, :]
    seen = _seen(index, query_segments, key_segments, window, branches, branches)
    scores = jnp.where(seen[:, None, None], scores, MASKED)
    highest = jnp.maximum(scores.max(axis=-1, keepdims=True), FLOOR)
    weights = jnp.exp(scores - jax.lax.stop_gradient(highest))
    weights = weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)
    output = jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(value.dtype), value)
    return output.reshape(query.shape).astype(query.dtype)


def attention(
    query: Float[Array, "batch heads length head_dim"],
    *others: Any,
    **settings: Any,
) -> Float[Array, "batch heads length head_dim"]:
    """`joined_attention`, by heads: `attention_reference` for as many queries as keys."""
    return split_heads(joined_attention(query, *others, **settings), query.shape[1])


def joined_attention(
    query: Float[Array, "batch heads length head_dim"],
    key: Float[Array, "batch key_heads length head_dim"],
    value: Float[Array, "batch key_heads length head_dim"],
    query_segments: Int[Array, "batch length"],
    key_segments: Int[Array, "batch length"],
    *,
    window: int | Int[Array, ""] | None = None,
    windows: tuple[int, ...] = (),
    softcap: float | None = None,
    scale: float,
    branches: Branches | None = None,
) -> Float[Array, "batch length width"]:
    """`attention_reference` for as many queries as keys, lean in the backward pass; heads concatenated.

    The backward pass keeps the arguments, the output as it is returned and the log-sum-exp of each row of scores; the
    last two bear the names "attention_output" and "attention_log_sum_exp" for a policy of
    `jax.checkpoint`. Products accumulate in float32, whatever the dtype of the inputs.

    `windows` are the values that a traced `window` may have: a TPU's kernel is made for each, and
    without them there is none.
    """
    if isinstance(window, int):
        windows = (window,)
    known = window is None or bool(windows)
    if window is not None:
        window = jnp.asarray(window, jnp.int32)
    masks = _Masks(query_segments, key_segments, window, branches)
    by_kernel = known and branches is None and query_segments is key_segments
    by_kernel = by_kernel and splash.fits(query, key)
    return _attention(query, key, value, masks, windows if by_kernel else None, softcap, scale)


class _Masks(NamedTuple):
    """What decides which keys are seen."""

    query_segments: Array
    key_segments: Array
    window: Array | None
    branches: Branches | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attention(
    query: Array,
    key: Array,
    value: Array,
    masks: _Masks,
    windows: tuple[int, ...] | None,
    softcap: float | None,
    scale: float,
) -> Array:
    return _forward(query, key, value, masks, windows, softcap, scale)[0]


def _forward(
    query: Array,
    key: Array,
    value: Array,
    masks: _Masks,
    windows: tuple[int, ...] | None,
    softcap: float | None,
    scale: float,
) -> tuple[Array, tuple[Any, ...]]:
    """The output, and what the backward pass needs. A kernel takes part where `windows` is not None."""
    run = _by_platform(_forward_by_blocks, splash.forward, windows, softcap, scale)
    output, log_sum_exp = run(query, key, value, masks)
    output = checkpoint_name(joined_heads(output), "attention_output")
    log_sum_exp = checkpoint_name(log_sum_exp, "attention_log_sum_exp")
    return output, (query, key, value, masks, output, log_sum_exp)


def _backward(
    windows: tuple[int, ...] | None,
    softcap: float | None,
    scale: float,
    residuals: tuple[Any, ...],
    cotangent: Array,
) -> Any:
    run = _by_platform(_backward_by_blocks, splash.backward, windows, softcap, scale)
    return *run(*residuals, cotangent), None


def _by_platform(
    by_blocks: Callable[..., Any],
    by_kernel: Callable[..., Any],
    windows: tuple[int, ...] | None,
    softcap: float | None,
    scale: float,
) -> Callable[..., Any]:
    """(query, key, value, masks, ...) -> what `by_blocks` gives; for TPUs by the kernel, unless `windows` is None."""
    options = {"softcap": softcap, "scale": scale}
    plain = functools.partial(by_blocks, **options)
    if windows is None:
        return plain

    def kernel(query: Array, key: Array, value: Array, masks: _Masks, *rest: Array) -> Any:
        where = (masks.query_segments, masks.window)
        return by_kernel(query, key, value, *where, *rest, windows=windows, **options)

    return functools.partial(by_platform, tpu=kernel, default=plain)


_attention.defvjp(_forward, _backward)


def _forward_by_blocks(
    query: Array, key: Array, value: Array, masks: _Masks, *, softcap: float | None, scale: float
) -> tuple[Array, Array]:
    """The output, and the log-sum-exp (batch, heads, length, 1) of each row of scores."""
    outputs, sums = [], []
    grouped = _grouped(query, key)
    for start, stop in _blocks(query.shape[2]):
        rows = _rows(grouped, start, stop)
        seen = _block_mask(masks, start, stop, grouped.shape[2])
        scores = _product("BKTH,BKSH->BKTS", rows, key[:, :, :stop]) * scale
        scores = _masked(_capped(scores, softcap)[0], seen)
        highest = jnp.maximum(scores.max(axis=-1, keepdims=True), FLOOR)
        weights = jnp.exp(scores - highest)
        total = jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)
        output = _product("BKTS,BKSH->BKTH", weights.astype(value.dtype), value[:, :, :stop])
        outputs.append(_unrows(output / total, stop - start).astype(query.dtype))
        sums.append(_unrows(highest + jnp.log(total), stop - start))
    output = jnp.concatenate(outputs, axis=3).reshape(query.shape)
    return output, jnp.concatenate(sums, axis=3).reshape(*query.shape[:3], 1)


def _backward_by_blocks(
    query: Array,
    key: Array,
    value: Array,
    masks: _Masks,
    output: Array,
    log_sum_exp: Array,
    cotangent: Array,
    *,
    softcap: float | None,
    scale: float,
) -> tuple[Array, Array, Array]:
    """The gradients: the probabilities of each block again, from its scores and the log-sum-exp."""
    output, cotangent = (split_heads(x, query.shape[1]) for x in (output, cotangent))
    delta = _delta(output, cotangent)
    grouped, cotangent = _grouped(query, key), _grouped(cotangent, key)
    delta, log_sum_exp = _grouped(delta, key), _grouped(log_sum_exp, key)
    d_queries = []
    # (head_dim, length): these products would else transpose the scores, twice as slow on a CPU
    d_key = jnp.zeros_like(key.swapaxes(2, 3), dtype=jnp.float32)
    d_value = jnp.zeros_like(value.swapaxes(2, 3), dtype=jnp.float32)
    for start, stop in _blocks(query.shape[2]):
        rows, d_rows = _rows(grouped, start, stop), _rows(cotangent, start, stop)
        keys, values = key[:, :, :stop], value[:, :, :stop]
        seen = _block_mask(masks, start, stop, grouped.shape[2])
        scores, tanh = _capped(_product("BKTH,BKSH->BKTS", rows, keys) * scale, softcap)
        weights = jnp.exp(_masked(scores, seen) - _rows(log_sum_exp, start, stop))
        d_weights = _product("BKTH,BKSH->BKTS", d_rows, values)
        d_scores = weights * (d_weights - _rows(delta, start, stop)) * scale
        d_scores = d_scores if tanh is None else d_scores * (1.0 - jnp.square(tanh))
        weights, d_scores = weights.astype(value.dtype), d_scores.astype(query.dtype)
        d_queries.append(_unrows(_product("BKTS,BKSH->BKTH", d_scores, keys), stop - start))
        d_key = d_key.at[..., :stop].add(_product("BKTH,BKTS->BKHS", rows, d_scores))
        d_value = d_value.at[..., :stop].add(_product("BKTH,BKTS->BKHS", d_rows, weights))
    d_query = jnp.concatenate(d_queries, axis=3).reshape(query.shape).astype(query.dtype)
    d_key = d_key.swapaxes(2, 3).astype(key.dtype)
    d_value = d_value.swapaxes(2, 3).astype(value.dtype)
    return d_query, d_key, d_value


def _delta(
    output: Float[Array, "*rows head_dim"], cotangent: Float[Array, "*rows head_dim"]
) -> Float[Array, "*rows 1"]:
    """What the gradient of each row of scores is lowered by (arXiv 2307.08691, algorithm 2: D), in float32."""
    return jnp.sum(output.astype(jnp.float32) * cotangent.astype(jnp.float32), -1, keepdims=True)


def _blocks(length: int) -> list[tuple[int, int]]:
    """The first row and the end of each block of queries; the last may be shorter."""
    size = max(LEAST_BLOCK, -(-length // MOST_BLOCKS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _rows(x: Array, start: int, stop: int) -> Array:
    """Rows start:stop of all heads of a group, one after the other, for one product a key head."""
    batch, key_heads, group, _, head_dim = x.shape
    return x[:, :, :, start:stop].reshape(batch, key_heads, group * (stop - start), head_dim)


def _unrows(x: Array, length: int) -> Array:
    """The heads of a group apart again."""
    batch, key_heads, rows, head_dim = x.shape
    return x.reshape(batch, key_heads, rows // length, length, head_dim)


def _product(letters: str, left: Array, right: Array) -> Array:
    return jnp.einsum(letters, left, right, preferred_element_type=jnp.float32)


def _block_mask(
    masks: _Masks, start: int, stop: int, group: int
) -> Bool[Array, "batch 1 rows stop"]:
    """Of the rows of all heads of a group, as `_rows` has them.

    A mask of one head's rows, broadcast to the group's, is written out by the TPU compiler: for each layer and block.
    """
    index = jnp.arange(start, stop, dtype=jnp.int32)[None, :]
    queries, branches = jax.tree.map(
        lambda ids: ids[:, start:stop], (masks.query_segments, masks.branches)
    )
    keys, before = jax.tree.map(lambda ids: ids[:, :stop], (masks.key_segments, masks.branches))
    index = jnp.broadcast_to(index, queries.shape)
    index, queries, branches = jax.tree.map(
        lambda ids: jnp.tile(ids, (1, group)), (index, queries, branches)
    )
    return _seen(index, queries, keys, masks.window, branches, before)[:, None]


def _masked(scores: Array, seen: Array) -> Array:
    """`MASKED` where a key is not seen."""
    return jnp.where(seen, scores, MASKED)


def _grouped(query: Array, key: Array) -> Array:
    """Query heads by the key head that they share: (batch, key_heads, group, length, head_dim)."""
    batch, heads, length, head_dim = query.shape
    return query.reshape(batch, key.shape[1], heads // key.shape[1], length, head_dim)


def _capped(scores: Array, softcap: float | None) -> tuple[Array, Array | None]:
    """The bounded scores, and tanh(scores / softcap) for the derivative."""
    if softcap is None:
        return scores, None
    tanh = jnp.tanh(scores / softcap)
    return softcap * tanh, tanh


def _seen(
    index: Int[Array, "batch length"],
    query_segments: Int[Array, "batch length"],
    key_segments: Int[Array, "batch key_length"],
    window: int | Int[Array, ""] | None,
    query_branches: Branches | None,
    key_branches: Branches | None,
) -> Bool[Array, "batch length key_length"]:
    """Which keys the query at each index sees."""
    distance = index[:, :, None] - jnp.arange(key_segments.shape[1], dtype=jnp.int32)[None, None, :]
    segments = query_segments[:, :, None]
    seen = (distance >= 0) & (segments == key_segments[:, None, :]) & (segments != 0)
    if query_branches is not None and key_branches is not None:
        keys = key_branches.numbers[:, None, :]
        seen = seen & ((keys == 0) | (keys == query_branches.numbers[:, :, None]))
        distance = query_branches.positions[:, :, None] - key_branches.positions[:, None, :]
    return seen if window is None else seen & (distance < window)
