"""The ledger: what is done is not done again, and a line that was cut short was not done."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxft.comparison.ledger import Ledger
from jaxft.errors import UserError


def test_a_piece_is_made_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.take("a", lambda: {"value": 1.5})["value"] == 1.5
    again = Ledger(tmp_path / "ledger.jsonl")
    assert again.take("a", lambda: {"value": 2.0})["value"] == 1.5
    assert again.seconds == ledger.seconds >= 0


def test_a_line_that_was_cut_short_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    Ledger(file).take("a", lambda: {"value": 1.0})
    whole = file.read_text()
    file.write_text(whole + '{"piece": "b", "val')
    assert list(Ledger(file).pieces) == ["a"]
    assert file.read_text() == whole


def test_another_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    file.write_text("[1]\n")
    with pytest.raises(UserError, match=r"ledger\.jsonl:1: no line of a comparison"):
        Ledger(file)
