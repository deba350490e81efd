"""What a benchmark asks of a model, by token ids: how likely a continuation is, and an answer up to a given text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxft.data.store import Example
from jaxft.data.tokenizer import Tokenizer
from jaxft.evaluation.likelihood import token_scores
from jaxft.inference.decoding import generate_tokens
from jaxft.inference.generate import padded, streams_of
from jaxft.models import Config

Ids = Sequence[int]


def continuation_scores(
    config: Config, params: Mapping[str, Any], pairs: Sequence[tuple[Ids, Ids]], batch_size: int
) -> list[tuple[float, bool]]:
    """Of each (context, continuation) log p(continuation | context), and whether greedy decoding would say it.

    Where both together are longer than the model reads, the context loses its beginning.

    Args:
        config: the decoder's shape.
        params: its tree, adapted or not.
        pairs: token ids; a context of one token at least.
        batch_size: sequences at once.
    """
    most = config.max_length + 1  # the last token is predicted, and not read
    examples = []
    for context, continuation in pairs:
        tokens = np.asarray([*context, *continuation][-most:], np.int32)
        examples.append(Example(tokens, np.ones(len(tokens), bool), ""))
    scores = token_scores(config, params, examples, batch_size=batch_size)
    found = []
    for (_, continuation), (log_p, hits) in zip(pairs, scores, strict=True):
        last = slice(len(log_p) - len(continuation), None)
        found.append((float(log_p[last].astype(np.float64).sum()), bool(hits[last].all())))
    return found


def answers_until(
    config: Config,
    params: Mapping[str, Any],
    tokenizer: Tokenizer,
    contexts: Sequence[Ids],
    until: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """What the model says after each context, up to the first of the texts `until`, an EOS, or `max_new_tokens`.

    A context that leaves no room for that many tokens loses its beginning.

    Args:
        config: the decoder's shape.
        params: its tree, adapted or not.
        tokenizer: the model's.
        contexts: token ids.
        until: texts that end an answer and do not stand in it.
        max_new_tokens: the most tokens of an answer.
        batch_size: contexts at once.
        temperature: as of `generate`, like the next three.
        top_k: 0 for all.
        top_p: 1.0 for all.
        seed: of the draws.
    """
    room = max(config.max_length - max_new_tokens, 1)
    rows = [list(context[-room:]) for context in contexts]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True)
    streams = streams_of(rows)
    found = [""] * len(rows)
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        tokens, segments = padded([rows[index] for index in some])
        ids, lengths = generate_tokens(
            config,
            params,
            tokens,
            segments,
            jax.random.key(seed),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_ids=(*tokenizer.eos_ids, *_single_tokens(tokenizer, until)),
            streams=streams[some],
        )
        for index, row, length in zip(some, ids, lengths, strict=True):
            found[index] = cut(tokenizer.decode(row[:length].tolist()), until)
    return found


def cut(text: str, until: Sequence[str]) -> str:
    """The text up to the first of the others.

    >>> cut("4 cats. Q: next", ["Q:", "cats"])
    '4 '
    """
    ends = [text.find(one) for one in until if one and one in text]
    return text[: min(ends)] if ends else text


def _single_tokens(tokenizer: Tokenizer, until: Sequence[str]) -> list[int]:
    """The ids of the texts that are one token: what comes behind them need not be generated."""
    each = [tokenizer.encode(text, add_special_tokens=False) for text in until if text]
    return [ids[0] for ids, text in zip(each, filter(None, until), strict=True)
            if len(ids) == 1 and tokenizer.decode(ids) == text]  # fmt: skip
