"""A run's data as feeds: read as the configuration and the objective say, batched, and laid out on the mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxft.data import Batches, Examples, Row, Tokenizer
from jaxft.data.feed import Feed, Given
from jaxft.data.packing import length_buckets
from jaxft.data.questions import are_chats, can_be_asked, rows_at, spread
from jaxft.data.report import Part
from jaxft.errors import UserError, counted
from jaxft.evaluation.evaluate import check_needs
from jaxft.evaluation.items import Item, items_of
from jaxft.evaluation.metrics import metrics_of
from jaxft.models import Config
from jaxft.objectives.kind import warnings_of
from jaxft.objectives.objective import objective_of
from jaxft.objectives.reading import (
    date_lines,
    epoch_of,
    max_length_of,
    mix_lines,
    named_sets,
    parts_of,
    source_lines,
    tokenizer_of,
)
from jaxft.retrieval.training_rows import retrieving
from jaxft.runtime.processes import first
from jaxft.training.policy import policy_of
from jaxft.training.reference import Reference
from jaxft.training.sharding import host_rows, lengths_on, place_batch, require_rows


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run reads.

    Attributes:
        tokenizer: the model's, or the one that `config.tokenizer` names.
        train: gives training batches without end.
        held_out: gives one pass over each held-out set, by name; "" where `config.data.eval` is one file.
        prompts: rows of the first held-out set that are answered at each evaluation.
        items: questions of that set on which `config.eval_metrics` are computed.
        lines: what became of the rows, to be said.
        parts: the training data and the held-out sets as they were read.
        chats: whether what is trained is asked by messages, and not by texts.
    """

    tokenizer: Tokenizer
    train: Feed
    held_out: dict[str, Feed]
    prompts: list[Row]
    items: list[Item]
    lines: list[str]
    parts: list[Part]
    chats: bool = False


def prepare_data(
    config: ConfigDict,
    model: Config,
    mesh: Mesh,
    complete: Callable[..., Any] | None = None,
    reference: Reference | None = None,
) -> Data:
    """Reads, tokenizes and batches the training and held-out rows.

    Args:
        config: of the run.
        model: the decoder's shape.
        mesh: where batches are laid out.
        complete: ("train" or "eval...", examples, max_length, pad_id) -> the examples with what is to be computed
            for them beforehand.
        reference: what a feed that samples asks.

    Raises:
        UserError: data that cannot be read, or lengths and rows that the mesh does not divide.
    """
    row, max_length = objective_of(config), max_length_of(config, model)
    for key in ("batch_size", "eval_batch_size"):
        require_rows(config[key] // (config.grad_accum if key == "batch_size" else 1), mesh, key)
    buckets = lengths_on(length_buckets(row.examples.row_length(config, max_length)), mesh)
    tokenizer = tokenizer_of(config)
    training, *others = parts_of(
        config,
        tokenizer=tokenizer,
        max_length=max_length,
        vocabulary_size=model.vocabulary,
        strict=True,
        **retrieving(config, tokenizer, max_length),
    )

    def batches(name: str, examples: Examples, size: int, **options: Any) -> Batches:
        if complete is not None:
            examples = complete(name, examples, max_length=max_length, pad_id=tokenizer.pad_id)
        return row.examples.batches(
            config,
            examples,
            batch_size=size,
            max_length=max_length,
            pad_id=tokenizer.pad_id,
            buckets=buckets,
            host_rows=host_rows(size, mesh),
            **options,
        )

    def feed(batches: Batches, size: int) -> Feed:
        place = functools.partial(place_batch, rows=size, mesh=mesh)
        return row.feed(batches, Given(place, policy))

    chats = are_chats(training.rows)
    policy = policy_of(config, model, mesh, tokenizer, chats, reference) if row.samples else None
    epoch = epoch_of(config, training.rows, training.examples, training.summary)
    train = batches("train", epoch, config.batch_size, shuffle=config.data.shuffle)
    lines = [f"{training.name}: {training.summary}; {_rows_line(train, config.data.packing)}"]
    lines += source_lines(training.rows) + mix_lines(config, training.rows, training.summary)
    lines += date_lines(tokenizer)
    held_out: dict[str, Feed] = {}
    size = config.eval_batch_size
    for name, part in zip(named_sets(config.data.eval), others, strict=True):
        split = f"eval_{name}" if name else "eval"
        made = batches(split, part.examples, size, shuffle=False, epochs=1)
        held_out[name] = feed(made, size)
        lines += [f"{part.name}: {part.summary}", *source_lines(part.rows)]
    room = model.max_length - config.samples.max_new_tokens
    prompts, more = _prompts(others, config.samples.count, tokenizer, room)
    parts = [training, *others]
    items = _items(config, others)
    train_feed = feed(train, config.batch_size)
    return Data(tokenizer, train_feed, held_out, prompts, items, lines + more, parts, chats)


def _items(config: ConfigDict, held_out: list[Part]) -> list[Item]:
    """The questions of the first held-out set on which `config.eval_metrics` are computed."""
    if not config.eval_metrics:
        return []
    part, reported = held_out[0], {metric.name for metric in objective_of(config).metrics}
    for name in config.eval_metrics:
        if name in reported:
            raise UserError(f"config.eval_metrics: {name} is reported in any case; leave it out")
    items = items_of(rows_at(part.rows, spread(range(part.summary.rows), config.eval_rows)))
    try:
        check_needs(metrics_of(config.eval_metrics, "spaces"), items)
    except UserError as error:
        raise UserError(f"config.eval_metrics: {error}") from error
    return items


def _prompts(
    held_out: list[Part], count: int, tokenizer: Tokenizer, room: int
) -> tuple[list[Row], list[str]]:
    """Rows of the first held-out set to be answered, and a line about those that cannot be asked."""
    chosen: list[Row] = []
    for part in held_out:
        chosen = chosen or rows_at(part.rows, spread(range(part.summary.rows), count))
    usable = [row for row in chosen if can_be_asked(row, tokenizer, room)]
    if len(usable) == len(chosen):
        return usable, []
    lost = counted(len(chosen) - len(usable), "sample prompt")
    said = "cannot be used: nothing is asked, or no room is left for an answer"
    return usable, [f"for samples {lost} {said}"]


def warning_lines(config: ConfigDict, data: Data, vocabulary: int) -> list[str]:
    """What the owner of the data should know, for a run's log, of the process that writes it."""
    if not first():
        return []
    kind = objective_of(config).examples
    found = warnings_of(config, kind, data.parts, data.tokenizer, vocabulary)
    return [f"warning: {line}" for line in found]


def _rows_line(batches: Batches, packing: bool) -> str:
    rows = f"{counted(batches.rows, 'packed row')}, {100 * batches.fill:.1f} % filled; "
    return f"{rows * packing}{counted(batches.steps_per_epoch, 'update')} an epoch"
