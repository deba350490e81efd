"""Where libtpu is installed and no TPU is there, JAX takes the GPU or the CPU without asking it."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxft.runtime.platforms import platforms


@pytest.mark.parametrize(
    ("devices", "packages", "expected"),
    [
        ((), (), ""),
        ((), ("jax_cuda12_plugin",), ""),  # without libtpu nothing needs to be said
        ((), ("libtpu",), "cpu"),
        (("accel0",), ("libtpu",), ""),
        (("vfio/0",), ("libtpu",), ""),
        (("vfio/vfio",), ("libtpu",), "cpu"),  # the driver alone
        (("nvidia0",), ("libtpu",), "cpu"),  # a GPU that JAX has no plugin for
        (("nvidia0",), ("libtpu", "jax_cuda12_plugin"), "cuda,cpu"),
        (("nvidiactl",), ("libtpu", "jax_cuda13_plugin"), "cpu"),
        (("kfd",), ("libtpu", "jax_rocm7_plugin", "jax_cuda12_plugin"), "rocm,cpu"),
    ],
)
def test_what_is_looked_for(
    tmp_path: Path, devices: tuple[str, ...], packages: tuple[str, ...], expected: str
) -> None:
    for name in devices:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert platforms(tmp_path, packages.__contains__) == expected
