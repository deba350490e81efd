"""Texts from prompts, in Python and from the command line."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxft
from jaxft import cli
from jaxft.data import encode_chat, load_tokenizer
from jaxft.data.chat import Ending
from jaxft.errors import UserError
from jaxft.inference.decoding import generate_tokens
from jaxft.inference.generate import decoded
from jaxft.models.transformer import initial_params

TRL = Path(__file__).parents[1] / "golden" / "trl"
FOLDER = TRL / "model"
PROMPTS = ["name: Greta | trade: beekeeper =", "Where?", "name: Elif | place: the market ="]
CHAT = [
    {"role": "system", "content": "Answer."},
    {"role": "user", "content": "Where does Clara work?"},
]
model, params = jaxft.load(FOLDER)
tokenizer = load_tokenizer(FOLDER)


def say(prompts=PROMPTS, **changes):
    given = {"tokenizer": tokenizer, "max_new_tokens": 12, "batch_size": 1}
    return jaxft.generate(model, params, prompts, **given | changes)


def greedy(ids):
    """The text behind these ids, one prompt at a time."""
    tokens = np.asarray([ids])
    greedily = {"max_new_tokens": 12, "temperature": 0.0, "top_k": 0, "top_p": 1.0}
    found, lengths = generate_tokens(
        model.config,
        params,
        tokens,
        np.ones_like(tokens),
        jax.random.key(0),
        eos_ids=tokenizer.eos_ids,
        **greedily,
    )
    return tokenizer.decode(found[0, : lengths[0]])


def test_texts_and_messages_are_encoded_as_the_model_was_trained():
    found = say([PROMPTS[0], CHAT])
    chat = encode_chat(tokenizer, CHAT, add_generation_prompt=True)
    assert found == [greedy(tokenizer.encode(PROMPTS[0])), greedy(chat)]


def test_the_tokenizer_may_be_a_folder():
    assert say(tokenizer=FOLDER) == say(tokenizer=str(FOLDER)) == say()


def test_nothing_to_say_to_no_prompts():
    assert say([]) == []


def test_draws_are_a_prompts_own():
    """They depend on the seed, the prompt and how often it stood before; not on its company."""
    found = say(temperature=1.0)
    assert found == say(temperature=1.0) == say(temperature=1.0, batch_size=4)
    assert found[::-1] == say(PROMPTS[::-1], temperature=1.0)
    assert found[1:2] == say(PROMPTS[1:2], temperature=1.0)
    assert found != say(temperature=1.0, seed=1)
    assert len(set(say(PROMPTS[:1] * 4, temperature=1.0))) == 4


def test_the_eos_and_special_tokens_are_no_part_of_the_text():
    first = tokenizer.encode("a", add_special_tokens=False)[0]
    ended = dataclasses.replace(tokenizer, eos_ids=(*tokenizer.eos_ids, first))
    assert decoded(ended, [first, tokenizer.bos_id, first], Ending()) == "a"
    assert decoded(tokenizer, [first, tokenizer.eos_id], Ending()) == "a"
    assert decoded(tokenizer, [], Ending()) == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 250}, "prompt 1: .* tokens and max_new_tokens=250 .* longest is 256"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"temperature": -1.0}, "temperature must be at least 0, not -1.0"),
        ({"top_k": -1}, "top_k must be at least 0, not -1"),
        ({"top_p": 1.5}, "top_p must be from 0 to 1, not 1.5"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"prompts": "one"}, "a list of prompts"),
        ({"prompts": [[]]}, "prompt 1: the prompt has no tokens"),
    ],
)
def test_mistakes_are_told(changes, message):
    with pytest.raises(UserError, match=message):
        say(**changes)


def test_a_prompt_that_the_model_cannot_read_is_told():
    config = dataclasses.replace(model.config, vocabulary=50)
    small = initial_params(config, jax.random.key(0))
    with pytest.raises(UserError, match=r"prompt 1: .* vocabulary has 50"):
        jaxft.generate(jaxft.models.Transformer(config), small, PROMPTS, tokenizer=tokenizer)
    tokenizer_without_bos = load_tokenizer(FOLDER)
    tokenizer_without_bos.backend.post_processor = None
    with pytest.raises(UserError, match="prompt 2: the prompt has no tokens"):
        say(["a", ""], tokenizer=tokenizer_without_bos)


def command(*words):
    return cli.main(["generate", "--model", str(FOLDER), "--max-new-tokens", "12", *words])


def test_the_command_writes_json_lines(capsys):
    assert command("--prompt", PROMPTS[0]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {"prompt": PROMPTS[0], "completion": say()[0]}


def test_the_command_shows_each_answer_below_its_prompt_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert command("--prompt", PROMPTS[0]) == 0
    assert capsys.readouterr().out == f"> {PROMPTS[0]}\n{say(PROMPTS[:1])[0]}\n\n"
    assert command("--prompt", PROMPTS[0], "--json") == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == PROMPTS[0]


def moved_adapter(folder):
    """The starting adapter of the golden files with its b off zero."""
    shutil.copytree(TRL / "adapters" / "lora", folder)
    file, rng = folder / "adapter_model.safetensors", np.random.default_rng(0)
    tensors = load_file(file)
    moved = {name: rng.normal(size=t.shape).astype(t.dtype) for name, t in tensors.items()}
    save_file({name: moved[name] if "lora_B" in name else tensors[name] for name in tensors}, file)
    return folder


def test_the_command_reads_messages_in_all_their_forms_and_says_what_is_not_written(
    capsys, tmp_path
):
    """Text parts and a turn of calls are read; what the template leaves out is a line on stderr."""
    call = {"function": {"name": "ask", "arguments": "{}"}}
    parts = [{"type": "text", "text": CHAT[1]["content"]}]
    rows = [
        {"messages": [CHAT[0], {"role": "user", "content": parts}]},
        {
            "prompt": [
                *CHAT,
                {"role": "assistant", "content": "Wait.", "tool_calls": [call]},
                CHAT[1],
            ]
        },
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert command("--data", str(path)) == 0
    out, err = capsys.readouterr()
    first = json.loads(out.splitlines()[0])
    assert first["completion"] == say([CHAT])[0]
    assert f"the chat template leaves out tool calls of 1 row at {path}:2" in err


def test_the_command_answers_a_file_through_an_adapter(capsys, tmp_path):
    answer = {"role": "assistant", "content": "Here."}
    rows = [{"prompt": PROMPTS[0], "completion": "not read"}, {"prompt": PROMPTS[1]}]
    rows += [{"messages": [*CHAT, answer]}, {"prompt": CHAT}, {"messages": CHAT}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = moved_adapter(tmp_path / "adapter")
    assert command("--data", str(file), "--adapter", str(folder)) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in found] == [*PROMPTS[:2], CHAT, CHAT, CHAT]
    adapted = jaxft.load_adapter(params, folder)
    asked = [*PROMPTS[:2], CHAT, CHAT, CHAT]
    want = jaxft.generate(model, adapted, asked, tokenizer=FOLDER, max_new_tokens=12)
    assert [row["completion"] for row in found] == want
    assert want != say(asked)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"promt": "a"},
            "2: keys found: 'promt'; a row needs prompt or messages (nearest: 'prompt')",
        ),
        ({"prompt": 3}, "2: prompt must be a list of messages, not a number"),
        (
            {"messages": [{"role": "assistant", "content": "a"}]},
            "2: messages: nothing stands before",
        ),
        (
            {"messages": [{"role": "usr", "content": "a"}]},
            "2: messages, message 1: unknown role 'usr'",
        ),
        ({"prompt": "a " * 300}, "2: "),
    ],
)
def test_a_bad_row_is_told_with_its_line(row, message, capsys, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps(row) + "\n")
    assert command("--data", str(file)) == 2
    assert f"jaxft: {file}:{message}" in capsys.readouterr().err


def test_an_empty_file_is_told(capsys, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n")
    assert command("--data", str(file)) == 2
    assert "no prompts: the file is empty" in capsys.readouterr().err


def adapted_differently():
    """Trees over the model with fresh adapters of different kinds, moved so far that they say other things."""
    made = {}
    for place, method in enumerate((jaxft.methods.lora, jaxft.methods.vera, jaxft.methods.dora)):
        row = method(rank=4)
        trainable, frozen = jaxft.partition(jaxft.adapt(params, row, jax.random.key(place)), row)
        moved = jax.tree.map(
            lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape),
            trainable,
        )
        made[row.name] = jaxft.combine(moved, frozen)
    return made


@pytest.mark.parametrize(
    "temperature", [0.0, pytest.param(1.0, marks=pytest.mark.thorough)], ids=str
)
def test_a_mixed_batch_says_what_each_adapter_alone_says(temperature):
    """Token for token, greedy or drawn, whatever stands beside it."""
    trees = adapted_differently()
    bank = jaxft.stack_adapters(params, trees)
    names = ["dora", None, "lora", "vera", "lora", "lora"]
    prompts = [*PROMPTS, *PROMPTS[:2], PROMPTS[0]]
    given = {"tokenizer": tokenizer, "max_new_tokens": 8, "temperature": temperature}
    found = jaxft.generate(model, bank, prompts, adapters=names, **given)
    for name in set(names) if temperature else {"lora", "dora"}:
        mine = [index for index, own in enumerate(names) if own == name]
        own = trees.get(name, params)
        alone = jaxft.generate(model, own, [prompts[index] for index in mine], **given)
        assert [found[index] for index in mine] == alone, name
    assert len(set(found)) > 3


def test_a_bank_is_asked_by_names_that_it_has():
    bank = jaxft.stack_adapters(params, {"lora": adapted_differently()["lora"]})
    for tree, given, said in [
        (bank, {}, "the tree is a bank"),
        (bank, {"adapters": ["lora"]}, "1 adapter for 3 prompts"),
        (bank, {"adapters": ["lora", "lara", None]}, "no adapter 'lara'.*'lora'"),
        (params, {"adapters": [None] * 3}, "the tree is no bank"),
    ]:
        with pytest.raises(UserError, match=said):
            jaxft.generate(model, tree, PROMPTS, tokenizer=tokenizer, **given)
