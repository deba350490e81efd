"""How a matrix becomes codes and scales: blocks by the largest magnitude, groups of integers, scales of scales.

Blocks and groups are runs of `group` rows down a column, that is along the input axis.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from jaxft.weights.quantized.codebooks import decode_dynamic, encode, encode_dynamic

NESTED = 256  # scales in a block of double quantization


def grouped(x: Float[Array, "in out"], group: int) -> Float[Array, "groups group out"]:
    """The rows in groups."""
    return x.reshape(-1, group, x.shape[-1])


def spread(scales: Float[Array, "groups out"], rows: int) -> Float[Array, "in out"]:
    """Each group's number, repeated for every row of the group."""
    groups, out = scales.shape
    return jnp.broadcast_to(scales[:, None, :], (groups, rows // groups, out)).reshape(rows, out)


def to_codebook(
    x: Float[Array, "in out"], table: np.ndarray, group: int
) -> tuple[Integer[Array, "in out"], Float[Array, "groups out"]]:
    """Codes of a 4-bit table, and the largest magnitude of each block (arXiv 2305.14314, eq. 1 and 3)."""
    largest = jnp.max(jnp.abs(grouped(x, group)), axis=1)
    inverse = 1.0 / jnp.where(largest == 0, 1.0, largest)
    scaled = jnp.clip(x * spread(inverse, x.shape[0]), -1.0, 1.0)
    return encode(scaled, table), largest


def to_integers(
    x: Float[Array, "in out"], bits: int, group: int
) -> tuple[Integer[Array, "in out"], Float[Array, "groups out"]]:
    """Symmetric integers, int8, and the step of each group.

    Of the steps in use each group takes that which leaves the least squared error: the largest magnitude at
    2^(bits-1) - 1 or half a step beyond (Qwix, torchao), or the least step that clips neither the largest nor the
    smallest number (torchao's "no clipping error").
    """
    high = 2 ** (bits - 1) - 1
    blocks = grouped(x, group)
    least, most = jnp.min(blocks, axis=1), jnp.max(blocks, axis=1)
    largest = jnp.maximum(most, -least)
    unclipped = jnp.maximum(most / high, -least / (high + 1))

    def rounded(step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        step = jnp.where(largest == 0, 1.0, step)
        steps = spread(step, x.shape[0])
        codes = jnp.clip(jnp.round(x / steps), -high - 1, high)
        return codes, step, jnp.sum(grouped(jnp.square(codes * steps - x), group), axis=1)

    codes, step, error = rounded(largest / (high + 0.5))
    for other in (largest / high, unclipped):
        other_codes, other_step, other_error = rounded(other)
        better = other_error < error
        codes = jnp.where(spread(better, x.shape[0]), other_codes, codes)
        step, error = jnp.where(better, other_step, step), jnp.minimum(error, other_error)
    return codes.astype(jnp.int8), step


def to_offset_integers(
    x: Float[Array, "in out"], bits: int, group: int
) -> tuple[Integer[Array, "in out"], Float[Array, "groups out"], Integer[Array, "groups out"]]:
    """Asymmetric integers, uint8, the step of each group, and the code that stands for zero there."""
    high = 2**bits - 1
    blocks = grouped(x, group)
    low = jnp.minimum(jnp.min(blocks, axis=1), 0.0)
    step = (jnp.maximum(jnp.max(blocks, axis=1), 0.0) - low) / high
    step = jnp.where(step == 0, 1.0, step)
    zero = jnp.clip(jnp.round(-low / step), 0, high)
    codes = jnp.round(x / spread(step, x.shape[0])) + spread(zero, x.shape[0])
    return jnp.clip(codes, 0, high).astype(jnp.uint8), step, zero.astype(jnp.uint8)


def nest(
    scales: Float[Array, "groups out"],
) -> tuple[Integer[Array, "groups out"], Float[Array, "blocks"], Float[Array, ""]]:
    """Double quantization: 8-bit codes of the scales, the largest magnitude of each 256 of them, and their mean.

    The mean is taken off first. Blocks run over the scales of one output feature after the other, as they would in the
    flattened (out, in) weight (arXiv 2305.14314, section 3; the 8-bit code is bitsandbytes').
    """
    flat = scales.T.reshape(-1)
    padding = (0, -flat.size % NESTED)
    # Summed in two stages, for precision. PyTorch's sum can still differ in the last bit, and then a scale in
    # the middle between two codes takes the other one.
    mean = jnp.sum(jnp.sum(jnp.pad(flat, padding).reshape(-1, NESTED), axis=1)) / flat.size
    centred = jnp.pad(flat - mean, padding).reshape(-1, NESTED)
    largest = jnp.max(jnp.abs(centred), axis=1)
    codes = encode_dynamic(centred / jnp.where(largest == 0, 1.0, largest)[:, None])
    codes = jnp.where(
        (largest == 0)[:, None], jnp.uint8(0), codes
    )  # as bitsandbytes: any code times 0
    return codes.reshape(-1)[: flat.size].reshape(scales.shape[::-1]).T, largest, mean


def unnest(
    codes: Integer[Array, "groups out"], largest: Float[Array, "blocks"], mean: Float[Array, ""]
) -> Float[Array, "groups out"]:
    """The scales that `nest` left."""
    groups, out = codes.shape
    factors = jnp.broadcast_to(largest[:, None], (largest.size, NESTED)).reshape(-1)[: codes.size]
    return decode_dynamic(codes) * factors.reshape(out, groups).T + mean


def pack(codes: Integer[Array, "in out"]) -> Integer[Array, "half out"]:
    """4-bit codes two a byte: row i of the first half of the rows below row i of the second.

    Halves of the whole axis, so that a product unpacks by a mask and a shift into two products and moves nothing.
    """
    low, high = jnp.split(codes.astype(jnp.uint8), 2)
    return low | (high << 4)
