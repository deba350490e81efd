"""Attention by JAX's own kernel for TPUs (splash attention): what `attention` computes, in one pass over blocks.

Scores stay in the chip's vector memory; blocks that the mask hides are not computed. The kernel is made for a mask
that is known when the program is made: causal, or a window; of traced windows, all that they may be.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxft.kernels.heads import split_heads
from jaxft.kernels.jax_private import splash_gradients
from jaxft.mesh import ACTIVATION_SPECS, BATCH, sizes_in_force
from jaxft.tree import first_match

FOREVER = 2**30  # a window that no sequence fills
BLOCKS = (1024, 512, 256, 128)  # rows and columns of the scores that are at hand at once
COMPUTED = (
    512  # columns of these that are computed at once, and the most rows of wide heads or numbers
)
# One kernel for all three gradients computes the scores once, where two would twice. It takes one block of keys, and
# gives its part of the queries' gradient: more parts than these are too much to hold and to add up.
MOST_PARTS = 4


def fits(query: jax.Array, key: jax.Array) -> bool:
    """Whether the kernel takes these shapes (batch, heads, length, head_dim) on the mesh in force, in this JAX."""
    sizes = sizes_in_force()
    rows = math.prod(sizes[axis] for axis in BATCH)
    return (
        query.shape[2] % BLOCKS[-1] == 0
        and query.shape[3] % 64 == 0
        and query.shape[0] % rows == 0
        and key.shape[1] % sizes["tensor"] == 0
        and sizes["context"] == 1
        and splash_gradients() is not None
    )


def forward(
    query: Float[Array, "batch heads length head_dim"],
    key: Float[Array, "batch key_heads length head_dim"],
    value: Float[Array, "batch key_heads length head_dim"],
    segments: Int[Array, "batch length"],
    window: int | Int[Array, ""] | None,
    *,
    windows: Sequence[int],
    softcap: float | None,
    scale: float,
    interpret: bool = False,
) -> tuple[Float[Array, "batch heads length head_dim"], Float[Array, "batch heads length 1"]]:
    """Attention's output, and the log-sum-exp of each row of scores in float32.

    A query in segment 0, which is padding, gives 0. The scale is applied to the query, in its dtype.

    Args:
        query: queries; heads that share a key head stand together.
        key: keys.
        value: values.
        segments: a query sees keys of its own segment.
        window: how far back a query sees, itself counted: one of `windows`, which may be traced.
        windows: the values that `window` may have, a kernel for each; () where all that is before is seen.
        softcap: bounds the scores, as in `attention`.
        scale: of the scores.
        interpret: run as a program of plain operations, on any platform.
    """

    def here(
        window: int, query: Array, key: Array, value: Array, segments: Array
    ) -> tuple[Array, Array]:
        kernel = _forward_kernel(query, window, softcap, interpret)
        query, ids = _scaled(query, scale), splash_attention_kernel.SegmentIds(segments, segments)
        output, (log_sum_exp,) = jax.vmap(kernel)(query, key, value, ids)
        return _without_padding(output, segments), log_sum_exp[..., None]

    return _on_mesh(here, "hh", window, windows, (query, key, value, segments), "hhhr")


def backward(
    query: Float[Array, "batch heads length head_dim"],
    key: Float[Array, "batch key_heads length head_dim"],
    value: Float[Array, "batch key_heads length head_dim"],
    segments: Int[Array, "batch length"],
    window: int | Int[Array, ""] | None,
    output: Float[Array, "batch length width"],
    log_sum_exp: Float[Array, "batch heads length 1"],
    cotangent: Float[Array, "batch length width"],
    *,
    windows: Sequence[int],
    softcap: float | None,
    scale: float,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """The gradients of query, key and value, from what `forward` gave, its heads joined. Arguments as there."""

    def here(window: int, query: Array, *others: Array) -> tuple[Array, ...]:
        key, value, segments, output, log_sum_exp, cotangent = others
        scaled, delta = _scaled(query, scale), _delta(output, cotangent, query.shape[1])
        cotangent = _without_padding(split_heads(cotangent, query.shape[1]), segments)

        def part(keys: slice) -> tuple[Array, Array, Array]:
            kernel = _backward_kernel(query, keys, window, softcap, interpret)

            def row(query: Array, key: Array, value: Array, *residuals: Array) -> Any:
                segments, delta, log_sum_exp, cotangent = residuals
                ids = splash_attention_kernel.SegmentIds(segments, segments[keys])
                return _gradients(
                    kernel, query, key, value, ids, log_sum_exp[..., 0], cotangent, delta
                )

            here = (key[:, :, keys], value[:, :, keys])
            return jax.vmap(row)(scaled, *here, segments, delta, log_sum_exp, cotangent)

        parts, *pairs = zip(*map(part, _parts(query)), strict=True)
        d_query = sum(part.astype(jnp.float32) for part in parts).astype(query.dtype)
        return _scaled(d_query, scale), *(jnp.concatenate(pair, axis=2) for pair in pairs)

    arrays = (query, key, value, segments, output, log_sum_exp, cotangent)
    return _on_mesh(here, "hhh", window, windows, arrays, "hhhrjhj")


def block_of(length: int, head_dim: int, itemsize: int = 2) -> int:
    """Rows and columns of the blocks that scores are computed in: with them the kernels take 16 MiB of fast memory.

    That is all that some chips give.

    Args:
        length: of the queries, a multiple of 128.
        head_dim: of the queries and keys.
        itemsize: bytes of their numbers.
    """
    most = COMPUTED if head_dim > 128 or itemsize > 2 else BLOCKS[0]
    return next(size for size in BLOCKS if size <= most and length % size == 0)


def _block(query: jax.Array) -> int:
    return block_of(query.shape[2], query.shape[3], query.dtype.itemsize)


def _parts(query: jax.Array) -> list[slice]:
    """The keys that the backward pass takes at once: all of them by two kernels, where there are many blocks."""
    length, size = query.shape[2], _block(query)
    size = length if length // size > MOST_PARTS else size
    return [slice(start, start + size) for start in range(0, length, size)]


def _forward_kernel(query: jax.Array, window: int, softcap: float | None, interpret: bool) -> Any:
    """The library's kernel for the queries of a row (batch, heads, length, head_dim)."""
    size = _block(query)
    sizes = {"block_q": size, "block_kv": size, "block_kv_compute": min(size, COMPUTED)}
    keys = slice(0, query.shape[2])
    return _kernel(query.shape, keys, window, softcap, interpret, sizes, residuals=True)


def _backward_kernel(
    query: jax.Array, keys: slice, window: int, softcap: float | None, interpret: bool
) -> Any:
    """The kernel, or the two, for the gradients of the queries and of these keys and values."""
    size = _block(query)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv")
    sizes: dict[str, Any] = dict.fromkeys(names, size)
    sizes["block_kv_dkv_compute"] = min(size, COMPUTED)
    if keys.stop - keys.start == size:
        sizes["use_fused_bwd_kernel"] = True
    else:
        sizes |= {"block_q_dq": size, "block_kv_dq": size}
    return _kernel(query.shape, keys, window, softcap, interpret, sizes, residuals=False)


def _gradients(
    kernel: Any,
    query: Array,
    key: Array,
    value: Array,
    segments: Any,
    log_sum_exp: Array,
    cotangent: Array,
    delta: Array,
) -> tuple[Array, Array, Array]:
    """Of the queries, keys and values of one row, by the library's backward pass, which else computes delta too."""
    sizes, settings = kernel.kwargs["block_sizes"], dict(kernel.kwargs)
    for name in ("block_sizes", "save_residuals", "residual_checkpoint_name"):
        settings.pop(name)
    settings |= {f"{name}_layout": getattr(sizes, f"{name}_layout") for name in "qkv"}
    arrays = {
        "q": query, "k": key, "v": value, "segment_ids": segments, "sinks": None, "logsumexp": log_sum_exp,
        "do": cotangent, "di": delta,
    }  # fmt: skip
    blocks = {"bq": sizes.block_q_dkv, "bkv": sizes.block_kv_dkv}
    known = splash_gradients()
    assert known is not None, "`fits` says so before"
    d_query, d_key, d_value = known.for_keys(
        bkv_compute=sizes.block_kv_dkv_compute,
        mask_info=kernel.dkv_mask_info,
        use_fused_bwd_kernel=sizes.use_fused_bwd_kernel,
        **arrays,
        **blocks,
        **settings,
    )
    if d_query is None:
        blocks = {"bq": sizes.block_q_dq, "bkv": sizes.block_kv_dq}
        d_query = known.for_queries(mask_info=kernel.dq_mask_info, **arrays, **blocks, **settings)
    return d_query, d_key, d_value


def _kernel(
    shape: tuple[int, ...],
    keys: slice,
    window: int,
    softcap: float | None,
    interpret: bool,
    sizes: dict[str, Any],
    residuals: bool,
) -> Any:
    _, heads, length, _ = shape
    seen = (length, keys.stop - keys.start)
    mask: Any = splash_attention_mask.CausalMask(seen, offset=-keys.start)
    if window < length:
        mask = splash_attention_mask.LocalMask(seen, (window - 1, 0), offset=-keys.start)
    return splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(**sizes),
        save_residuals=residuals,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )


def _on_mesh(
    here: Callable[..., Any],
    results: str,
    window: int | Array | None,
    windows: Sequence[int],
    arrays: tuple[Array, ...],
    kinds: str,
) -> Any:
    """`here(window, *arrays)` for each device's part: of heads where `kinds` has an h or a j, of rows where an r."""
    reaches = windows or (FOREVER,)
    branches = [functools.partial(here, reach) for reach in reaches]
    choice = jnp.zeros((), jnp.int32)
    if len(reaches) > 1:
        choice = jnp.argmax(jnp.asarray(reaches, jnp.int32) == window).astype(jnp.int32)

    def chosen(choice: Array, *arrays: Array) -> Any:
        return jax.lax.switch(choice, branches, *arrays)

    if math.prod(sizes_in_force().values()) == 1:
        return chosen(choice, *arrays)
    names = {"h": "heads", "j": "joined_heads"}
    specs = {kind: first_match(ACTIVATION_SPECS, name) for kind, name in names.items()}
    specs["r"] = PartitionSpec(BATCH)
    divided = jax.shard_map(
        chosen,
        in_specs=(PartitionSpec(), *(specs[kind] for kind in kinds)),
        out_specs=tuple(specs[kind] for kind in results),
        check_vma=False,
    )
    return divided(choice, *arrays)


def _delta(
    output: Float[Array, "batch length width"],
    cotangent: Float[Array, "batch length width"],
    heads: int,
) -> Float[Array, "batch heads length"]:
    """What the gradient of each row of scores is lowered by (arXiv 2307.08691, algorithm 2: D), in float32.

    A product with ones adds up each head's numbers where they are: for a sum over heads they would be moved first.
    """
    product = output.astype(jnp.float32) * cotangent.astype(jnp.float32)
    ones = jnp.repeat(jnp.eye(heads, dtype=jnp.float32), product.shape[-1] // heads, axis=0)
    return jnp.einsum("BTW,WK->BKT", product, ones, precision="high")


def _without_padding(
    x: Float[Array, "batch heads length head_dim"], segments: Int[Array, "batch length"]
) -> Float[Array, "batch heads length head_dim"]:
    """0 at the tokens of segment 0."""
    return jnp.where((segments != 0)[:, None, :, None], x, jnp.zeros_like(x))


def _scaled(x: Array, scale: float) -> Array:
    return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)
