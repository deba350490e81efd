"""What makes a quantized weight of an array: `quantize`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.defaults import DOUBLE_QUANT, GROUP_SIZE
from jaxft.errors import UserError, nearest
from jaxft.weights.base import Weight
from jaxft.weights.quantized.codebooks import TABLES
from jaxft.weights.quantized.rounding import (
    nest,
    pack,
    to_codebook,
    to_integers,
    to_offset_integers,
)
from jaxft.weights.quantized.weight import SCHEMES, Flattened, Quantized


def quantize(
    kernel: Float[Array, "... in out"],
    scheme: str = "nf4",
    *,
    group_size: int = GROUP_SIZE,
    double_quant: bool = DOUBLE_QUANT,
    symmetric: bool = True,
) -> Weight:
    """The quantized weight that stands for a kernel (in, out), or for a stack of them.

    Args:
        kernel: (..., in, out), floating.
        scheme: nf4 (arXiv 2305.14314; codes and scales are bitsandbytes'), fp4, int4 or int8.
        group_size: rows that share a scale; -1: a whole column. Where it does not divide `in`, nf4 and fp4 take
            blocks of the flattened (out, in) weight.
        double_quant: of nf4 and fp4: the scales too are quantized, in blocks of 256. The integer schemes keep theirs.
        symmetric: of int4 and int8: 0 is the middle code; otherwise each group has a code for 0.

    Raises:
        UserError: an unknown scheme, a group that does not divide, a kernel that is quantized or adapted already.

    >>> weight = quantize(jnp.ones((128, 4)), "nf4")
    >>> weight.shape, weight.codes.shape, weight.scales.dtype
    ((128, 4), (64, 4), dtype('uint8'))
    """
    if scheme not in SCHEMES:
        known = nearest(str(scheme), SCHEMES) or f"; there are: {', '.join(SCHEMES)}"
        raise UserError(f"unknown quantization scheme {scheme!r}{known}")
    if isinstance(kernel, Weight):
        kind = type(kernel).__name__
        raise UserError(f"quantize takes an array, and this is a {kind} weight already")
    if kernel.ndim < 2 or not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise UserError(
            f"quantize takes a floating kernel (in, out), not {kernel.dtype}{kernel.shape}"
        )
    rows = kernel.shape[-2]
    group = rows if group_size == -1 else group_size
    if group < 1:
        raise UserError(
            f"a group of {group_size} rows: give a number from 1, or -1 for a whole column"
        )
    fits = rows % group == 0 and (rows % 2 == 0 or SCHEMES[scheme] == 8)
    if not fits and scheme not in TABLES:
        raise UserError(
            f"{scheme}: groups of {group_size} do not divide the {rows} rows of a kernel {tuple(kernel.shape)}"
            + (" in pairs" if rows % group == 0 else "")
        )
    return _stack_rounded(kernel, fits, scheme, group, double_quant, symmetric)


@functools.partial(jax.jit, static_argnums=range(1, 6))
def _stack_rounded(kernel: jax.Array, fits: bool, *settings: Any) -> Weight:
    """The kernel rounded, layer by layer and not all at once."""

    def one(kernel: jax.Array) -> Weight:
        if kernel.ndim > 2:
            return jax.lax.map(one, kernel)
        return _rounded(kernel, *settings) if fits else _flat_rounded(kernel, *settings)

    return one(kernel)


def _rounded(
    kernel: jax.Array, scheme: str, group: int, double_quant: bool, symmetric: bool
) -> Quantized:
    bits, zeros = SCHEMES[scheme], None
    x = kernel.astype(jnp.float32)
    if scheme in TABLES:
        codes, scales = to_codebook(x, TABLES[scheme], group)
    elif symmetric:
        codes, scales = to_integers(x, bits, group)
        codes = (codes + 8).astype(jnp.uint8) if bits == 4 else codes
    else:
        codes, scales, zeros = to_offset_integers(x, bits, group)
    nested, mean = None, None
    if double_quant and scheme in TABLES:
        scales, nested, mean = nest(scales)
    return Quantized(
        codes=pack(codes) if bits == 4 else codes,
        scales=scales,
        zeros=zeros,
        nested=nested,
        mean=mean,
        scheme=scheme,
        matrix_shape=kernel.shape,
        dense_dtype=kernel.dtype,
    )


def _flat_rounded(kernel: jax.Array, scheme: str, group: int, *settings: Any) -> Flattened:
    flat = kernel.T.reshape(-1)
    blocks = jnp.pad(flat, (0, -flat.size % group)).reshape(-1, group).T
    return Flattened(_rounded(blocks, scheme, group, *settings), matrix_shape=kernel.shape)
