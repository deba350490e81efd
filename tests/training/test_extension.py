"""A run that exists gets more updates, and nothing of it is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxft.configuration import load_config, to_json
from jaxft.errors import UserError
from jaxft.runs.best import best_step
from jaxft.runs.extension import HISTORY, past_of, patience_since
from jaxft.training.loop import train
from tests.small_runs import GOLDEN, Cut, adapter_of, cut_at, held_out, lines

CONSTANT = {"optimizer.schedule": "constant", "data.packing": True, "method.dropout": 0.1}
SETTINGS = held_out() | CONSTANT


@pytest.fixture(scope="module")
def long(configure: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six updates from the start."""
    folder = tmp_path_factory.mktemp("long") / "run"
    with jax.numpy_dtype_promotion("standard"):
        train(configure(**SETTINGS), folder)
    return folder


@pytest.fixture(scope="module")
def finished(configure: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four updates, done."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with jax.numpy_dtype_promotion("standard"):
        train(configure(**SETTINGS, steps=4), folder)
    return folder


@pytest.fixture
def short(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "run")


def assert_same(one: Path, other: Path) -> None:
    """Training numbers and exported tensors, bit for bit."""
    assert lines(one) == lines(other)
    ours, theirs = adapter_of(one), adapter_of(other)
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)


def test_an_extended_run_equals_one_that_was_longer_from_the_start(
    short: Path, long: Path, configure: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit where the rate is constant: batches, dropout and the optimizer's state go on."""
    before = (short / "config.json").read_text()
    result = train(configure(**SETTINGS), short)
    assert result.steps == 6
    assert_same(short, long)
    assert lines(short, "eval") == lines(long, "eval")
    assert (short / "samples.jsonl").read_text() == (long / "samples.jsonl").read_text()
    said = capsys.readouterr().err
    assert "extended: config.steps: 4 -> 6: 6 updates instead of 4, of which 4 are made" in said
    assert "going on from the checkpoint of step 4" in said
    assert (short / "config.json").read_text() == (long / "config.json").read_text()
    (change,) = json.loads((short / HISTORY).read_text())
    assert change == {"step": 4, "changed": ["steps: 4 -> 6"], "config": json.loads(before)}
    assert train(load_config(str(short / "config.json")), short).steps == 6
    assert "extended: " not in capsys.readouterr().err


def test_a_run_that_was_cut_short_is_extended_and_cut_short_again(
    long: Path, configure: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each start goes on from the last checkpoint; the extension is told once."""
    for cut, steps in ((3, 4), (5, 6)):
        with monkeypatch.context() as patch:
            cut_at(patch, cut)
            with pytest.raises(Cut):
                train(configure(**SETTINGS, steps=steps), tmp_path / "run")
    train(configure(**SETTINGS), tmp_path / "run")
    assert_same(tmp_path / "run", long)
    (change,) = json.loads((tmp_path / "run" / HISTORY).read_text())
    assert change["step"] == 2


def test_the_schedule_is_computed_anew_and_said(
    configure: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is made stays as it was; what follows is on the course of the longer run."""
    settings = {"optimizer.schedule": "linear", "data.packing": True}
    train(configure(**settings, steps=2), tmp_path / "run")
    train(configure(**settings, steps=4), tmp_path / "run")
    rates = [row["learning_rate"] for row in lines(tmp_path / "run")]
    np.testing.assert_allclose(rates, [1e-2, 5e-3, 5e-3, 2.5e-3], rtol=1e-6)
    said = capsys.readouterr().err
    assert "the schedule (linear) is computed anew over 4 updates" in said
    assert "the learning rate was 0.005 and goes on at 0.005" in said


@pytest.mark.parametrize("packing", [True, pytest.param(False, marks=pytest.mark.thorough)])
def test_epochs_extend_a_run_and_may_take_the_place_of_steps(
    packing: bool,
    configure: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Packed and mixed, whichever of the two keys counts the updates."""
    some = (GOLDEN / "data.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    for name, rows in (("a", some[:3]), ("b", some[3:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    settings = {
        "data.train": f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl",
        "data.mix": (1, 1),
        "data.packing": packing,
        "optimizer.schedule": "constant",
        "batch_size": 1,
        "steps": 0,
    }
    epoch = train(configure(**settings, epochs=1.0), tmp_path / "run").steps
    assert train(configure(**settings, epochs=2.0), tmp_path / "run").steps == 2 * epoch
    assert f"config.epochs: 1.0 -> 2.0: {2 * epoch} updates" in capsys.readouterr().err
    more = settings | {"steps": 2 * epoch + 1, "epochs": 2.0}
    assert train(configure(**more), tmp_path / "run").steps == 2 * epoch + 1
    train(configure(**settings, epochs=2 + 1 / epoch), tmp_path / "whole")
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert [entry["step"] for entry in past_of(tmp_path / "run").changes] == [epoch, 2 * epoch]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 3}, r"config\.steps: 4 -> 3 makes 3 updates, and this run has made 4: give more"),
        ({"epochs": 9.0, "steps": 4}, r"config\.epochs: 3\.0 -> 9\.0 counts for nothing where config\.steps is 4"),
        ({"seed": 7, "steps": 6}, r"another configuration.*steps.*alone may be more.*seed: 42 -> 7; steps: 4 -> 6"),
        ({"optimizer.learning_rate": 1e-3, "steps": 6}, "another configuration.*learning_rate"),
    ],
    ids=["fewer", "epochs that do not count", "seed", "rate"],
)  # fmt: skip
def test_what_is_no_extension_is_refused_in_one_line(
    changes: dict[str, Any], message: str, short: Path, configure: Callable[..., Any]
) -> None:
    """And nothing of the run changes."""

    def files() -> dict[Path, bytes]:
        found = (file for file in short.rglob("*") if file.is_file() and file.name != "lock")
        return {file: file.read_bytes() for file in found}

    before = files()
    with pytest.raises(UserError, match=message) as error:
        train(configure(**SETTINGS | changes), short)
    assert "\n" not in str(error.value)
    assert files() == before


def test_fewer_updates_than_planned_end_a_run_early(
    configure: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As long as no more than these are made: the checkpoint is exported."""
    with monkeypatch.context() as patch:
        cut_at(patch, 5)
        with pytest.raises(Cut):
            train(configure(**SETTINGS), tmp_path / "run")
    result = train(configure(**SETTINGS, steps=4), tmp_path / "run")
    assert (result.steps, result.output.exists()) == (4, True)
    said = capsys.readouterr().err
    assert "shortened: config.steps: 6 -> 4: 4 updates instead of 6, of which 4 are made" in said


def test_the_same_number_by_the_other_key_changes_nothing(
    short: Path, configure: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Epochs that come to the steps that were made: an epoch has six updates."""
    rows = lines(short)
    assert train(configure(**SETTINGS, steps=0, epochs=0.66), short).steps == 4
    said = capsys.readouterr().err
    assert "config.epochs: 3.0 -> 0.66; config.steps: 4 -> 0: 4 updates as before" in said
    assert lines(short) == rows


def test_a_run_that_patience_stopped_is_given_it_anew(
    configure: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The best checkpoint stays, also where the updates after it are worse, and is what is exported."""
    settings = SETTINGS | {
        "patience": 1,
        "checkpoint.best": True,
        "checkpoint.keep": 1,
        "optimizer.name": "sgd",
        "optimizer.learning_rate": 1e4,
        "optimizer.clip_norm": 0.0,
        "eval_every": 1,
        "checkpoint.every": 1,
        "optimizer.max_bad_steps": 99,
    }
    stopped = train(configure(**settings, steps=8), tmp_path / "run").steps
    assert stopped < 8
    best = adapter_of(tmp_path / "run")
    again = train(configure(**settings, steps=8), tmp_path / "run")
    assert again.steps == stopped
    extended = train(configure(**settings, steps=9), tmp_path / "run")
    assert stopped < extended.steps < 9
    said = capsys.readouterr().err
    assert f"its 1 evaluation counts anew from step {stopped}" in said
    losses = {row["step"]: row["loss"] for row in lines(tmp_path / "run", "eval")}
    kept = best_step(
        {step: float("nan" if loss is None else loss) for step, loss in losses.items()}
    )
    assert (tmp_path / "run" / "checkpoints" / str(kept)).exists()
    if kept is not None and kept <= stopped:
        np.testing.assert_equal(adapter_of(tmp_path / "run"), best)


def test_patience_counts_anew_only_where_it_had_stopped_the_run() -> None:
    """The changes are gone through in their order."""
    said: list[str] = []
    losses = {2: 1.0, 4: 2.0, 6: 3.0, 8: 4.0, 10: 5.0}
    assert patience_since([], losses, 2, said.append) == 0
    assert patience_since([4], losses, 2, said.append) == 0
    assert said == []
    assert patience_since([6], losses, 2, said.append) == 6
    assert patience_since([6, 8], losses, 2, said.append) == 6
    assert patience_since([6, 10], losses, 2, said.append) == 10
    assert len(said) == 3


def test_a_change_that_was_told_but_not_made_is_forgotten(
    configure: Callable[..., Any], tmp_path: Path
) -> None:
    """The process died between the two files."""
    (tmp_path / "config.json").write_text(to_json(configure()))
    entry = {"step": 4, "changed": ["steps: 6 -> 8"], "config": json.loads(to_json(configure()))}
    older = entry | {"config": json.loads(to_json(configure(steps=5)))}
    (tmp_path / HISTORY).write_text(json.dumps([older, entry]))
    assert past_of(tmp_path).changes == (older,)
    (tmp_path / HISTORY).write_text("{")
    with pytest.raises(UserError, match=r"history\.json: not what jaxft wrote"):
        past_of(tmp_path)
