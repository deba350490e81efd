"""A quantized matrix whose rows lie in another order, so that each group of rows is a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxft.weights.base import (
    Weight,
    contract,
    contract_transposed,
    materialize,
    take,
    weight,
)


@weight
class Permuted(Weight):
    """`x W = x[order] W[order]`: GPTQ's "activation order", in which a group's rows are scattered over the input axis.

    The codes are kept sorted by group and the input is permuted instead.

    Attributes:
        ordered: W[order], a `Quantized` (in, out).
        order: int32 (in,), a permutation: the row of W that each row of `ordered` is.
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {"order": ()}
    is_encoded = True
    ordered: Any
    order: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.ordered.shape)

    @property
    def dtype(self) -> Any:
        return self.ordered.dtype

    @property
    def scheme(self) -> str:
        """int4 | int8."""
        return str(self.ordered.scheme)

    @property
    def group_size(self) -> int:
        """Rows in a group."""
        return int(self.ordered.group_size)

    @property
    def zeros(self) -> Any:
        """As of `Quantized`."""
        return self.ordered.zeros

    def _rows(self) -> Int[Array, "... in"]:
        """Where each row of W stands in `ordered`."""
        return jnp.argsort(self.order, axis=-1)

    def contract(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        return contract(_columns(x, self.order), self.ordered)

    def contract_transposed(self, x: Float[Array, "... out"]) -> Float[Array, "... in"]:
        return _columns(contract_transposed(x, self.ordered), self._rows())

    def take(self, ids: Int[Array, "..."]) -> Float[Array, "... out"]:
        rows = self._rows()
        return take(self.ordered, rows[jnp.clip(ids, 0, rows.size - 1)])

    def materialize(self) -> Float[Array, "... in out"]:
        return jnp.take_along_axis(materialize(self.ordered), self._rows()[..., None], axis=-2)


def _columns(x: Float[Array, "... in"], order: Int[Array, "in"]) -> Float[Array, "... in"]:
    """`x[..., order]`, whose gradient needs no sum: no column is taken twice."""
    return x.at[..., order].get(unique_indices=True, mode="promise_in_bounds")
