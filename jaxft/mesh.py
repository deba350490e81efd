"""The mesh's axes, and how activations lie on them: a list of patterns, and nothing else decides.

The mesh has the axes data, fsdp, context and tensor. The batch's rows are divided over data and fsdp, their length
over context, kernels over fsdp along one axis and over tensor along the other (`jaxft.weights.placement`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxft.tree import first_match

AXES = ("data", "fsdp", "context", "tensor")
BATCH = ("data", "fsdp")

ACTIVATION_SPECS = (
    ("residual", PartitionSpec(BATCH, ("context", "tensor"), None)),  # (batch, length, hidden)
    ("normalized", PartitionSpec(BATCH, "context", None)),  # the same, as kernels read it
    ("heads", PartitionSpec(BATCH, "tensor", "context", None)),  # (batch, heads, length, head_dim)
    (
        "joined_heads",
        PartitionSpec(BATCH, "context", "tensor"),
    ),  # (batch, length, heads * head_dim)
    (
        "cache",
        PartitionSpec(None, BATCH, "tensor", None, None),
    ),  # (layers, batch, heads, length, head_dim)
    ("feed_forward", PartitionSpec(BATCH, "context", "tensor")),  # (batch, length, intermediate)
)


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
    spec = first_match(ACTIVATION_SPECS, name)

    def fit(size: int, axes: Any) -> Any:
        """As many of the axes as divide the dimension."""
        names = (axes,) if isinstance(axes, str) else axes or ()
        while size % parts_of(mesh, names):
            names = names[:-1]
        return names

    divided = (fit(size, axes) for size, axes in zip(x.shape, spec, strict=True))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*divided))


def without(axis: str, spec: PartitionSpec) -> PartitionSpec:
    """The spec of an array that this axis of the mesh does not divide."""

    def rest(axes: Any) -> Any:
        if isinstance(axes, tuple):
            return tuple(one for one in axes if one != axis)
        return None if axes == axis else axes

    return PartitionSpec(*(rest(axes) for axes in spec))
