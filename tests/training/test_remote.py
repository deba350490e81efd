"""A RUN in an object store: Orbax, tensorstore and gcsfs as they are, over a store on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxft import load as load_model
from jaxft import load_adapter
from jaxft.errors import UserError
from jaxft.runs.publish import Logs
from jaxft.training import loop
from jaxft.training.loop import train
from tests.several_processes import alone as alone
from tests.several_processes import assert_same_run, outcomes, start
from tests.small_runs import GOLDEN, PACKED, Cut, assert_same_end, cut_at
from tests.small_runs import whole as whole

from .store import Bucket, served

pytest.importorskip("gcsfs")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    """gs://bucket, for this process and those that it starts."""
    folder = tmp_path_factory.mktemp("store")
    with served(folder) as (bucket, environment), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield bucket


@pytest.fixture(scope="module")
def died(bucket: Bucket, configure: Callable[..., Any]) -> str:
    """A run in the store with checkpoints of the steps 2 and 4 that died after step 5, and copied nothing then."""
    with jax.numpy_dtype_promotion("standard"), pytest.MonkeyPatch.context() as patch:
        cut_at(patch, 5)
        dying = loop.Loop.read

        def killed(self: Any) -> None:
            try:
                dying(self)
            except Cut:
                patch.setattr(Logs, "publish", lambda *_, **__: None)
                raise

        patch.setattr(loop.Loop, "read", killed)
        with pytest.raises(Cut):
            train(configure(**PACKED), "gs://bucket/died")
    return "died"


@pytest.fixture
def cut(bucket: Bucket, died: str, tmp_path: Path) -> str:
    """A copy of the run that died."""
    bucket.fill(tmp_path.name, bucket.unpacked(died, tmp_path / "copy"))
    return tmp_path.name


def test_a_run_that_died_goes_on_and_its_end_is_that_of_a_local_run(
    bucket: Bucket, cut: str, whole: Path, configure: Callable[..., Any], tmp_path: Path
) -> None:
    """Metrics, samples and adapter, bit for bit, and the same files but for those of the lock."""
    result = train(configure(**PACKED), f"gs://bucket/{cut}")
    assert str(result.output) == f"gs://bucket/{cut}/adapter"
    ours = bucket.unpacked(cut, tmp_path / "run")
    assert_same_end(ours, whole)
    for folder in ("", "adapter", "plots", "checkpoints"):
        names = [{path.name for path in (run / folder).iterdir()} for run in (ours, whole)]
        assert names[0] - {"writer"} == names[1] - {"lock"}
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md", "manifest.json"):
        assert (ours / "adapter" / name).read_bytes() == (whole / "adapter" / name).read_bytes()


def test_a_run_moves_from_the_store_to_a_disk(
    bucket: Bucket, cut: str, whole: Path, configure: Callable[..., Any], tmp_path: Path
) -> None:
    """As it was copied: the manifests hold there too."""
    ours = bucket.unpacked(cut, tmp_path / "run")
    train(configure(**PACKED), ours)
    assert_same_end(ours, whole)


def test_a_checkpoint_without_its_manifest_was_never_whole(
    bucket: Bucket,
    cut: str,
    whole: Path,
    configure: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As a process leaves it that is killed while it writes: the next removes it, and goes on from the one before."""
    bucket.remove(f"{cut}/checkpoints/4/manifest.json")
    train(configure(**PACKED), f"gs://bucket/{cut}")
    said = capsys.readouterr().err
    assert "going on from the checkpoint of step 2" in said
    assert "damaged" not in said
    assert_same_end(bucket.unpacked(cut, tmp_path / "run"), whole)


@pytest.mark.thorough
def test_a_run_in_the_store_is_extended(
    bucket: Bucket, cut: str, configure: Callable[..., Any]
) -> None:
    """Its configuration and the one before stand there."""
    before = json.loads(bucket.get(f"{cut}/config.json"))
    assert train(configure(**PACKED | {"steps": 7}), f"gs://bucket/{cut}").steps == 7
    assert json.loads(bucket.get(f"{cut}/config.json")) == before | {"steps": 7}
    (change,) = json.loads(bucket.get(f"{cut}/history.json"))
    assert change["config"] == before


@pytest.mark.thorough
def test_a_checkpoint_that_was_cut_short_is_named(
    bucket: Bucket, cut: str, configure: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """By its size."""
    name = next(name for name in bucket.names() if name.startswith(f"{cut}/checkpoints/4/tree/d/"))
    bucket.put(name, b"short")
    train(configure(**PACKED), f"gs://bucket/{cut}")
    said = capsys.readouterr().err
    assert f"{name} (5 bytes) is not what was written: its size differs".split("4/")[1] in said
    assert "going on from the checkpoint of step 2" in said


def test_the_last_that_began_has_the_run(
    bucket: Bucket, cut: str, configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process takes it: this one stops at its next checkpoint with one line, and has written nothing."""
    before: dict[str, bytes] = {}
    log = loop.Loop.read

    def taken(self: Any) -> None:
        log(self)
        if self.step == 5:
            bucket.put(f"{cut}/checkpoints/writer", b"process 7 on elsewhere (1)")
            before.update({name: bucket.get(name) for name in bucket.names()})

    monkeypatch.setattr(loop.Loop, "read", taken)
    with pytest.raises(UserError, match=r"process 7 on elsewhere \(1\) has gone on with this run"):
        train(configure(**PACKED), f"gs://bucket/{cut}")
    assert {name: bucket.get(name) for name in bucket.names()} == before


def test_what_is_no_run_is_left_alone(bucket: Bucket, configure: Callable[..., Any]) -> None:
    """A folder of other things, and a run of another configuration."""
    bucket.put("papers/a.pdf", b"%PDF")
    with pytest.raises(UserError, match="gs://bucket/papers: not a run"):
        train(configure(), "gs://bucket/papers")
    assert [name for name in bucket.names() if name.startswith("papers")] == ["papers/a.pdf"]


def test_an_adapter_is_read_from_the_store(
    bucket: Bucket, whole: Path, configure: Callable[..., Any], tmp_path: Path
) -> None:
    """By the library, and as `config.adapter`."""
    bucket.fill("tuned", whole / "adapter")
    _, params = load_model(GOLDEN / "model")
    here, there = (load_adapter(params, name) for name in (whole / "adapter", "gs://bucket/tuned"))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), here, there)))
    runs = []
    for name in (str(whole / "adapter"), "gs://bucket/tuned"):
        result = train(configure(steps=1, adapter=name), tmp_path / str(len(runs)))
        runs.append((result.output / "adapter_model.safetensors").read_bytes())
    assert runs[0] == runs[1]
    with pytest.raises(UserError, match="gs://bucket/nothing: no such folder"):
        load_adapter(params, "gs://bucket/nothing")


@pytest.mark.thorough
def test_two_processes_write_one_run(bucket: Bucket, alone: Path, tmp_path: Path) -> None:
    """All of them write the checkpoint straight into the store, and the first the rest."""
    found = outcomes(start(2, "gs://bucket/two"))
    assert [code for code, _ in found] == [0, 0], found
    parts = {
        name.split("/")[4] for name in bucket.names() if name.startswith("two/checkpoints/4/tree")
    }
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= parts
    assert_same_run(bucket.unpacked("two", tmp_path / "two"), alone)


@pytest.mark.thorough
def test_a_killed_process_of_two_and_a_restart(bucket: Bucket, alone: Path, tmp_path: Path) -> None:
    """kill -9 of one; the same command goes on from the last whole checkpoint to the same end."""
    found = outcomes(start(2, "gs://bucket/killed", die_after=(0, 3)))
    assert [code for code, _ in found] == [1, -9], found
    assert "killed/checkpoints/2/manifest.json" in bucket.names()
    found = outcomes(start(2, "gs://bucket/killed"))
    assert [code for code, _ in found] == [0, 0], found
    assert "going on from the checkpoint of step 2" in found[0][1]
    assert_same_run(bucket.unpacked("killed", tmp_path / "killed"), alone)
