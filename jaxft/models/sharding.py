"""How leaves and activations are laid over a mesh: two lists of patterns, and nothing else decides.

The mesh has the axes data, fsdp, context and tensor. The batch's rows are divided over data and fsdp, their length
over context, kernels over fsdp along one axis and over tensor along the other. A part of a weight follows the axes of
its kernel: the weight says which (`Weight.axes`). Specs are those of one layer: stacked leaves get an axis in front.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec, Sharding
from jaxtyping import Array, Float

from jaxft.tree import PyTree, first_match, flatten_with_paths, map_with_paths
from jaxft.weights import PARTS, divided

AXES = ("data", "fsdp", "context", "tensor")
BATCH = ("data", "fsdp")

# (pattern of a kernel's path, the mesh axes of its (in, out)); the first match holds. What matches none is replicated:
# norms, biases, and VeRA's projections, which kernels of many sizes slice.
LEAVES: tuple[tuple[str, tuple[str | None, str | None]], ...] = (
    ("embed/embedding", ("tensor", "fsdp")),
    ("positions/embedding", (None, "fsdp")),
    ("o_proj/kernel", ("tensor", "fsdp")),
    ("down_proj/kernel", ("tensor", "fsdp")),
    ("kernel", ("fsdp", "tensor")),
)

ACTIVATIONS = (
    ("residual", PartitionSpec(BATCH, ("context", "tensor"), None)),  # (batch, length, hidden)
    ("normalized", PartitionSpec(BATCH, "context", None)),  # the same, as kernels read it
    ("heads", PartitionSpec(BATCH, "tensor", "context", None)),  # (batch, heads, length, head_dim)
    (
        "joined_heads",
        PartitionSpec(BATCH, "context", "tensor"),
    ),  # (batch, length, heads * head_dim)
    ("feed_forward", PartitionSpec(BATCH, "context", "tensor")),  # (batch, length, intermediate)
)

# Parts of a quantized kernel that may be too short to be divided as the kernel is.
BESIDE_CODES = ("scales", "zeros")


def leaf_spec(path: str, ndim: int) -> PartitionSpec:
    """The spec of a leaf: its kernel's axes, those that it has, with the layers' axis in front where there is one.

    A part with a rank and without the kernel's axis over fsdp lies over fsdp along the other, so that no device
    holds, or updates, all of it.

    >>> tuple(leaf_spec("layers/attention/o_proj/kernel/a", 3))
    (None, ('tensor', 'fsdp'), None)
    """
    kernel = first_match(LEAVES, path)
    if kernel is None:
        return PartitionSpec()
    owner: dict[str, str | None] = dict(zip(("in", "out"), kernel, strict=True))
    part = next((name for name in path.split("/") if name in PARTS), None)
    spec: list[Any] = [owner.get(axis) for axis in PARTS[part]] if part else list(kernel)
    if part and "rank" in PARTS[part] and "fsdp" not in spec:
        spec = [axis and (axis, "fsdp") for axis in spec]
    return PartitionSpec(*(None,) * (ndim - len(spec)), *spec) if spec else PartitionSpec()


def fitted(
    path: str, spec: PartitionSpec, shape: tuple[int, ...], mesh: Mapping[str, int]
) -> PartitionSpec:
    """The spec without what does not divide a part beside a kernel.

    Those are the scales or zeros of a quantized kernel, which then stay whole, and what lies over fsdp because it
    would else be whole.
    """

    def fit(size: int, axes: Any) -> Any:
        if isinstance(axes, tuple):
            return axes if size % math.prod(mesh[axis] for axis in axes) == 0 else axes[0]
        beside = path.split("/")[-1] in BESIDE_CODES
        return None if beside and axes is not None and size % mesh[axes] else axes

    return PartitionSpec(*(fit(size, axes) for size, axes in zip(shape, spec, strict=False)))


def _without(axis: str, spec: PartitionSpec) -> PartitionSpec:
    def rest(axes: Any) -> Any:
        if isinstance(axes, tuple):
            return tuple(one for one in axes if one != axis)
        return None if axes == axis else axes

    return PartitionSpec(*(rest(axes) for axes in spec))


def divided_as(params: PyTree, shardings: Callable[[str, tuple[int, ...]], Sharding]) -> PyTree:
    """The tree whose codes are packed so that products divide their rows as the mesh does.

    That is by the axes in `shardings(path, shape)` but fsdp, over which codes are gathered before.
    """

    def parts(path: str, shape: tuple[int, ...]) -> int:
        sharding: Any = shardings(path, shape)
        spec = getattr(sharding, "spec", ())
        if len(spec) < 2:
            return 1
        return parts_of(sharding.mesh, _without("fsdp", PartitionSpec(*spec))[-2])

    return divided(params, parts)


def parts_of(mesh: Any, axes: str | tuple[str, ...] | None) -> int:
    """Into how many parts the mesh divides a dimension that lies over these axes."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names)


def sizes_in_force() -> Mapping[str, int]:
    """The sizes of the axes of the mesh in force; of 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return dict.fromkeys(AXES, 1) | dict(mesh.shape)


def constrain(x: jax.Array, name: str) -> jax.Array:
    """Holds an activation to its spec on the mesh in force; without one, x itself.

    A dimension that does not divide stays whole: that of one token, in decoding. Training's are checked before.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = first_match(ACTIVATIONS, name)

    def fit(size: int, axes: Any) -> Any:
        """As many of the axes as divide the dimension."""
        names = (axes,) if isinstance(axes, str) else axes or ()
        while size % parts_of(mesh, names):
            names = names[:-1]
        return names

    divided = (fit(size, axes) for size, axes in zip(x.shape, spec, strict=True))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*divided))


def summed(x: Float[Array, "batch length hidden"]) -> Float[Array, "batch length hidden"]:
    """What a kernel gives whose input `tensor` divides. Its gradient is gathered to all places of a row's part.

    Otherwise the places would stay divided in the backward pass, as the residual's are, and the kernel be gathered.
    """
    return x if jax.sharding.get_abstract_mesh().empty else _summed(x)


@jax.custom_vjp
def _summed(x: jax.Array) -> jax.Array:
    return x


_summed.defvjp(lambda x: (x, None), lambda _, cotangent: (constrain(cotangent, "normalized"),))


def forked(x: Float[Array, "batch length size"]) -> tuple[jax.Array, jax.Array | None]:
    """What several kernels read, by one name for the kernels and, where it matters, by another for what adapts them.

    Where `tensor` divides the kernels' columns each has a part of the gradient to x, which the devices add up: of
    kernels alone the compiler sums the parts before (the `f` of arXiv 1909.08053), and what comes of adapters, which
    is whole, must not stand between.
    """
    return _forked(x) if sizes_in_force()["tensor"] > 1 else (x, None)


@jax.custom_vjp
def _forked(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, x


_forked.defvjp(lambda x: ((x, x), None), lambda _, cotangents: (cotangents[1] + cotangents[0],))


def gather(kernels: PyTree) -> PyTree:
    """Holds kernels, by their paths or the names of their projections, to their specs without fsdp.

    Said inside the loop over the layers, before anything is computed from them, this gathers one layer at a time,
    in the type it is stored in. Their gradients go back to the specs with fsdp: each device gets its own part.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernels

    def hold(path: str, leaf: Any) -> Any:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        spec = fitted(path, leaf_spec(path, leaf.ndim), leaf.shape, mesh.shape)
        if not jax.dtypes.issubdtype(leaf.dtype, np.inexact):  # no gradient comes back
            return jax.lax.with_sharding_constraint(leaf, _without("fsdp", spec))
        return _gathered(leaf, spec)

    return map_with_paths(hold, kernels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
    return jax.lax.with_sharding_constraint(leaf, _without("fsdp", spec))


def _gathered_forward(leaf: jax.Array, spec: PartitionSpec) -> tuple[jax.Array, None]:
    return _gathered(leaf, spec), None


def _gathered_backward(spec: PartitionSpec, _: None, cotangent: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(cotangent, spec),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a leaf lies on a mesh.

    Attributes:
        path, shape, dtype: the leaf's.
        spec: the mesh axes of its dimensions.
        bytes: of the leaf, once.
        bytes_per_device: of what each device holds.
        copies: how many devices hold the same part.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec
    bytes: int
    bytes_per_device: int
    copies: int

    @property
    def replicated(self) -> bool:
        """Whether every device holds the whole leaf."""
        return self.copies > 1 and self.bytes_per_device == self.bytes

    @property
    def surplus(self) -> int:
        """The bytes, all devices together, beyond one copy."""
        return self.bytes * (self.copies - 1)


def describe(params: PyTree, mesh: Mesh) -> list[Placement]:
    """Every leaf's placement on a mesh, the costliest copies first. Works on abstract trees.

    Args:
        params: a parameter tree, adapted or not, or an optimizer's state over one.
        mesh: concrete or abstract.
    """
    found = []
    for path, leaf in flatten_with_paths(params):
        spec = leaf_spec(path, len(leaf.shape)) if leaf.shape else PartitionSpec()
        spec = fitted(path, spec, leaf.shape, mesh.shape)
        parts = math.prod(parts_of(mesh, axes) for axes in spec)
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        found.append(
            Placement(
                path,
                tuple(leaf.shape),
                str(leaf.dtype),
                spec,
                bytes=size,
                bytes_per_device=size // parts,
                copies=mesh.size // parts,
            )
        )
    return sorted(found, key=lambda placement: (-placement.surplus, placement.path))
