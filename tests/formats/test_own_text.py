"""The text on which a folder that was made of another is measured."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jaxft.assets import tiny_folder
from jaxft.configuration import load_config, to_json
from jaxft.data import load_tokenizer
from jaxft.formats.config_file import model_config
from jaxft.formats.own_text import TOKENS, WIDEST, text_for


@pytest.fixture
def config():
    return model_config(tiny_folder())


@pytest.fixture
def run_of(tmp_path):
    """A run's folder over these rows: `run_of([...], held_out=[...], objective="dpo")`."""

    def make(rows, held_out=(), objective="sft", **settings):
        folder = tmp_path / "run"
        folder.mkdir()
        settings |= {"model": str(tiny_folder())}
        for key, some in (("train", rows), ("eval", held_out)):
            if some:
                path = tmp_path / f"{key}.jsonl"
                path.write_text("".join(json.dumps(row) + "\n" for row in some))
                settings[f"data.{key}"] = str(path)
        recipe = "configs/sft.py:lora"
        if objective != "sft":
            recipe, settings["objective.name"] = "configs/dpo.py:lora", objective
        (folder / "config.json").write_text(to_json(load_config(recipe, settings)))
        return folder / "adapter"

    return make


def words(text):
    """The trained tokens as text."""
    tokenizer = load_tokenizer(tiny_folder())
    return [tokenizer.decode(ids[targets].tolist()) for ids, targets in text.pieces]


def pair(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def test_held_out_data_come_before_training_data(run_of, config, tmp_path):
    adapter = run_of([pair("Who?", " I do.")], [pair("Where?", " Here it is.")])
    text = text_for(tiny_folder(), config, adapter)
    assert text.name == f"the run's held-out data ({tmp_path / 'eval.jsonl'})"
    assert words(text) == [" Here it is."]
    (tmp_path / "eval.jsonl").unlink()
    text = text_for(tiny_folder(), config, adapter)
    assert text.name == f"the run's training data ({tmp_path / 'train.jsonl'})"
    assert words(text) == [" I do."]


def test_what_the_run_was_asked_stands_in_where_its_data_are_gone(run_of, config, tmp_path):
    adapter = run_of([pair("Who?", " I do.")])
    (tmp_path / "train.jsonl").unlink()
    sample = {"prompt": "Who?", "completion": " x", "reference": " I did."}
    lines = [json.dumps({"step": step, **sample}) for step in (0, 2)]
    (tmp_path / "run" / "samples.jsonl").write_text("\n".join(lines) + "\n")
    text = text_for(tiny_folder(), config, adapter)
    assert "samples.jsonl" in text.name
    assert words(text) == [" I did."]


@pytest.mark.parametrize(
    ("objective", "row"),
    [
        ("dpo", {"prompt": "Who?", "chosen": " I do.", "rejected": " you"}),
        ("kto", {"prompt": "Who?", "completion": " I do.", "label": True}),
    ],
)
def test_of_preferences_the_chosen_completion_is_measured(run_of, config, objective, row):
    other = {**row, "prompt": "Why?"} | ({"label": False} if objective == "kto" else {})
    text = text_for(tiny_folder(), config, run_of([row, other], objective=objective))
    assert text.name.startswith("the run's training data")
    assert words(text) == [" I do.", " I do."]


def test_a_chat_is_measured_by_the_template_beside_the_adapter(run_of, config):
    talk = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I do."}]
    adapter = run_of([{"messages": talk}], **{"data.chat_template": "chatml"})
    adapter.mkdir()
    template = "{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}!{% endgeneration %}{% endfor %}"
    (adapter / "chat_template.jinja").write_text(template)
    (said,) = words(text_for(tiny_folder(), config, adapter))
    assert said.endswith("I do.!")


@pytest.mark.parametrize("beside", ["nothing", "a folder of other things", "data at a URL"])
def test_else_english_text_is_measured(run_of, config, tmp_path, beside):
    adapter = tmp_path / "adapter"
    if beside == "a folder of other things":
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    if beside == "data at a URL":
        adapter = run_of([], **{"data.train": "https://nowhere.invalid/a.jsonl,tfds:gsm8k"})
    text = text_for(tiny_folder(), config, adapter)
    assert text.name == "English text that comes with jaxft"
    assert not text.random
    assert sum(len(ids) for ids, _ in text.pieces) > 1000


def test_little_is_read_and_a_long_prompt_leaves_room_for_its_completion(run_of, config):
    rows = [pair("word " * 2000, " end"), *(pair(f"{n} " * 100, " x" * 60) for n in range(99))]
    text = text_for(tiny_folder(), config, run_of(rows))
    widths = [len(ids) for ids, _ in text.pieces]
    assert max(widths) <= WIDEST
    assert TOKENS <= sum(widths) < TOKENS + WIDEST
    assert words(text)[0] == " end"
    assert all(targets.any() and not targets[0] for _, targets in text.pieces)


def test_without_a_tokenizer_the_tokens_are_random_and_the_same_every_time(golden):
    folder = golden / "models/llama"
    texts = [text_for(folder, model_config(folder), folder) for _ in range(2)]
    assert texts[0].random
    for one, other in zip(texts[0].pieces, texts[1].pieces, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
