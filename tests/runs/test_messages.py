"""What a run says to do next fits what it trained, and can be copied."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from jaxft.configuration import load_config
from jaxft.runs.messages import next_commands


def commands(output="runs/a/adapter", base="m", chats=False, method="lora", **overrides):
    config = load_config(f"configs/sft.py:{method}", {"model": "m", **overrides})
    return next_commands(config, base, Path(output), chats)


def test_what_was_trained_on_texts_goes_on_from_a_prompt():
    assert commands() == [
        'next: jaxft generate --model m --adapter runs/a/adapter --prompt "..."',
        "  or: jaxft merge --model m --adapter runs/a/adapter --output runs/a/merged",
    ]
    assert commands("runs/a/model", method="full") == [
        'next: jaxft generate --model runs/a/model --prompt "..."'
    ]


def test_what_was_trained_on_chats_is_chatted_with():
    assert commands(chats=True) == [
        "next: jaxft chat --model m --adapter runs/a/adapter",
        '  or: jaxft generate --model m --adapter runs/a/adapter --chat --prompt "..."',
        "  or: jaxft merge --model m --adapter runs/a/adapter --output runs/a/merged",
    ]
    assert commands("runs/a/model", method="full", chats=True) == [
        "next: jaxft chat --model runs/a/model",
        '  or: jaxft generate --model runs/a/model --chat --prompt "..."',
    ]


def test_over_a_quantized_base_the_same_base_is_taken():
    said = commands(method="qlora")
    assert said[-1] == "they take m in nf4, as this run did: the adapter's card says so"
    assert "in nf4" not in " ".join(commands(method="qlora", base="runs/a/base"))


def test_another_tokenizer_goes_along():
    assert "--tokenizer words --prompt" in commands(tokenizer="words")[0]
    assert "--tokenizer" not in commands(tokenizer="words")[1]


@pytest.mark.parametrize("name", ["my runs/a", "it's", "a;b"])
def test_a_folder_with_any_name_can_be_copied(name):
    words = shlex.split(commands(f"{name}/adapter", base=name)[0].removeprefix("next: "))
    assert words[2:6] == ["--model", name, "--adapter", f"{name}/adapter"]


def test_a_model_in_a_bucket_is_copied_first():
    [line] = commands("gs:/bucket/model", method="full")
    assert "jaxft generate" in line
