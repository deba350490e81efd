"""metrics.jsonl has each step once, and progress is plain lines where there is no terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxft.runs.metrics import Metrics, Progress, read_metrics
from jaxft.runs.plots import plot_run


def test_lines_after_the_step_are_cut_off(tmp_path: Path) -> None:
    """A run that goes on from step 2 writes step 3 again, once; half a line is no line."""
    path = tmp_path / "metrics.jsonl"
    first = Metrics(path, 0, [])
    for step in (1, 2, 3):
        first.write("train", step, {"loss": float(step)})
    first.write("eval", 2, {"loss": 9.0})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    again = Metrics(path, 2, [])
    assert again.values == {2: 9.0}
    again.write("train", 3, {"loss": 3.5})
    again.close()
    assert [(row["split"], row["step"]) for row in read_metrics(path)] == [
        ("train", 1),
        ("train", 2),
        ("eval", 2),
        ("train", 3),
    ]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_progress_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Plain lines on stderr with loss, speed and the time left; nothing on stdout."""
    progress = Progress(0, 2)
    progress.update(1, {"loss": 1.5, "tokens_per_second": 100.0})
    progress.update(2, {"loss": 1.25, "tokens_per_second": 100.0})
    progress.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "step 2/2: loss 1.2500, 100 tokens/s, 0 s left" in captured.err
    assert "\r" not in captured.err


def test_a_plot_of_what_there_is(tmp_path: Path) -> None:
    """A run without evaluation, or without any update, has a plot too."""
    (tmp_path / "metrics.jsonl").write_text("")
    assert plot_run(tmp_path).stat().st_size > 1000
