"""How a trained model is asked, and a conversation with it."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest

import jaxft
from jaxft import cli
from jaxft.data import load_tokenizer
from jaxft.data.chat import Ending, end_of_turn
from jaxft.errors import UserError
from jaxft.formats.manifest import note, put, write_manifest
from jaxft.formats.trained_base import trained_on_chats
from jaxft.inference import chat
from jaxft.inference.decoding import decode
from jaxft.inference.generate import decoded
from jaxft.inference.opening import as_chat, open_words

TRL = Path(__file__).parents[1] / "golden" / "trl"
FOLDER = TRL / "model"
USER = {"role": "user", "content": "Where?"}
model, params = jaxft.load(FOLDER)
tokenizer = load_tokenizer(FOLDER)


@pytest.fixture
def adapter(tmp_path):
    """An adapter as a run of jaxft leaves it, and what it notes of its training."""
    folder = tmp_path / "adapter"
    shutil.copytree(TRL / "adapters" / "lora", folder)
    write_manifest(folder)
    return folder


def command(capsys, *words, verb="generate"):
    words = (verb, "--model", str(FOLDER), "--max-new-tokens", "8", *words)
    assert cli.main(words) == 0
    captured = capsys.readouterr()
    return captured.out.splitlines(), captured.err


def completion(capsys, *words):
    lines, told = command(capsys, "--prompt", "Where?", *words)
    row = json.loads(lines[0])
    assert row["prompt"] == "Where?"
    return row["completion"], told


def say(prompt):
    return jaxft.generate(model, params, [prompt], tokenizer=tokenizer, max_new_tokens=8)[0]


def test_what_was_trained_on_chats_is_asked_so_unless_told_otherwise(capsys, adapter):
    note(adapter, trained_on="chats")
    found, told = completion(capsys, "--adapter", str(adapter))
    assert found == say([USER]) != say("Where?")
    assert "it was trained on chats" in told
    assert "--no-chat" in told
    assert completion(capsys, "--adapter", str(adapter), "--no-chat") == (say("Where?"), "")


def test_what_was_trained_on_texts_goes_on_from_the_prompt_unless_told_otherwise(capsys, adapter):
    note(adapter, trained_on="texts")
    assert completion(capsys, "--adapter", str(adapter)) == (say("Where?"), "")
    assert completion(capsys, "--adapter", str(adapter), "--chat")[0] == say([USER])


def test_a_model_of_which_nothing_is_known_goes_on_and_chat_is_named(capsys):
    found, told = completion(capsys)
    assert found == say("Where?")
    assert told == (
        "jaxft: prompts are continued as they stand; "
        "--chat asks them through the model's chat template\n"
    )


def test_a_system_message_makes_a_chat_and_stands_first_where_there_is_none(capsys, tmp_path):
    system = {"role": "system", "content": "Answer."}
    other = {"role": "system", "content": "Do not."}
    assert completion(capsys, "--system", "Answer.") == (say([system, USER]), "")
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": [USER]}, {"prompt": [other, USER]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines, _ = command(capsys, "--data", str(file), "--system", "Answer.")
    found = [json.loads(line)["completion"] for line in lines]
    assert found == [say([system, USER]), say([other, USER])]


def test_messages_are_a_chat_whatever_is_known(capsys, adapter, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": [USER]}) + "\n")
    note(adapter, trained_on="texts")
    lines, told = command(capsys, "--data", str(file), "--adapter", str(adapter))
    assert json.loads(lines[0])["completion"] == say([USER])
    assert told == ""


def test_how_an_adapter_was_trained_is_noted_or_shown_by_its_template(adapter):
    assert trained_on_chats(adapter) is None
    put(adapter, {"chat_template.jinja": b"{{ messages }}"})  # what TRL leaves beside its adapters
    assert trained_on_chats(adapter) is True
    note(adapter, trained_on="texts")
    assert trained_on_chats(adapter) is False
    assert trained_on_chats(FOLDER) is None


def test_flags_that_contradict_are_told_before_weights_are_read(capsys, tmp_path):
    shutil.copytree(FOLDER, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    settings = tmp_path / "bare" / "tokenizer_config.json"
    written = json.loads(settings.read_text())
    words = open_words(str(tmp_path / "bare"))
    with pytest.raises(UserError, match="--system is a chat's: it does not go with --no-chat"):
        as_chat(words, False, "Answer.")
    written.pop("chat_template", None)
    settings.write_text(json.dumps(written))
    for file in (tmp_path / "bare").glob("chat_template*"):
        file.unlink()
    words = open_words(str(tmp_path / "bare"))
    with pytest.raises(UserError, match=r"has no chat template, .*: --chat-template chatml takes"):
        as_chat(words, True, "")
    assert as_chat(open_words(str(tmp_path / "bare"), chat_template="chatml"), True, "")


def test_a_turn_ends_with_the_mark_that_the_template_writes(tmp_path):
    """As a token where it is one, by its text where it is none; other text may stand in an answer."""
    assert end_of_turn(tokenizer) == Ending()  # the EOS itself
    chatml = load_tokenizer(FOLDER, "chatml")
    assert end_of_turn(chatml) == Ending(text="<|im_end|>")
    assert decoded(chatml, chatml.encode("Yes.<|im_end|> <|im"), end_of_turn(chatml)) == "Yes."
    chatml.backend.add_special_tokens(["<|im_end|>"])
    [number] = chatml.encode("<|im_end|>", add_special_tokens=False)
    assert end_of_turn(chatml) == Ending(ids=(number,))
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}"
    assert end_of_turn(load_tokenizer(FOLDER, plain)) == Ending()
    failing = "{{ raise_exception('no') }}"
    assert end_of_turn(load_tokenizer(FOLDER, failing)) == Ending()


DATED = "{{ bos_token }}{{ strftime_now('%Y-%m-%d') }}{% for m in messages %} {{ m.content }}{% endfor %}"


def test_a_template_that_writes_the_date_is_given_one(capsys):
    """As `config.data.date` of the run; the answers are those to a text with that day in it."""
    words = ("--chat-template", DATED, "--date", "2024-02-29")
    assert completion(capsys, *words, "--chat")[0] == say("2024-02-29 Where?")
    assert completion(capsys, "--chat-template", DATED, "--chat")[0] != say("2024-02-29 Where?")


@pytest.mark.parametrize("verb", [("generate", "--prompt", "Where?"), ("chat",)])
def test_a_date_that_is_none_is_refused_by_the_flag(capsys, verb):
    assert cli.main([*verb, "--model", str(FOLDER), "--date", "29.2.24"]) == 2
    assert capsys.readouterr().err.startswith("jaxft: --date takes a date as 2024-02-29, or")


def talk(**settings):
    return chat.Conversation(model, params, tokenizer, max_new_tokens=8, **settings)


def test_a_conversation_is_kept_and_forgotten():
    """Each answer is what `generate` says to all that stands before it."""
    conversation = talk(system="Answer.")
    messages = [{"role": "system", "content": "Answer."}]
    for text in ("Where?", "Who?"):
        messages.append({"role": "user", "content": text})
        answer = conversation.ask(text)
        assert answer == say(messages)
        messages.append({"role": "assistant", "content": answer})
    assert conversation.messages == messages
    conversation.reset()
    assert conversation.messages == messages[:1]


def test_a_longer_conversation_compiles_nothing_anew():
    conversation = talk()
    conversation.ask("Where?")
    before = decode._cache_size()
    conversation.ask("And who was it that was there then?")
    assert decode._cache_size() == before


def test_what_no_longer_fits_is_forgotten_from_the_oldest_on(capsys):
    conversation = talk(system="Answer.")
    conversation.ask("first " * 20)
    while "first" in conversation.messages[1]["content"]:
        conversation.ask("again " * 20)
    assert conversation.messages[0]["content"] == "Answer."
    assert [m["role"] for m in conversation.messages[1:3]] == ["user", "assistant"]
    assert "the oldest 2 messages no longer fit" in capsys.readouterr().err
    before = list(conversation.messages)
    with pytest.raises(
        UserError, match=r"the message is too long: .* tokens, where the model reads"
    ):
        conversation.ask("long " * 300)
    assert conversation.messages == before


def test_chat_answers_a_pipe_line_by_line(capsys, monkeypatch):
    lines = "Where?\n\nWho?\n/reset\nWhere?"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    found, told = command(capsys, verb="chat")
    conversation = talk()
    first = conversation.ask("Where?")
    assert "\n".join(found).split("\n") == "\n".join(
        [first, conversation.ask("Who?"), first]
    ).split("\n")
    assert told == ""


def test_chat_with_what_was_trained_on_texts_says_so(capsys, monkeypatch, adapter):
    note(adapter, trained_on="texts")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    found, told = command(capsys, "--adapter", str(adapter), verb="chat")
    assert (found, told) == ([], "jaxft: it was trained on texts, and not to chat\n")
