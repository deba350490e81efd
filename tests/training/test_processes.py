"""Runs as processes of their own: killed, asked to stop, and without room to write."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.small_runs import GOLDEN, RECIPE, lines

pytestmark = pytest.mark.slow

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
MIB = 1 << 20


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of a process that finds the programs that the other tests compiled."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.getbasetemp().parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def command(workdir: Path, *words: str) -> list[str]:
    """`jaxft train` of a small run."""
    keys = {
        "model": GOLDEN / "model",
        "data.train": GOLDEN / "data.jsonl",
        "data.max_length": 256,
        "data.packing": True,
        "batch_size": 4,
        "steps": 6,
        "checkpoint.every": 2,
    }
    given = [f"--config.{key}={value}" for key, value in keys.items()]
    start = [sys.executable, "-m", "jaxft", "train", "--config", f"{RECIPE}:lora"]
    return [*start, "--workdir", str(workdir), *given, *words]


def run(
    words: list[str], environment: dict[str, str], largest: int = 0
) -> subprocess.CompletedProcess:
    """The process, once it has ended. `largest`: bytes that a file of its may have."""
    if largest:  # in blocks of 512 bytes
        words = ["sh", "-c", f'ulimit -f {largest // 512}; exec "$@"', "sh", *words]
    return subprocess.run(
        words,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, where one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root mounts file systems")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.thorough
def test_kills(tmp_path: Path, environment: dict[str, str]) -> None:
    """experiments/soak.py, a few times: it fails where a start or an end is not what it should be."""
    words = [sys.executable, str(EXPERIMENTS / "soak.py"), "--kills", "10"]
    done = run([*words, "--seed", "5", "--output", str(tmp_path)], environment)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["kills"] == 10
    assert found["updates_lost_at_most"] <= found["checkpoint_every"]


@pytest.mark.parametrize("places", [20, pytest.param(120, marks=pytest.mark.thorough)])
def test_nothing_damaged_is_read_as_if_it_were_whole(
    places: int, tmp_path: Path, environment: dict[str, str]
) -> None:
    """experiments/corruption.py; without the manifests some would be."""
    words = [sys.executable, str(EXPERIMENTS / "corruption.py"), "--places", str(places)]
    done = run([*words, "--output", str(tmp_path)], environment)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "corruption.json").read_text())
    assert not any(counts.get("silently wrong") for counts in found["with"].values())
    assert not any(counts.get("another error") for counts in found["with"].values())
    assert any(counts.get("silently wrong") for counts in found["without"].values())


def test_sigterm_ends_with_143_and_the_next_start_with_0(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    """Sent while the step is compiled."""
    words = command(tmp_path / "run")
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("compiling"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 143
    assert "whose checkpoint is written" in rest
    assert "Traceback" not in rest
    done = run(words, environment)
    assert done.returncode == 0, done.stderr
    assert "going on from the checkpoint" in done.stderr
    assert [row["step"] for row in lines(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.thorough
def test_a_full_disk(small_disk: Path, environment: dict[str, str]) -> None:
    """One line with path and bytes; the last good checkpoint is whole, and with room the run goes on from it."""
    words = command(small_disk / "run", "--config.method.rank=32", "--config.checkpoint.keep=3")
    done = run(words, environment)
    assert done.returncode == 2, done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"jaxft: {small_disk / 'run'}/checkpoints/"), said
    assert "No space left on device" in said
    assert said.endswith(" bytes are free)")
    assert "Traceback" not in done.stderr
    assert (small_disk / "run" / "checkpoints" / "2" / "manifest.json").exists()
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    done = run(words, environment)
    assert done.returncode == 0, done.stderr
    assert "going on from the checkpoint of step" in done.stderr


@pytest.mark.thorough
def test_no_room_for_a_file(tmp_path: Path, environment: dict[str, str]) -> None:
    """The same by a limit on the size of files, which anyone may set."""
    done = run(command(tmp_path / "run"), environment, largest=20_000)
    assert done.returncode == 2, done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"jaxft: {tmp_path / 'run'}/checkpoints/2: cannot be written: "), said
    assert said.endswith(" bytes are free)")
    # Orbax's other writes call an event loop that it has closed.
    assert "Traceback" not in done.stderr


@pytest.mark.thorough
def test_a_read_only_folder(small_disk: Path, environment: dict[str, str]) -> None:
    """Before anything is trained, new run or old."""
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    words = command(small_disk / "run")
    assert run([*words, "--config.steps=2"], environment).returncode == 0
    before = sorted((p, p.stat().st_mtime_ns) for p in small_disk.rglob("*"))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for name in ("run", "new"):
        done = run([*command(small_disk / name), "--config.steps=2"], environment)
        assert done.returncode == 2, done.stderr
        said = done.stderr.splitlines()[-1]
        assert said.startswith(f"jaxft: {small_disk / name}"), said
        assert "Read-only file system" in said
        assert "Traceback" not in done.stderr
    assert sorted((p, p.stat().st_mtime_ns) for p in small_disk.rglob("*")) == before
