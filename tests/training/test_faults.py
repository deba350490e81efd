"""What may happen to a run, and what becomes of it: it goes on, or ends in one clear line, and loses nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import cli
from jaxft.errors import UserError
from jaxft.runs import checkpoint, evaluation, metrics
from jaxft.runs.lock import Lock
from jaxft.training import loop, program
from jaxft.training.loop import train
from tests.small_runs import (
    GOLDEN,
    PACKED,
    Cut,
    adapter_of,
    assert_same_end,
    cut_at,
    flip,
    lines,
)
from tests.small_runs import whole as whole

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def died(configure: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of the steps 2 and 4 that died after step 5."""
    folder = tmp_path_factory.mktemp("died") / "run"
    with jax.numpy_dtype_promotion("standard"), pytest.MonkeyPatch.context() as patch:
        cut_at(patch, 5)
        with pytest.raises(Cut):
            train(configure(**PACKED), folder)
    return folder


@pytest.fixture
def cut(died: Path, tmp_path: Path) -> Path:
    """A copy of the run that died."""
    return Path(shutil.copytree(died, tmp_path / "cut"))


def send(number: int) -> None:
    """A signal to this process."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "ends", "place"),
    [
        (signal.SIGTERM, SystemExit, "evaluating at step 0"),
        (signal.SIGTERM, SystemExit, "compiling"),
        pytest.param(
            signal.SIGTERM, SystemExit, "evaluating at step 4", marks=pytest.mark.thorough
        ),
        (signal.SIGINT, KeyboardInterrupt, "compiling"),
    ],
)
def test_a_signal_writes_a_checkpoint_and_the_next_start_goes_on(
    configure: Callable[..., Any],
    tmp_path: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    ends: type[BaseException],
    place: str,
) -> None:
    """During evaluation and compilation; the code is 143 or 130, and handlers are as they were."""
    config, before = configure(**PACKED), signal.getsignal(number)
    say = metrics.Progress.say

    def struck(self: Any, line: str) -> None:
        say(self, line)
        if line.startswith(place):
            send(number)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Progress, "say", struck)
        with pytest.raises(ends) as ended:
            train(config, tmp_path / "run")
    if number == signal.SIGTERM:
        assert ended.value.code == 143  # type: ignore[attr-defined]
    assert signal.getsignal(number) is before
    stopped = {"evaluating at step 0": 0, "compiling": 1, "evaluating at step 4": 4}[place]
    assert f"stopped after step {stopped}, whose checkpoint is written" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / str(stopped) / "manifest.json").exists()
    assert not (tmp_path / "run" / "adapter").exists()
    train(config, tmp_path / "run")
    assert_same_end(tmp_path / "run", whole)


def test_a_signal_before_there_is_anything_to_save_ends_at_once(
    configure: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the model is read: nothing has been written."""
    monkeypatch.setattr(loop, "prepare_model", lambda *_: send(signal.SIGTERM))
    with pytest.raises(SystemExit, match="143"):
        train(configure(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_named_and_the_end_is_the_same(
    configure: Callable[..., Any], cut: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run goes on from the checkpoint before it."""
    largest = max((cut / "checkpoints" / "4").rglob("d/*"), key=lambda path: path.stat().st_size)
    flip(largest, 100)
    train(configure(**PACKED), cut)
    said = capsys.readouterr().err
    assert f"checkpoints/4: damaged: {largest.relative_to(cut / 'checkpoints' / '4')}" in said
    assert "going on from the checkpoint of step 2" in said
    assert_same_end(cut, whole)


def test_without_any_whole_checkpoint_a_run_begins_again(
    configure: Callable[..., Any], cut: Path, whole: Path
) -> None:
    """Which comes to the same."""
    for step in (2, 4):
        (cut / "checkpoints" / str(step) / "manifest.json").write_text("{")
    train(configure(**PACKED), cut)
    assert_same_end(cut, whole)


def test_half_a_line_of_metrics_and_samples_is_written_again(
    configure: Callable[..., Any], cut: Path, whole: Path
) -> None:
    """Also one that breaks off within a letter."""
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    with (cut / "samples.jsonl").open("ab") as file:
        file.write('{"step": 4, "prompt": "é'.encode()[:-1])
    train(configure(**PACKED), cut)
    assert_same_end(cut, whole)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer_config.json"])
def test_another_base_or_tokenizer_is_refused(
    configure: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """In the same folder: what differs is named, and the checkpoint stays as it is."""
    shutil.copytree(GOLDEN / "model", tmp_path / "model")
    config = configure(**PACKED | {"model": str(tmp_path / "model")})
    with monkeypatch.context() as patch:
        cut_at(patch, 3)
        with pytest.raises(Cut):
            train(config, tmp_path / "run")
    if file.endswith(".json"):
        (tmp_path / "model" / file).write_text((GOLDEN / "model" / file).read_text() + " ")
    else:
        flip(tmp_path / "model" / file)
    with pytest.raises(UserError, match=f"has changed since: the .*{file}"):
        train(config, tmp_path / "run")
    shutil.copy(GOLDEN / "model" / file, tmp_path / "model" / file)
    assert train(config, tmp_path / "run").steps == 6


@pytest.mark.thorough
def test_another_mesh_is_honoured(
    configure: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run on two devices goes on, on four, with the same numbers up to rounding."""
    both = {"data.packing": True, "checkpoint.every": 2, "mesh.data": 2}
    two = configure(**both)
    train(two, tmp_path / "whole")
    with monkeypatch.context() as patch:
        cut_at(patch, 3)
        with pytest.raises(Cut):
            train(two, tmp_path / "run")
    train(configure(**both, **{"mesh.fsdp": 2}), tmp_path / "run")
    assert (
        "the mesh was data 2 x fsdp 1 x context 1 x tensor 1 and is data 2 x fsdp 2"
        in capsys.readouterr().err
    )
    ours, theirs = ([row["loss"] for row in lines(tmp_path / name)] for name in ("run", "whole"))
    assert len(ours) == 6
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize(
    "change", [{"seed": 7}, {"data.train": str(GOLDEN / "messages.jsonl")}, {"method.rank": 2}]
)
def test_another_seed_or_other_data_are_refused(
    configure: Callable[..., Any], cut: Path, change: dict[str, Any]
) -> None:
    """The keys are shown with both values."""
    key = next(iter(change))
    with pytest.raises(UserError, match=rf"another configuration.*{key}: .* -> "):
        train(configure(**PACKED | change), cut)


def test_of_two_processes_the_second_is_refused(
    configure: Callable[..., Any], cut: Path, whole: Path
) -> None:
    """The first is named. A lock file that a killed process left is no lock."""
    assert (cut / "checkpoints" / "lock").exists()
    with Lock(cut):
        before = (cut / "metrics.jsonl").read_text()
        with pytest.raises(UserError, match=rf"process {os.getpid()} on .* is training in"):
            train(configure(**PACKED), cut)
        assert (cut / "metrics.jsonl").read_text() == before
    train(configure(**PACKED), cut)
    assert_same_end(cut, whole)


def test_two_that_begin_a_new_run_at_once(
    configure: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both found no folder: the later one to write is refused."""
    prepare = loop.prepare_data
    first = Lock(tmp_path / "run")

    def meanwhile(*arguments: Any) -> Any:
        loop.open_folder(configure(), tmp_path / "run")
        first.take()
        return prepare(*arguments)

    monkeypatch.setattr(loop, "prepare_data", meanwhile)
    with pytest.raises(UserError, match="is training in this folder"):
        train(configure(), tmp_path / "run")
    first.__exit__(None, None, None)


def poison(monkeypatch: pytest.MonkeyPatch, token: int) -> None:
    """The loss of a batch that holds the token is not a number."""
    loss_of = program.loss_of

    def poisoned(*arguments: Any) -> Any:
        loss = loss_of(*arguments)

        def one(params: Any, batch: Any) -> Any:
            total, weight = loss(params, batch)
            return total * jnp.where(jnp.any(batch["tokens"] == token), jnp.nan, 1.0), weight

        return one

    monkeypatch.setattr(program, "loss_of", poisoned)


@pytest.fixture
def rare(configure: Callable[..., Any]) -> tuple[int, list[int]]:
    """A token that two batches of a run of six hold, not one after the other, and the steps of the two."""
    config = configure(dtype="float32", param_dtype="float32")
    mesh = loop.make_mesh(config.mesh)
    model, _, _ = loop.prepare_model(config, mesh)
    train_data = loop.prepare_data(config, model.config, mesh).train.batches
    held = [set(np.unique(train_data[index]["tokens"])) for index in range(6)]
    for token in sorted(set.union(*held)):
        steps = [index + 1 for index in range(6) if token in held[index]]
        if len(steps) == 2 and steps[1] - steps[0] > 1 and steps[0] > 1:
            return int(token), steps
    raise AssertionError("the golden data have no such token")


def test_an_update_that_is_no_number_is_not_applied(
    configure: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rare: tuple[int, list[int]],
) -> None:
    """The run goes on, says so with the batch's examples, and everything it writes is finite."""
    token, bad = rare
    poison(monkeypatch, token)
    train(configure(), tmp_path / "run")
    rows = lines(tmp_path / "run")
    assert [row["step"] for row in rows if row["loss"] is None] == bad
    assert all(row["grad_norm"] is not None for row in rows if row["step"] not in bad)
    said = capsys.readouterr().err
    assert f"step {bad[0]}: loss nan" in said
    assert f"the update is not applied; examples {GOLDEN / 'data.jsonl'}:" in said
    for tensor in adapter_of(tmp_path / "run").values():
        assert np.all(np.isfinite(tensor))


def test_after_max_bad_steps_the_run_stops(
    configure: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rare: tuple[int, list[int]],
) -> None:
    """In one line with step, rate and examples; the checkpoint before it stays."""
    token, bad = rare
    poison(monkeypatch, token)
    config = configure(**{"optimizer.max_bad_steps": 1, "checkpoint.every": 1})
    wanted = (
        rf"step {bad[0]}: loss nan, gradient norm nan, learning rate [\d.]+: .*examples "
        rf".*data\.jsonl:\d+,\d+,\d+,\d+; 1 such step in a row: checkpoint {bad[0] - 1} stays"
    )
    with pytest.raises(UserError, match=wanted) as error:
        train(config, tmp_path / "run")
    assert "\n" not in str(error.value)
    steps = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    assert steps[-1] == bad[0] - 1


def test_a_failed_save_in_the_background_fails_the_run(
    configure: Callable[..., Any],
    cut: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """One line, and the exit code is not 0; the good checkpoint is not touched."""
    write = checkpoint.write_manifest

    def full(folder: Path) -> None:
        if folder.parent.name == "checkpoints":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(folder)

    before = sorted(path for path in (cut / "checkpoints").rglob("*") if path.is_file())
    monkeypatch.setattr(checkpoint, "write_manifest", full)
    assert cli.main(["train", "--config", str(cut / "config.json"), "--workdir", str(cut)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(
        f"jaxft: {cut}/checkpoints/6: cannot be written: No space left on device"
    )
    assert "bytes are free" in said
    assert sorted(path for path in (cut / "checkpoints").rglob("*") if path.is_file()) == before
    assert not (cut / "adapter").exists()


def test_a_data_file_that_vanished(
    configure: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mid-run it is not missed, for its tokens are in memory; the next start names it."""
    data = tmp_path / "data.jsonl"
    shutil.copy(GOLDEN / "data.jsonl", data)
    config = configure(**PACKED | {"data.train": str(data)})
    dispatch = loop.Loop.dispatch

    def vanishing(self: Any, batch: Any) -> Any:
        data.unlink(missing_ok=True)
        return dispatch(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "dispatch", vanishing)
        cut_at(patch, 5)
        with pytest.raises(Cut):
            train(config, tmp_path / "run")
    with pytest.raises(UserError, match=f"{data}: no such file"):
        train(config, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "4" / "manifest.json").exists()
    shutil.copy(GOLDEN / "data.jsonl", data)
    assert train(config, tmp_path / "run").steps == 6


def scripted(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Held-out losses, one an evaluation."""
    given = iter(losses)

    def told(sums: Any, trainable: Any, frozen: Any, batches: Iterator[Any]) -> dict[str, float]:
        list(batches)
        return {"loss": next(given), "tokens": 1.0}

    monkeypatch.setattr(evaluation, "held_out", told)


def test_early_stopping_keeps_and_exports_the_best(
    configure: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter is that of the lowest held-out loss, also when the run is taken up after its end."""
    common = {
        "data.eval": str(GOLDEN / "data.jsonl"),
        "data.packing": True,
        "optimizer.schedule": "constant",
    }
    config = configure(
        steps=12,
        eval_every=2,
        patience=2,
        **common,
        **{"checkpoint.best": True, "checkpoint.every": 3, "checkpoint.keep": 1},
    )
    scripted(monkeypatch, [9.0, 3.0, 2.0, 2.5, 2.6])
    result = train(config, tmp_path / "run")
    assert result.steps == 8
    assert [row["loss"] for row in lines(tmp_path / "run", "eval")] == [9.0, 3.0, 2.0, 2.5, 2.6]
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").glob("[0-9]*")}
    assert kept == {"4", "8"}
    exported = adapter_of(tmp_path / "run")
    scripted(monkeypatch, [9.0, 3.0, 2.0])
    train(configure(steps=4, eval_every=2, **common), tmp_path / "short")
    for name, tensor in adapter_of(tmp_path / "short").items():
        np.testing.assert_array_equal(exported[name], tensor)
    scripted(monkeypatch, [])
    assert train(config, tmp_path / "run").steps == 8
    for name, tensor in adapter_of(tmp_path / "run").items():
        np.testing.assert_array_equal(exported[name], tensor)


def test_several_held_out_sets(configure: Callable[..., Any], tmp_path: Path) -> None:
    """Each has a line that names it, at each evaluation; from a command line as well."""
    rows = (GOLDEN / "data.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "first.jsonl").write_text("".join(rows[:8]))
    (tmp_path / "second.jsonl").write_text("".join(rows[8:24]))
    sets = {name: str(tmp_path / f"{name}.jsonl") for name in ("first", "second")}
    result = train(
        configure(eval_every=3, **{"data.eval": sets, "data.packing": True}), tmp_path / "run"
    )
    found = [(row["step"], row["set"]) for row in lines(tmp_path / "run", "eval")]
    assert found == [(step, name) for step in (0, 3, 6) for name in sets]
    assert result.metrics["eval_first_loss"] != result.metrics["eval_second_loss"]
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["data"]["eval"] == sets
    words = ["train", "--config", str(tmp_path / "run" / "config.json"), "--workdir"]
    assert cli.main([*words, str(tmp_path / "run")]) == 0
    other = [*words, str(tmp_path / "other"), f"--config.data.eval={json.dumps(sets)}"]
    assert cli.main([*other, "--config.steps=1"]) == 0


def compilations(caplog: pytest.LogCaptureFixture) -> int:
    """How often the training step was compiled since the last call."""
    count = sum("Compiling jit(update)" in record.getMessage() for record in caplog.records)
    caplog.clear()
    return count


@pytest.mark.usefixtures("compiled_anew")
def test_the_step_compiles_once(
    configure: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """For a run with one bucket, and once more when it is taken up; on several devices too."""
    settings = {"data.packing": True, "checkpoint.every": 2, "mesh.data": 2, "mesh.fsdp": 2}
    config = configure(**settings)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        with monkeypatch.context() as patch:
            cut_at(patch, 4)
            with pytest.raises(Cut):
                train(config, tmp_path / "run")
        assert compilations(caplog) == 1
        train(config, tmp_path / "run")
        assert compilations(caplog) == 1


def test_the_end_says_what_to_do_next(
    configure: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """How many parameters trained, the seconds, and the commands with their paths; all of it on stderr."""
    train(configure(steps=2, **{"data.packing": True}), tmp_path / "run")
    out, said = capsys.readouterr()
    assert out == ""
    assert "compiling the step for 4 rows of" in said
    assert "done: 2 updates of 6,144 of 84,734 parameters in" in said
    both = f"--model {GOLDEN / 'model'} --adapter {tmp_path / 'run' / 'adapter'}"
    assert f"jaxft generate {both} --prompt" in said
    assert f"jaxft merge {both} --output {tmp_path / 'run' / 'merged'}" in said
