"""The embedded base: small, whole, and a model of English."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxft import assets
from jaxft.assets import model_folder
from jaxft.data import load_tokenizer, prepare_examples, read_rows
from jaxft.data.chat import encode_chat_with_mask
from jaxft.errors import UserError
from jaxft.formats import load
from jaxft.models import head_of, hidden_states
from jaxft.objectives.cross_entropy import cross_entropy

ENGLISH = (
    "Maria has 5 apples. She buys 3 more apples at the store. How many apples does she have now?"
)
MESSAGES = [
    {"role": "user", "content": "How many legs do 3 dogs have?"},
    {"role": "assistant", "content": "They have 12 legs."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(assets.tiny_folder())


def test_the_folder_is_whole_and_at_most_eight_megabytes():
    names = {path.name for path in assets.tiny_folder().iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert {"generation_config.json", "model.safetensors", "README.md"} <= names
    folder = assets.tiny_folder().parent
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 8_000_000


def test_the_base_knows_english(tokenizer):
    """Its loss on a sentence is far below that of a uniform guess."""
    model, params = load(assets.tiny_folder())
    tokens = jnp.asarray([tokenizer.encode(ENGLISH)], jnp.int32)
    hidden = hidden_states(model.config, params, tokens)[:, :-1]
    weights = jnp.ones(tokens[:, 1:].shape)
    total, count = jax.jit(cross_entropy)(hidden, head_of(params), tokens[:, 1:], weights)
    assert total / count < 0.5 * math.log(model.config.vocabulary)


@pytest.mark.parametrize("text", [ENGLISH, "Zoë paid 3,50 €\nfor  two 🍎s </s"])
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_id
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == text


def test_the_chat_template_marks_the_answer_and_its_end(tokenizer):
    ids, trained = encode_chat_with_mask(tokenizer, MESSAGES)
    said = [token for token, mark in zip(ids, trained, strict=True) if mark]
    assert ids[0] == tokenizer.bos_id
    assert (
        tokenizer.decode(ids)
        == "Question: How many legs do 3 dogs have?\nAnswer: They have 12 legs."
    )
    assert tokenizer.decode(said) == " They have 12 legs."
    assert said[-1] == tokenizer.eos_id


def test_held_out_rows_are_new_and_short(tokenizer):
    """No held-out record, and no pair of a name with a thing, is in the training rows."""
    read = {name: list(read_rows(assets.quickstart_data(name))) for name in ("train", "heldout")}
    assert (len(read["train"]), len(read["heldout"])) == (600, 60)
    prompts = {name: {row.values["prompt"] for row in rows} for name, rows in read.items()}
    assert not prompts["train"] & prompts["heldout"]
    assert not {*map(_pair, prompts["train"])} & {*map(_pair, prompts["heldout"])}
    for rows in read.values():
        _, summary = prepare_examples(rows, tokenizer, max_length=128, loss_on="completion")
        assert summary.truncated == summary.dropped == summary.without_eos == 0


def _pair(prompt: str) -> tuple[str, str]:
    fields = dict(field.split(": ") for field in prompt.removesuffix(" ->").split(" | "))
    thing = next(value for key, value in fields.items() if key != "name" and value.isalpha())
    return fields["name"], thing


def test_transformers_reads_the_same_settings():
    """The ids that the model's files name are the tokenizer's."""
    folder = assets.tiny_folder()
    config = json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    tokenizer = load_tokenizer(folder)
    for content in (config, generation):
        assert content["bos_token_id"] == tokenizer.bos_id
        assert content["eos_token_id"] == tokenizer.eos_id
        assert content["pad_token_id"] == tokenizer.pad_id
    assert tokenizer.vocabulary_size == config["vocab_size"]


def test_a_name_of_the_hub_that_cannot_be_fetched_says_what_to_do(tmp_path, monkeypatch):
    """Tests are offline. A folder of that name is meant before the hub's model."""
    monkeypatch.chdir(tmp_path)
    for name in ("Qwen/Qwen3-0.6B", "hf://Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B@v1", "gpt2"):
        with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
            model_folder(name)
    (tmp_path / "Qwen" / "Qwen3-0.6B").mkdir(parents=True)
    (tmp_path / "gpt2").mkdir()
    assert model_folder("Qwen/Qwen3-0.6B") == Path("Qwen/Qwen3-0.6B")
    assert model_folder("gpt2") == Path("gpt2")
    with pytest.raises(UserError, match=r"no such folder; .* is hf://Qwen/Other$"):
        model_folder("Qwen/Other")  # a slip of the pen is nothing that the hub is asked for


def test_another_name_that_is_no_folder_names_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "llama").mkdir(parents=True)
    (tmp_path / "model.gguf").write_text("")
    for name, says in {
        "runs/lama": r"no such folder; .* \(nearest: 'runs/llama'\)$",
        "tinny": r"\(nearest: 'tiny'\)$",
        "model.gguf": "is a file; .*: give the folder in which it stands$",
        "": "^no model is given",
        "/no/such/place": "no such folder; a model is a folder",
    }.items():
        with pytest.raises(UserError, match=says):
            model_folder(name)
