"""Two and four processes are one run: its numbers, its files, and its end."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxft.errors import UserError
from jaxft.formats.safetensors import open_folder
from jaxft.runtime.processes import join
from jaxft.training.loop import train
from tests.several_processes import (
    TOGETHER,
    assert_same_run,
    assert_the_other_ends,
    outcomes,
    start,
)
from tests.several_processes import alone as alone
from tests.small_runs import GOLDEN, RECIPE, lines

pytestmark = pytest.mark.slow


@pytest.mark.thorough
def test_two_processes_give_one_processs_run(alone: Path, tmp_path: Path) -> None:
    """The same metrics, samples and adapter; one speaks; both write the checkpoint; each reads half the weights."""
    done = outcomes(start(2, tmp_path / "run"))
    assert [status for status, _ in done] == [0, 0], done
    assert_same_run(tmp_path / "run", alone)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        path.name for path in alone.iterdir()
    }
    assert "held-out loss" in done[0][1]
    assert "held-out loss" not in done[1][1]
    parts = {path.name for path in (tmp_path / "run" / "checkpoints" / "4" / "tree").iterdir()}
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= parts
    stored = open_folder(GOLDEN / "model").values()
    whole = sum(tensor.nbytes for tensor in stored)
    norms = sum(tensor.nbytes for tensor in stored if len(tensor.shape) == 1)
    copied = [int(output.split("copied ")[1].split()[0]) for _, output in done]
    assert copied == [(whole - norms) // 2 + norms] * 2


@pytest.mark.thorough
def test_four_processes_give_one_processs_run(alone: Path, tmp_path: Path) -> None:
    """Two rows of the mesh, of two processes each."""
    done = outcomes(start(4, tmp_path / "run"))
    assert [status for status, _ in done] == [0] * 4, done
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.thorough
def test_preferences_of_two_processes(tmp_path: Path) -> None:
    """The reference beforehand, the last batch of an epoch with rows for one process alone: as of a single one."""
    from jaxft.configuration import load_config

    pairs = GOLDEN.parent / "preferences" / "pairs.jsonl"
    few = tmp_path / "few.jsonl"
    few.write_text("".join(f"{line}\n" for line in pairs.read_text().splitlines()[:9]))
    recipe = RECIPE.replace("sft", "dpo")
    changes = {"data.train": few, "data.eval": few, "objective.precompute": True}
    changes["samples.count"] = "0"
    settings = {key: value for key, value in TOGETHER.items() if key != "method.dropout"}
    settings |= {key: value if value is True else str(value) for key, value in changes.items()}
    done = outcomes(start(2, tmp_path / "run", recipe=recipe, settings=settings))
    assert [status for status, _ in done] == [0, 0], done
    train(load_config(f"{recipe}:lora", {**settings, "mesh.data": 1}), tmp_path / "alone")
    assert_same_run(tmp_path / "run", tmp_path / "alone")
    both = [np.load(tmp_path / run / "reference" / "train.npz") for run in ("run", "alone")]
    assert both[0]["data"] == both[1]["data"]
    np.testing.assert_allclose(*(file["log_probabilities"] for file in both), rtol=1e-6)


# With states on each host's disk the first is killed in tests/runs/test_host_checkpoint.py.
@pytest.mark.thorough
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_and_a_restart_goes_on(
    victim: int, alone: Path, tmp_path: Path
) -> None:
    """In under a minute, in one clear line, and the whole is as if nothing had happened."""
    life = tuple(3 if number == victim else 0 for number in range(2))
    assert_the_other_ends(start(2, tmp_path / "run", die_after=life), victim)
    assert not (tmp_path / "run" / "adapter").exists()
    assert [status for status, _ in outcomes(start(2, tmp_path / "run"))] == [0, 0]
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.thorough
def test_sigterm_to_one_stops_all_with_a_checkpoint_and_a_restart_goes_on(
    alone: Path, tmp_path: Path
) -> None:
    """A machine that is to be taken away: all stop at one step, with 143, and the whole is as if they had not."""
    began = start(2, tmp_path / "run")
    output = began[0].stdout
    assert output is not None
    for line in output:
        if line.startswith("compiling"):
            began[1].send_signal(signal.SIGTERM)
            break
    done = outcomes(began)
    assert [status for status, _ in done] == [143, 143], done
    assert "whose checkpoint is written" in done[0][1]
    assert not (tmp_path / "run" / "adapter").exists()
    again = outcomes(start(2, tmp_path / "run"))
    assert [status for status, _ in again] == [0, 0], again
    assert "going on from the checkpoint" in again[0][1]
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.thorough
def test_two_processes_extend_a_run(configure: Callable[..., Any], tmp_path: Path) -> None:
    """One of them writes and says it; both go on to the same end, from the hosts' disks as well."""
    settings = TOGETHER | {"optimizer.schedule": "constant", "checkpoint.local": tmp_path / "near"}
    settings |= {"checkpoint.local_every": 1, "optimizer.learning_rate": 1e-2}
    for steps in (2, 4):
        done = outcomes(start(2, tmp_path / "run", settings=settings | {"steps": steps}))
        assert [status for status, _ in done] == [0, 0], done
    assert [output.count("extended: config.steps: 2 -> 4") for _, output in done] == [1, 0]
    assert len(json.loads((tmp_path / "run" / "history.json").read_text())) == 1
    one = {**settings, "mesh.data": 1, "checkpoint.local": str(tmp_path / "one")}
    train(configure(**one), tmp_path / "alone")
    assert_same_run(tmp_path / "run", tmp_path / "alone")


def test_a_variable_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names it."""
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES takes a number, not 'two'"):
        join()


@pytest.mark.thorough
def test_a_run_goes_on_on_other_meshes(configure: Callable[..., Any], tmp_path: Path) -> None:
    """Saved on 8 devices over fsdp, gone on with over the other axes: to 1e-6; on the same bit for bit."""
    import shutil

    shared = {"steps": 4, "batch_size": 8, "checkpoint.every": 2, "samples.count": 0}
    first = {"mesh.data": 1, "mesh.fsdp": 8}
    train(configure("dora", **shared, **first), tmp_path / "eight")
    whole = lines(tmp_path / "eight")
    for name, mesh in {
        "again": first,
        "other": {"mesh.data": 2, "mesh.context": 2, "mesh.tensor": 2},
    }.items():
        shutil.copytree(tmp_path / "eight", tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / "4")
        train(configure("dora", **shared, **mesh), tmp_path / name)
        row = lines(tmp_path / name)
        assert row[:2] == whole[:2]
        if name == "again":
            assert row == whole
        for ours, theirs in zip(row, whole, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
