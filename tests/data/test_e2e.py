"""experiments/e2e.py makes of the E2E corpus a file that jaxft reads."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from jaxft.data import read_rows

SCRIPT = Path(__file__).parents[2] / "experiments" / "e2e.py"
specification = importlib.util.spec_from_file_location("e2e", SCRIPT)
e2e = importlib.util.module_from_spec(specification)
specification.loader.exec_module(e2e)


def test_the_file_it_writes_is_read(tmp_path, monkeypatch, capsys):
    source, target = tmp_path / "valid.txt", tmp_path / "valid.jsonl"
    source.write_text("name : Aromi||Aromi is here . \nname : Zizzi||Zizzi \n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["e2e.py", str(source), str(target)])
    e2e.main()
    assert [row.values for row in read_rows(target)] == [
        {"prompt": "name : Aromi ->", "completion": " Aromi is here ."},
        {"prompt": "name : Zizzi ->", "completion": " Zizzi"},
    ]
    assert "2 examples" in capsys.readouterr().out


def test_a_line_without_a_reference_is_told_with_its_place():
    with pytest.raises(SystemExit, match=r"valid\.txt:2: no \|\|"):
        list(e2e.convert(["a||b", "name : Aromi"], "valid.txt"))
