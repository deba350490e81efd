"""The number formats behind quantized weights: two 4-bit tables, and the 8-bit code of their scales.

A code is looked up by arithmetic and selects, never by indexing a table, which a TPU does slowly; the tables
are its plain reference.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

# Quantiles of the normal distribution, zero among them (arXiv 2305.14314, appendix E).
NF4 = np.asarray(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
# One bit of sign, two of exponent, one of fraction, in the order of bitsandbytes' bit patterns.
_FP4_POSITIVE = np.asarray([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0], np.float32)
FP4 = np.concatenate([_FP4_POSITIVE, -_FP4_POSITIVE]) / np.float32(12.0)
TABLES: dict[str, np.ndarray] = {"nf4": NF4, "fp4": FP4}


def dynamic_table() -> Float[np.ndarray, "256"]:
    """The dynamic 8-bit code of bitsandbytes, in ascending order: 127 negative numbers, 0, and 128 positive ones.

    A code n steps above that of 0, with e = floor(log2 n), stands for 10^(e-6) (0.1 + 0.9 (n - 2^e + 1/2) / 2^e);
    the last one stands for 1 (arXiv 2110.02861, section 1.3).
    """
    positive = []
    for exponent in range(7):
        edges = _linspace(0.1, 1.0, 2**exponent + 1)
        positive.append(
            (edges[:-1] + edges[1:]) / np.float32(2.0) * np.float32(10.0 ** (exponent - 6))
        )
    upper = np.concatenate([*positive, np.ones(1, np.float32)])
    return np.concatenate([-upper[-2::-1], np.zeros(1, np.float32), upper])


def _linspace(start: float, end: float, count: int) -> Float[np.ndarray, "count"]:
    """Numbers at equal distances as PyTorch computes them in float32: from both ends to the middle."""
    first, last = np.float32(start), np.float32(end)
    step = (last - first) / np.float32(count - 1)
    index = np.arange(count, dtype=np.float32)
    return np.where(index < count // 2, first + step * index, last - step * index[::-1])


def decode(codes: Integer[Array, "..."], table: Float[np.ndarray, "16"]) -> Float[Array, "..."]:
    """`table[codes]` in float32 by a tree of selects, one level a bit."""
    level: list[jax.Array | np.float32] = list(table)
    for bit in range(4):
        on = ((codes >> bit) & 1) == 1
        level = [
            jnp.where(on, high, low) for low, high in zip(level[::2], level[1::2], strict=True)
        ]
    return jnp.asarray(level[0])


def decode_reference(codes: Integer[Array, "..."], table: np.ndarray) -> Float[Array, "..."]:
    """What `decode` and `decode_dynamic` compute, by the table."""
    return jnp.asarray(table)[codes.astype(jnp.int32)]


def encode(x: Float[Array, "..."], table: Float[np.ndarray, "16"]) -> Integer[Array, "..."]:
    """The code of the nearest number in a 4-bit table, uint8; the lower number wins a tie."""
    order = np.argsort(table, kind="stable")
    rising = table[order]
    between = (rising[:-1] + rising[1:]) / np.float32(2.0)
    codes = jnp.zeros(x.shape, jnp.uint8)
    for index, bound in enumerate(between):
        codes = jnp.where(x > bound, jnp.uint8(order[index + 1]), codes)
    return jnp.where(x > between[0], codes, jnp.uint8(order[0]))


def decode_dynamic(codes: Integer[Array, "..."]) -> Float[Array, "..."]:
    """`dynamic_table()[codes]` in float32, by the formula: a select for each power of ten."""
    signed = codes.astype(jnp.float32) - 127.0
    size = jnp.abs(signed)
    value = jnp.zeros(codes.shape, jnp.float32)
    for exponent in range(7):
        steps = 2.0**exponent
        ten = 10.0 ** (exponent - 6)
        slope = 0.9 * ten / steps
        line = slope * size + (0.1 * ten - slope * (steps - 0.5))
        value = jnp.where(size >= steps, line, value)
    value = jnp.where(size >= 128.0, 1.0, value)
    return value * jnp.sign(signed)


def encode_dynamic(x: Float[Array, "..."]) -> Integer[Array, "..."]:
    """The dynamic code, uint8, nearest to each of x in [-1, 1] once that is rounded to one of 2^16 even steps.

    So bitsandbytes does it on the CPU, by a table of 2^16 codes; without the rounding about one code in 150 would
    be the neighbour.
    """
    table, steps = dynamic_table(), np.float32(2**16 - 1)
    index = jnp.floor((x + 1.0) * 0.5 * steps + 0.5)
    snapped = index / steps * 2.0 - 1.0
    below = jnp.clip(jnp.searchsorted(jnp.asarray(table), snapped, side="right") - 1, 0, 254)
    low, high = decode_reference(below, table), decode_reference(below + 1, table)
    upper = jnp.abs(snapped - high) < jnp.abs(snapped - low)
    return jnp.where(upper, below + 1, below).astype(jnp.uint8)
