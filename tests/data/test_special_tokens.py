"""Special tokens and ids of folders that name them in many ways, as transformers 5.23 has them (golden file)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from jaxft.data import load_tokenizer
from jaxft.data.chat import render
from jaxft.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = json.loads((GOLDEN / "special_tokens.json").read_text(encoding="utf-8"))
REBUILT = "the ids are those of tokenizer.json as it stands"
TEMPLATE = "[{{ bos_token }}|{{ eos_token }}|{{ image_token }}]{{ messages[0].content }}"


@pytest.fixture
def written(tmp_path):
    """`load = written(folder)`: a folder of the golden file, or one like it."""

    def write(tokenizer: str = "tokenizer", **files):
        shutil.copyfile(GOLDEN / tokenizer / "tokenizer.json", tmp_path / "tokenizer.json")
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return write


def _folder(written, folder):
    files = {name.removesuffix(".json"): content for name, content in folder["files"].items()}
    return written(folder["tokenizer"], **files)


@pytest.mark.parametrize("folder", FOLDERS, ids=range(len(FOLDERS)))
def test_special_tokens_are_those_of_transformers_and_ids_too_or_it_is_said(
    written, folder, capsys
):
    tokenizer = load_tokenizer(_folder(written, folder), TEMPLATE)
    assert tokenizer.special_tokens == folder["named"]
    named = [folder["named"].get(name, "") for name in ("bos_token", "eos_token", "image_token")]
    assert render(tokenizer, [{"role": "user", "content": "hi"}])[0] == f"[{'|'.join(named)}]hi"
    differ = any(tokenizer.encode(text) != ids for text, ids in folder["ids"].items())
    said = capsys.readouterr().err
    if differ:
        assert REBUILT in said
        assert folder["class"] in said
    if folder["class"] == "TokenizersBackend":
        assert not said


def test_nothing_is_said_where_the_class_builds_what_tokenizer_json_holds(written, capsys):
    known = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, **known}
    folder = written("metaspace", tokenizer_config=settings)
    raw = json.loads((folder / "tokenizer.json").read_text())
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    raw |= {"normalizer": None, "pre_tokenizer": metaspace}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    load_tokenizer(folder)
    assert capsys.readouterr().err == ""


def test_the_difference_is_shown_by_an_example_and_what_to_write(written, capsys):
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    folder = written("metaspace", tokenizer_config=settings)
    tokenizer = load_tokenizer(folder)
    (said,) = capsys.readouterr().err.splitlines()
    assert "rebuilds it as LlamaTokenizer, which makes" in said
    assert '"tokenizer_class": "TokenizersBackend"' in said
    # as in transformers 4, and in 5 with that class: a blank before each part of a text
    assert tokenizer.decode(tokenizer.encode("a</s>b"), skip_special_tokens=False) == "<s> a</s> b"


def test_a_null_bos_is_none_and_a_null_eos_leaves_the_models_ends(written):
    settings = {"bos_token": None, "eos_token": None}
    model = {"model_type": "llama", "bos_token_id": 0, "eos_token_id": [1, 7]}
    tokenizer = load_tokenizer(written(tokenizer_config=settings, config=model))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (None, 1, (1, 7))
    assert tokenizer.eos_text == "</s>"
    assert tokenizer.special_tokens == {}


def test_a_class_default_that_the_vocabulary_lacks_ends_nothing(written):
    model = {"model_type": "qwen2", "eos_token_id": 1}
    tokenizer = load_tokenizer(written(config=model))
    assert tokenizer.special_tokens["eos_token"] == "<|endoftext|>"
    assert (tokenizer.eos_ids, tokenizer.pad_id) == ((1,), 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eos_token": 5}, "eos_token: 5 is no token"),
        ({"eos_token": {"text": "</s>"}}, "eos_token: {'text': '</s>'} is no token"),
        ({"extra_special_tokens": [3]}, "extra_special_tokens: 3 is no token"),
        ({"added_tokens_decoder": [3]}, r"added_tokens_decoder is \[3\], and no object"),
    ],
)
def test_what_is_no_token_is_one_clear_line(written, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(written(tokenizer_config=settings))
    assert "\n" not in str(caught.value)
