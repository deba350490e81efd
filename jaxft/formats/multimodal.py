"""Folders that hold more than a decoder: of one with vision or sound the text is served, and the rest is kept.

Such a config.json has the decoder's settings in `text_config`, and the names of its tensors stand behind a prefix.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

TEXT = "text_config"
# How a decoder's tensors begin, instead of `model.`: as transformers 5 saves them, and as folders of others have them.
PREFIXES = ("language_model.model.", "model.language_model.")
PREFIX = "model."
MODULES = "model.language_model."  # how PEFT knows the decoder's modules
HEAD, INNER_HEAD = "lm_head.weight", "language_model.lm_head.weight"
TIED = "tie_word_embeddings"


def text_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's part of a config.json: all of it, where it says nothing of a `text_config`."""
    text = raw.get(TEXT)
    if not isinstance(text, Mapping):
        return dict(raw)
    above = {TIED: raw[TIED]} if raw.get(TIED) is not None else {}
    return {**text, **above}


def may_be_tied(raw: Mapping[str, Any]) -> bool:
    """Whether config.json of a multimodal folder lets the head be the embedding; the stored tensors then decide.

    It does where its top level does not say (transformers then takes the default of the multimodal class), and where
    its text_config says that they are tied (which some of those classes follow, whatever the top level says).
    """
    text = raw.get(TEXT)
    if not isinstance(text, Mapping):
        return False
    return raw.get(TIED) is None or bool(text.get(TIED))


def prefix_in(stored: Mapping[str, Any]) -> str:
    """The prefix of the decoder's tensors among others, by their names; "" where the folder holds a decoder alone."""
    return next((p for p in PREFIXES if any(name.startswith(p) for name in stored)), "")


def spelled_inside(prefix: str, stored: Mapping[str, Any]) -> Callable[[str], str]:
    """How a folder with other parts spells the decoder's names."""
    head = INNER_HEAD if INNER_HEAD in stored else HEAD
    return lambda name: head if name == HEAD else prefix + name.removeprefix(PREFIX)


def rest_of(stored: Mapping[str, Any], family_prefix: str = PREFIX) -> list[str]:
    """The names of the tensors that belong to other parts than the decoder."""
    prefix = prefix_in(stored)
    if not prefix or family_prefix != PREFIX:
        return []
    heads = (HEAD, INNER_HEAD)
    return [name for name in stored if not name.startswith(prefix) and name not in heads]


@functools.lru_cache(maxsize=64)
def tell_rest(folder: str, names: tuple[str, ...]) -> None:
    """Says once which parts of a folder are left as they are."""
    parts = dict.fromkeys(name.removeprefix(PREFIX).split(".")[0] for name in names)
    print(
        f"jaxft: {folder}: its text is read; {', '.join(parts)} stay as they are and are kept in what is saved",
        file=sys.stderr,
    )
