"""Tuning runs: those that fail say why, and those that do not fit the device together go in halves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxft.comparison import tuning
from jaxft.comparison.levers import LEVERS
from jaxft.comparison.tuning import Wanted
from jaxft.training.memory import NoRoom

LORA = LEVERS["lora"]
TOLD = (100, 2**20)  # trained parameters, bytes of an update


def ended(folder: Path, **told: Any) -> Path:
    """What is left of a member: two updates of 30 tokens, the held-out loss before them and after."""
    folder.mkdir()
    lines = [
        {"step": 0, "loss": 4.0, "split": "eval"},
        *({"step": n, "tokens": 30, "tokens_per_second": 10.0, "split": "train"} for n in (1, 2)),
        {"step": 2, "loss": 3.0, "split": "eval"},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "ended.json").write_text(json.dumps({"step": 2, **told}))
    return folder


def test_a_member_has_its_share_of_the_seconds(tmp_path: Path) -> None:
    """Of three that took 20 s, 6 of them in updates: 2 are one's, and what is beside them is anybody's."""
    given: Any = SimpleNamespace(folder=tmp_path)
    told = tuning._told(given, LORA, ended(tmp_path / "a"), TOLD, 20.0, 3)
    assert (told["value"], told["run"], told["tokens"]) == (3.0, "a", 60)
    assert told["tuning_seconds"] == pytest.approx(14.0 + 6.0 / 3)
    assert told["step_seconds"] == pytest.approx(1.0)
    assert told["tokens_per_second"] == 30.0


def test_a_member_that_failed_has_no_value(tmp_path: Path) -> None:
    """Whatever was measured before it did."""
    given: Any = SimpleNamespace(folder=tmp_path)
    folder = ended(tmp_path / "a", error="loss is not finite")
    told = tuning._told(given, LORA, folder, TOLD, 20.0, 3)
    assert told == {"value": None, "why": "loss is not finite"}


def test_runs_that_do_not_fit_together_go_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to one, whose refusal is its own."""
    sizes = []

    def fits_two(given: Any, lever: Any, wanted: Sequence[Wanted], *_: Any, **__: Any) -> Any:
        sizes.append(len(wanted))
        if len(wanted) > 2:
            raise NoRoom("the step needs 3 GiB on a device, which has 2 GiB")
        return [{"value": one.rate} for one in wanted]

    monkeypatch.setattr(tuning, "_together", fits_two)
    wanted = [Wanted(float(rate), 0) for rate in range(5)]
    given: Any = None
    made = tuning.tune(given, LORA, wanted, 4, keep=False)
    assert [one["value"] for one in made] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert sizes == [5, 2, 3, 1, 2]
