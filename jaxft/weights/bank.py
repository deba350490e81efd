"""A bank: many adapters over one base as one weight, in which every row of a batch has its own.

    y_n = ratio_k * (x_n W + s_k (x_n a_k) b_k + ((x_n A * d_k) B) * g_k)      for a row n of the adapter k

holds LoRA and its relatives (a, b, s), DoRA (ratio = m / |W + s a b|, computed once) and VeRA (d, g over projections A
and B that stand once in the tree). Ranks are padded with zeros, and what an adapter has no part in is zero, so that
methods, ranks and targets mix; both are exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxft.errors import UserError, nearest, shown
from jaxft.kernels.low_rank import each_low_rank, of_rows
from jaxft.kernels.remat import keep
from jaxft.weights.base import (
    Adapter,
    contract,
    contract_transposed,
    map_weights,
    replace,
    static,
    take,
    weight,
)

SLOTS = "bank"


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Slots:
    """What a bank's indices are called: a record at `params["bank"]`, without an array.

    `bind_groups` leaves it out of what a program sees, so that another name needs no other program.

    Attributes:
        names: of each index; None where there is room.
        projections: (start, end) of each pair of VeRA's projections among the columns of `params["vera"]["a"]`.
    """

    names: tuple[str | None, ...]
    projections: tuple[tuple[int, int], ...] = ()

    def index(self, name: str) -> int:
        """Where the adapter of that name is. Raises UserError with the nearest name where there is none."""
        if name not in self.names:
            known = [known for known in self.names if known is not None]
            hint = nearest(str(name), known) or f" (there are: {', '.join(known) or 'none'})"
            raise UserError(f"the bank has no adapter {shown(name)}{hint}")
        return self.names.index(name)

    def free(self) -> int | None:
        """The first index where there is room; None where there is none."""
        return self.names.index(None) if None in self.names else None


@weight
class Bank(Adapter):
    """Adapters 0 to K - 1 over one base; a row of a batch is multiplied by its own (the module says how).

    The rows' adapters are `groups`, put there by `bind_groups`. Without them the rows are laid by adapter: K runs of
    one length. A row of a group below 0 has no adapter: it gets what the base gives, to the last bit.

    Attributes:
        base: the weight W (in, out) of all, dense, quantized or sharded.
        scale: s (K,); with stacked layers (layers, K), as every part has the layers in front.
        a_rows: (K, rank, in), the transposed a, and b: (K, rank, out): of LoRA and its relatives, if there is one.
        ratio: (K, out), of DoRA, if there is one; 1 for all others.
        d: (K, ranks), g: (K, out): of VeRA, if there is one.
        groups: (rows,): the adapter of each row.
        tie_adapters: on an embedding, whether a head tied to it sees the adapters too.
        projections: VeRA's A (in, ranks) and B (ranks, out), filled in by `bind`.
        read: the input by another name, only inside of `contract_each`.
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "scale": (),
        "a_rows": ("rank", "in"),
        "b": ("rank", "out"),
        "ratio": ("out",),
        "d": ("rank",),
        "g": ("out",),
        "groups": (),
    }
    base: Any
    scale: Any
    a_rows: Any = None
    b: Any = None
    ratio: Any = None
    d: Any = None
    g: Any = None
    groups: Any = None
    tie_adapters: bool = static(default=False)
    projections: Any = None
    read: Any = None

    def bind(self, params: Mapping[str, Any]) -> Bank:
        bound = super().bind(params)
        if self.d is None:
            return bound
        rows, columns = self.shape[-2:]
        shared = params["vera"]
        return replace(bound, projections=(shared["a"][:rows], shared["b"][:, :columns]))

    def bind_groups(self, groups: Int[Array, " rows"]) -> Bank:
        """The bank with the adapter of each row, for all layers."""
        layers = self.scale.shape[:-1]
        return replace(self, groups=jnp.broadcast_to(groups, (*layers, *groups.shape)))

    def reading(self, x: Float[Array, "... in"], narrow: Any = None) -> Bank:
        return replace(super().reading(x), read=x)

    def contract(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        y = contract(x, self.base)
        read = x if self.read is None else self.read
        return keep(self._scaled(self._delta(self._rows(read)).reshape(y.shape) + y))

    def contract_groups(
        self, x: Float[Array, "... in"], groups: Int[Array, "..."]
    ) -> Float[Array, "... out"]:
        return replace(self, groups=groups.reshape(-1)).contract(x)

    def contract_transposed(self, x: Float[Array, "... out"]) -> Float[Array, "... in"]:
        x = self._scaled(x)
        y, rows = contract_transposed(x, self.base), self._rows(x)
        total = jnp.zeros((*rows.shape[:-1], y.shape[-1]), x.dtype)
        if self.a_rows is not None:
            total = each_low_rank(rows, self.b, self.a_rows, self.scale, self.groups)
        if self.d is not None:
            a, b = self.projections
            narrow = self._times(contract_transposed(self._times(rows, self.g), b), self.d)
            total = total + contract_transposed(narrow, a)
        return total.reshape(y.shape) + y

    def take(self, ids: Int[Array, "..."]) -> Float[Array, "... out"]:
        y = take(self.base, ids)
        groups, total = self._groups(len(ids)), jnp.zeros_like(y)
        own = jnp.broadcast_to(groups.reshape(-1, *(1,) * (ids.ndim - 1)), ids.shape)
        if self.a_rows is not None:
            narrow = self.a_rows.at[own, :, ids].get(mode="clip").astype(y.dtype)
            narrow = self._rows(narrow) * of_rows(self.scale, groups, 0.0)[:, None, None].astype(
                y.dtype
            )
            b = jnp.take(self.b, groups, axis=0, mode="clip").astype(y.dtype)
            total = jnp.matmul(narrow, b).reshape(y.shape)
        if self.d is not None:
            a, b = self.projections
            total = total + self._scaled_projection(self._rows(take(a, ids)), b).reshape(y.shape)
        return self._scaled(y + total)

    def materialize(self) -> Float[Array, "... in out"]:
        raise UserError(
            "a bank stands for many kernels and equals no one: merge the adapter that you want over the base"
        )

    def _rows(self, x: Float[Array, "rows ... size"]) -> Float[Array, "rows length size"]:
        """x as it lies by groups."""
        count = len(x) if self.groups is None else len(self.groups)
        return x.reshape(count, -1, x.shape[-1])

    def _groups(self, rows: int) -> Int[Array, " rows"]:
        """The adapter of each row, also of rows that are laid by adapter."""
        if self.groups is not None:
            return self.groups
        return jnp.arange(rows, dtype=jnp.int32) // max(rows // len(self.scale), 1)

    def _delta(self, x: Float[Array, "rows length in"]) -> Float[Array, "rows length out"]:
        """What a row's adapter adds to the base's product."""
        total: Any = 0.0
        if self.a_rows is not None:
            total = each_low_rank(x, self.a_rows, self.b, self.scale, self.groups)
        if self.d is not None:
            a, b = self.projections
            total = total + self._scaled_projection(x @ a.astype(x.dtype), b)
        return total

    def _scaled_projection(self, narrow: jax.Array, b: jax.Array) -> jax.Array:
        """((x A) * d B) * g, of x A."""
        wide = self._times(narrow, self.d) @ b.astype(narrow.dtype)
        return self._times(wide, self.g)

    def _times(
        self, x: Float[Array, "rows length size"], vectors: Float[Array, "adapters size"]
    ) -> Float[Array, "rows length size"]:
        """Each row times its adapter's vector; 0 where it has no adapter."""
        own = of_rows(vectors, self._groups(len(x)), 0.0)[:, None, :]
        return x * jnp.broadcast_to(own.astype(x.dtype), x.shape)

    def _scaled(self, y: Float[Array, "... out"]) -> Float[Array, "... out"]:
        """Each row times its ratio."""
        if self.ratio is None:
            return y
        rows = self._rows(y)
        own = of_rows(self.ratio, self._groups(len(rows)), 1.0)[:, None, :]
        return (rows * jnp.broadcast_to(own.astype(y.dtype), rows.shape)).reshape(y.shape)


def slots_of(params: Mapping[str, Any]) -> Slots:
    """What a bank's indices are called. Raises UserError for a tree that is no bank."""
    if SLOTS not in params:
        raise UserError("the tree is no bank of adapters: jaxft.stack_adapters makes one")
    return params[SLOTS]


def bind_groups(params: Mapping[str, Any], groups: Int[Array, " rows"]) -> dict[str, Any]:
    """A bank's tree with the adapter of each row of a batch: what a model is applied to.

    Args:
        params: of `stack_adapters`; its record of names is left out of what comes back.
        groups: (rows,) int32, an index for each row of the batch; -1 for none. It may be traced: which adapters a batch
            has is data.
    """
    tree = {name: child for name, child in params.items() if name != SLOTS}
    return map_weights(Bank, lambda bank: bank.bind_groups(groups), tree)
