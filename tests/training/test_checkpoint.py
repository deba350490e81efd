"""Checkpoints hold what trains and what was drawn at random, and never the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft.errors import UserError
from jaxft.methods import METHODS
from jaxft.training.checkpoint import Checkpoints, split_base
from jaxft.tree import flatten_with_paths


def adapted(name: str) -> tuple[Any, Any, Any]:
    """(params, trainable, frozen) of a small stacked tree."""
    tree = {"layers": {"q_proj": {"kernel": jnp.ones((2, 4, 6))}}, "norm": {"scale": jnp.ones(4)}}
    method = METHODS[name]() if name == "full" else METHODS[name](rank=2)
    params = jaxft.adapt(tree, method, jax.random.key(0))
    return params, *jaxft.partition(params, method)


@pytest.mark.parametrize(
    ("name", "drawn"),
    [
        ("lora", {"scale"}),
        ("lora_fa", {"a", "scale"}),
        ("vera", {"vera/a", "vera/b"}),
        ("delta_lora", {"a0", "b0", "factor", "scale"}),
        ("full", set()),
    ],
)
def test_the_base_is_left_out_and_nothing_else(name: str, drawn: set[str]) -> None:
    """The frozen leaves in a checkpoint are those that the base's folder does not hold."""
    params, _, frozen = adapted(name)
    kept, base = split_base(params, frozen)
    prefix = "layers/q_proj/kernel/"
    assert {path.removeprefix(prefix) for path, _ in flatten_with_paths(kept)} == drawn
    wanted = set() if name == "full" else {f"{prefix}base", "norm/scale"}
    assert {path for path, _ in flatten_with_paths(base)} == wanted


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    """Bit for bit, with the iterator's state, and the last of several."""
    _, trainable, _ = adapted("dora")
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (1, 2, 3):
        tree = jax.tree.map(lambda leaf, by=step: leaf * by, trainable)
        checkpoints.save(step, tree, {"step": step})
    checkpoints.wait()
    assert checkpoints.latest == 3
    restored, data = checkpoints.restore(3, trainable), checkpoints.data(3)
    checkpoints.close()
    assert data == {"step": 3}
    assert jax.tree.structure(restored) == jax.tree.structure(trainable)
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(trainable), strict=True):
        np.testing.assert_array_equal(ours, 3 * theirs)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_a_checkpoint_of_another_shape_is_one_clear_line(tmp_path: Path) -> None:
    """What cannot be restored names the folder and the step."""
    _, trainable, _ = adapted("lora")
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, asynchronous=False)
    checkpoints.save(1, {"a": jnp.ones(3)}, {"step": 1})
    with pytest.raises(UserError, match="checkpoints/1: this checkpoint cannot be read") as error:
        checkpoints.restore(1, trainable)
    assert "\n" not in str(error.value)
    checkpoints.close()
