"""DoRA: direction by LoRA, magnitude trained apart.  `x W' = m / |W + s a b| (x W + s (x a) b)`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxft.kernels.remat import keep_narrow, keep_small
from jaxft.weights.base import Peft, is_adapter, materialize, weight
from jaxft.weights.lora import LoRA, peft_layers, peft_parts
from jaxft.weights.site import Site


def column_norm(matrix: Float[Array, "... in out"]) -> Float[Array, "... out"]:
    """The Euclidean norm of each output feature's weights, in float32."""
    return jnp.sqrt(jnp.sum(jnp.square(matrix.astype(jnp.float32)), axis=-2))


@weight
class DoRA(LoRA):
    """Weight-decomposed adaptation (arXiv 2402.09353, eq. 5): `W' = m (W + s a b) / |W + s a b|`.

    The norm, one for each output feature, is a constant to the gradient (section 4.3). The bias of the
    projection is never scaled. Departures from PEFT: dropout acts on the adapter's input alone, where PEFT
    also feeds the base's share of the magnitude the dropped input.

    Attributes:
        magnitude: m, (out,), the norm of W at first, so that a fresh adapter changes nothing.
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {**LoRA.axes, "magnitude": ("out",)}
    # A default keeps the dataclass's order legal after LoRA's optional fields; it is always given.
    magnitude: Any = ()

    @classmethod
    def at(cls, site: Site, **parts: Any) -> Any:
        """A fresh adapter; the magnitude begins as the norm of the (dequantized) base."""

        def norm(base: Any) -> jax.Array:
            return column_norm(materialize(base).reshape(site.matrix_shape))

        # Layer by layer: a quantized base must not stand dense as a whole.
        magnitude = jax.lax.map(norm, site.bound) if site.stacked else norm(site.bound)
        return super().at(site, magnitude=magnitude.astype(site.dtype), **parts)

    def ratio(self) -> Float[Array, "... out"]:
        """m / |W + s a b|, and 1 in a layer that is not adapted."""
        # To a W in fewer digits a b need not be added in all of its own: a TPU multiplies six times for these.
        precision = "highest" if self.dtype == self.a.dtype else None
        change = jax.lax.stop_gradient(self.change(precision))
        base = jax.lax.stop_gradient(materialize(self.base)).reshape(change.shape)
        norm = keep_small(column_norm(base.astype(change.dtype) + change))
        adapted = jnp.broadcast_to(self.scale[..., None] != 0, norm.shape)
        return jnp.where(adapted, self.magnitude.astype(norm.dtype) / norm, 1.0)

    def contract(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        ratio = self.ratio()
        y = super().contract(x) * _along_last(jax.lax.stop_gradient(ratio), x)
        return _with_gradient_to(ratio, keep_narrow(y))

    def to_peft(self, embedding: bool = False) -> Peft | None:
        if is_adapter(self.base):
            return None

        def parts(one: DoRA, rank: int) -> dict[str, jax.Array]:
            direction = peft_parts(one, rank, embedding)
            return direction | {"lora_magnitude_vector": one.magnitude}

        return Peft("dora", peft_layers(self, parts))

    def contract_transposed(self, x: Float[Array, "... out"]) -> Float[Array, "... in"]:
        return super().contract_transposed(x * _along_last(self.ratio(), x))

    def take(self, ids: Int[Array, "..."]) -> Float[Array, "... out"]:
        rows = super().take(ids)
        return rows * _along_last(self.ratio(), rows)

    def materialize(self) -> Float[Array, "... in out"]:
        base = materialize(self.base)
        moved = self.change()
        moved = moved + base.reshape(moved.shape).astype(moved.dtype)
        ratio = jnp.broadcast_to(self.ratio()[..., None, :], moved.shape).astype(moved.dtype)
        return (moved * ratio).reshape(base.shape).astype(base.dtype)


@jax.custom_vjp
def _with_gradient_to(ratio: Float[Array, " out"], y: Float[Array, "... out"]) -> jax.Array:
    """y, which is z * ratio: its gradient to the ratio, sum(dy z), is made of y, that of z being there already.

    Most of what reads a product keeps it for its own backward pass: so z is not kept as well. (Under remat = dots
    z is what is kept, and y is made of it.) Where the ratio is 0, y tells nothing of z, and the gradient is 0.
    """
    return y


def _with_gradient_forward(ratio: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
    return y, (ratio, y)


def _with_gradient_backward(residuals: Any, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    ratio, y = residuals
    wide = cotangent.astype(jnp.float32) * y.astype(jnp.float32)
    total = wide.sum(axis=tuple(range(y.ndim - 1))).astype(ratio.dtype)
    zero = ratio == 0
    return jnp.where(zero, 0.0, total / jnp.where(zero, 1.0, ratio)), cotangent


_with_gradient_to.defvjp(_with_gradient_forward, _with_gradient_backward)


def _along_last(vector: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(vector.astype(x.dtype), (*x.shape[:-1], vector.shape[-1]))
