"""RAFT's rows: the oracle among distractors or distractors alone, and what a search finds where rows are held out."""

import json

import numpy as np
import pytest

import jaxft
from jaxft.data import Row, load_tokenizer
from jaxft.errors import UserError
from jaxft.objectives.preview import preview
from jaxft.retrieval import open_retriever, update_index
from jaxft.retrieval.training_rows import retrieving, with_passages

NAMES = ["Ola", "Tove", "Malin", "Knut", "Siri", "Arne", "Berit", "Dag"]


@pytest.fixture
def retriever(tmp_path, monkeypatch, tokenizer):
    """An index of who lives where, a chunk a person."""
    monkeypatch.chdir(tmp_path)
    lines = [{"id": n, "text": f"{n} lives in town {len(n)}{i}."} for i, n in enumerate(NAMES)]
    (tmp_path / "people.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    update_index("INDEX", ["people.jsonl"])
    return open_retriever("INDEX", tokenizer, passages=3)


def asked(name):
    return f"In which town lives {name}? The town"


def rows(count=200, talk=False):
    for number in range(count):
        place = number % len(NAMES)
        name = NAMES[place]
        values = {"prompt": asked(name), "completion": f" {len(name)}{place}."}
        if talk:
            said = zip(("user", "assistant"), values.values(), strict=True)
            values = {"messages": [{"role": role, "content": text} for role, text in said]}
        kind = "messages" if talk else "prompt_completion"
        yield Row(f"train.jsonl:{number + 1}", kind, values)


def passages(row):
    """What stands between the template's words."""
    prompt = row.values["prompt"]
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    body = text.removeprefix("Answer the question from these passages.\n\n")
    return [line.partition("] ")[2] for line in body.partition("\n\nQuestion:")[0].split("\n\n")]


def made(retriever, given=None, **changes):
    settings = {"retriever": retriever, "max_length": 400, "share": 0.8, "seed": 0}
    return list(with_passages(iter(given or rows()), **settings | changes))


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_share_of_the_rows_has_the_passage_of_its_answer(retriever, share):
    found = made(retriever, share=share)
    has = [any(row.values["completion"].strip() in one for one in passages(row)) for row in found]
    assert np.mean(has) == pytest.approx(share, abs=0.1 if 0 < share < 1 else 0)
    assert {len(passages(row)) for row in found} == {3}
    assert all(len(set(passages(row))) == 3 for row in found)


def test_the_oracle_stands_anywhere(retriever):
    found = made(retriever, share=1.0)
    places = [
        [row.values["completion"].strip() in one for one in passages(row)].index(True)
        for row in found
    ]
    assert set(places) == {0, 1, 2}


def test_draws_depend_on_the_seed_and_on_where_the_row_stands(retriever):
    texts = [row.values["prompt"] for row in made(retriever)]
    assert texts == [row.values["prompt"] for row in made(retriever)]
    assert texts[10:] == [row.values["prompt"] for row in made(retriever, list(rows())[10:])]
    assert texts != [row.values["prompt"] for row in made(retriever, seed=1)]
    assert texts[0] != texts[len(NAMES)]  # the same question, elsewhere


def test_held_out_rows_have_what_is_found_in_use(retriever):
    (row,) = made(retriever, list(rows(1)), share=None)
    (one,) = retriever.ask({"prompt 1": asked("Ola")}, 390)
    assert row.values["prompt"] == one.prompt
    assert passages(row)[0] == "Ola lives in town 30."


def test_a_conversation_becomes_its_last_question_and_answer(retriever):
    (row,) = made(retriever, list(rows(1, talk=True)), share=1.0)
    assert row.format == "prompt_completion"
    assert row.values["prompt"][-1]["content"].endswith(f"Question: {asked('Ola')}")
    assert row.values["completion"] == [{"role": "assistant", "content": " 30."}]


def test_the_answer_keeps_its_room(retriever, tokenizer):
    for length in (60, 70, 80, 120):
        for row in made(retriever, list(rows(8)), max_length=length):
            text = row.values["prompt"] + row.values["completion"]
            assert len(tokenizer.encode(text)) < length
    with pytest.raises(UserError, match=r"train\.jsonl:1: the question is longer than the model"):
        made(retriever, max_length=30)


def test_a_text_asks_nothing(retriever):
    with pytest.raises(UserError, match=r"a\.jsonl:1: a text asks nothing: config\.data\.retrieve"):
        made(retriever, [Row("a.jsonl:1", "text", {"text": "x"})])


def written(folder):
    for name in ("train", "eval"):
        lines = [json.dumps(row.values) + "\n" for row in rows(8)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return {"data.train": "train.jsonl", "data.eval": "eval.jsonl", "data.retrieve": "INDEX"}


def test_a_run_reads_rows_with_passages(retriever, tmp_path):
    config = jaxft.load_config("configs/sft.py:lora", written(tmp_path))
    text = "\n".join(preview(config, reading=retrieving, shown=1))
    assert "Answer the question from these passages" in text
    assert "lives in town" in text
    assert retrieving(jaxft.load_config("configs/sft.py:lora"), load_tokenizer("tiny"), 64) == {}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("retrieve_oracle", 1.5, "config.data.retrieve_oracle takes a number from 0 to 1"),
        ("retrieve_passages", 0, "config.data.retrieve_passages takes a number of at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(key, value, said):
    with pytest.raises(UserError, match=said):
        jaxft.load_config("configs/sft.py:lora", {f"data.{key}": value})


def test_preferences_take_no_passages():
    with pytest.raises(UserError, match=r"config\.data\.retrieve: preferences take '' alone"):
        jaxft.load_config("configs/dpo.py:lora", {"data.retrieve": "INDEX"})
