"""VeRA: two frozen random projections for the whole model, two trained vectors for each kernel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxft.kernels.remat import keep
from jaxft.weights.base import (
    Adapter,
    Peft,
    PeftLayer,
    contract,
    is_adapter,
    materialize,
    replace,
    static,
    weight,
)
from jaxft.weights.lora import down
from jaxft.weights.site import Site


def _uniform(
    generator: np.random.RandomState, shape: tuple[int, int], fan_in: int
) -> Float[np.ndarray, "rows columns"]:
    """U(-sqrt(6/fan_in), sqrt(6/fan_in)) as PyTorch's CPU generator draws it: 24 low bits of MT19937."""
    bits = generator.randint(0, 2**32, size=shape, dtype=np.uint32) & np.uint32(2**24 - 1)
    bound = np.float32(math.sqrt(6.0 / fan_in))
    return bits.astype(np.float32) * np.float32(2**-24) * (bound - -bound) + -bound


def drawn_projections(
    rank: int, rows: int, columns: int, seed: int
) -> tuple[Float[np.ndarray, "rows rank"], Float[np.ndarray, "rank columns"]]:
    """a and b in float32, as PEFT draws them from this seed."""
    generator = np.random.RandomState(seed)
    a = _uniform(generator, (rank, rows), fan_in=rows).T
    return a, _uniform(generator, (columns, rank), fan_in=rank).T


def projections(sites: Sequence[Site], seed: int = 0) -> dict[str, Any]:
    """The matrices that all sites share, as the subtree `vera`: a (in, rank), b (rank, out).

    Sized to the largest adapted kernel, from which each slices its top left corner; drawn as PEFT draws
    them (A, then B, Kaiming-uniform), so that an adapter saved without them can be read by its seed.
    """
    rank = max(site.rank for site in sites)
    rows = max(site.matrix_shape[0] for site in sites)
    columns = max(site.matrix_shape[1] for site in sites)
    a, b = drawn_projections(rank, rows, columns, seed)
    dtype = sites[0].dtype
    return {"vera": {"a": jnp.asarray(a, dtype), "b": jnp.asarray(b, dtype)}}


@weight
class VeRA(Adapter):
    """Vector-based random matrix adaptation (arXiv 2310.11454, eq. 2): `x W' = x W + ((x a * d) b) * g`.

    The paper writes L_b and L_d for the diagonal matrices g and d. There is no alpha. A layer that is not
    adapted has d = g = 0, which gives both a gradient of zero.

    Attributes:
        base: the weight W (in, out).
        d: (rank,), 0.1 at first; g: (out,), zero at first, so that a fresh adapter changes nothing.
        a: (in, rank), b: (rank, out): slices of the tree's `vera`, filled in by `bind`.
        key: a dropout key, only while training.
        dropout: the rate on the adapter's input.
        ranks: the rank of each layer, or 0.
        read: the input by another name, only inside of `contract_each`.
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {"d": ("rank",), "g": ("out",), "key": ()}
    base: Any
    d: Any
    g: Any
    a: Any = None
    b: Any = None
    key: Any = None
    dropout: float = static(default=0.0)
    ranks: tuple[int, ...] = static(default=())
    read: Any = None

    @classmethod
    def at(cls, site: Site, d_initial: float = 0.1) -> VeRA:
        """A fresh adapter for a site."""
        d = jnp.full(site.stack(site.rank), d_initial, site.dtype) * site.mask(site.rank)
        return cls(
            base=site.base,
            d=d,
            g=jnp.zeros(site.stack(site.matrix_shape[1]), site.dtype),
            dropout=site.dropout,
            ranks=site.ranks,
        )

    def bind(self, params: Mapping[str, Any]) -> VeRA:
        shared, rank, columns = params["vera"], self.d.shape[-1], self.g.shape[-1]
        rows = math.prod(self.base.shape[self.d.ndim - 1 :]) // columns
        bound = super().bind(params)
        return replace(bound, a=shared["a"][:rows, :rank], b=shared["b"][:rank, :columns])

    def reading(self, x: Float[Array, "... in"], narrow: Any = None) -> Any:
        return replace(super().reading(x), read=x)

    def contract(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        read = x if self.read is None else self.read
        narrow = down(read, self.a, self.dropout, self.key)
        narrow = narrow * jnp.broadcast_to(self.d.astype(x.dtype), narrow.shape)
        wide = narrow @ self.b.astype(x.dtype)
        change = wide * jnp.broadcast_to(self.g.astype(x.dtype), wide.shape)
        return keep(contract(x, self.base) + change)

    def to_peft(self, embedding: bool = False) -> Peft | None:
        del embedding
        if is_adapter(self.base):
            return None
        d, g = jnp.atleast_2d(self.d), jnp.atleast_2d(self.g)
        ranks = self.ranks or (d.shape[-1],) * len(d)
        return Peft(
            "vera",
            {
                layer: PeftLayer(rank, 1.0, {"vera_lambda_d": d[layer], "vera_lambda_b": g[layer]})
                for layer, rank in enumerate(ranks)
                if rank
            },
        )

    def change(self) -> Float[Array, "... in out"]:
        """a diag(d) b diag(g): what the adapter adds to W."""
        stack = self.d.shape[:-1]
        a = jnp.broadcast_to(self.a, (*stack, *self.a.shape))
        narrow = a * jnp.broadcast_to(self.d[..., None, :], a.shape)
        b = jnp.broadcast_to(self.b, (*stack, *self.b.shape))
        b = b * jnp.broadcast_to(self.g[..., None, :], b.shape)
        return jnp.matmul(narrow, b, precision="highest")

    def materialize(self) -> Float[Array, "... in out"]:
        base = materialize(self.base)
        change = self.change().reshape(base.shape)
        return (base.astype(change.dtype) + change).astype(base.dtype)

    def bind_dropout(self, key: jax.Array) -> VeRA:
        if not self.dropout:
            return self
        keys = jax.random.split(key, self.d.shape[0]) if self.d.ndim == 2 else key
        return replace(self, key=keys)
