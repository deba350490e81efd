"""What a row asks, and what it answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jaxft.data.chat import encode_chat
from jaxft.data.sources import Row
from jaxft.data.tokenizer import Tokenizer


def prompt_and_reference(row: Row) -> tuple[Any, str]:
    """What a held-out row asks (a text or messages), and what it answers."""
    if row.format == "messages":
        messages = row.values["messages"]
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=0)
        return messages[:last], _said(messages[last])
    if row.format == "text":
        words = row.values["text"].split(" ")
        half = max(len(words) // 2, 1)
        return " ".join(words[:half]), " " + " ".join(words[half:])
    prompt, completion = row.values["prompt"], row.values["completion"]
    return prompt, completion if isinstance(completion, str) else _said(completion[-1])


def _said(message: Mapping[str, Any]) -> str:
    """The message's content; its calls where it has none."""
    return str(message.get("content") or json.dumps(message.get("tool_calls", "")))


def prompt_length(row: Row, tokenizer: Tokenizer) -> int:
    """The tokens of what a row asks."""
    prompt, _ = prompt_and_reference(row)
    if isinstance(prompt, str):
        return len(tokenizer.encode(prompt))
    tools = row.values.get("tools")
    return len(encode_chat(tokenizer, prompt, add_generation_prompt=True, tools=tools))
