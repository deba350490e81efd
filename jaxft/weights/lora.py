"""LoRA: a frozen weight plus a trained product of rank r.  `x W' = x W + s (x a) b`."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.kernels.remat import keep, keep_narrow
from jaxft.weights.base import (
    Adapter,
    Peft,
    PeftLayer,
    contract,
    contract_transposed,
    is_adapter,
    materialize,
    replace,
    static,
    take,
    weight,
)
from jaxft.weights.site import Site

LINEAR_PARTS = ("lora_A.weight", "lora_B.weight")
EMBEDDING_PARTS = ("lora_embedding_A", "lora_embedding_B")


def drop(x: Float[Array, "..."], rate: float, key: jax.Array | None) -> Float[Array, "..."]:
    """Inverted dropout; without a key (evaluation) or a rate, x itself."""
    if key is None or rate == 0.0:
        return x
    drawn = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(drawn, x / (1.0 - rate), 0.0).astype(x.dtype)


def down(
    x: Float[Array, "... in"], a: Float[Array, "in rank"], rate: float, key: jax.Array | None
) -> Float[Array, "... rank"]:
    """`drop(x) a`. The backward pass makes the dropped input again instead of keeping it."""

    def product(x: jax.Array, a: jax.Array, key: jax.Array | None) -> jax.Array:
        return drop(x, rate, key) @ a.astype(x.dtype)

    if key is None or rate == 0.0:
        return keep_narrow(product(x, a, None))
    return keep_narrow(jax.checkpoint(product, prevent_cse=False)(x, a, key))


@jax.custom_vjp
def up(narrow: Float[Array, "... rank"], b: Float[Array, "rank out"]) -> Float[Array, "... out"]:
    """`narrow @ b`, whose gradient to b has the narrow factor on the left.

    Plain autodiff puts the wide cotangent there, and XLA's CPU compiler then writes it out transposed.
    """
    return narrow @ b


def _up_forward(narrow: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return narrow @ b, (narrow, b)


def _up_backward(
    residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    narrow, b = residuals
    return contract_transposed(cotangent, b), jnp.einsum("...r,...o->ro", narrow, cotangent)


up.defvjp(_up_forward, _up_backward)


def draw_a(site: Site) -> Float[Array, "*layers in rank"]:
    """a ~ U(-1/sqrt(in), 1/sqrt(in)), which is PyTorch's Kaiming-uniform with a = sqrt(5).

    On an embedding, whose input is one-hot, a ~ N(0, 1): there PEFT draws b so and leaves a at zero,
    under which a frozen a (LoRA-FA) could never learn. Entries beyond a layer's own rank are 0.
    """
    shape = site.stack(site.matrix_shape[0], site.rank)
    if site.embedding:
        a = jax.random.normal(site.key, shape, site.dtype)
    else:
        bound = 1.0 / math.sqrt(site.matrix_shape[0])
        a = jax.random.uniform(site.key, shape, site.dtype, -bound, bound)
    return a * jnp.broadcast_to(jnp.expand_dims(site.mask(site.rank), -2), shape)


@weight
class LoRA(Adapter):
    """Low-rank adaptation (arXiv 2106.09685, eq. 3): `x W' = x W + s (x a) b`, s = alpha / r.

    Ranks that differ between stacked layers are padded with zeros in a and b to the largest, which is
    exact and stays so in training: a padded entry gets a gradient of zero.

    Attributes:
        base: the weight W (in, out) that stays as it is.
        a: (in, rank); b: (rank, out), zero at first, so that a fresh adapter changes nothing.
        scale: s, (); with stacked layers (layers,), 0 where a layer is not adapted.
        key: a dropout key, only while training.
        dropout: the rate on the adapter's input.
        ranks: the true rank of each layer.
        tie_adapters: on an embedding, whether a head tied to it sees the adapter too.
        read: the input by another name, and narrow: that times a, if it is known; both only inside of `contract_each`.
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "a": ("in", "rank"),
        "b": ("rank", "out"),
        "scale": (),
        "key": (),
    }
    base: Any
    a: Any
    b: Any
    scale: Any
    key: Any = None
    dropout: float = static(default=0.0)
    ranks: tuple[int, ...] = static(default=())
    tie_adapters: bool = static(default=False)
    read: Any = None
    narrow: Any = None

    @classmethod
    def at(cls, site: Site, **parts: Any) -> Any:
        """A fresh adapter for a site; `parts` are those a subclass adds."""
        a, b = site.start or (
            draw_a(site),
            jnp.zeros(site.stack(site.rank, site.matrix_shape[1]), site.dtype),
        )
        return cls(
            base=site.base,
            a=a,
            b=b,
            scale=site.scale(),
            dropout=site.dropout,
            ranks=site.ranks,
            tie_adapters=site.tie_adapters,
            **parts,
        )

    def narrowing(self) -> Float[Array, "in rank"] | None:
        dropped = self.key is not None and self.dropout > 0.0
        return None if dropped else self.a  # each drops an input of its own

    def reading(self, x: Float[Array, "... in"], narrow: Any = None) -> Any:
        return replace(super().reading(x), read=x, narrow=narrow)

    def delta(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        """s (x a) b, scaled where it is narrow."""
        narrow = self.narrow
        if narrow is None:
            narrow = down(self._input(x), self.a, self.dropout, self.key)
        return up(narrow * self.scale.astype(x.dtype), self.b.astype(x.dtype))

    def _input(self, x: Float[Array, "... in"]) -> Float[Array, "... in"]:
        """What the adapter reads: x, by another name if it has one."""
        return x if self.read is None else self.read

    def contract(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        y = contract(x, self.base)
        delta = self.delta(x)
        if x.shape[-1] > 2 * y.shape[-1]:
            delta = jax.lax.optimization_barrier(delta)
        # In this order a TPU adds the delta while it writes the base's product; in the other it reads that again. v6e
        # computes the delta there too, but a wide input leaves no room for that in its fast memory.
        return keep(delta + y)

    def contract_transposed(self, x: Float[Array, "... out"]) -> Float[Array, "... in"]:
        narrow = contract_transposed(x, self.b) * self.scale.astype(x.dtype)
        return contract_transposed(x, self.base) + contract_transposed(narrow, self.a)

    def take(self, ids: Int[Array, "..."]) -> Float[Array, "... out"]:
        rows = take(self.base, ids)
        narrow = take(self.a, ids).astype(rows.dtype) * self.scale.astype(rows.dtype)
        return rows + narrow @ self.b.astype(rows.dtype)

    def change(self, precision: str | None = "highest") -> Float[Array, "... in out"]:
        """s a b: what the adapter adds to W, in the adapter's dtype."""
        return times(self.scale, jnp.matmul(self.a, self.b, precision=precision))

    def materialize(self) -> Float[Array, "... in out"]:
        base = materialize(self.base)
        change = self.change().reshape(base.shape)
        return (base.astype(change.dtype) + change).astype(base.dtype)

    def as_lora(self) -> LoRA:
        """The ordinary LoRA that computes the same: what is written to disk."""
        return self

    def to_peft(self, embedding: bool = False) -> Peft | None:
        stored = self.as_lora()
        if is_adapter(stored.base):
            return None
        return Peft("lora", peft_layers(stored, functools.partial(peft_parts, embedding=embedding)))

    def bind_dropout(self, key: jax.Array) -> Any:
        if not self.dropout:
            return self
        layers = self.a.shape[0] if self.a.ndim == 3 else None
        return replace(self, key=key if layers is None else jax.random.split(key, layers))


def peft_layers(
    adapter: Any, parts: Callable[[Any, int], dict[str, jax.Array]]
) -> dict[int, PeftLayer]:
    """The adapted layers of a LoRA, each by `parts(one layer's adapter, its true rank)`."""
    stacked = adapter.b.ndim == 3
    layers = len(adapter.b) if stacked else 1
    scales = np.broadcast_to(np.asarray(adapter.scale).reshape(-1), (layers,))
    ranks = adapter.ranks or (adapter.b.shape[-2],) * layers
    return {
        layer: PeftLayer(rank, float(scales[layer]), parts(_one(adapter, layer), rank))
        for layer, rank in enumerate(ranks)
        if rank
    }


def _one(adapter: Any, layer: int) -> Any:
    """One layer's a, b and magnitude; the base is left alone."""
    if adapter.b.ndim == 2:
        return adapter
    own = {"a", "b", "magnitude"} & {field.name for field in dataclasses.fields(adapter)}
    return replace(adapter, **{name: getattr(adapter, name)[layer] for name in own})


def peft_parts(lora: LoRA, rank: int, embedding: bool) -> dict[str, jax.Array]:
    """a and b of one layer under PEFT's names, (out, in) as PyTorch has them."""
    names = EMBEDDING_PARTS if embedding else LINEAR_PARTS
    return dict(zip(names, (lora.a[:, :rank].T, lora.b[:rank].T), strict=True))


def times(scale: Float[Array, "*layers"], matrix: Float[Array, "*layers in out"]) -> jax.Array:
    """A factor a layer on a stack of matrices."""
    return matrix * jnp.broadcast_to(scale[..., None, None], matrix.shape).astype(matrix.dtype)


def doubled(lora: LoRA, a: tuple[Any, Any], b: tuple[Any, Any]) -> LoRA:
    """The LoRA of twice the rank with the sum of both products. Per layer, true ranks come first and padding last."""
    rank = lora.a.shape[-1]
    order = jnp.asarray(
        [
            [
                *range(true),
                *range(rank, rank + true),
                *range(true, rank),
                *range(rank + true, 2 * rank),
            ]
            for true in lora.ranks
        ]
    )
    order = order if lora.a.ndim == 3 else order[0]
    wide = jnp.take_along_axis(jnp.concatenate(a, axis=-1), order[..., None, :], axis=-1)
    tall = jnp.take_along_axis(jnp.concatenate(b, axis=-2), order[..., :, None], axis=-2)
    ranks = tuple(2 * true for true in lora.ranks)
    return LoRA(lora.base, wide, tall, lora.scale, ranks=ranks)


def precondition_by_a(gradient: LoRA, frozen: LoRA) -> LoRA:
    """LoRA-FA's second version: `(a^T a)^-1 / s^2` times b's gradient.

    The step in b that moves W nearest to where the full gradient points (arXiv 2308.03303 v2, as in PEFT's
    `LoraFAOptimizer`). In the padding of smaller ranks a^T a is given a diagonal of 1: there b's gradient is 0.

    Args:
        gradient: the trainable tree's weight, b (..., rank, out) alone.
        frozen: the frozen tree's weight, with a and scale.
    """
    gram = jnp.einsum("...ir,...is->...rs", frozen.a, frozen.a, precision="highest")
    diagonal = jnp.diagonal(gram, axis1=-2, axis2=-1)
    padding = (diagonal == 0).astype(gram.dtype)
    eye = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    gram = gram + eye * jnp.broadcast_to(padding[..., None, :], gram.shape)
    scale = jnp.where(frozen.scale == 0, 1.0, frozen.scale)
    b = times(1.0 / jnp.square(scale), _solve_each(gram, gradient.b))
    return replace(gradient, b=b)


def _solve_each(
    matrix: Float[Array, "*layers rank rank"], right: Float[Array, "*layers rank out"]
) -> Float[Array, "*layers rank out"]:
    """`jnp.linalg.solve`, layer by layer.

    jaxlib divides a batch among the threads of XLA's pool and waits for them on one of these: as many such calls at a
    time as there are threads wait for each other for ever (`ParallelBatchMap` in jaxlib/cpu/lapack_kernels.cc).
    """
    if matrix.ndim == 2:
        return jnp.linalg.solve(matrix, right)
    return jax.lax.map(lambda pair: _solve_each(*pair), (matrix, right))
