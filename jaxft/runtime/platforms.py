"""Which platforms JAX looks for: not TPUs, where their library is installed and there are none."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

TPUS = ("accel[0-9]*", "vfio/[0-9]*")  # in /dev
GPUS = {"cuda": ("nvidia[0-9]*", "dxg"), "rocm": ("kfd",)}
PLUGINS = {"cuda": ("jax_cuda12_plugin", "jax_cuda13_plugin"), "rocm": ("jax_rocm7_plugin",)}


def without_absent_tpus() -> None:
    """Has JAX not ask libtpu for TPUs on a machine that has none. To be called before JAX looks for devices.

    With the extra `tpu` installed, whose compiler `jaxft plan` takes, JAX would ask it, wait for its answer and print
    its stack traces. What is said by JAX_PLATFORMS holds.
    """
    if os.environ.get("JAX_PLATFORMS"):
        return
    found = platforms(Path("/dev"), lambda name: importlib.util.find_spec(name) is not None)
    if found:
        os.environ["JAX_PLATFORMS"] = found  # JAX reads it when it is imported


def platforms(devices: Path, installed: Callable[[str], bool]) -> str:
    """What JAX is to look for, as JAX_PLATFORMS says it; "" where it may look for all.

    Args:
        devices: the folder of the machine's devices, /dev.
        installed: whether there is a package of that name.
    """
    if not installed("libtpu") or _any(devices, TPUS):
        return ""
    gpus = [
        kind
        for kind, patterns in GPUS.items()
        if _any(devices, patterns) and any(map(installed, PLUGINS[kind]))
    ]
    return ",".join([*gpus, "cpu"])


def _any(devices: Path, patterns: tuple[str, ...]) -> bool:
    return any(any(devices.glob(pattern)) for pattern in patterns)
