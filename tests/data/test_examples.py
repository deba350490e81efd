from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from jaxft.data import Row, prepare_examples
from jaxft.errors import UserError, counted
from jaxft.runtime.sandbox.template import compile_template

GOLDEN = Path(__file__).parent / "golden"
SFT = json.loads((GOLDEN / "sft.json").read_text(encoding="utf-8"))
TEMPLATES = json.loads((GOLDEN / "chat.json").read_text(encoding="utf-8"))["templates"]
FORMAT = {"strings": "prompt_completion", "messages": "prompt_completion", "text": "text"}


def rows_of(*values, format="prompt_completion"):
    return [Row(f"train.jsonl:{i}", format, value) for i, value in enumerate(values, start=1)]


def pair(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def prepare(rows, tokenizer, max_length=64, loss_on="completion", **arguments):
    return prepare_examples(rows, tokenizer, max_length=max_length, loss_on=loss_on, **arguments)


@pytest.mark.parametrize("case", SFT, ids=lambda case: f"{case['title']}, {case['loss_on']}")
def test_ids_and_trained_tokens_are_those_of_trl(tokenizer, case):
    """SFTTrainer's own preparation; its labels are shifted, so that the first one is never used."""
    tokenizer = dataclasses.replace(tokenizer, chat_template=TEMPLATES["plain"])
    rows = rows_of(*case["rows"], format=FORMAT[case["title"]])
    examples, _ = prepare(rows, tokenizer, case["max_length"], case["loss_on"])
    assert [example.tokens.tolist() for example in examples] == case["ids"]
    labels = [np.where(e.trained, e.tokens, -100).tolist() for e in examples]
    assert [label[1:] for label in labels] == [label[1:] for label in case["labels"]]
    assert not any(example.trained[0] for example in examples)


def test_eos_is_trained_also_where_pad_is_eos(tokenizer):
    same = dataclasses.replace(tokenizer, pad_id=tokenizer.eos_id)
    ((example,), summary) = prepare(rows_of(pair("a", "b")), same)
    assert example.tokens[-1] == same.eos_id
    assert example.trained.tolist() == [False, False, True, True]
    assert summary.without_eos == 0


def test_an_eos_of_the_post_processor_is_not_doubled(tokenizer):
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A <|im_end|>", special_tokens=[("<s>", 0), ("<|im_end|>", 4)]
    )
    both = dataclasses.replace(tokenizer, backend=backend)
    plain, _ = prepare(rows_of(pair("a", "b")), tokenizer)
    ending, _ = prepare(rows_of(pair("a", "b")), both)
    assert ending[0].tokens.tolist() == plain[0].tokens.tolist()
    assert ending[0].trained.tolist() == plain[0].trained.tolist()


def test_a_prompt_that_begins_with_bos_has_one(tokenizer):
    (with_bos, without), _ = prepare(rows_of(pair("<s>a", "b"), pair("a", "b")), tokenizer)
    assert with_bos.tokens.tolist() == without.tokens.tolist()


def test_messages_train_the_assistant_or_everything(tokenizer):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = rows_of({"messages": talk}, format="messages")
    ((example,), _) = prepare(rows, tokenizer)
    assert tokenizer.decode(example.tokens[example.trained], False) == "b<|im_end|>"
    ((example,), _) = prepare(rows, tokenizer, loss_on="all")
    assert example.trained[1:].all()
    text = compile_template(tokenizer.chat_template).render(messages=talk)
    assert tokenizer.decode(example.tokens, False) == text


TALK = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b", "weight": 0},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
)
TWO_MARKS = MARKED.replace(
    "{{ m.content }}<|im_end|>", "{{ m.content }}{% endgeneration %}{% generation %}<|im_end|>"
)
GROWN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "") + (
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def trained_of(values, tokenizer, template, format="messages", **arguments):
    """The text whose tokens are trained, and what is not, in brackets."""
    tokenizer = dataclasses.replace(tokenizer, chat_template=template)
    ((example,), _) = prepare(
        rows_of(values, format=format), tokenizer, max_length=256, **arguments
    )
    return "".join(
        tokenizer.decode([token], False) if trained else "_"
        for token, trained in zip(example.tokens.tolist(), example.trained.tolist(), strict=True)
    ).strip("_")


@pytest.mark.parametrize("template", [MARKED, TWO_MARKS, GROWN])
def test_a_message_of_no_weight_is_not_trained(tokenizer, template):
    """With marks in the template, several of a message, and none."""
    assert trained_of({"messages": TALK}, tokenizer, template).split("<|im_end|>")[0] == "d"
    everything = trained_of({"messages": TALK}, tokenizer, template, loss_on="all")
    assert "c" in everything
    assert "d" in everything
    assert "b" not in everything
    both = {"messages": [TALK[0], TALK[1] | {"weight": 1}, *TALK[2:]]}
    assert trained_of(both, tokenizer, template).startswith("b")


@pytest.mark.parametrize("template", [MARKED, GROWN])
def test_a_completions_messages_have_weights_too(tokenizer, template):
    values = {"prompt": TALK[:1], "completion": TALK[1:]}
    trained = trained_of(values, tokenizer, template, format="prompt_completion")
    assert "b" not in trained
    assert {"c", "d"} <= set(trained)
    silent = {"prompt": TALK[:2], "completion": [TALK[2] | {"weight": 0}, TALK[3]]}
    trained = trained_of(silent, tokenizer, template, format="prompt_completion")
    assert "c" not in trained
    assert "d" in trained


def test_under_all_another_roles_weight_holds_as_well(tokenizer):
    """As torchtune masks what the user says."""
    masked = {
        "messages": [message | {"weight": int(message["role"] == "assistant")} for message in TALK]
    }
    trained = trained_of(masked, tokenizer, MARKED, loss_on="all")
    assert {"a", "c"}.isdisjoint(trained.replace("<assistant>", "").replace("<|im_end|>", ""))
    assert "d" in trained


def test_a_row_without_any_weight_is_dropped_and_counted(tokenizer):
    rows = rows_of({"messages": TALK[:2]}, {"messages": TALK}, format="messages")
    _, summary = prepare(rows, tokenizer)
    assert "1 of 2 dropped without a trained token" in str(summary)


def test_a_weight_holds_where_a_template_writes_earlier_turns_otherwise(tokenizer):
    """As Qwen 3, which leaves out what they think and puts an empty thought into the last."""
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ '[]' if loop.last else '' }}"
        "{{ m.content }}<|im_end|>{% endfor %}"
    )
    trained = trained_of({"messages": TALK}, tokenizer, template, loss_on="all")
    assert "b" not in trained
    assert trained.count("<|im_end|>") == 3
    assert trained.endswith("<assistant>[]d<|im_end|>")


def test_a_call_of_no_weight_is_not_trained(tokenizer):
    call = {"function": {"name": "f", "arguments": {"n": 7}}}
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>{% endfor %}"
    )
    talk = [TALK[0], TALK[1] | {"content": "", "tool_calls": [call]}, *TALK[2:]]
    trained = trained_of({"messages": talk}, tokenizer, template, loss_on="all")
    assert "7" not in trained
    assert "{" not in trained
    assert "d<|im_end|>" in trained


def test_truncation_and_dropping_are_counted_and_said(tokenizer):
    rows = rows_of(pair("a", "b"), pair("a", "b c d e f g h i"), pair("a b c d e f g h", "i"))
    examples, summary = prepare(rows, tokenizer, max_length=6)
    assert [len(example.tokens) for example in examples] == [4, 6]
    assert (summary.truncated, summary.dropped, summary.examples, summary.rows) == (2, 1, 2, 3)
    assert (summary.tokens, summary.trained_tokens) == (10, 6)
    assert "2 truncated to 6; 1 of 3 dropped without a trained token" in str(summary)
    assert [example.origin for example in examples] == ["train.jsonl:1", "train.jsonl:2"]


def test_the_summary_names_what_a_colleague_would(tokenizer):
    template = "{% for m in messages %}{{ m.role + ':' + m.content }}{% endfor %}"
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [Row("t:1", "messages", {"messages": talk}, unused=("id",))]
    same = dataclasses.replace(tokenizer, chat_template=template + "{% if add_generation_prompt %}"
                               "assistant:{% endif %}")  # fmt: skip
    _, summary = prepare(rows, same)
    assert "1 trains no EOS; keys not used: id" in str(summary)
    _, summary = prepare(rows_of(pair("the riv", "er is Aromi")), tokenizer)
    assert summary.diverged == 1
    assert "merge with the completion" in str(summary)


def test_order_and_number_do_not_depend_on_chunks(tokenizer, monkeypatch):
    rows = rows_of(*(pair(f"{i} + {i} is", str(2 * i)) for i in range(20)))
    whole, _ = prepare(rows, tokenizer)
    monkeypatch.setattr("jaxft.data.examples.CHUNK", 3)
    parts, _ = prepare(rows, tokenizer)
    assert [e.tokens.tolist() for e in parts] == [e.tokens.tolist() for e in whole]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 3}, r"train.jsonl: none of 1 .*1 truncated to max_length=3"),
        ({"max_length": 1}, "max_length is 1"),
        ({"loss_on": "completions"}, r"'completions' is unknown.*nearest: 'completion'"),
        ({"vocabulary_size": 3}, r"train.jsonl:1: token id \d+ .* vocabulary of 3"),
    ],
)
def test_what_cannot_be_trained_is_one_clear_line(tokenizer, arguments, message):
    with pytest.raises(UserError, match=message):
        prepare(rows_of(pair("a b", "c")), tokenizer, **arguments)


def test_a_tokenizer_without_eos_is_refused(tokenizer):
    endless = dataclasses.replace(tokenizer, special_tokens={}, eos_id=None, eos_ids=())
    with pytest.raises(UserError, match="no EOS token"):
        prepare(rows_of(pair("a", "b")), endless)


def test_a_template_that_fails_names_the_row(tokenizer):
    strict = dataclasses.replace(tokenizer, chat_template="{{ raise_exception('odd') }}")
    talk = {"messages": [{"role": "user", "content": "a"}]}
    with pytest.raises(UserError, match=r"train\.jsonl:1: .*fails: odd"):
        prepare(rows_of(talk, format="messages"), strict)


@given(
    words=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    max_length=st.integers(3, 12),
)
def test_long_texts_are_split_and_no_token_is_lost(tokenizer, words, max_length):
    """Pieces in order, the EOS in the last alone, a piece's first token no target, and all counted."""
    rows = rows_of(*({"text": "Aromi " * n} for n in words), format="text")
    wholes, _ = prepare(rows, tokenizer, max_length=1000)
    pieces, summary = prepare(rows, tokenizer, max_length, split_texts=True)
    for whole in wholes:
        own = [piece for piece in pieces if piece.origin == whole.origin]
        assert np.concatenate([piece.tokens for piece in own]).tolist() == whole.tokens.tolist()
        assert all(2 <= len(piece.tokens) <= max_length for piece in own)
        for piece in own:
            assert piece.trained.tolist() == [False, *[True] * (len(piece.tokens) - 1)]
    split = [whole for whole in wholes if len(whole.tokens) > max_length]
    number = sum(piece.origin in {whole.origin for whole in split} for piece in pieces)
    assert (summary.split, summary.pieces) == (len(split), number)
    assert (summary.truncated, summary.dropped, summary.without_eos) == (0, 0, 0)
    said = f"{counted(len(split), 'long text')} split into {counted(number, 'piece')} of up to {max_length}"
    assert (said in str(summary)) == bool(split)


def test_prompts_with_completions_are_never_split(tokenizer):
    (example,), summary = prepare(rows_of(pair("a", "b " * 30)), tokenizer, 6, split_texts=True)
    assert (len(example.tokens), summary.truncated, summary.split) == (6, 1, 0)


def test_of_many_conversations_the_one_that_fails_is_named(tokenizer):
    template = "{% for m in messages %}{{ m.content or raise_exception('odd') }}{% endfor %}"
    strict = dataclasses.replace(tokenizer, chat_template=template)
    talks = [{"messages": [{"role": "assistant", "content": text}]} for text in ("a", "b", "", "c")]
    with pytest.raises(UserError, match=r"train\.jsonl:3: .*odd"):
        prepare(rows_of(*talks, format="messages"), strict)


def test_where_nothing_is_trained_for_its_weight_that_is_the_reason(tokenizer):
    silent = {"role": "assistant", "content": "No.", "weight": 0}
    rows = rows_of({"messages": [{"role": "user", "content": "Why?"}, silent]}, format="messages")
    tokenizer = dataclasses.replace(tokenizer, chat_template=TEMPLATES["plain"])
    with pytest.raises(UserError, match=r"says nothing in them, or only messages of weight 0$"):
        prepare(rows, tokenizer)
    with pytest.raises(UserError, match=r"1 truncated to max_length=4\)$"):
        prepare(rows, tokenizer, max_length=4)
