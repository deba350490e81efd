"""LoRA that begins at a matrix's principal parts, or at what quantizing it leaves, instead of at zero."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.errors import UserError
from jaxft.weights.base import materialize, static, weight
from jaxft.weights.lora import LoRA, doubled
from jaxft.weights.site import Site

STARTS = ("default", "loftq", "pissa")
Factors = tuple[Float[np.ndarray, "in rank"], Float[np.ndarray, "rank out"]]


def principal(matrix: Float[np.ndarray, "in out"], rank: int) -> Factors:
    """a, b whose product is nearest to the matrix among those of that rank: U sqrt(S), sqrt(S) V^T of its SVD."""
    u, s, v = np.linalg.svd(np.asarray(matrix, np.float32), full_matrices=False)
    root = np.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * v[:rank]


_dense = jax.jit(materialize)


def alternate(
    kernel: Float[np.ndarray, "in out"],
    rank: int,
    start: str,
    iterations: int,
    quantize: Callable[[Float[np.ndarray, "in out"]], Any],
) -> tuple[Any, Factors]:
    """The quantized base and the a, b of a start over it: Q + a b comes near to the kernel W.

        loftq: a b = 0, then T times  Q = q(W - a b);  a, b = SVD_r(W - Q)        (arXiv 2310.08659, algorithm 1)
        pissa: a, b = SVD_r(W), Q = q(W - a b), then T - 1 times  a, b = SVD_r(W - Q);  Q = q(W - a b)
                                                                   (arXiv 2404.02948, section 4 and appendix)

    After one iteration LoftQ's Q is q(W), the base that any adapter would have.

    Args:
        kernel: W.
        rank: r.
        start: loftq | pissa.
        iterations: T.
        quantize: q: kernel -> the quantized weight.
    """
    dense = np.asarray(kernel, np.float32)

    def rounded(factors: Factors | None) -> tuple[Any, np.ndarray]:
        rest = dense if factors is None else dense - factors[0] @ factors[1]
        made = quantize(rest.astype(kernel.dtype))
        with jax.default_device(jax.devices("cpu")[0]):
            return made, dense - np.asarray(_dense(made), np.float32)

    factors = principal(dense, rank) if start == "pissa" else None
    base, error = rounded(factors)
    for _ in range(iterations - 1):
        factors = principal(error, rank)
        base, error = rounded(factors)
    return base, principal(error, rank) if factors is None or start == "loftq" else factors


@weight
class LowRankStart(LoRA):
    """LoRA that does not begin at zero (PiSSA, LoftQ): `x W' = x W + s (x a) b - s (x a0) b0`.

    The papers take s a0 b0 off the base. Where the base is dense it stays as it is here and the product is taken off
    in passing: so it is no copy, a fresh adapter changes nothing in any dtype, and the adapter left out is the base.
    Where the base is quantized, it was taken off before (`moved`), and the adapter left out is the base and the start.

    Attributes:
        a0: (in, rank), b0: (rank, out): where a and b begin, frozen.
        moved: whether the base lacks s a0 b0.
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **LoRA.axes,
        "a0": ("in", "rank"),
        "b0": ("rank", "out"),
    }
    # Defaults keep the dataclass's order legal after LoRA's optional fields; they are always given.
    a0: Any = ()
    b0: Any = ()
    moved: bool = static(default=False)

    @classmethod
    def at(cls, site: Site, moved: bool = False, **parts: Any) -> Any:
        """The adapter for a site, at the site's `start`."""
        fresh = LoRA.at(site)
        # Copies: the trained leaves are donated to the step, the frozen ones are not.
        a0, b0 = jnp.copy(fresh.a), jnp.copy(fresh.b)
        own = {field.name: getattr(fresh, field.name) for field in dataclasses.fields(LoRA)}
        return cls(**own, a0=a0, b0=b0, moved=moved, **parts)

    def _start(self) -> LoRA:
        return LoRA(self.base, self.a0, self.b0, self.scale, ranks=self.ranks)

    def narrowing(self) -> Float[Array, "in rank"] | None:
        """Not where the start is taken off in passing: of a fresh adapter that is what is added, to the last bit."""
        return super().narrowing() if self.moved else None

    def delta(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        adapted = super().delta(x)
        return adapted if self.moved else adapted - self._start().delta(self._input(x))

    def contract_transposed(self, x: Float[Array, "... out"]) -> Float[Array, "... in"]:
        return self._plain().contract_transposed(x)

    def take(self, ids: Int[Array, "..."]) -> Float[Array, "... out"]:
        return self._plain().take(ids)

    def change(self, precision: str | None = "highest") -> Float[Array, "... in out"]:
        change = super().change(precision)
        return change if self.moved else change - self._start().change(precision)

    def base_of(self) -> Any:
        return self._start() if self.moved else self.base

    def _plain(self) -> LoRA:
        """The ordinary LoRA over the same base that computes the same, its ranks not told apart."""
        if self.moved:
            return LoRA(self.base, self.a, self.b, self.scale)
        a = jnp.concatenate([self.a, self.a0], axis=-1)
        return LoRA(self.base, a, jnp.concatenate([self.b, -self.b0], axis=-2), self.scale)

    def as_lora(self) -> LoRA:
        """What is written to disk: over a moved base the adapter itself, else PEFT's conversion, of twice the rank."""
        if self.moved:
            return LoRA(self.base, self.a, self.b, self.scale, ranks=self.ranks)
        return doubled(self, (self.a, self.a0), (self.b, -self.b0))


def start_of_dense(site: Site) -> tuple[Any, Any]:
    """PiSSA's a, b (..., in, rank) and (..., rank, out) at a site whose kernel is dense, layer by layer on the host."""
    layers = range(len(site.ranks)) if site.stacked else (None,)

    def kernel(layer: int | None) -> np.ndarray:
        one = site.bound if layer is None else jax.tree.map(lambda part: part[layer], site.bound)
        return np.asarray(materialize(one)).reshape(site.matrix_shape)

    return stacked_start(
        site, {layer or 0: principal(kernel(layer), site.ranks[layer or 0]) for layer in layers}
    )


def stacked_start(site: Site, factors: Mapping[int, Factors]) -> tuple[Any, Any]:
    """The layers' a, b over s as the site's arrays, smaller ranks padded with zeros."""
    rows, columns = site.matrix_shape
    a = np.zeros((len(site.ranks), rows, site.rank), np.float32)
    b = np.zeros((len(site.ranks), site.rank, columns), np.float32)
    for layer, (left, right) in factors.items():
        scale = np.float32(site.scales[layer] or 1.0)
        root = np.sqrt(scale)
        a[layer, :, : left.shape[1]], b[layer, : len(right)] = left / root, right / root
    pair = (a, b) if site.stacked else (a[0], b[0])
    return jnp.asarray(pair[0], site.dtype), jnp.asarray(pair[1], site.dtype)


def require_rank(site: Site, start: str) -> None:
    """Raises UserError where a rank is larger than the kernel's."""
    if site.rank > min(site.matrix_shape):
        raise UserError(
            f"method.init {start}: {site.path} {site.matrix_shape} has no {site.rank} principal parts: take a rank of "
            f"at most {min(site.matrix_shape)}"
        )
