"""A thousand of the inputs of experiments/fuzz.py: each is read, or refused with one line."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
COUNTS = [100, pytest.param(600, marks=pytest.mark.thorough)]  # inputs of a kind


@pytest.fixture(scope="module")
def fuzz():
    """The script, with its sound files and its watch."""
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        import fuzz as script
    finally:
        sys.path.remove(str(EXPERIMENTS))
    with jax.numpy_dtype_promotion("standard"), script.prepared() as (inputs, watch):
        yield script, inputs, watch


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    "kind",
    [
        "header",
        "index",
        "config",
        "adapter",
        "tokenizer",
        "template",
        "jsonl",
        "override",
        "written",
    ],
)
def test_no_input_is_more_than_jaxft_stands(fuzz, kind, count, monkeypatch):
    script, inputs, watch = fuzz
    monkeypatch.setattr(script, "SECONDS", 1.5)  # the same work takes longer beside other tests
    result = script.fuzz(kind, inputs, count, watch, seed=1)
    assert not result.findings, "\n".join(result.findings)
    assert result.read + result.refused == count
    assert result.read
    assert result.refused > count // 10


def test_the_watch_sees_what_must_not_happen(fuzz, tmp_path):
    """A write outside of the run, another exception, a long message, a pickle: each is a finding."""
    script, _, watch = fuzz

    def wrong(act):
        return script.fault_of(act, watch, script.Result())

    assert "open outside of the run" in wrong(lambda: (tmp_path / "x").write_text("a"))
    assert "ZeroDivisionError" in wrong(lambda: 1 / 0)
    assert "a message of 3 letters" in wrong(lambda: raising(script.UserError("a\nb")))
    assert "s of the processor" in wrong(lambda: spin(1.2))
    assert wrong(lambda: raising(script.UserError("fine"))) == ""


def raising(error):
    raise error


def spin(seconds):
    import time

    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
