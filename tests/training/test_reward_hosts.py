"""Runs that learn from rewards as processes: killed at any moment, on many devices, and two as one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxft.configuration import load_config
from jaxft.training.loop import train
from tests.several_processes import TOGETHER, assert_same_run, outcomes, start
from tests.small_runs import GOLDEN, RECIPE, adapter_of, lines

pytestmark = [pytest.mark.slow, pytest.mark.thorough]

REWARDS = RECIPE.replace("sft", "rl")
SCRIPT = Path(__file__).parents[1] / "rewarded_process.py"
NAMES = ("Ada", "Bo", "Cleo", "Dora", "Emil", "Fay", "Gus", "Hal")
GRADERS = [
    {
        "type": "text_similarity",
        "name": "close",
        "evaluation_metric": "fuzzy_match",
        "input": "{{ sample.output_text }}",
        "reference": "{{ item.letter }} the trade",
    }
]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Keys of a small run."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": f"name: {name} | trade:", "letter": name[0]} for name in NAMES]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "graders.json").write_text(json.dumps(GRADERS))
    return {
        "model": str(GOLDEN / "model"),
        "data.train": str(folder / "prompts.jsonl"),
        "data.max_length": 64,
        "graders": str(folder / "graders.json"),
        "batch_size": 8,
        "rollout.group": 4,
        "rollout.max_new_tokens": 8,
        "steps": 4,
        "method.rank": 4,
        "optimizer.learning_rate": 1e-2,
        "samples.count": 0,
        "checkpoint.every": 1,
        "mesh.data": 1,
    }


def journal(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "rollouts.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(
    settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[int, str]]:
    """(status, output) of a process that is killed at `moment`."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.getbasetemp().parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def make(workdir: Path, moment: str, **more: Any) -> tuple[int, str]:
        words = [f"--config.{key}={value}" for key, value in (settings | more).items()]
        command = [sys.executable, str(SCRIPT), moment, "train", "--config", f"{REWARDS}:lora"]
        done = subprocess.run(
            [*command, "--workdir", str(workdir), *words],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stderr + done.stdout

    return make


@pytest.fixture(scope="module")
def whole(run: Callable[..., tuple[int, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody killed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    status, output = run(folder, "never")
    assert status == 0, output
    return folder


@pytest.mark.parametrize("moment", ["rollout", "grading", "update"])
def test_a_killed_process_goes_on_with_the_same_bits(moment, run, whole, tmp_path):
    """SIGKILL, which nothing can answer; the same command then ends the run."""
    status, output = run(tmp_path / "run", moment)
    assert status == -signal.SIGKILL, output
    assert len(lines(tmp_path / "run")) < 4
    status, output = run(tmp_path / "run", "never")
    assert status == 0, output
    assert "going on from the checkpoint of step" in output
    assert lines(tmp_path / "run") == lines(whole)
    assert journal(tmp_path / "run") == journal(whole)
    ours, theirs = adapter_of(tmp_path / "run"), adapter_of(whole)
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)


MESHES = [{"data": 8}, {"data": 4, "tensor": 2}, {"fsdp": 4, "tensor": 2}, {"fsdp": 8}]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_eight_devices_sample_and_learn_as_one(mesh, settings, tmp_path):
    keys = settings | {"steps": 3, "objective.beta": 0.05}
    axes = {f"mesh.{axis}": size for axis, size in ({"data": 1} | mesh).items()}
    for name, more in {"one": {}, "eight": axes}.items():
        train(load_config(f"{REWARDS}:lora", keys | more), tmp_path / name)
    one, eight = tmp_path / "one", tmp_path / "eight"
    told = [line["completion"] for line in journal(one)]
    assert [line["completion"] for line in journal(eight)] == told
    for ours, theirs in zip(lines(eight), lines(one), strict=True):
        assert ours["rollout/mismatch"] == theirs["rollout/mismatch"] == 0
        for name in ("loss", "grad_norm", "reward", "kl", "entropy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


def test_two_processes_are_one_run(settings, tmp_path):
    """Each samples and learns from its half of the prompts, and one of them judges."""
    shared = {"mesh.fsdp": TOGETHER["mesh.fsdp"], "steps": 3, "data.eval": settings["data.train"]}
    keys = settings | shared | {"eval_every": 3, "eval_batch_size": 8, "samples.count": 1}
    done = outcomes(start(2, tmp_path / "run", recipe=REWARDS, settings=keys))
    assert [status for status, _ in done] == [0, 0], done
    train(load_config(f"{REWARDS}:lora", keys), tmp_path / "alone")
    assert_same_run(tmp_path / "run", tmp_path / "alone")
    told = [line["completion"] for line in journal(tmp_path / "alone")]
    assert [line["completion"] for line in journal(tmp_path / "run")] == told
