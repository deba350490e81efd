"""A mesh changes where the numbers are, and not what they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxft.errors import UserError
from jaxft.training.loop import train
from jaxft.training.sharding import leaf_sharding, make_mesh

from .conftest import lines


@pytest.mark.parametrize(
    ("method", "mesh"),
    [
        ("lora", {"data": 4}),
        ("full", {"fsdp": 4}),
        ("dora", {"fsdp": 2, "tensor": 2}),
        ("vera", {"data": 2, "fsdp": 2}),
    ],
)
def test_devices_give_one_devices_curve(
    method: str, mesh: dict[str, int], configure: Callable[..., Any], tmp_path: Path
) -> None:
    """Losses of 4 simulated devices equal those of one, to 1e-5."""
    sizes = {f"mesh.{axis}": size for axis, size in ({"data": 1} | mesh).items()}
    shared = {"steps": 3, "data.packing": True, "optimizer.learning_rate": 1e-3}
    train(configure(method, **shared), tmp_path / "one")
    train(configure(method, **shared, **sizes), tmp_path / "many")
    one, many = lines(tmp_path / "one"), lines(tmp_path / "many")
    np.testing.assert_allclose(
        [row["loss"] for row in many], [row["loss"] for row in one], rtol=1e-5
    )


def test_minus_one_takes_the_rest(configure: Callable[..., Any]) -> None:
    """The devices that the other axes leave."""
    sizes = configure(**{"mesh.data": -1, "mesh.tensor": 2}).mesh
    mesh = make_mesh(sizes, jax.devices()[:4])
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "context": 1, "tensor": 2}


def test_what_does_not_divide_is_refused_with_the_numbers(configure: Callable[..., Any]) -> None:
    """A dimension, the devices, the rows of a batch."""
    mesh = make_mesh(configure(**{"mesh.fsdp": 4}).mesh, jax.devices()[:4])
    with pytest.raises(UserError, match="fsdp=4 does not divide 6"):
        leaf_sharding(mesh, "layers/attention/q_proj/kernel", (2, 6, 8))
    with pytest.raises(UserError, match="does not divide 4 devices"):
        make_mesh(configure(**{"mesh.data": -1, "mesh.tensor": 3}).mesh, jax.devices()[:4])
    with pytest.raises(UserError, match="does not fit 4 devices"):
        make_mesh(configure(**{"mesh.data": 8}).mesh, jax.devices()[:4])


def test_rows_that_do_not_divide(configure: Callable[..., Any], tmp_path: Path) -> None:
    """A batch of 3 on 2 devices."""
    config = configure(**{"mesh.data": 2, "batch_size": 3})
    with pytest.raises(UserError, match="batch_size: 3 rows do not divide"):
        train(config, tmp_path / "run")
