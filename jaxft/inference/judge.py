"""A model's folder that judges: what it answers to conversations."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.inference.generate import generate
from jaxft.inference.opening import open_model, open_words


def ask_folder(folder: str, conversations: Sequence[Any], sampling: Mapping[str, Any]) -> list[str]:
    """The answers of a folder's model to conversations, a text each. Graders of the kind score_model ask it.

    Args:
        folder: a Hugging Face folder, or "tiny".
        conversations: lists of messages.
        sampling: temperature, top_p, seed and max_completions_tokens, as OpenAI has them.
    """
    words, network, params = _opened(folder)
    given = {name: value for name, value in sampling.items() if value is not None}
    known = {"temperature": 0.0, "top_p": 1.0, "seed": 0, "max_completions_tokens": 64} | given
    return generate(
        network,
        params,
        conversations,
        tokenizer=words.tokenizer,
        max_new_tokens=int(known["max_completions_tokens"]),
        temperature=float(known["temperature"]),
        top_p=float(known["top_p"]),
        seed=int(known["seed"]),
    )


@functools.lru_cache(maxsize=2)
def _opened(folder: str) -> tuple[Any, Any, Any]:
    """A judge, which stays in memory."""
    words = open_words(folder, "")
    network, params = open_model(folder, "", "float32")
    return words, network, params
