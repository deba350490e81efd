"""A run of several processes, each with a device of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxft.training.loop import train
from tests.small_runs import GOLDEN, RECIPE, lines

TOGETHER = {
    "model": str(GOLDEN / "model"),
    "data.train": str(GOLDEN / "data.jsonl"),
    "data.eval": str(GOLDEN / "data.jsonl"),
    "data.max_length": 256,
    "batch_size": 8,
    "steps": 4,
    "method.rank": 4,
    "method.dropout": 0.1,
    "samples.count": 1,
    "samples.max_new_tokens": 4,
    "eval_every": 2,
    "checkpoint.every": 2,
    "mesh.data": -1,
    "mesh.fsdp": 2,
}


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(
    count: int,
    workdir: str | Path,
    *,
    die_after: tuple[int, ...] = (),
    recipe: str = RECIPE,
    settings: dict[str, Any] = TOGETHER,
) -> list[subprocess.Popen[str]]:
    """The processes of a run, each with one device; `die_after` says for each when it kills itself."""
    script = str(Path(__file__).with_name("process.py"))
    words = [f"--config.{key}={value}" for key, value in settings.items()]
    port, started = free_port(), []
    for number in range(count):
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("JAX")},
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(number),
        }
        life = str(die_after[number] if die_after else 0)
        command = [sys.executable, script, life, "train", "--config", f"{recipe}:lora"]
        command += ["--workdir", str(workdir), *words]
        started.append(
            subprocess.Popen(
                command,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    return started


def outcomes(started: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """(exit status, output) of each."""
    found = []
    for process in started:
        output, _ = process.communicate(timeout=240)
        found.append((process.returncode, output))
    return found


def assert_the_other_ends(began: list[subprocess.Popen[str]], victim: int) -> None:
    """Of two processes one kills itself: the other ends in under a minute with one clear line."""
    began[victim].wait(timeout=240)
    killed = time.monotonic()
    began[1 - victim].wait(timeout=60)
    assert time.monotonic() - killed < 60
    done = outcomes(began)
    assert (done[victim][0], done[1 - victim][0]) == (-9, 1), done
    said = [line for line in done[1 - victim][1].splitlines() if line.startswith("jaxft:")]
    assert len(said) == 1, said
    assert "a process of this run ended" in said[0]


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Metrics, samples and the adapter, to rounding."""
    for split in ("train", "eval"):
        for row, other in zip(lines(ours, split), lines(theirs, split), strict=True):
            assert row.keys() == other.keys()
            for key, value in other.items():
                assert row[key] == (value if key == "split" else pytest.approx(value, rel=1e-6))
    assert (ours / "samples.jsonl").read_text() == (theirs / "samples.jsonl").read_text()
    mine, yours = (
        load_file(run / "adapter" / "adapter_model.safetensors") for run in (ours, theirs)
    )
    assert mine.keys() == yours.keys()
    for name, tensor in yours.items():
        np.testing.assert_allclose(mine[name], tensor, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a single process with two devices."""
    from jaxft.configuration import load_config

    workdir = tmp_path_factory.mktemp("alone") / "run"
    with jax.numpy_dtype_promotion("standard"):
        train(load_config(f"{RECIPE}:lora", {**TOGETHER, "mesh.data": 1}), workdir)
    return workdir
