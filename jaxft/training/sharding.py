"""The mesh of a run, and its trees and batches laid over it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jaxft.errors import UserError, counted, worded
from jaxft.mesh import AXES, BATCH, parts_of
from jaxft.models.config import Config
from jaxft.models.transformer import initial_params
from jaxft.tree import PyTree, flatten_with_paths, map_with_paths
from jaxft.weights.placement import fitted, leaf_spec


def make_mesh(sizes: ConfigDict, devices: list[Any] | None = None) -> Mesh:
    """A mesh (data, fsdp, context, tensor) of the sizes in `config.mesh`; -1 takes the devices that are left.

    Neighbours on the last axes are neighbours on the machine's network where the devices tell where they are.

    Raises:
        UserError: the sizes do not fit the devices, or leave a process without one.
    """
    devices = jax.devices() if devices is None else devices
    known = {axis: sizes[axis] for axis in AXES}
    given = math.prod(size for size in known.values() if size != -1)
    shape = [len(devices) // given if size == -1 else size for size in known.values()]
    asked = ", ".join(f"{axis}={size}" for axis, size in known.items())
    if 0 in shape or math.prod(shape) > len(devices):
        raise UserError(f"config.mesh: {asked} does not fit {counted(len(devices), 'device')}")
    if -1 in known.values() and math.prod(shape) != len(devices):
        raise UserError(f"config.mesh: {given} does not divide {counted(len(devices), 'device')}")
    chosen = devices[: math.prod(shape)]
    left_out = {device.process_index for device in devices[len(chosen) :]}
    if left_out - {device.process_index for device in chosen}:
        raise UserError(
            f"config.mesh: {asked} leaves processes without a device; it must take all "
            f"{len(devices)}: set one axis to -1"
        )
    if len(chosen) == len(devices) and devices[0].platform == "tpu":
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        array = np.asarray(chosen).reshape(shape)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def leaf_sharding(mesh: Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of a leaf by its path.

    Raises UserError where the mesh does not divide a dimension, with the numbers that do.
    """
    spec = leaf_spec(path, len(shape)) if shape else PartitionSpec()
    spec = fitted(path, spec, shape, mesh.shape)
    for size, axes in zip(shape, spec, strict=False):
        if size % parts_of(mesh, axes):
            raise UserError(
                f"config.mesh: {axes}={parts_of(mesh, axes)} does not divide {size}, a dimension "
                f"of {path} {shape}; {_divisors(size)} do"
            )
    return NamedSharding(mesh, spec)


def require_divisible(model: Config, mesh: Mesh) -> None:
    """Raises UserError where an axis does not divide the model, with the sizes that divide all of it."""
    tree = jax.eval_shape(lambda: initial_params(model, jax.random.key(0)))
    wanted: dict[str, dict[str, int]] = {axis: {} for axis in AXES}
    wanted["tensor"] |= {"heads": model.heads, "key_heads": model.key_heads}
    for path, leaf in flatten_with_paths(tree):
        for size, axes in zip(leaf.shape, leaf_spec(path, len(leaf.shape)), strict=False):
            if axes is not None:
                wanted[axes][path] = size
    for axis, found in wanted.items():
        parts = mesh.shape[axis]
        for name, size in found.items():
            if size % parts:
                raise UserError(
                    f"config.mesh: {axis}={parts} does not divide {size}, the model's {name}; "
                    f"{_divisors(math.gcd(*found.values()))} divide all of it"
                )


def _divisors(number: int) -> str:
    """The numbers by which it divides, the largest few.

    >>> _divisors(12)
    '1, 2, 3, 4, 6 and 12'
    """
    found = [part for part in range(1, number + 1) if number % part == 0]
    *rest, last = found if len(found) < 12 else [*found[:10], found[-1]]
    return f"{', '.join(map(str, rest))} and {last}" if rest else str(last)


def shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """The sharding of each leaf; works on optimizer states, whose paths end in their leaf's."""
    return map_with_paths(lambda path, leaf: leaf_sharding(mesh, path, leaf.shape), tree)


def laid_out(tree: PyTree, placed: PyTree) -> PyTree:
    """The shapes of a tree's leaves with their shardings."""

    def one(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(one, tree, placed)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp, their length over context."""
    return NamedSharding(mesh, PartitionSpec(BATCH, "context"))


def host_rows(rows: int, mesh: Mesh) -> tuple[int, int]:
    """(first, last + 1) of the rows of a batch that the devices of this process hold."""
    sharding = NamedSharding(mesh, PartitionSpec(BATCH))
    slices = sharding.addressable_devices_indices_map((rows,))
    spans = [part[0].indices(rows) for part in slices.values() if part is not None]
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
        less, more = rows // devices * devices, (rows // devices + 1) * devices
        near = f"{less} or {more}" if less else str(more)
        raise UserError(
            f"config.{key}: {counted(rows, 'row')} {worded(rows, 'does', 'do')} not divide among data x fsdp = "
            f"{counted(devices, 'device')}; {near} {'do' if less else 'does'}"
        )


def lengths_on(lengths: list[int], mesh: Mesh) -> list[int]:
    """Those of the ascending row lengths that `context` divides, each into two chunks a device.

    Raises UserError where the longest is not among them, with the nearest that is.
    """
    chunks = 2 * mesh.shape["context"] if mesh.shape["context"] > 1 else 1
    if rest := lengths[-1] % chunks:
        near = dict.fromkeys((lengths[-1] - rest or chunks, lengths[-1] - rest + chunks))
        raise UserError(
            f"config.data.max_length: {lengths[-1]} does not divide into 2 x context = {chunks} "
            f"chunks; {' or '.join(map(str, near))} does"
        )
    return [length for length in lengths if length % chunks == 0]
