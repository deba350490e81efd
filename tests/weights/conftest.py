"""The kernels that every row of the table of methods is crossed with."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxft
from jaxft.methods import METHODS, defaults
from jaxft.tree import map_with_paths
from jaxft.weights import Permuted, Tied, is_adapter, is_weight, quantized_in

IN, OUT, LAYERS, VOCABULARY = 6, 8, 3, 8  # few shapes: JAX compiles each operation once a shape


def normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def product(path: str) -> Callable[[Any, jax.Array], jax.Array]:
    """params, x -> x @ W' for the kernel at a path, as the decoder computes it."""

    def apply(params: Any, x: jax.Array) -> jax.Array:
        kernel = functools.reduce(lambda tree, name: tree[name], path.split("/"), params)
        return jaxft.contract(x, jaxft.bind(kernel, params))

    return apply


@jax.jit  # a scan outside of jit compiles at every call
def stacked_product(params: Any, x: jax.Array) -> jax.Array:
    """x through a residual layer for each of the stacked kernels, scanned: (4, IN) -> (4, IN)."""

    def body(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        kernel = jaxft.bind(layer["attention"]["q_proj"]["kernel"], params)
        return x + jnp.tanh(jaxft.contract(x, kernel))[:, :IN], None

    return jax.lax.scan(body, x, params["layers"])[0]


def looked_up(params: Any, x: jax.Array) -> jax.Array:
    """Rows of the embedding, for ids that stand in x's place."""
    return jaxft.take(jaxft.bind(params["embed"]["embedding"], params), x)


@dataclasses.dataclass(frozen=True)
class Base:
    """A tree, what adapts it, what it computes, and of what."""

    params: dict[str, Any]
    settings: dict[str, Any]
    path: str
    apply: Callable[[Any, jax.Array], jax.Array]
    x: jax.Array
    cast: Any = None

    def __post_init__(self) -> None:
        """Without another way, every leaf is cast."""
        if self.cast is None:
            plain = lambda dtype: jax.tree.map(lambda leaf: leaf.astype(dtype), self.params)  # noqa: E731
            object.__setattr__(self, "cast", plain)


def quantized(base: Base, scheme: str, **settings: Any) -> Base:
    """The base with its kernel quantized."""
    targets = (base.path,)
    params = jaxft.quantize_params(base.params, scheme, targets=targets, **settings)
    return dataclasses.replace(
        base, params=params, cast=lambda dtype: jaxft.quantize_params(
            base.cast(dtype), scheme, targets=targets, **settings
        )
    )  # fmt: skip


def permuted(base: Base) -> Base:
    """The base with its kernel quantized and its rows in another order."""

    def sort(params: dict[str, Any]) -> dict[str, Any]:
        order = jnp.asarray([4, 0, 5, 2, 1, 3], jnp.int32)
        ordered = jaxft.quantize(params["q_proj"]["kernel"][order], "int4", group_size=3)
        return {"q_proj": {"kernel": Permuted(ordered, order)}}

    return dataclasses.replace(
        base, params=sort(base.params), cast=lambda dtype: sort(base.cast(dtype))
    )


def bases() -> dict[str, Base]:
    dense = dense_bases()
    return dense | {
        "nf4": quantized(dense["plain"], "nf4", group_size=2),
        "nf4 stacked": quantized(dense["stacked"], "nf4", group_size=3, double_quant=False),
        "nf4 flattened": quantized(dense["plain"], "nf4"),
        "int4 embedding": quantized(dense["embedding"], "int4", group_size=4),
        "int8 offset": quantized(dense["layers left out"], "int8", group_size=-1, symmetric=False),
        "int4 permuted": permuted(dense["plain"]),
        "fp4 head": quantized(dense["head"], "fp4", group_size=6),
    }


def dense_bases() -> dict[str, Base]:
    embedding = normal(1, VOCABULARY, IN)
    tied = Tied(
        path=("embed", "embedding"), head_shape=(IN, VOCABULARY), head_dtype=jnp.dtype("float32")
    )
    layers = {"attention": {"q_proj": {"kernel": normal(2, LAYERS, IN, OUT)}}}
    stacked_path = "layers/attention/q_proj/kernel"
    x = normal(3, 4, IN)
    ids = jnp.asarray([0, 5, 7, 5], jnp.int32)
    return {
        "plain": Base(
            {"q_proj": {"kernel": normal(0, IN, OUT)}},
            {},
            "q_proj/kernel",
            product("q_proj/kernel"),
            x,
        ),
        "stacked": Base(
            {"layers": layers},
            {
                "rank_pattern": {r"layers\.0\.attention\.q_proj": 1},
                "alpha_pattern": {"layers.2.*": 7.0},
            },
            stacked_path,
            stacked_product,
            x,
        ),
        "layers left out": Base(
            {"layers": layers}, {"layers_to_transform": (0, 2)}, stacked_path, stacked_product, x
        ),
        "embedding": Base(
            {"embed": {"embedding": embedding}},
            {"targets": ("embed/embedding",)},
            "embed/embedding",
            looked_up,
            ids,
        ),
        "head": Base(
            {"head": {"kernel": normal(4, IN, VOCABULARY)}},
            {"targets": ("head",)},
            "head/kernel",
            product("head/kernel"),
            x,
        ),
        "tied head": Base(
            {"embed": {"embedding": embedding}, "head": {"kernel": tied}},
            {"targets": ("head",)},
            "head/kernel",
            product("head/kernel"),
            x,
        ),
    }


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of the table on one of the bases."""

    base: Base
    method: jaxft.methods.Method
    params: dict[str, Any]

    @property
    def kernel(self) -> Any:
        """What stands at the base's path."""
        return functools.reduce(
            lambda tree, name: tree[name], self.base.path.split("/"), self.params
        )

    @property
    def weight(self) -> Any:
        """The kernel bound: what the decoder multiplies by."""
        return jaxft.bind(self.kernel, self.params)

    def layers(self) -> list[Any]:
        """The weight of each layer, bound after slicing as in the decoder's scan; else the one."""
        if self.kernel.ndim == 2:
            return [self.weight]
        slices = [jax.tree.map(operator.itemgetter(i), self.kernel) for i in range(LAYERS)]
        return [jaxft.bind(one, self.params) for one in slices]

    def randomised(self) -> Case:
        """The same with every part of the adapter off its start."""
        return dataclasses.replace(self, params=randomise(self.params))


def randomise(params: Any) -> Any:
    """Every part of every adapter off its start, by whatever name a new row calls it; factors of layers stay."""

    def moved(path: str, leaf: Any) -> Any:
        if not is_adapter(leaf):
            return leaf
        parts = {"base": moved(f"{path}/base", leaf.base)}
        for field in dataclasses.fields(leaf):
            part, name = getattr(leaf, field.name), f"{path}/{field.name}"
            if field.name != "base" and isinstance(part, jax.Array) and part.ndim > leaf.ndim - 2:
                drawn = normal(len(name) + ord(name[-1]), *part.shape)
                parts[field.name] = part + drawn.astype(part.dtype)
        return dataclasses.replace(leaf, **parts)

    return map_with_paths(moved, params, is_leaf=is_weight)


def make_case(name: str, base: Base, **settings: Any) -> Case:
    """A row of the table with rank 2 on a base; settings that the row does not take are left out."""
    known = defaults(name)
    wanted = {"rank": 2, "alpha": 3.0} | base.settings | settings
    method = METHODS[name](**{key: value for key, value in wanted.items() if key in known})
    return Case(base, method, jaxft.adapt(base.params, method, jax.random.key(5)))


BASES = bases()
# The first row of each kind of weight: the others of its kind compute the same by other parts and factors.
KINDS = {METHODS[name]().weight: name for name in reversed(METHODS)}
EACH = "stacked"  # the base on which every row stands: layers with ranks and scales of their own


def rows_of(names: Iterable[str]) -> list[Any]:
    """Rows; those that another of their kind of weight stands for are thorough."""
    return [
        pytest.param(name, marks=[] if name in KINDS.values() else [pytest.mark.thorough])
        for name in names
    ]


@pytest.fixture(params=rows_of(METHODS), scope="session")
def name(request: pytest.FixtureRequest) -> str:
    """A row of each kind of weight."""
    return request.param


@pytest.fixture(params=rows_of(name for name in METHODS if name != "full"), scope="session")
def adapter(request: pytest.FixtureRequest) -> str:
    """The same without full tuning."""
    return request.param


def crossed(*, rows: bool) -> list[Any]:
    """(row, base) of every row and base but for full tuning over codes, which is refused.

    Those that others stand for are thorough: with `rows` all but each row on one base and each kind of weight on one
    of codes, else all but each kind of weight on each base.
    """
    cases = []
    for base in BASES:
        for name in METHODS:
            weight = METHODS[name]().weight
            if weight is None and quantized_in(BASES[base].params):
                continue
            kind = KINDS[weight] == name
            stays = base == EACH or (kind and base == "nf4") if rows else kind
            marks = [] if stays else [pytest.mark.thorough]
            cases.append(pytest.param((name, base), id=f"{name}-{base}", marks=marks))
    return cases


@pytest.fixture(params=crossed(rows=False))
def case(request: pytest.FixtureRequest) -> Case:
    """Every kind of weight on every base, for laws of its value."""
    name, base = request.param
    return make_case(name, BASES[base])


@pytest.fixture(params=crossed(rows=True))
def row(request: pytest.FixtureRequest) -> Case:
    """Every row, for laws of what it trains."""
    name, base = request.param
    return make_case(name, BASES[base])


@pytest.fixture
def make() -> Callable[..., Case]:
    """(method, base's name, **settings) -> Case."""
    return lambda name, base="plain", **settings: make_case(name, BASES[base], **settings)
