"""How leaves lie on a mesh: a list of patterns, and nothing else decides.

A part of a weight follows the axes of its kernel: the weight says which (`Weight.axes`). Specs are those of one
layer: stacked leaves get an axis in front.
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

from jaxft.mesh import parts_of, without
from jaxft.tree import PyTree, first_match, flatten_with_paths, map_with_paths
from jaxft.weights.base import part_axes
from jaxft.weights.quantized.weight import divided

# (pattern of a kernel's path, the mesh axes of its (in, out)); the first match holds. What matches none is replicated:
# norms, biases, and VeRA's projections, which kernels of many sizes slice.
LEAVES: tuple[tuple[str, tuple[str | None, str | None]], ...] = (
    ("embed/embedding", ("tensor", "fsdp")),
    ("layer_embed/embedding", ("tensor", "fsdp")),
    ("positions/embedding", (None, "fsdp")),
    ("o_proj/kernel", ("tensor", "fsdp")),
    ("output_proj/kernel", ("tensor", "fsdp")),
    ("down_proj/kernel", ("tensor", "fsdp")),
    ("kernel", ("fsdp", "tensor")),
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
    known = part_axes()
    axes = next((known[name] for name in path.split("/") if name in known), None)
    spec: list[Any] = list(kernel) if axes is None else [owner.get(axis) for axis in axes]
    if axes and "rank" in axes and "fsdp" not in spec:
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


def divided_as(params: PyTree, shardings: Callable[[str, tuple[int, ...]], Sharding]) -> PyTree:
    """The tree whose codes are packed so that products divide their rows as the mesh does.

    That is by the axes in `shardings(path, shape)` but fsdp, over which codes are gathered before.
    """

    def parts(path: str, shape: tuple[int, ...]) -> int:
        sharding: Any = shardings(path, shape)
        spec = getattr(sharding, "spec", ())
        if len(spec) < 2:
            return 1
        return parts_of(sharding.mesh, without("fsdp", PartitionSpec(*spec))[-2])

    return divided(params, parts)


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
            return jax.lax.with_sharding_constraint(leaf, without("fsdp", spec))
        return _gathered(leaf, spec)

    return map_with_paths(hold, kernels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
    return jax.lax.with_sharding_constraint(leaf, without("fsdp", spec))


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
