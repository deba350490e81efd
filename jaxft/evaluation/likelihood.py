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
from jaxft.models.transformer import fitted
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
        examples: at most one token longer than `config.max_length`: the last token is not read.
        batch_size: rows at once; on a mesh, rounded up to what it divides.
        packing: put several examples into a row.
    """
    lengths = [len(example.tokens) - 1 for example in examples]  # positions that predict a token
    longest = max(lengths, default=0)
    if longest > config.max_length:
        raise ValueError(f"{counted(longest, 'token')}, and the model reads {config.max_length}")
    found: list[Scores] = [(np.zeros(n + 1, np.float32), np.zeros(n + 1, bool)) for n in lengths]
    some = [index for index, length in enumerate(lengths) if length > 0]
    room = min(longest * 4, config.max_length) if packing else 0
    packed = pack([lengths[index] for index in some], room) if packing and some else None
    rows = [[some[span] for span in row] for row in packed] if packed else [[i] for i in some]
    for chosen, batch in _batches(examples, rows, _divisible(batch_size), config.max_length):
        log_p, hits = map(to_host, _scores(config, params, batch))
        for row, members in enumerate(chosen):
            start = 0
            for index in members:
                span = slice(start, start + lengths[index])
                found[index][0][1:], found[index][1][1:] = log_p[row, span], hits[row, span]
                start += lengths[index]
    return found


def _batches(
    examples: Sequence[Example], rows: Sequence[Sequence[int]], size: int, most: int
) -> Iterator[tuple[Sequence[Sequence[int]], Mapping[str, Any]]]:
    """Rows alike in length, the longest first: they show whether the memory is enough."""

    def length(row: Sequence[int]) -> int:
        return sum(len(examples[index].tokens) - 1 for index in row)

    def part(index: int, span: slice) -> Example:
        tokens = examples[index].tokens[span]
        return Example(tokens, np.ones(len(tokens), bool), "")

    order = sorted(rows, key=length, reverse=True)
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        length_of_row = smallest_bucket(length(chosen[0]), length_buckets(most))
        read, wanted = (
            collate(
                [[part(index, span) for index in row] for row in chosen],
                batch_size=size,
                length=length_of_row,
                pad_id=0,
            )
            for span in (slice(None, -1), slice(1, None))
        )
        yield chosen, {**read, "targets": wanted["tokens"]}


def _divisible(batch_size: int) -> int:
    """The batch size, rounded up to what the mesh in force divides."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH if axis in mesh.shape)
    return parts * -(-batch_size // parts)


@functools.partial(jax.jit, static_argnames="config")
def _scores(
    config: Config, params: Mapping[str, Any], batch: Mapping[str, Any]
) -> tuple[Float[Array, "batch length"], Bool[Array, "batch length"]]:
    """Of the token after each position; what stands after the end of an example means nothing."""
    read = (jnp.asarray(batch[name]) for name in ("tokens", "segments", "positions"))
    hidden = hidden_states(config, params, *read)
    targets = jnp.asarray(batch["targets"])
    return target_scores(hidden, head_of(params), targets, softcap=config.logit_softcap)


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
        vocabulary_size=fitted(config, params).vocabulary,
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
