"""How leaves and activations are laid over a mesh: two lists of patterns, and nothing else decides.

The mesh has the axes data, fsdp and tensor. The batch is divided over data and fsdp; kernels over fsdp along one
axis and over tensor along the other. Specs are those of one layer: stacked leaves get an axis in front.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxft.tree import PyTree, first_match, map_with_paths

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

LEAVES = (
    # An adapter's parts follow the contraction that they belong to.
    ("*/a", PartitionSpec("fsdp", None)),
    ("*/a0", PartitionSpec("fsdp", None)),
    ("o_proj/kernel/b", PartitionSpec(None, "fsdp")),
    ("down_proj/kernel/b", PartitionSpec(None, "fsdp")),
    ("o_proj/kernel/b0", PartitionSpec(None, "fsdp")),
    ("down_proj/kernel/b0", PartitionSpec(None, "fsdp")),
    ("*/b", PartitionSpec(None, "tensor")),
    ("*/b0", PartitionSpec(None, "tensor")),
    # Codes, scales and zeros of a quantized kernel lie as the kernel does; what makes its scales is small.
    ("nested", PartitionSpec()),
    ("mean", PartitionSpec()),
    ("blocks", PartitionSpec()),
    ("scale", PartitionSpec()),
    ("bias", PartitionSpec()),
    ("magnitude", PartitionSpec()),
    ("d", PartitionSpec()),
    ("g", PartitionSpec()),
    ("factor", PartitionSpec()),
    ("embed/embedding", PartitionSpec("tensor", "fsdp")),
    ("positions/embedding", PartitionSpec(None, "fsdp")),
    ("o_proj/kernel", PartitionSpec("tensor", "fsdp")),
    ("down_proj/kernel", PartitionSpec("tensor", "fsdp")),
    ("kernel", PartitionSpec("fsdp", "tensor")),
)

ACTIVATIONS = (
    ("residual", PartitionSpec(BATCH, None, None)),  # (batch, length, hidden)
    ("heads", PartitionSpec(BATCH, "tensor", None, None)),  # (batch, heads, length, head_dim)
    ("feed_forward", PartitionSpec(BATCH, None, "tensor")),  # (batch, length, intermediate)
)


BESIDE_CODES = ("scales", "zeros")


def leaf_spec(path: str, ndim: int) -> PartitionSpec:
    """The spec of a leaf: the first pattern's, with the layers' axis in front where the leaf has one."""
    spec = first_match(LEAVES, path, PartitionSpec())
    return PartitionSpec(*(None,) * (ndim - len(spec)), *spec) if len(spec) else spec


def fitted(
    path: str, spec: PartitionSpec, shape: tuple[int, ...], mesh: Mapping[str, int]
) -> PartitionSpec:
    """The spec without the axes that do not divide the scales or zeros of a quantized kernel: those stay whole."""
    if path.split("/")[-1] not in BESIDE_CODES:
        return spec
    return PartitionSpec(
        *(
            axis if axis is None or size % mesh[axis] == 0 else None
            for axis, size in zip(spec, shape, strict=False)
        )
    )


def _without(axis: str, spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*(None if part == axis else part for part in spec))


def constrain(x: jax.Array, name: str) -> jax.Array:
    """Holds an activation to its spec on the mesh in force; without one, x itself."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, first_match(ACTIVATIONS, name))


def gather(kernels: PyTree) -> PyTree:
    """Holds one layer's kernels, by the names of their projections, to their specs without fsdp.

    Said inside the loop over the layers, before anything is computed from them, this gathers one layer at a time,
    in the type it is stored in.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernels

    def hold(path: str, leaf: Any) -> Any:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        spec = fitted(path, leaf_spec(path, leaf.ndim), leaf.shape, mesh.shape)
        return jax.lax.with_sharding_constraint(leaf, _without("fsdp", spec))

    return map_with_paths(hold, kernels)
