"""jaxft.formats.companions: what stands beside a model or an adapter goes along, whole and never mixed."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from jaxft.data.tokenizer import load_tokenizer
from jaxft.errors import UserError
from jaxft.formats.companions import (
    changes,
    check_tokens,
    companions,
    lay_beside,
    merged_tokenizer,
    trained_with,
)
from jaxft.formats.manifest import check_manifest
from jaxft.formats.merge import merge_folder


def tokenizer(*words):
    vocabulary = {word: place for place, word in enumerate(("<unk>", *words))}
    return json.dumps({"model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}})


def folder(path, **files):
    """A folder of these files; `__` in a name is a dot, and a dictionary is JSON."""
    for name, content in files.items():
        file = path / name.replace("__", ".").replace("_in_", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


BASE = {
    "tokenizer__json": tokenizer("a", "b"),
    "tokenizer_config__json": {"bos_token": "a", "chat_template": "base's"},
    "special_tokens_map__json": {"bos_token": "a"},
    "added_tokens__json": {"b": 2},
    "generation_config__json": {"temperature": 1.0},
}


@pytest.fixture
def base(tmp_path):
    return folder(tmp_path / "base", **BASE)


@pytest.fixture
def laid(base, tmp_path):
    """`laid(file=content, ...)`: {name: text} of a folder that base and an adapter of these files make."""

    def lay(**files):
        target = tmp_path / "merged"
        target.mkdir()
        lay_beside(target, base, folder(tmp_path / "adapter", adapter_config__json="{}", **files))
        inside = [path for path in target.rglob("*") if path.is_file()]
        return {path.relative_to(target).as_posix(): path.read_text() for path in inside}

    return lay


def test_an_adapter_with_nothing_beside_it_leaves_the_bases_files_as_they_are(laid, base, capsys):
    assert laid() == {file.name: file.read_text() for file in base.iterdir()}
    assert capsys.readouterr().err == ""


def test_the_adapters_template_takes_the_place_of_all_the_bases(laid, base, tmp_path, capsys):
    """Also of the one in tokenizer_config.json, so that no reader's order of precedence matters."""
    folder(base, additional_chat_templates_in_tool_use__jinja="base's for tools")
    found = laid(chat_template__jinja="adapter's")
    assert found["chat_template.jinja"] == "adapter's"
    assert json.loads(found["tokenizer_config.json"]) == {"bos_token": "a"}
    assert "additional_chat_templates/tool_use.jinja" not in found
    said = capsys.readouterr().err
    assert "from beside the adapter: chat_template.jinja; of the base's are left out" in said
    assert load_tokenizer(tmp_path / "merged").chat_template == "adapter's"


def test_further_templates_go_along_with_the_first(laid):
    found = laid(
        chat_template__jinja="one", additional_chat_templates_in_tool_use__jinja="for tools"
    )
    assert found["additional_chat_templates/tool_use.jinja"] == "for tools"


def test_a_template_in_the_adapters_tokenizer_config_counts_before_the_bases_file(laid, base):
    folder(base, chat_template__jinja="base's file")
    found = laid(tokenizer_config__json={"chat_template": "adapter's"})
    assert "chat_template.jinja" not in found
    assert json.loads(found["tokenizer_config.json"]) == {"chat_template": "adapter's"}


def test_a_tokenizer_is_the_adapters_or_the_bases_and_never_some_files_of_both(laid, capsys):
    own = tokenizer("a", "b", "<tool>")
    found = laid(tokenizer__json=own, tokenizer_config__json={"bos_token": "b"})
    assert found["tokenizer.json"] == own
    assert not found.keys() & {"special_tokens_map.json", "added_tokens.json"}
    assert "left out: added_tokens.json, special_tokens_map.json" in capsys.readouterr().err


def test_a_tokenizer_without_a_template_keeps_that_of_the_base(laid, base):
    """As `jaxft generate --adapter` does; that of the base may have stood in the file that is left out."""
    named = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    folder(base, tokenizer_config__json={"chat_template": named})
    found = laid(tokenizer__json=tokenizer("a"), tokenizer_config__json={})
    assert found["chat_template.jinja"] == "one"
    assert found["additional_chat_templates/tool_use.jinja"] == "two"


def test_other_files_count_by_name(laid):
    found = laid(generation_config__json={"temperature": 0.5}, special_tokens_map__json={"x": "y"})
    assert json.loads(found["generation_config.json"]) == {"temperature": 0.5}
    assert json.loads(found["special_tokens_map.json"]) == {"x": "y"}
    assert "tokenizer.json" in found


def test_what_is_no_companion_stays_behind_and_links_out_of_a_folder_too(laid, tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "adapter/added_tokens.json").symlink_to(tmp_path / "secret")
    found = laid(README__md="card", training_args__bin="x", optimizer__pt="y")
    assert found.keys() == {name.replace("__", ".") for name in BASE}
    assert json.loads(found["added_tokens.json"]) == {"b": 2}
    assert capsys.readouterr().err.count("is a link out of its folder") == 1


def test_tokens_without_a_row_are_refused(base, tmp_path):
    more = folder(tmp_path / "more", tokenizer__json=tokenizer("a", "b", "<tool>"))
    check_tokens(base, more, 4)
    with pytest.raises(
        UserError, match=r"4 tokens .the last is '<tool>'., .* 3 rows: merge it with"
    ):
        check_tokens(base, more, 3)
    added = folder(tmp_path / "added", tokenizer_config__json={"eos_token": "<end>"})
    with pytest.raises(UserError, match=r"the last is '<end>'"):
        check_tokens(base, added, 3)
    check_tokens(base, folder(tmp_path / "none", chat_template__jinja="x"), 1)
    check_tokens(more, folder(tmp_path / "same", **BASE), 1)  # which is the base's own lack


def test_a_base_that_is_copied_keeps_its_further_templates(base, tmp_path):
    folder(base, additional_chat_templates_in_tool_use__jinja="for tools")
    assert companions(base)["additional_chat_templates/tool_use.jinja"] == b"for tools"


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_merging_brings_the_template_that_the_adapter_was_trained_with(golden, tmp_path, quantize):
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    shutil.copytree(golden / "models/llama", model)
    shutil.copytree(golden / "adapters/lora", adapter)
    folder(model, **BASE)
    folder(adapter, chat_template__jinja="adapter's")
    merge_folder(model, adapter, tmp_path / "out", quantize)
    assert (tmp_path / "out/chat_template.jinja").read_text() == "adapter's"
    assert (tmp_path / "out/tokenizer.json").read_text() == BASE["tokenizer__json"]
    assert "chat_template.jinja" in check_manifest(tmp_path / "out")["files"]
    folder(adapter, tokenizer__json=tokenizer(*map(str, np.arange(96))))
    with pytest.raises(UserError, match="97 tokens"):
        merge_folder(model, adapter, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_before_they_are_merged_a_model_and_an_adapter_are_asked_as_the_merged_folder_is(
    laid, base, tmp_path
):
    laid(
        tokenizer__json=tokenizer("a", "b", "<tool>"),
        tokenizer_config__json={"chat_template": "adapter's"},
        special_tokens_map__json={"bos_token": "<tool>"},
    )
    merged, before = (
        load_tokenizer(tmp_path / "merged"),
        merged_tokenizer(base, tmp_path / "adapter"),
    )
    assert before.chat_template == merged.chat_template == "adapter's"
    assert before.bos_id == merged.bos_id == 3
    assert before.encode("<tool>") == merged.encode("<tool>") == [3]
    assert before.name == str(tmp_path / "adapter")


def test_a_vocabulary_that_jaxft_does_not_read_leaves_the_model_asked_by_its_own(base, tmp_path):
    """Older adapters have a tokenizer.model; its template counts all the same."""
    own = folder(tmp_path / "adapter", tokenizer__model="pieces", chat_template__jinja="adapter's")
    found = merged_tokenizer(base, own)
    assert (found.encode("b"), found.chat_template) == ([2], "adapter's")


def test_the_templates_of_a_run_are_one_set_in_the_folder_it_leaves(base):
    """Those of the base go, also the one in tokenizer_config.json; one for chats with tools is kept apart."""
    folder(base, additional_chat_templates_in_rag__jinja="base's")
    found = changes(base, trained_with(None, "run's", "with tools"))
    assert found["chat_template.jinja"] == b"run's"
    assert found["additional_chat_templates/tool_use.jinja"] == b"with tools"
    assert found["additional_chat_templates/rag.jinja"] is None
    assert json.loads(found["tokenizer_config.json"]) == {"bos_token": "a"}
    assert changes(base, trained_with(None, None, None)) == {}
