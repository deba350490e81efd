"""A mesh changes where the numbers are, and not what they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxft
from jaxft.errors import UserError
from jaxft.methods import METHODS
from jaxft.training.loop import train
from jaxft.training.sharding import leaf_sharding, make_mesh
from jaxft.tree import flatten_with_paths
from jaxft.weights.placement import describe, leaf_spec


def test_minus_one_takes_the_rest(configure: Callable[..., Any]) -> None:
    """The devices that the other axes leave."""
    sizes = configure(**{"mesh.data": -1, "mesh.tensor": 2}).mesh
    mesh = make_mesh(sizes, jax.devices()[:4])
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "context": 1, "tensor": 2}


def test_what_does_not_divide_is_refused_with_the_numbers(configure: Callable[..., Any]) -> None:
    """A dimension, the devices, the rows of a batch."""
    mesh = make_mesh(configure(**{"mesh.fsdp": 4}).mesh, jax.devices()[:4])
    with pytest.raises(UserError, match=r"fsdp=4 does not divide 6.*; 1, 2, 3 and 6 do"):
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


def test_a_model_that_does_not_divide_is_refused_with_the_sizes_that_do(
    configure: Callable[..., Any], tmp_path: Path
) -> None:
    """Of an axis those sizes that divide all that lies on it: here 4 heads, 2 of keys; 48 wide; rows of 256."""
    with pytest.raises(UserError, match="tensor=8 does not divide 4, the model's heads; 1 and 2"):
        train(configure(**{"mesh.tensor": 8}), tmp_path / "run")
    with pytest.raises(
        UserError, match=r"fsdp=5 does not divide 48.*; 1, 2, 3, 4, 6, 8, 12, 16, 24 and 48"
    ):
        train(configure(**{"mesh.fsdp": 5}), tmp_path / "run")
    with pytest.raises(
        UserError, match=r"max_length: 250 does not divide into 2 x context = 8 chunks; 248 or 256"
    ):
        train(configure(**{"mesh.context": 4, "data.max_length": 250}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["full", "lora", "dora", "vera", "delta_lora"])
def test_a_part_lies_as_the_contraction_that_it_belongs_to(method: str) -> None:
    """On every weight: an axis "in" or "out" lies on the mesh as its kernel's, the stack's never.

    Of a and b the one that has not the kernel's axis over fsdp lies over fsdp too.
    """
    kernels = {"q_proj": ("fsdp", "tensor"), "o_proj": ("tensor", "fsdp")}
    tree = {"layers": {name: {"kernel": jnp.ones((2, 8, 8))} for name in kernels}}
    row = METHODS[method](**({} if method == "full" else {"rank": 4}))
    for path, leaf in flatten_with_paths(jaxft.adapt(tree, row, jax.random.key(0))):
        spec = tuple(leaf_spec(path, leaf.ndim))
        name = path.split("/")[-1]
        inside, out = kernels.get(path.split("/")[1], (None, None))
        left, right = ((axis, "fsdp") if axis == "tensor" else axis for axis in (inside, out))
        wanted = {
            "a": (None, left, None),
            "a0": (None, left, None),
            "b": (None, None, right),
            "b0": (None, None, right),
            "magnitude": (None, out),
            "g": (None, out),
            "d": (None, None),
            "base": (None, inside, out),
            "kernel": (None, inside, out),
        }
        assert spec == (() if path.startswith("vera") else wanted.get(name, ())), path


def test_what_is_replicated_and_what_it_costs(configure: Callable[..., Any]) -> None:
    """The costliest first; a divided leaf costs its copies over the other axes."""
    mesh = make_mesh(configure(**{"mesh.data": 2, "mesh.fsdp": 4}).mesh, jax.devices())
    tree = {
        "q_proj": {"kernel": jnp.ones((8, 16))},
        "final_norm": {"scale": jnp.ones(8)},
        "vera": {"a": jnp.ones((8, 4))},
    }
    vera, kernel, norm = describe(tree, mesh)
    assert (vera.path, vera.replicated, vera.copies) == ("vera/a", True, 8)
    assert (vera.bytes_per_device, vera.surplus) == (128, 7 * 128)
    assert (kernel.path, kernel.replicated, kernel.copies) == ("q_proj/kernel", False, 2)
    assert (kernel.bytes_per_device, kernel.surplus) == (128, 512)
    assert (norm.path, norm.surplus) == ("final_norm/scale", 7 * 32)


def test_a_part_that_a_mesh_does_not_divide_lies_as_its_kernel(
    configure: Callable[..., Any],
) -> None:
    """b over fsdp where that divides it; else, as the kernel's output, over tensor alone."""
    mesh = make_mesh(configure(**{"mesh.fsdp": 4, "mesh.tensor": 2, "mesh.data": 1}).mesh)
    path = "layers/attention/q_proj/kernel/b"
    assert leaf_sharding(mesh, path, (2, 4, 16)).spec[2] == ("tensor", "fsdp")
    assert leaf_sharding(mesh, path, (2, 4, 12)).spec[2] == "tensor"
