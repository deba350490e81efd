"""The date that a chat template writes is the run's, on every day and in every part of it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxft import train
from jaxft.configuration import from_json, load_config
from jaxft.data import encode_chat
from jaxft.errors import UserError
from jaxft.objectives.preview import preview
from jaxft.objectives.reading import tokenizer_of
from jaxft.runs import dating
from jaxft.runs.dating import dated
from jaxft.runs.folder import open_folder

DATED = "{{ strftime_now('%d %b %Y') }}: {% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
PREFERENCES = str(Path(__file__).parents[2] / "configs" / "dpo.py")


@pytest.fixture
def talks(tmp_path: Path) -> str:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = tmp_path / "talks.jsonl"
    path.write_text((json.dumps({"messages": turns}) + "\n") * 8)
    return str(path)


def on(day: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Day(datetime.date):
        @classmethod
        def today(cls) -> Any:
            return cls.fromisoformat(day)

    monkeypatch.setattr(dating.datetime, "date", Day)


def test_a_run_goes_on_the_next_day(
    configure: Callable[..., Any], talks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the date of its first day, which its own config.json brings into another folder too."""
    settings = {"data.train": talks, "data.chat_template": DATED, "steps": 1}
    on("2024-02-29", monkeypatch)
    train(configure(**settings), tmp_path / "run")
    on("2024-03-01", monkeypatch)
    assert train(configure(**settings), tmp_path / "run").steps == 1
    again = load_config(str(tmp_path / "run" / "config.json"))
    assert again.data.date == "2024-02-29"
    assert dated(again, tmp_path / "again") is again
    with pytest.raises(UserError, match=r"data\.date: '2024-02-29' -> '2024-03-01'"):
        train(configure(**settings, **{"data.date": "2024-03-01"}), tmp_path / "run")


@pytest.mark.parametrize("recipe", ["sft.py", "dpo.py"])
def test_the_date_is_given_or_the_runs_or_todays(
    configure: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    recipe = str(Path(PREFERENCES).with_name(recipe))
    config = configure(recipe=recipe, **{"data.chat_template": DATED})
    on("2024-02-29", monkeypatch)
    fixed = dated(config, tmp_path / "run")
    assert fixed.data.date == "2024-02-29"
    open_folder(fixed, tmp_path / "run")
    on("2024-03-01", monkeypatch)
    assert dated(config, tmp_path / "run") == fixed
    assert config.data.date == ""  # the caller's is left as it was
    assert dated(config, tmp_path / "other").data.date == "2024-03-01"
    given = configure(recipe=recipe, **{"data.date": "2023-12-24T18:30"})
    assert dated(given, tmp_path / "run") is given
    written = (tmp_path / "run" / "config.json").read_text()
    assert from_json(written).data.date == "2024-02-29"


@pytest.mark.parametrize(
    ("date", "format", "text"),
    [
        ("2024-02-29", "%d %b %Y", "29 Feb 2024"),
        ("2024-02-29", "%Y-%m-%d %H:%M", "2024-02-29 00:00"),
        ("2024-02-29T18:30", "%A, %H:%M", "Thursday, 18:30"),
        ("2024-02-29T18:30:00+02:00", "%I %p%z", "06 PM+0200"),
    ],
)
def test_a_template_writes_the_date_in_its_own_way(
    configure: Callable[..., Any], date: str, format: str, text: str
) -> None:
    template = "{% set day = strftime_now('" + format + "') %}{{ day }}"
    config = configure(**{"data.chat_template": template, "data.date": date})
    tokenizer = tokenizer_of(config)
    assert tokenizer.decode(encode_chat(tokenizer, [{"role": "user", "content": "a"}])) == text


@pytest.mark.parametrize("date", ["yesterday", "29.2.2024", "2023-02-29", "2024-02-29T25:00"])
def test_what_is_no_date_is_refused(configure: Callable[..., Any], date: str) -> None:
    with pytest.raises(UserError, match=r"data\.date takes a date as 2024-02-29, or .*, not"):
        configure(**{"data.date": date})


def test_the_preview_says_the_date(configure: Callable[..., Any], talks: str) -> None:
    settings = {"data.train": talks, "data.date": "2024-02-29"}
    shown = "\n".join(preview(configure(**settings, **{"data.chat_template": DATED})))
    assert "the chat template writes the date, in this run 2024-02-29 (config.data.date)" in shown
    assert "29 Feb 2024: q" in shown
    undated = preview(configure(**settings, **{"data.chat_template": "chatml"}))
    assert "writes the date" not in "\n".join(undated)
