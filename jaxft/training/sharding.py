"""The mesh of a run, and its trees laid over it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jaxft.errors import UserError
from jaxft.models.sharding import AXES, BATCH, fitted, leaf_spec
from jaxft.tree import PyTree, map_with_paths


def make_mesh(sizes: ConfigDict, devices: list[Any] | None = None) -> Mesh:
    """A mesh (data, fsdp, tensor) of the sizes in `config.mesh`; -1 takes the devices that are left."""
    devices = jax.devices() if devices is None else devices
    known = {axis: sizes[axis] for axis in AXES}
    given = math.prod(size for size in known.values() if size != -1)
    shape = [len(devices) // given if size == -1 else size for size in known.values()]
    if 0 in shape or math.prod(shape) > len(devices):
        asked = ", ".join(f"{axis}={size}" for axis, size in known.items())
        raise UserError(f"config.mesh: {asked} does not fit {len(devices)} devices")
    if -1 in known.values() and math.prod(shape) != len(devices):
        raise UserError(f"config.mesh: {given} does not divide {len(devices)} devices")
    chosen = np.asarray(devices[: math.prod(shape)]).reshape(shape)
    return Mesh(chosen, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def leaf_sharding(mesh: Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of a leaf by its path.

    Raises UserError where the mesh does not divide a dimension, with the numbers.
    """
    spec = leaf_spec(path, len(shape)) if shape else PartitionSpec()
    spec = fitted(path, spec, shape, mesh.shape)
    for size, axis in zip(shape, spec, strict=False):
        parts = mesh.shape[axis] if axis else 1
        if size % parts:
            raise UserError(
                f"config.mesh: {axis}={parts} does not divide {size}, a dimension of {path} {shape}"
            )
    return NamedSharding(mesh, spec)


def shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """The sharding of each leaf; works on optimizer states, whose paths end in their leaf's."""
    return map_with_paths(lambda path, leaf: leaf_sharding(mesh, path, leaf.shape), tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def host_rows(rows: int, mesh: Mesh) -> tuple[int, int]:
    """(first, last + 1) of the rows of a batch that the devices of this host hold."""
    places = batch_sharding(mesh).addressable_devices_indices_map((rows,))
    spans = [place[0].indices(rows) for place in places.values() if place is not None]
    return min(start for start, _, _ in spans), max(stop for _, stop, _ in spans)


def place_batch(batch: Mapping[str, np.ndarray], rows: int, mesh: Mesh) -> dict[str, jax.Array]:
    """The global batch of `rows` rows, of which each host gives its `host_rows`."""
    sharding, (start, _) = batch_sharding(mesh), host_rows(rows, mesh)

    def part(array: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        first, last, _ = index[0].indices(rows)
        return array[first - start : last - start, *index[1:]]

    return {
        name: jax.make_array_from_callback(
            (rows, *array.shape[1:]), sharding, functools.partial(part, array)
        )
        for name, array in batch.items()
    }


def require_rows(rows: int, mesh: Mesh, key: str) -> None:
    """Raises UserError where the devices do not divide the rows of a batch."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % devices:
        raise UserError(
            f"config.{key}: {rows} rows do not divide among data x fsdp = {devices} devices"
        )
