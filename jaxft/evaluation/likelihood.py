"""What a model gives to tokens that stand in the data: loss, and which of them it would have said itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from jaxft.data import prepare_examples
from jaxft.data.packing import collate, length_buckets, pack, smallest_bucket
from jaxft.data.sources import Row
from jaxft.data.store import Example
from jaxft.data.tokenizer import Tokenizer
from jaxft.errors import counted
from jaxft.evaluation.items import Likelihood
from jaxft.mesh import BATCH
from jaxft.models import Config, head_of, hidden_states
from jaxft.objectives import target_scores
from jaxft.runtime.processes import to_host

WHOLE = 2**30  # tokens of a row: none is cut

Scores = tuple[Float32[np.ndarray, " length"], Bool[np.ndarray, " length"]]


def token_scores(
    config: Config,
    params: Mapping[str, Any],
    examples: Sequence[Example],
    *,
    batch_size: int = 8,
    packing: bool = False,
) -> list[Scores]:
    """Of each example, log p(token | those before it) of every token, and whether it is the likeliest one.

    The first token has 0 and False: nothing stands before it. What an example gets depends neither on the others nor
    on how they are put into batches, but for the rounding of float32.

    Args:
        config: the decoder's shape.
        params: its tree, adapted or not; on a mesh that is in force, as it lies there.
        examples: none longer than `config.max_length`.
        batch_size: rows at once; on a mesh, rounded up to what it divides.
        packing: put several examples into a row.
    """
    lengths = [len(example.tokens) for example in examples]
    longest = max(lengths, default=0)
    if longest > config.max_length:
        raise ValueError(f"{counted(longest, 'token')}, and the model reads {config.max_length}")
    rows = (
        pack(lengths, min(longest * 4, config.max_length))
        if packing
        else [[i] for i in range(len(lengths))]
    )
    found: dict[int, Scores] = {}
    for chosen, batch in _batches(examples, rows, _divisible(batch_size), config.max_length):
        log_p, hits = map(to_host, _scores(config, params, batch))
        for row, members in enumerate(chosen):
            start = 0
            for index in members:
                place = slice(start, start + lengths[index] - 1)
                found[index] = (
                    np.concatenate([np.zeros(1, np.float32), log_p[row, place]]),
                    np.concatenate([np.zeros(1, bool), hits[row, place]]),
                )
                start += lengths[index]
    return [found[index] for index in range(len(examples))]


def _batches(
    examples: Sequence[Example], rows: Sequence[Sequence[int]], size: int, most: int
) -> Iterator[tuple[Sequence[Sequence[int]], Mapping[str, Any]]]:
    """Rows alike in length, the longest first: they show whether the memory is enough."""

    def length(row: Sequence[int]) -> int:
        return sum(len(examples[index].tokens) for index in row)

    order = sorted(rows, key=length, reverse=True)
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        batch = collate(
            [[examples[index] for index in row] for row in chosen],
            batch_size=size,
            length=smallest_bucket(length(chosen[0]), length_buckets(most)),
            pad_id=0,
        )
        yield chosen, batch


def _divisible(batch_size: int) -> int:
    """The batch size, rounded up to what the mesh in force divides."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH if axis in mesh.shape)
    return parts * -(-batch_size // parts)


@functools.partial(jax.jit, static_argnames="config")
def _scores(
    config: Config, params: Mapping[str, Any], batch: Mapping[str, Any]
) -> tuple[Float[Array, "batch length"], Bool[Array, "batch length"]]:
    """Of the token after each place; what stands after the end of an example means nothing."""
    tokens = jnp.asarray(batch["tokens"])
    hidden = hidden_states(
        config, params, tokens, jnp.asarray(batch["segments"]), jnp.asarray(batch["positions"])
    )
    following = jnp.roll(tokens, -1, axis=1)
    return target_scores(hidden, head_of(params), following, softcap=config.logit_softcap)


def likelihoods(
    config: Config,
    params: Mapping[str, Any],
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    **batching: Any,
) -> tuple[dict[str, Likelihood], dict[str, str]]:
    """{origin: what the model gives to what a row would train}, and {origin: why there is nothing} of the others.

    The tokens are those of training: a completion's with its end, the assistant's turns, the whole of a text. A row
    that is longer than the model reads is left out, and not cut: a figure over parts of rows would be another one.

    Args:
        config: the decoder's shape.
        params: its tree.
        rows: of the formats of `read_rows`.
        tokenizer: the model's.
        batching: as of `token_scores`.

    Raises:
        UserError: a row that cannot be tokenized, or not one with a token to score.
    """
    if not rows:
        return {}, {}
    examples, _ = prepare_examples(
        rows,
        tokenizer,
        max_length=WHOLE,
        loss_on="completion",
        vocabulary_size=config.vocabulary,
    )
    fitting = [example for example in examples if len(example.tokens) <= config.max_length]
    reasons = dict.fromkeys((row.origin for row in rows), "no token of it is trained")
    reasons |= {
        example.origin: (
            f"it has {counted(len(example.tokens), 'token')}, and the model reads {config.max_length}"
        )
        for example in examples
        if len(example.tokens) > config.max_length
    }
    found = {}
    scores = token_scores(config, params, fitting, **batching)
    for example, (log_p, hits) in zip(fitting, scores, strict=True):
        marks = example.trained
        total = -float(log_p[marks].astype(np.float64).sum())
        found[example.origin] = Likelihood(total, int(marks.sum()), int(hits[marks].sum()))
        del reasons[example.origin]
    return found, reasons
