"""Text that is data and nothing else: what looks like a special token in it is encoded as the letters that it is.

A passage of somebody's document may hold `<|im_end|>`. Put into a prompt as it stands, it would end the user's turn.
`literal` marks such spans by two of Unicode's noncharacters, which no text in interchange has; they pass through a
chat template, and `Tokenizer.encode` takes them away again and encodes what stands between them in two parts, neither
of which is the token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Protocol

import tokenizers

OPEN, CLOSE = "\ufdd0", "\ufdd1"
MARKED = re.compile(f"{OPEN}([^{CLOSE}]*){CLOSE}")


class Encodes(Protocol):
    """A `Tokenizer`."""

    @property
    def added_tokens(self) -> re.Pattern[str] | None:
        """Finds the tokens that are added to its vocabulary."""


def literal(text: str, tokenizer: Encodes) -> str:
    """The text with the tokenizer's special and added tokens marked as text; most texts have none of them."""
    for mark in (OPEN, CLOSE):
        text = text.replace(mark, "\ufffd")
    pattern = tokenizer.added_tokens
    return text if pattern is None else pattern.sub(rf"{OPEN}\g<0>{CLOSE}", text)


def unmarked(text: str) -> str:
    """The text as it was before `literal`."""
    return MARKED.sub(r"\1", text)


def pattern_of(backend: tokenizers.Tokenizer) -> re.Pattern[str] | None:
    """Finds the added tokens of a tokenizer in a text, the longest first; None if there are none.

    White space and single letters are left out: they are text wherever they stand.
    """
    added = backend.get_added_tokens_decoder().values()
    texts = sorted({token.content for token in added if len(token.content.strip()) > 1})
    texts.sort(key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts))) if texts else None


def encode_marked(
    backend: tokenizers.Tokenizer,
    text: str,
    add_special_tokens: bool,
    pattern: re.Pattern[str] | None,
) -> list[int]:
    """Ids of a text in which `literal` marked something."""
    parts = MARKED.split(text)
    texts = [
        piece
        for index, part in enumerate(parts)
        for piece in (_broken(part, pattern) if index % 2 else [part])
        if piece
    ]
    encodings = [backend.encode(piece, add_special_tokens=False) for piece in texts]
    whole = tokenizers.Encoding.merge(encodings)
    ids: list[int] = backend.post_process(whole, None, add_special_tokens).ids
    return ids


def _broken(part: str, pattern: re.Pattern[str] | None) -> Iterator[str]:
    """Yields the parts of a text, none of which holds an added token.

    >>> list(_broken("<s>", re.compile("<s>")))
    ['<', 's>']
    """
    while pattern is not None and (match := pattern.search(part)):
        yield part[: match.start() + 1]
        part = part[match.start() + 1 :]
    yield part
