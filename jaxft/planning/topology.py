"""The devices to plan for: a TPU topology that the compiler knows, or this machine's own."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.errors import UserError, nearest
from jaxft.training.memory import memory_of

# The TPU compiler asks for these where there is no TPU.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one JAX device of a kind can do, from its maker's data sheet.

    Attributes:
        memory: bytes of high-bandwidth memory.
        flops: products and sums a second, bfloat16 inputs.
        clock: cycles a second, in which the compiler estimates.
        link: bytes a second that a device sends to its neighbours along one axis of the slice, both ways.
    """

    memory: float
    flops: float
    clock: float
    link: float


CHIPS = {
    "v4": Chip(16 * GIB, 137.5e12, 1.05e9, 90e9),  # a device is one of the chip's two cores
    "v5e": Chip(16 * GIB, 197e12, 1.5e9, 90e9),
    "v5p": Chip(95 * GIB, 459e12, 1.75e9, 180e9),
    "v6e": Chip(32 * GIB, 918e12, 1.75e9, 180e9),
}


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices that a plan is made for.

    Attributes:
        name: the topology, or `local (KIND)`.
        devices: all there are.
        chip: what one can do; None for this machine's own.
        axes: sizes of the slice, as (4, 4).
    """

    name: str
    devices: Sequence[Any]
    chip: Chip | None
    axes: tuple[int, ...]


def tpu_devices(topology: str) -> Devices:
    """The devices of a slice such as `v5e:4x4`, described by libtpu; no TPU is needed.

    Raises:
        UserError: libtpu is not installed, the kind is unknown, or the slice does not exist.
    """
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS or not shape:
        raise UserError(
            f"--topology takes {' | '.join(CHIPS)} and a shape, as v5e:4x4, not {topology!r}"
            f"{nearest(kind, CHIPS)}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "planning for a TPU needs its compiler: pip install 'jaxft[tpu]' (or --device local)"
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    # Of one chip alone, as in a notebook, libtpu would have a host of four by default, and refuse.
    alone = {} if set(shape) - set("1x") else {"chips_per_host_bounds": (1, 1, 1)}
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology, **alone)
    except Exception as error:  # libtpu's own kinds of error
        reason = str(error).split("\n")[0]
        raise UserError(f"--topology {topology}: {reason}") from None
    axes = tuple(int(size) for size in shape.split("x"))
    return Devices(topology, tuple(description.devices), CHIPS[kind], axes)


def local_devices() -> Devices:
    """The devices of this machine."""
    devices = jax.devices()
    return Devices(f"local ({devices[0].device_kind})", devices, None, (len(devices),))


def local_memory() -> int | None:
    """Bytes of a local device's memory; on a CPU, the machine's."""
    return memory_of(jax.devices()[0])


@functools.cache
def local_flops(dtype: str) -> float:
    """Products and sums a second of a matrix product on this machine, measured: the best of five."""
    square = jnp.ones((2048, 2048), jnp.dtype(dtype))
    product = jax.jit(jnp.matmul)
    product(square, square).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(square, square).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(seconds)
