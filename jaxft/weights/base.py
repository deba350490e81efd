"""The rule by which a kernel leaf multiplies, is looked up, is merged and is stripped of its adapter.

A weight is a `jax.Array` (..., in, out) or a `Weight`: a frozen dataclass registered as a pytree that
stands for the array. Everything outside this package calls the functions below and never asks
which kind it has. A new weight subclasses `Weight`, is decorated by `@weight`, and says how it
contracts and what dense array it equals; the rest follows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxft.kernels.grouped import grouped_product
from jaxft.kernels.joined import joined_products
from jaxft.kernels.remat import keep
from jaxft.kernels.tensor_parallel import column_parallel_input
from jaxft.tree import PyTree, flatten_with_paths

T = TypeVar("T")
C = TypeVar("C", bound=type)
KINDS: list[type[Any]] = []
"""Every kind of weight there is, as `weight` registers them."""


def static(**options: Any) -> Any:
    """A dataclass field that is part of the tree's structure and not a leaf."""
    return dataclasses.field(metadata={"static": True}, **options)


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(static,))
def weight(cls: C) -> C:
    """Makes a `Weight` subclass a frozen dataclass and registers it as a pytree with named parts.

    An optional part (one whose default is None) that is absent is no part of the tree, so that a
    None inside a tree always means a hole left by `partition`. A weight that a tree's walk made has
    the parts of the one walked over, holes or not.
    """
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)  # type: ignore[assignment]
    fields = dataclasses.fields(cls)
    leaves = [field for field in fields if not field.metadata.get("static")]
    statics = [field.name for field in fields if field.metadata.get("static")]

    def present(self: Any) -> tuple[str, ...]:
        return getattr(self, "_parts", None) or tuple(
            field.name
            for field in leaves
            if field.default is not None or getattr(self, field.name) is not None
        )

    def flatten_with_keys(self: Any) -> tuple[list[Any], Any]:
        names = present(self)
        parts = [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names]
        return parts, (names, tuple(getattr(self, name) for name in statics))

    def flatten(self: Any) -> tuple[list[Any], Any]:
        names = present(self)
        return [getattr(self, name) for name in names], (
            names,
            tuple(getattr(self, name) for name in statics),
        )

    def unflatten(structure: Any, parts: Any) -> Any:
        self: Any = object.__new__(cls)
        values = dict.fromkeys((field.name for field in leaves), None)
        values |= dict(zip(structure[0], parts, strict=True))
        values |= dict(zip(statics, structure[1], strict=True))
        for name, value in (values | {"_parts": structure[0]}).items():
            object.__setattr__(self, name, value)
        return self

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    KINDS.append(cls)
    return cls


def replace(weight: T, **parts: Any) -> T:
    """The weight with some parts exchanged."""
    return dataclasses.replace(weight, **parts)  # type: ignore[type-var]


class Weight:
    """What stands for a kernel: a value that knows how to multiply.

    Invariant: every array part of a stacked weight (one for all scanned layers) has the leading axis
    of the layers, its scale included, so that slicing the tree slices the weight.

    Attributes:
        axes: {part: what its axes are, in one layer}: "in" and "out" lie on a mesh as the kernel's do, any other
            name is not divided. A part that is not named here, and is not the base, lies as the kernel does.
        is_adapter: whether it changes another weight, its `base`: an `Adapter`.
        is_encoded: whether its parts are another form of the dense array, whose numbers are then those that count.
        trained: parts that train under every method, of a weight that no row of the table makes.
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    is_adapter: ClassVar[bool] = False
    is_encoded: ClassVar[bool] = False
    trained: ClassVar[tuple[str, ...]] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., in, out): that of the dense array it stands for."""
        raise TypeError(f"{type(self).__name__} does not say its shape")

    @property
    def ndim(self) -> int:
        """How many axes the dense array has."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the dense array it stands for."""
        raise TypeError(f"{type(self).__name__} does not say its dtype")

    def contract(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        """`x @ W'` (..., out), in x's dtype, marked by `keep`."""
        raise TypeError(f"{type(self).__name__} does not say how to contract")

    def contract_groups(
        self, x: Float[Array, "... in"], groups: Int[Array, "..."]
    ) -> Float[Array, "... out"]:
        """`contract` of each row with one of a stack of such weights. The plain way; one may know a cheaper."""
        return grouped_product(x, self, groups, contract)

    def contract_transposed(self, x: Float[Array, "... out"]) -> Float[Array, "... in"]:
        """`x @ W'.T` (..., in): a tied head. The plain way; a weight may know a cheaper one."""
        return contract_transposed(x, self.materialize())

    def take(self, ids: Int[Array, "..."]) -> Float[Array, "... out"]:
        """Rows of W' (..., out): an embedding. The plain way; a weight may know a cheaper one."""
        return take(self.materialize(), ids)

    def materialize(self) -> Float[Array, "... in out"]:
        """The dense array it equals, in the base's dtype."""
        raise TypeError(f"{type(self).__name__} does not say what it equals")

    def base_of(self) -> Any:
        """The weight with its adapter left out: itself, if it is none."""
        return self

    def merged(self, params: Mapping[str, Any]) -> Any:
        """What this weight becomes when the tree's adapters are merged."""
        return materialize(self.bind(params))

    def bind(self, params: Mapping[str, Any]) -> Any:
        """The weight with what it shares with the rest of `params` filled in."""
        return self

    def bind_dropout(self, key: jax.Array) -> Any:
        """The weight with its dropout `key` filled in, if it has a rate."""
        rate = getattr(self, "dropout", 0.0)
        return replace(self, key=key) if rate else self


class PeftLayer(NamedTuple):
    """One layer's adapter as PEFT has it.

    Attributes:
        rank: the true one.
        scale: the factor s.
        parts: {ending of the tensor's name: array, as it is stored}.
    """

    rank: int
    scale: float
    parts: dict[str, jax.Array]


class Peft(NamedTuple):
    """An adapter as PEFT has it.

    Attributes:
        kind: lora, dora or vera; or tokens, which stand beside those.
        layers: {layer: its adapter}, of those that are adapted; layer 0 of a weight that is not stacked.
        tokens: whose rows they are, of the kind tokens.
    """

    kind: str
    layers: dict[int, PeftLayer]
    tokens: tuple[int, ...] = ()


class Adapter(Weight):
    """A weight that changes another one, its base.

    Attributes:
        base: the weight that is adapted.
    """

    is_adapter: ClassVar[bool] = True
    base: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def base_of(self) -> Any:
        return self.base

    def bind(self, params: Mapping[str, Any]) -> Any:
        if isinstance(self.base, Weight):
            return replace(self, base=self.base.bind(params))
        return self

    def to_peft(self, embedding: bool = False) -> Peft | None:
        """What PEFT's format holds of it; None where that format has no tensor for it.

        Args:
            embedding: whether the weight is looked up rather than multiplied.
        """
        del embedding
        return None

    def narrowing(self) -> Float[Array, "in rank"] | None:
        """The matrix by which it multiplies an input first, if that product may be made elsewhere."""
        return None

    def reading(
        self, x: Float[Array, "... in"], narrow: Float[Array, "... rank"] | None = None
    ) -> Any:
        """The weight whose adapters read x, which equals what `contract` is given.

        Args:
            x: the same input by another name: see `column_parallel_input`.
            narrow: x times the matrix of `narrowing`, if it is known.
        """
        del narrow
        if isinstance(self.base, Adapter):
            return replace(self, base=self.base.reading(x))
        return self


def is_weight(leaf: Any) -> bool:
    """Tells a `Weight` from an array or a dictionary: the `is_leaf` of walks over whole weights."""
    return isinstance(leaf, Weight)


def is_adapter(leaf: Any) -> bool:
    """Whether the leaf is a weight that changes another one."""
    return isinstance(leaf, Weight) and leaf.is_adapter


def bare(leaf: Any) -> Any:
    """What stands below all the adapters of a leaf."""
    while is_adapter(leaf):
        leaf = leaf.base
    return leaf


def is_encoded(leaf: Any) -> bool:
    """Whether the leaf is a weight in another form than numbers, as codes and scales are."""
    return isinstance(leaf, Weight) and leaf.is_encoded


def _matrix(kernel: jax.Array, rows: int) -> jax.Array:
    """A kernel of more than two axes (those of other libraries' modules) as the matrix (in, out)."""
    return kernel if kernel.ndim == 2 else kernel.reshape(rows, -1)


def _dense_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ _matrix(kernel, x.shape[-1]).astype(x.dtype)


def contract(
    x: Float[Array, "... in"], weight: Any, groups: Int[Array, "..."] | None = None
) -> Float[Array, "... out"]:
    """`x @ W'`: the product of an input with any weight, or of each row with one of several.

    Args:
        x: (..., in).
        weight: an array (in, out), or a `Weight` that stands for one; with `groups` a stack of them, each array of it
            with the groups as its leading axis, or a `Bank`.
        groups: (...): which of the stack each row of x is multiplied by: the expert or the adapter it belongs to. A row
            of a group that the stack does not have gives 0, and of an adapter that a bank does not have the base's.

    Returns:
        (..., out) in x's dtype.
    """
    if isinstance(weight, Weight):
        return weight.contract(x) if groups is None else weight.contract_groups(x, groups)
    if groups is not None:
        return grouped_product(x, weight, groups, contract)
    if weight.dtype == x.dtype:
        return keep(_dense_product(x, weight))
    # The cast copy of a kernel must be no residual of the backward pass.
    return keep(jax.checkpoint(_dense_product, prevent_cse=False)(x, weight))


def contract_each(
    x: Float[Array, "... in"], weights: Sequence[Any]
) -> list[Float[Array, "... out"]]:
    """`contract` with each of several weights that read the same input, as q, k and v.

    It computes what `contract` does. What their adapters multiply x by first becomes one product, where there are two
    or more of these.
    """
    x, read = column_parallel_input(x)
    adapters = {index: one for index, one in enumerate(weights) if isinstance(one, Adapter)}
    matrices = {
        index: matrix.astype(x.dtype)
        for index, adapter in adapters.items()
        if (matrix := adapter.narrowing()) is not None
    }
    narrow: dict[int, jax.Array] = {}
    if len(matrices) > 1:
        narrow = dict(zip(matrices, joined_products(read, list(matrices.values())), strict=True))
    reading = {index: one.reading(read, narrow.get(index)) for index, one in adapters.items()}
    return [contract(x, reading.get(index, weight)) for index, weight in enumerate(weights)]


def contract_transposed(x: Float[Array, "... out"], weight: Any) -> Float[Array, "... in"]:
    """`x @ W'.T` for a weight (in, out): the head of a model whose embedding serves as one."""
    if isinstance(weight, Weight):
        return weight.contract_transposed(x)
    return jnp.einsum("...o,io->...i", x, weight.astype(x.dtype))


def take(weight: Any, ids: Int[Array, "..."]) -> Float[Array, "... out"]:
    """Rows `ids` of a weight (in, out): the embedding of tokens. (...) -> (..., out)."""
    if isinstance(weight, Weight):
        return weight.take(ids)
    return jnp.take(weight, ids, axis=0, mode="clip")


def materialize(weight: Any) -> Float[Array, "... in out"]:
    """The dense array (..., in, out) that a weight equals, in its base's dtype."""
    return weight.materialize() if isinstance(weight, Weight) else weight


def merged_one(weight: Any, params: Mapping[str, Any]) -> Any:
    """What a weight becomes when the adapters of the tree `params` are merged; an array stays."""
    return weight.merged(params) if isinstance(weight, Weight) else weight


def base_of(weight: Any) -> Any:
    """The weight with its outermost adapter left out; an array is its own base."""
    return weight.base_of() if isinstance(weight, Weight) else weight


def bind(tree: PyTree, params: Mapping[str, Any]) -> PyTree:
    """Gives the weights in `tree` what stands once for all of them in `params`.

    These are VeRA's projections (`params["vera"]`) and the embedding behind a tied head. The decoder binds
    each layer inside its scan, so what is shared is closed over and neither stacked nor copied.
    """
    return jax.tree.map(
        lambda leaf: leaf.bind(params) if isinstance(leaf, Weight) else leaf,
        tree,
        is_leaf=is_weight,
    )


def count_parameters(tree: PyTree) -> int:
    """How many parameters the tree has; an encoded kernel has those of the dense one. Works on abstract trees."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree, is_leaf=is_encoded))


def part_axes(kinds: Iterable[type[Weight]] = KINDS) -> dict[str, tuple[str, ...]]:
    """The `axes` of all these kinds of weight in one table, by the part's name.

    Raises ValueError where two kinds mean different axes by one name.
    """
    found: dict[str, tuple[str, ...]] = {}
    for kind in kinds:
        for name, axes in kind.axes.items():
            if found.setdefault(name, axes) != axes:
                raise ValueError(f"{kind.__name__}: {name} is {axes}, elsewhere {found[name]}")
    return found


def weights_of(params: PyTree) -> list[tuple[str, Weight]]:
    """Lists (path, weight) of every `Weight` in the tree, outermost ones only."""
    return [
        (path, leaf)
        for path, leaf in flatten_with_paths(params, is_leaf=is_weight)
        if isinstance(leaf, Weight)
    ]


def map_weights(kind: type[Any], function: Callable[[Any], Any], params: PyTree) -> PyTree:
    """Applies the function to every weight of a kind, outermost ones only."""
    return jax.tree.map(
        lambda leaf: function(leaf) if isinstance(leaf, kind) else leaf, params, is_leaf=is_weight
    )
