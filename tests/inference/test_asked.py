"""Files of prompts: what is asked, and what is said of the rest."""

import json
from pathlib import Path

import pytest

import jaxft
from jaxft.errors import UserError
from jaxft.inference.asked import read_prompts

FOLDER = Path(__file__).parents[1] / "golden" / "trl" / "model"
USER = {"role": "user", "content": "Where?"}
SYSTEM = {"role": "system", "content": "Answer."}


def read(tmp_path, *rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, tools = read_prompts(str(file))
    return list(found.values()), tools


def test_a_system_key_stands_first_in_the_conversation(tmp_path):
    rows = [
        {"messages": [USER], "system": "Answer."},
        {"messages": [SYSTEM, USER], "system": "Answer."},
        {"prompt": [USER], "system": "Answer."},
        {"prompt": "Where?", "system": "Answer."},
    ]
    assert read(tmp_path, *rows)[0] == [[SYSTEM, USER]] * 4
    assert read(tmp_path, {"prompt": "Where?", "system": ""})[0] == ["Where?"]


@pytest.mark.parametrize("system", ["Do not.", 3])
def test_a_system_key_that_cannot_be_is_refused(tmp_path, system):
    with pytest.raises(UserError, match=r"rows\.jsonl:1: system (says otherwise|must be a string)"):
        read(tmp_path, {"messages": [SYSTEM, USER], "system": system})


def test_text_that_is_not_asked_is_said_once_with_its_first_place(tmp_path, capsys):
    rows = [{"prompt": "Where?", "completion": "Here.", "id": 7}]
    rows += [{"prompt": "Where?", "context": "It is in Paris."}] * 2
    assert read(tmp_path, *rows)[0] == ["Where?"] * 3
    said = capsys.readouterr().err
    assert "'context': text of 2 rows that is not asked (first: " in said
    assert "rows.jsonl:2)" in said
    read(tmp_path, *rows[:1])
    assert capsys.readouterr().err == ""


def test_tools_go_with_their_rows(tmp_path, capsys):
    tool = {"name": "add"}
    _, tools = read(tmp_path, {"messages": [USER], "tools": json.dumps([tool])}, {"prompt": "a"})
    assert tools == [[tool], None]
    assert capsys.readouterr().err == ""


def test_a_text_is_asked_without_tools_and_that_is_said(capsys):
    model, params = jaxft.load(FOLDER)
    settings = {"tokenizer": FOLDER, "max_new_tokens": 1, "progress": True}
    jaxft.generate(model, params, ["Where?"], tools=[[{"name": "add"}]], **settings)
    assert "jaxft: texts are asked without their tools: --chat asks them" in capsys.readouterr().err
