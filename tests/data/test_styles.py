"""Chat templates of several families, with tools and calls, against transformers and TRL."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from jaxft.data import Row, encode_chat, encode_chat_with_mask, load_tokenizer, prepare_examples
from jaxft.errors import UserError

FOLDER = Path(__file__).parent / "golden"
# `make_styles.py ALL.json` writes the same of every template that TRL ships.
GOLDEN = json.loads(
    Path(os.environ.get("STYLES", FOLDER / "styles.json")).read_text(encoding="utf-8")
)
RENDERED = [case for case in GOLDEN["cases"] if "ids" in case]
MARKED = [case for case in RENDERED if case["mask"] is not None]
FAILED = [case for case in GOLDEN["cases"] if "fails" in case]
# Whose beginning is written otherwise when more follows: turns that reasoned, and no longer do.
UNSTABLE = {
    ("qwen3", "several turns"),
    ("qwen3", "a call"),
    ("qwen3", "words and two calls"),
}


def named(case):
    return f"{case['template']}, {case['row']}"


def tokenizer_of(name, template=None):
    """The golden tokenizer with all families' special tokens, and the template's."""
    tokenizer = load_tokenizer(FOLDER / "tokenizer")
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens(GOLDEN["others"])
    bos, eos = GOLDEN["special"][name]
    eos_id = backend.token_to_id(eos)
    return dataclasses.replace(
        tokenizer,
        backend=backend,
        special_tokens=tokenizer.special_tokens | {"bos_token": bos, "eos_token": eos},
        bos_id=backend.token_to_id(bos),
        eos_id=eos_id,
        eos_ids=(eos_id,),
        chat_template=template or GOLDEN["templates"][name],
    )


def parts_of(case):
    row = GOLDEN["rows"][case["row"]]
    return row["messages"], row.get("tools")


def masked(case, template=None):
    messages, tools = parts_of(case)
    return encode_chat_with_mask(tokenizer_of(case["template"], template), messages, tools=tools)


@pytest.mark.parametrize("case", RENDERED, ids=named)
def test_ids_are_those_of_transformers(case):
    """In training, and of the prompt for the last turn: no BOS is doubled in either."""
    tokenizer = tokenizer_of(case["template"])
    messages, tools = parts_of(case)
    assert encode_chat(tokenizer, messages, tools=tools) == case["ids"]
    prompt = encode_chat(tokenizer, messages[:-1], add_generation_prompt=True, tools=tools)
    assert prompt == case["prompt_ids"]
    assert case["ids"].count(tokenizer.bos_id) <= 1


@pytest.mark.parametrize("case", MARKED, ids=named)
def test_marked_tokens_are_those_of_transformers(case):
    ids, mask = masked(case)
    assert (ids, mask.astype(int).tolist()) == (case["ids"], case["mask"])


@pytest.mark.parametrize("case", [c for c in MARKED if "of jaxft" in c["template"]], ids=named)
def test_the_turns_of_jaxfts_templates_are_found_without_their_marks_as_well(case):
    unmarked = re.sub(r"\{%-? *(end)?generation *-?%\}", "", GOLDEN["templates"][case["template"]])
    ids, mask = masked(case, unmarked)
    assert (ids, mask.astype(int).tolist()) == (case["ids"], case["mask"])


@pytest.mark.parametrize("case", [c for c in RENDERED if c["mask"] is None], ids=named)
def test_turns_found_by_growth_are_those_that_trl_marks(case):
    """But for white space behind the end of a turn, which no model says; else the template is refused."""
    if (case["template"], case["row"]) in UNSTABLE:
        with pytest.raises(UserError, match="otherwise when more follows"):
            masked(case)
        return
    ids, mask = masked(case)
    tokenizer = tokenizer_of(case["template"])
    said = tokenizer.decode(np.array(ids)[mask], skip_special_tokens=False)
    assert all(
        m.get("content", "").strip() in said for m in parts_of(case)[0] if m["role"] == "assistant"
    )
    twin = f"{case['template']}_training"
    theirs = next((c for c in MARKED if (c["template"], c["row"]) == (twin, case["row"])), None)
    if theirs is not None and theirs["ids"] == ids:
        more = np.array(theirs["mask"], bool) & ~mask
        assert not (mask & ~np.array(theirs["mask"], bool)).any()
        assert tokenizer.decode(np.array(ids)[more], skip_special_tokens=False).strip() == ""


@pytest.mark.parametrize("case", FAILED, ids=named)
def test_what_a_template_refuses_is_one_line(case):
    messages, tools = parts_of(case)
    tokenizer = tokenizer_of(case["template"])

    def encode():
        encode_chat(tokenizer, messages, tools=tools)
        encode_chat(tokenizer, messages[:-1], add_generation_prompt=True, tools=tools)

    with pytest.raises(UserError, match="chat template fails") as error:
        encode()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", GOLDEN["labels"])
def test_trained_tokens_are_those_of_trl(name):
    """SFTTrainer with assistant_only_loss, of rows with and without tools."""
    rows = [
        Row(f"t:{n}", "messages", dict(row)) for n, row in enumerate(GOLDEN["rows"].values(), 1)
    ]
    examples, summary = prepare_examples(
        rows, tokenizer_of(name), max_length=4096, loss_on="completion"
    )
    ours = [np.where(e.trained, e.tokens, -100).tolist()[1:] for e in examples]
    assert ours == [labels[1:] for labels in GOLDEN["labels"][name]]
    assert summary.unused_keys == ()


def test_tools_that_a_template_does_not_ask_for_are_said():
    row = Row("t:1", "messages", dict(GOLDEN["rows"]["words and two calls"]))
    _, summary = prepare_examples(
        [row], tokenizer_of("llama3"), max_length=4096, loss_on="completion"
    )
    for what in ("the tools", "tool calls"):
        assert f"the chat template leaves out {what} of 1 row at t:1" in str(summary)
