"""Delta-LoRA: LoRA whose base moves with the product a b, without the base being written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxft.weights.base import contract_transposed, replace, take, weight
from jaxft.weights.lora import LoRA, doubled, times
from jaxft.weights.site import Site


@weight
class DeltaLoRA(LoRA):
    """Delta-LoRA (arXiv 2309.02411, eq. 5 and algorithm 1).

    From step K on the paper adds lambda s (a_{t+1} b_{t+1} - a_t b_t) to the frozen W after each update.
    The sum telescopes, so that W_t = W + lambda s (a_t b_t - a_K b_K) needs no write:

        x W' = x W + s (x a) b + lambda s (x sg(a) sg(b) - (x a0) b0)

    where sg stops the gradient to a and b (W has none in the paper either) but not to x, and a0, b0 are
    a_K, b_K. Departure: dropout is refused, for which the paper gives its reasons in section 4.

    Attributes:
        a0: (in, rank), b0: (rank, out): a and b at step K, frozen.
        factor: lambda, (); with stacked layers (layers,). It is 0 before step K.
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **LoRA.axes,
        "a0": ("in", "rank"),
        "b0": ("rank", "out"),
        "factor": (),
    }
    # Defaults keep the dataclass's order legal after LoRA's optional fields; they are always given.
    a0: Any = ()
    b0: Any = ()
    factor: Any = ()

    @classmethod
    def at(cls, site: Site, factor: float = 2.0, start_step: int = 0, **parts: Any) -> Any:
        """A fresh adapter; where the base moves from the first step on, a0 and b0 are a and b as drawn."""
        return cls.from_lora(LoRA.at(site, **parts), 0.0 if start_step else factor)

    @classmethod
    def from_lora(cls, lora: LoRA, factor: float) -> DeltaLoRA:
        """The weight whose base begins to move at this LoRA."""
        fields = {field.name: getattr(lora, field.name) for field in dataclasses.fields(LoRA)}
        factors = jnp.full(lora.scale.shape, factor, jnp.float32)
        # Copies: the trained leaves are donated to the step, the frozen ones are not.
        return cls(**fields, a0=jnp.copy(lora.a), b0=jnp.copy(lora.b), factor=factors)

    def start(self, factor: float) -> DeltaLoRA:
        """The weight from step K on: a0, b0 become the present a, b."""
        factors = jnp.full_like(self.factor, factor)
        return replace(self, a0=jnp.copy(self.a), b0=jnp.copy(self.b), factor=factors)

    def _moving(self) -> tuple[jax.Array, jax.Array]:
        """[a, a0] (in, 2 rank) and lambda s [b, -b0] (2 rank, out): how far the base has moved."""
        a = jnp.concatenate([jax.lax.stop_gradient(self.a), self.a0], axis=-1)
        b = jnp.concatenate([jax.lax.stop_gradient(self.b), -self.b0], axis=-2)
        return a, times(self.factor * self.scale, b)

    def delta(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        a, b = self._moving()
        return super().delta(x) + (self._input(x) @ a.astype(x.dtype)) @ b.astype(x.dtype)

    def contract_transposed(self, x: Float[Array, "... out"]) -> Float[Array, "... in"]:
        a, b = self._moving()
        moved = contract_transposed(contract_transposed(x, b), a)
        return super().contract_transposed(x) + moved

    def take(self, ids: Int[Array, "..."]) -> Float[Array, "... out"]:
        a, b = self._moving()
        rows = super().take(ids)
        return rows + take(a, ids).astype(rows.dtype) @ b.astype(rows.dtype)

    def change(self, precision: str | None = "highest") -> Float[Array, "... in out"]:
        a, b = self._moving()
        return super().change(precision) + jnp.matmul(a, b, precision=precision)

    def as_lora(self) -> LoRA:
        """The exact LoRA of twice the rank: s [a, a0] [(1 + lambda) b; -lambda b0].

        Of the same rank where b0 is still zero.
        """
        b = times(1.0 + self.factor, self.b)
        if not bool(jnp.any(self.b0)):
            return LoRA(self.base, self.a, b, self.scale, ranks=self.ranks)
        return doubled(self, (self.a, self.a0), (b, times(-self.factor, self.b0)))
