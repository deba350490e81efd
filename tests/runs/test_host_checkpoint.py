"""States on each host's own disk: a restart loses at most the updates between two of them, and is the same run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jaxft.errors import UserError
from jaxft.runs.host_checkpoint import Local
from jaxft.training.loop import train
from jaxft.training.sharding import make_mesh
from tests.several_processes import (
    TOGETHER,
    assert_same_run,
    assert_the_other_ends,
    outcomes,
    start,
)
from tests.several_processes import alone as alone
from tests.small_runs import PACKED, Cut, assert_same_end, cut_at, flip, lines

pytestmark = pytest.mark.slow

BETWEEN = PACKED | {
    "steps": 6,
    "checkpoint.every": 4,
    "eval_every": 4,
    "checkpoint.local_every": 1,
}


def tree_on(fsdp: int) -> Any:
    """Arrays in two types, divided and whole."""
    mesh = make_mesh(
        ConfigDict({"data": 1, "fsdp": fsdp, "context": 1, "tensor": 1}), jax.devices()[:fsdp]
    )
    divided, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("fsdp",), ()))
    return {
        "a": jax.device_put(jnp.arange(24.0, dtype=jnp.bfloat16).reshape(8, 3), divided),
        "b": [jax.device_put(jnp.arange(3.0), whole), jax.device_put(jnp.int32(7), whole)],
    }


def test_a_state_comes_back_as_it_lay(tmp_path: Path) -> None:
    """Values, types and shardings; a divided array is not gathered, a whole one is written once."""
    local, tree = Local(tmp_path / "run" / "0", 1), tree_on(4)
    local.save(3, tree, {"at": 3})
    local.wait()
    with np.load(tmp_path / "run" / "0" / "3" / "pieces.npz") as found:
        assert sorted(found) == [
            "a bfloat16[8,3] 0:2,:", "a bfloat16[8,3] 2:4,:", "a bfloat16[8,3] 4:6,:",
            "a bfloat16[8,3] 6:8,:", "b/0 float32[3] :", "b/1 int32[] ",
        ]  # fmt: skip
    again = Local(tmp_path / "run" / "0", 1)
    assert again.newest(tree, print) == 3
    assert again.data(3) == {"at": 3}
    for old, new in zip(*map(jax.tree.leaves, (tree, again.restore(3, tree))), strict=True):
        assert (old.dtype, old.sharding) == (new.dtype, new.sharding)
        np.testing.assert_array_equal(old, new)


def test_another_mesh_or_a_damaged_state_is_said_and_not_used(tmp_path: Path) -> None:
    """The one before it is, where there is one."""
    folder = tmp_path / "run" / "0"
    local, tree = Local(folder, 1), tree_on(4)
    for step in (1, 2, 3):
        local.save(step, tree, {})
    local.wait()
    assert local.steps == [2, 3]
    said: list[str] = []
    assert local.newest(tree_on(2), said.append) is None
    assert "3: lies otherwise on the devices; it is not used" in said[-1]
    flip(folder / "3" / "pieces.npz", 300)
    assert local.newest(tree, said.append) == 2
    assert "3: damaged: pieces.npz" in said[-1]
    local.forget(2)
    assert local.steps == [2]
    local.discard()
    assert not folder.parent.exists()


def test_without_a_folder_nothing_is_written() -> None:
    """As it is where nobody asked."""
    local = Local(None, 0)
    local.save(1, tree_on(1), {})
    local.wait()
    assert local.newest(tree_on(1), print) is None


@pytest.mark.parametrize("method", ["lora", pytest.param("vera", marks=pytest.mark.thorough)])
def test_going_on_from_the_disk_equals_never_stopping(
    method: str,
    configure: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    """Bit for bit, though RUN has no checkpoint yet; then the disk is left clean."""
    train(configure(method, **BETWEEN), tmp_path / "whole")
    config = configure(method, **BETWEEN, **{"checkpoint.local": str(tmp_path / "disk")})
    with monkeypatch.context() as patch:
        cut_at(patch, 2)
        with pytest.raises(Cut):
            train(config, tmp_path / "run")
    assert [
        path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.is_dir()
    ] == []
    capsys.readouterr()
    train(config, tmp_path / "run")
    assert "going on from the checkpoint of step 2" in capsys.readouterr().err
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    assert not list((tmp_path / "disk").iterdir())


def test_states_that_the_run_went_on_without_are_forgotten(
    configure: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that could not use them, as on another mesh, cuts the metrics off; a later one must not take them up."""
    settings = BETWEEN | {"checkpoint.every": 2, "checkpoint.local": str(tmp_path / "disk")}
    with monkeypatch.context() as patch:
        cut_at(patch, 5)
        with pytest.raises(Cut):
            train(configure(**settings), tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Local, "newest", lambda *_: None)
        cut_at(patch, 4)
        with pytest.raises(Cut):
            train(configure(**settings), tmp_path / "run")
    train(configure(**settings), tmp_path / "run")
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_begins_anew_takes_nothing_from_the_one_before(
    configure: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same name and configuration: its numbers would be missing in the new metrics."""
    config = configure(**BETWEEN, **{"checkpoint.local": str(tmp_path / "disk")})
    with monkeypatch.context() as patch:
        cut_at(patch, 2)
        with pytest.raises(Cut):
            train(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    train(config, tmp_path / "run")
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_url_is_refused_before_anything_is_made(
    configure: Callable[..., Any], tmp_path: Path
) -> None:
    """The disk is the host's own."""
    with pytest.raises(
        UserError, match=r"checkpoint.local: a folder on each host's own disk, not gs://b"
    ):
        train(configure(**{"checkpoint.local": "gs://b"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
@pytest.mark.parametrize("lost", [False, True])
def test_of_two_processes_one_is_killed(lost: bool, alone: Path, tmp_path: Path) -> None:
    """After 3 of 4 updates, RUN having 2: the other ends within a minute, in one clear line.

    Started again they go on from 3, or from 2 where a disk is gone, to the same end.
    """
    settings = TOGETHER | {"checkpoint.local": str(tmp_path / "disk"), "checkpoint.local_every": 1}
    assert_the_other_ends(start(2, tmp_path / "run", die_after=(3, 0), settings=settings), 0)
    assert not (tmp_path / "run" / "adapter").exists()
    (disk,) = (tmp_path / "disk").iterdir()
    assert sorted(path.name for path in disk.iterdir()) == ["0", "1"]
    if lost:
        shutil.rmtree(disk / "1")
    found = outcomes(start(2, tmp_path / "run", settings=settings))
    assert [code for code, _ in found] == [0, 0], found
    assert f"going on from the checkpoint of step {2 if lost else 3}" in found[0][1]
    assert_same_run(tmp_path / "run", alone)
