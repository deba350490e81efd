"""An Ollama Modelfile: the chat template as a Go template, where it can be one, the stop tokens and the parameters.

Ollama renders Go's templates, and a model's are Jinja's. Most of them only put fixed texts around the messages of
each role: those texts are found by rendering, and the template made of them is compared with what Jinja writes for four
conversations. Of another template nothing is said, and Ollama takes the one in the GGUF file if it knows it.
"""

from __future__ import annotations

import json
from pathlib import Path

from jaxft.data.chat import render
from jaxft.data.tokenizer import Tokenizer
from jaxft.errors import UserError
from jaxft.runtime.untrusted import read_json

SYSTEM, USER, ANSWER, MORE = "\u2042S\u2042", "\u2042U\u2042", "\u2042A\u2042", "\u2042V\u2042"
PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


def modelfile(head: str, tokenizer: Tokenizer, folder: Path) -> str:
    """The text of a Modelfile.

    Args:
        head: its first lines: FROM, ADAPTER.
        tokenizer: with the chat template and the ids that end an answer.
        folder: whose generation_config.json says how answers are sampled.
    """
    lines = [head.rstrip("\n")]
    template = go_template(tokenizer)
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    elif tokenizer.chat_template:
        lines.append("# the chat template is no row of fixed texts: the one in the GGUF file holds")
    ends = [tokenizer.backend.id_to_token(index) for index in tokenizer.eos_ids]
    lines += [f"PARAMETER stop {json.dumps(end, ensure_ascii=False)}" for end in ends if end]
    file = folder / "generation_config.json"
    settings = read_json(file) if file.is_file() else {}
    lines += [
        f"PARAMETER {ours} {settings[theirs]}"
        for theirs, ours in PARAMETERS.items()
        if isinstance(settings.get(theirs), int | float)
    ]
    return "\n".join(lines) + "\n"


def go_template(tokenizer: Tokenizer) -> str | None:
    """The chat template in Go, without the BOS that the tokenizer adds; None where fixed texts do not make it."""
    if not tokenizer.chat_template:
        return None
    try:
        texts = [_rendered(tokenizer, said) for said in CONVERSATIONS]
    except UserError:
        return None
    alone, told, longer, both = texts
    pieces = _pieces(alone, longer)
    around = _between(told, SYSTEM, USER)
    if pieces is None or around is None:
        return None
    first, asked, again = pieces
    before, behind = around
    made = [
        f"{first}{USER}{asked}",
        f"{before}{SYSTEM}{behind}{USER}{asked}",
        f"{first}{USER}{asked}{ANSWER}{again}{MORE}{asked}",
        f"{before}{SYSTEM}{behind}{USER}{asked}{ANSWER}{again}{MORE}{asked}",
    ]
    fixed = (first, asked, again, before, behind)
    if made != [alone, told, longer, both] or any('"""' in one or "{{" in one for one in fixed):
        return None
    return (
        '{{ range $i, $m := .Messages }}{{ if eq $m.Role "system" }}' + before + "{{ $m.Content }}" + behind
        + '{{ else if eq $m.Role "user" }}{{ if eq $i 0 }}' + first + "{{ end }}{{ $m.Content }}" + asked
        + '{{ else if eq $m.Role "assistant" }}{{ $m.Content }}' + again + "{{ end }}{{ end }}"
    )  # fmt: skip


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


_ASKED = [_turn("user", USER)]
_LONGER = [*_ASKED, _turn("assistant", ANSWER), _turn("user", MORE)]
CONVERSATIONS = (
    _ASKED,
    [_turn("system", SYSTEM), *_ASKED],
    _LONGER,
    [_turn("system", SYSTEM), *_LONGER],
)


def _rendered(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> str:
    text, _ = render(tokenizer, messages, add_generation_prompt=True)
    ids = tokenizer.backend.encode("a").ids
    if tokenizer.bos_id is not None and len(ids) > 1 and ids[0] == tokenizer.bos_id:
        text = text.removeprefix(str(tokenizer.backend.id_to_token(tokenizer.bos_id)))
    return text


def _pieces(alone: str, longer: str) -> tuple[str, str, str] | None:
    """What stands before a first question, behind each question, and behind an answer before the next question."""
    first, mark, asked = alone.partition(USER)
    rest = longer.removeprefix(f"{first}{USER}{asked}{ANSWER}")
    again, more, _ = rest.partition(MORE)
    return (first, asked, again) if mark and more and rest != longer else None


def _between(text: str, one: str, other: str) -> tuple[str, str] | None:
    """What stands before the first mark, and between the two."""
    before, mark, rest = text.partition(one)
    between, second, _ = rest.partition(other)
    return (before, between) if mark and second else None
