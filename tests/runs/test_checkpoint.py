"""Checkpoints hold what trains and what was drawn at random, and never the base."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft.errors import UserError
from jaxft.formats.manifest import Damaged
from jaxft.methods import METHODS
from jaxft.runs import checkpoint
from jaxft.runs.checkpoint import Checkpoints, split_base
from jaxft.runs.folder import written
from jaxft.runtime.processes import lost
from jaxft.tree import flatten_with_paths
from tests.small_runs import flip


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


def three(folder: Path, **settings: Any) -> tuple[Checkpoints, Any]:
    """(checkpoints of the steps 1, 2 and 3, the tree that each holds times its step)."""
    _, trainable, _ = adapted("lora")
    checkpoints = Checkpoints(folder, **{"keep": 3} | settings)
    for step in (1, 2, 3):
        tree = jax.tree.map(lambda leaf, by=step: leaf * by, trainable)
        checkpoints.save(step, tree, {"step": step})
    checkpoints.wait()
    return checkpoints, trainable


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path: Path) -> None:
    """Whichever of its files is damaged or missing; when all are, there is none."""
    checkpoints, trainable = three(tmp_path)
    said: list[str] = []
    assert checkpoints.newest(said.append) == 3
    assert said == []
    flip(max((tmp_path / "3" / "tree").rglob("d/*"), key=lambda path: path.stat().st_size))
    assert checkpoints.newest(said.append) == 2
    assert f"{tmp_path}/3: damaged: tree/" in said[0]
    with pytest.raises(Damaged):
        checkpoints.restore(3, trainable)
    (tmp_path / "2" / "data" / "metadata").unlink()
    (tmp_path / "1" / "manifest.json").unlink()
    assert checkpoints.newest(said.append) is None
    assert "data/metadata is missing" in said[2]
    checkpoints.close()


def test_a_damaged_checkpoint_is_written_again(tmp_path: Path) -> None:
    """It does not push out whole ones."""
    first, trainable = three(tmp_path, keep=2)
    first.close()
    flip(tmp_path / "3" / "data" / "metadata")
    again = Checkpoints(tmp_path, keep=2)
    assert again.newest(lambda line: None) == 2
    again.restore(2, trainable)
    again.save(3, trainable, {"step": 3})
    again.wait()
    assert again.steps == [2, 3]
    assert again.newest(pytest.fail) == 3
    again.close()


def test_protected_checkpoints_stay(tmp_path: Path) -> None:
    """The best beside the last ones."""
    checkpoints, trainable = three(tmp_path, keep=1)
    assert checkpoints.steps == [3]
    checkpoints.save(4, trainable, {}, protect=(3,))
    checkpoints.save(5, trainable, {}, protect=(3,))
    checkpoints.wait()
    assert checkpoints.steps == [3, 5]
    checkpoints.close()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_that_fails_is_told_and_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    """In one line with the path and the bytes that are free, whenever it is asked; what was whole stays."""
    checkpoints, trainable = three(tmp_path, asynchronous=asynchronous)

    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write_manifest", full)

    def save() -> None:
        checkpoints.save(4, trainable, {})
        checkpoints.wait()

    with pytest.raises(UserError, match=r"/4: cannot be written: No space.*[\d,]+ bytes") as error:
        save()
    assert "\n" not in str(error.value)
    assert checkpoints.newest(pytest.fail) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "3"}
    checkpoints.close()


def test_another_process_that_is_gone_is_no_failure_to_write(tmp_path: Path) -> None:
    """They write together: what XLA says of it is told as the loss of a process, not as a full disk."""
    gone = ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")
    with pytest.raises(ValueError, match="Gloo") as error, written(tmp_path / "4"):
        raise gone
    assert error.value is gone
    assert lost(gone)
    with (
        pytest.raises(UserError, match="4: cannot be written: Connection reset"),
        written(tmp_path / "4"),
    ):
        raise RuntimeError("Connection reset by the bucket")


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """A checkpoint that was not whole."""
    three(tmp_path)[0].close()
    (tmp_path / "4.partial").mkdir()
    (tmp_path / "5.partial.orbax-checkpoint-tmp").mkdir()
    again = Checkpoints(tmp_path, keep=3)
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "3"}
    assert again.latest == 3
    again.close()
