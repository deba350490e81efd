"""Quantized weights: codes of 4 or 8 bits with a scale for each group, dequantized while they are multiplied."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.kernels.dequantized import Run, in_turn, times, times_transposed
from jaxft.kernels.platform import by_platform
from jaxft.kernels.remat import keep
from jaxft.tree import PyTree, flatten_with_paths, map_with_paths
from jaxft.weights.base import Weight, contract_transposed, replace, static, weight
from jaxft.weights.quantized.codebooks import TABLES, decode
from jaxft.weights.quantized.packing import half, repacked
from jaxft.weights.quantized.rounding import spread, unnest

SCHEMES = {"nf4": 4, "fp4": 4, "int4": 4, "int8": 8}
"""The schemes with their bits."""
MANY = 4096
"""With so many tokens a TPU dequantizes a matrix before it multiplies by it."""
SHIFTS = np.asarray([0, 4], np.uint8).reshape(1, 2, 1, 1, 1)  # of the codes of a byte's halves
Units = tuple[jax.Array, jax.Array, jax.Array | None]
Product = Callable[[jax.Array, Any], jax.Array]


@weight
class Quantized(Weight):
    """Codes and scales that stand for a matrix: `x W' = x dequantize(codes, scales)`.

    A group is a run of rows, that is along `in`, as the blocks of a flattened (out, in) weight are. A group's scale
    times the number that a code stands for is the entry, rounded once to the dtype of the product. The product
    has a backward rule of its own, in which the dequantized copy is made again; it is never a residual.

    Attributes:
        codes: uint8 (in / 2, out), two codes of 4 bits a byte (row i below row i + in / 2, in each of the `parts`), or
            int8 (in, out), or uint8 (in, out) where there are zeros.
        scales: float32 (groups, out), or their uint8 codes under double quantization.
        zeros: uint8 (groups, out): the code that stands for 0, of the asymmetric schemes.
        nested: float32 (blocks of 256 scales,); mean: float32 (): what makes scales of their codes.
        scheme: nf4 | fp4 | int4 | int8.
        matrix_shape: (in, out).
        dense_dtype: that of the array it stands for.
        parts: into how many runs of rows `in` is cut, each of which is packed by itself: as many as devices divide it
            among, so that each has in its bytes the codes of its own rows.
    """

    # What makes scales of their codes is small; codes, scales and zeros lie as the kernel does.
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {"nested": (), "mean": ()}
    is_encoded = True
    codes: Any
    scales: Any
    zeros: Any = None
    nested: Any = None
    mean: Any = None
    scheme: str = static(default="nf4")
    matrix_shape: tuple[int, ...] = static(default=(0, 0))
    dense_dtype: Any = static(default=jnp.dtype("float32"))
    parts: int = static(default=1)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-2], *self.matrix_shape)

    @property
    def dtype(self) -> Any:
        return self.dense_dtype

    @property
    def group_size(self) -> int:
        """Rows in a group."""
        return self.matrix_shape[0] // self.scales.shape[-2]

    def step_sizes(self) -> Float[Array, "groups out"]:
        """The groups' scales in float32."""
        if self.nested is None:
            return self.scales
        return unnest(self.scales, self.nested, self.mean)

    def _numbers(self, codes: jax.Array, zeros: jax.Array | None) -> Float[Array, "..."]:
        """What codes stand for, in float32, before the scale."""
        if self.scheme in TABLES:
            return decode(codes, TABLES[self.scheme])
        numbers = codes.astype(jnp.float32)
        if zeros is not None:
            return numbers - zeros.astype(jnp.float32)
        return numbers - 8.0 if self.scheme == "int4" else numbers

    def runs(self) -> list[Run]:
        """What takes rows that lie together in the codes from an axis."""
        if SCHEMES[self.scheme] == 8:
            return [lambda x, axis: x]
        return [functools.partial(half, which) for which in (0, 1)]

    def units(self) -> Units:
        """Codes (units, rows, out), scales and zeros (units, 1, out): a unit is rows that share one scale.

        The rows are an axis of their own because of the compiler of TPUs: it then multiplies by the scale where it
        stands. For codes (in, out) it first writes the scale of every row to memory.
        """
        rows, out = self.matrix_shape
        unit = math.gcd(self.group_size, rows // self.parts // len(self.runs()))
        zeros = None if self.zeros is None else spread(self.zeros, rows // unit)
        return self.codes.reshape(-1, unit, out), spread(self.step_sizes(), rows // unit), zeros

    def dequantized(self, index: int, units: Units) -> Float[Array, "units rows out"]:
        """The rows of a run in float32."""
        run, (codes, scales, zeros) = self.runs()[index], units
        if SCHEMES[self.scheme] == 4:
            codes = codes >> 4 if index else codes & 15
        offsets = None if zeros is None else run(zeros, 0)[:, None]
        return self._numbers(codes, offsets) * run(scales, 0)[:, None]

    def in_order(self, dtype: Any) -> Float[Array, "parts halves units rows out"]:
        """All rows, in one pass over the codes; the axes joined are those of the matrix."""
        codes, scales, zeros = self.units()
        shape = self.parts, len(self.runs()), -1

        def apart(x: jax.Array) -> jax.Array:
            return x.reshape(*shape, 1, x.shape[-1])

        codes = codes.reshape(self.parts, 1, -1, *codes.shape[1:])
        if SCHEMES[self.scheme] == 4:
            codes = codes >> SHIFTS & 15
        numbers = self._numbers(codes, None if zeros is None else apart(zeros))
        return (numbers * apart(scales)).astype(dtype)

    def standing(self, x: jax.Array) -> Float[Array, "in out"]:
        """The dequantized matrix in x's dtype, in memory as a whole.

        A barrier makes it wait for x. Without one the compiler would share it between the forward pass, when that is
        computed again, and the backward pass, and so keep it in memory between the two. It is reshaped to (in, out)
        behind a second barrier, so that the compiler keeps the axis of units until then: see `units`.
        """
        weight, x = jax.lax.optimization_barrier((self, x))
        found = jax.lax.optimization_barrier(weight.in_order(x.dtype))
        return found.reshape(self.matrix_shape)

    def product(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        def at_once(x: jax.Array, weight: Quantized) -> jax.Array:
            return x @ weight.standing(x)

        def by_runs(x: jax.Array, weight: Quantized) -> jax.Array:
            found = in_turn(weight, x, lambda run, piece: times(run(x, x.ndim - 1), piece))
            return functools.reduce(jnp.add, found)

        return self._either(at_once, by_runs, x)

    def product_transposed(self, x: Float[Array, "... out"]) -> Float[Array, "... in"]:
        def at_once(x: jax.Array, weight: Quantized) -> jax.Array:
            return contract_transposed(x, weight.standing(x))

        def by_runs(x: jax.Array, weight: Quantized) -> jax.Array:
            found = in_turn(weight, x, lambda run, piece: times_transposed(x, piece))
            return jnp.concatenate(found, axis=-1)

        return self._either(at_once, by_runs, x)

    def _either(self, at_once: Product, by_runs: Product, x: jax.Array) -> jax.Array:
        """A product with the whole matrix, dequantized before, or with one run of rows after the other.

        Runs need less memory; the TPU's compiler dequantizes them inside the product, which with few tokens is faster
        too, but takes it three times as long. Where devices divide the rows, one product is one sum over devices.
        """
        if self.parts > 1:
            return at_once(x, self)
        if x.size < MANY * x.shape[-1]:
            return by_runs(x, self)
        return by_platform(x, self, tpu=at_once, default=by_runs)

    def divided(self, parts: int) -> Quantized:
        """The same weight in so many parts; its codes may be NumPy's."""
        if parts == self.parts:
            return self
        eight = SCHEMES[self.scheme] == 8
        codes = self.codes if eight else repacked(self.codes, self.parts, parts)
        return replace(self, codes=codes, parts=parts)

    def contract(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        return keep(_product(x, self))

    def contract_transposed(self, x: Float[Array, "... out"]) -> Float[Array, "... in"]:
        return _transposed_product(x, self)

    def take(self, ids: Int[Array, "..."]) -> Float[Array, "... out"]:
        rows = self.matrix_shape[0]
        ids = jnp.clip(ids, 0, rows - 1)
        group = ids // self.group_size
        scales = self.step_sizes()[group]
        zeros = None if self.zeros is None else self.zeros[group]
        if SCHEMES[self.scheme] == 4:
            size = rows // self.parts
            bytes_, index = size // 2, ids % size
            codes = self.codes[ids // size * bytes_ + index % bytes_]
            codes = jnp.where((index < bytes_)[..., None], codes & 15, codes >> 4)
        else:
            codes = self.codes[ids]
        return (self._numbers(codes, zeros) * scales).astype(self.dtype)

    def materialize(self) -> Float[Array, "... in out"]:
        return _over_stack(lambda one: _dense(one, one.dtype), self.codes.ndim - 2)(self)


def _dense(weight: Quantized, dtype: Any) -> Float[Array, "in out"]:
    """The plain reference: the dequantized matrix, with which a product could be taken."""
    return weight.in_order(dtype).reshape(weight.matrix_shape)


@jax.custom_vjp
def _product(x: Float[Array, "... in"], weight: Any) -> Float[Array, "... out"]:
    """`x @ dequantize(weight)`, of which x's gradient alone is taken: from the codes, which alone are residuals."""
    return weight.product(x)


@jax.custom_vjp
def _transposed_product(x: Float[Array, "... out"], weight: Any) -> Float[Array, "... in"]:
    return weight.product_transposed(x)


_product.defvjp(
    lambda x, weight: (_product(x, weight), weight),
    lambda weight, cotangent: (_transposed_product(cotangent, weight), None),
)
_transposed_product.defvjp(
    lambda x, weight: (_transposed_product(x, weight), weight),
    lambda weight, cotangent: (_product(cotangent, weight), None),
)


def _over_stack(function: Callable[..., Any], axes: int) -> Callable[..., Any]:
    return functools.reduce(lambda inner, _: jax.vmap(inner), range(axes), function)


@weight
class Flattened(Weight):
    """A quantized matrix whose blocks do not fit its input axis: they run over the flattened (out, in) weight.

    This is what the paper and bitsandbytes do with every weight; the last block is filled up with zeros. Such a
    weight is dequantized whole before it is multiplied, and is not divided over a mesh.

    Attributes:
        blocks: the same numbers as a matrix (block, number of blocks), a block a column.
        matrix_shape: (in, out).
    """

    # Its blocks cross rows and columns.
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {"blocks": ()}
    is_encoded = True
    blocks: Any
    matrix_shape: tuple[int, ...] = static(default=(0, 0))

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.blocks.shape[:-2], *self.matrix_shape)

    @property
    def dtype(self) -> Any:
        return self.blocks.dtype

    @property
    def scheme(self) -> str:
        """nf4 | fp4."""
        return self.blocks.scheme

    @property
    def group_size(self) -> int:
        """Entries in a block."""
        return self.blocks.matrix_shape[0]

    @property
    def nested(self) -> Any:
        """As of `Quantized`: None without double quantization."""
        return self.blocks.nested

    def product(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        return x @ _unflattened(self).astype(x.dtype)

    def product_transposed(self, x: Float[Array, "... out"]) -> Float[Array, "... in"]:
        return x @ _unflattened(self).T.astype(x.dtype)

    def contract(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        return keep(_product(x, self))

    def contract_transposed(self, x: Float[Array, "... out"]) -> Float[Array, "... in"]:
        return _transposed_product(x, self)

    def materialize(self) -> Float[Array, "... in out"]:
        axes = self.blocks.codes.ndim - 2
        return _over_stack(lambda one: _unflattened(one).astype(one.dtype), axes)(self)


def _unflattened(weight: Flattened) -> Float[Array, "in out"]:
    rows, out = weight.matrix_shape
    flat = _dense(weight.blocks, jnp.float32).T.reshape(-1)
    return flat[: rows * out].reshape(out, rows).T


def quantized_in(params: PyTree) -> list[tuple[str, Any]]:
    """Lists (path, weight) of every quantized weight in the tree, adapted ones too."""
    kinds = (Quantized, Flattened)
    leaves = flatten_with_paths(params, is_leaf=lambda leaf: isinstance(leaf, kinds))
    return [(path, leaf) for path, leaf in leaves if isinstance(leaf, kinds)]


def divided(params: PyTree, parts: Callable[[str, tuple[int, ...]], int]) -> PyTree:
    """The tree with each quantized weight in as many parts as are said of its codes' path and shape."""

    def one(path: str, leaf: Any) -> Any:
        return leaf.divided(parts(f"{path}/codes", leaf.codes.shape)) if quantized(leaf) else leaf

    def quantized(leaf: Any) -> bool:
        return isinstance(leaf, Quantized)

    return map_with_paths(one, params, is_leaf=quantized)
