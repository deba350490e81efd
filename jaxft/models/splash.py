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

from jaxft.models.sharding import ACTIVATIONS, BATCH, sizes_in_force
from jaxft.tree import first_match

FOREVER = 2**30  # a window that no sequence fills
BLOCKS = (512, 256, 128)  # rows and columns of the scores that are computed at once


def fits(query: jax.Array, key: jax.Array) -> bool:
    """Whether the kernel takes these shapes (batch, heads, length, head_dim) on the mesh in force."""
    sizes = sizes_in_force()
    rows = math.prod(sizes[axis] for axis in BATCH)
    return (
        query.shape[2] % BLOCKS[-1] == 0
        and query.shape[3] % 64 == 0
        and query.shape[0] % rows == 0
        and key.shape[1] % sizes["tensor"] == 0
        and sizes["context"] == 1
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
        kernel = _kernel(query.shape, window, softcap, interpret, backward=False)
        query = _scaled(query, scale)
        output, (log_sum_exp,) = jax.vmap(kernel)(query, key, value, _segment_ids(segments))
        return _without_padding(output, segments), log_sum_exp[..., None]

    return _on_mesh(here, "hh", window, windows, (query, key, value, segments), "hhhr")


def backward(
    query: Float[Array, "batch heads length head_dim"],
    key: Float[Array, "batch key_heads length head_dim"],
    value: Float[Array, "batch key_heads length head_dim"],
    segments: Int[Array, "batch length"],
    window: int | Int[Array, ""] | None,
    output: Float[Array, "batch heads length head_dim"],
    log_sum_exp: Float[Array, "batch heads length 1"],
    cotangent: Float[Array, "batch heads length head_dim"],
    *,
    windows: Sequence[int],
    softcap: float | None,
    scale: float,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """The gradients of query, key and value, from what `forward` gave. Arguments as there."""

    def here(window: int, query: Array, *parts: Array) -> tuple[Array, ...]:
        key, value, segments, output, log_sum_exp, cotangent = parts
        kernel = _kernel(query.shape, window, softcap, interpret, backward=True)
        scaled = _scaled(query, scale)

        def row(query: Array, key: Array, value: Array, ids: Any, *rest: Array) -> Any:
            output, log_sum_exp, cotangent = rest
            masks = (kernel.dq_mask_info, kernel.dkv_mask_info)
            kept = (query, key, value, ids, None, output, log_sum_exp[..., 0], *masks)
            # The library differentiates the kernel with residuals of its own; here they are `attention`'s.
            gradients = splash_attention_kernel._splash_attention_bwd(
                **kernel.kwargs, res=kept, do=cotangent
            )
            return gradients[3:6]

        cotangent = _without_padding(cotangent, segments)
        ids = _segment_ids(segments)
        gradients = jax.vmap(row)(scaled, key, value, ids, output, log_sum_exp, cotangent)
        return _scaled(gradients[0], scale), *gradients[1:]

    arrays = (query, key, value, segments, output, log_sum_exp, cotangent)
    return _on_mesh(here, "hhh", window, windows, arrays, "hhhrhhh")


def _kernel(
    shape: tuple[int, ...], window: int, softcap: float | None, interpret: bool, *, backward: bool
) -> Any:
    """The library's kernel for the queries of a row (batch, heads, length, head_dim), one way or the other."""
    _, heads, length, _ = shape
    size = next(size for size in BLOCKS if length % size == 0)
    sizes: dict[str, Any] = {"block_q": size, "block_kv": size}
    if backward:
        # One kernel for both would write a query's gradient once for each block of keys, and add those up.
        names = ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
        sizes |= dict.fromkeys(names, size)
    mask: Any = splash_attention_mask.CausalMask((length, length))
    if window < length:
        mask = splash_attention_mask.LocalMask((length, length), (window - 1, 0), 0)
    return splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(**sizes),
        save_residuals=not backward,
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
    """`here(window, *arrays)` for each device's part: of heads where `kinds` has an h, of rows where it has an r."""
    reaches = windows or (FOREVER,)
    branches = [functools.partial(here, reach) for reach in reaches]
    place = jnp.zeros((), jnp.int32)
    if len(reaches) > 1:
        place = jnp.argmax(jnp.asarray(reaches, jnp.int32) == window).astype(jnp.int32)

    def chosen(place: Array, *arrays: Array) -> Any:
        return jax.lax.switch(place, branches, *arrays)

    if math.prod(sizes_in_force().values()) == 1:
        return chosen(place, *arrays)
    specs = {"h": first_match(ACTIVATIONS, "heads"), "r": PartitionSpec(BATCH)}
    divided = jax.shard_map(
        chosen,
        in_specs=(PartitionSpec(), *(specs[kind] for kind in kinds)),
        out_specs=tuple(specs[kind] for kind in results),
        check_vma=False,
    )
    return divided(place, *arrays)


def _segment_ids(segments: Int[Array, "batch length"]) -> Any:
    return splash_attention_kernel.SegmentIds(segments, segments)


def _without_padding(
    x: Float[Array, "batch heads length head_dim"], segments: Int[Array, "batch length"]
) -> Float[Array, "batch heads length head_dim"]:
    """0 at the places of segment 0."""
    return jnp.where((segments != 0)[:, None, :, None], x, jnp.zeros_like(x))


def _scaled(x: Array, scale: float) -> Array:
    return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)
