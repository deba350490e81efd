"""A model's figures on rows of data: `jaxft.evaluate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.data.tokenizer import Tokenizer, load_tokenizer
from jaxft.defaults import MAX_NEW_TOKENS
from jaxft.errors import UserError
from jaxft.evaluation.asking import as_chats, score, with_passages
from jaxft.evaluation.confidence import Figure, figure
from jaxft.evaluation.items import PROMPT, Item
from jaxft.evaluation.metrics import (
    ANSWER,
    LIKELIHOOD,
    PAIR,
    REWARDS,
    Metric,
    metrics_of,
    of_grader,
)
from jaxft.evaluation.reading import Data, read_items
from jaxft.inference.asked import Before
from jaxft.models import Transformer
from jaxft.objectives.graders import Grader, check_items, read_graders


@dataclasses.dataclass(frozen=True)
class Result:
    """What was found.

    Attributes:
        metrics: name -> value, interval and n.
        records: of every item what was asked, answered and scored, fit for JSON lines.
        unscored: origin -> why, of the items that lack a score.
    """

    metrics: dict[str, Figure]
    records: list[dict[str, Any]]
    unscored: dict[str, str]


def evaluate(
    model: Transformer,
    params: Mapping[str, Any],
    rows: Data,
    metrics: Sequence[str] = ("loss", "exact"),
    *,
    tokenizer: Tokenizer | str | Path,
    graders: Any = (),
    normalize: str = "spaces",
    cluster: str = "",
    chat: bool = False,
    system: str = "",
    fields: Mapping[str, str] | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 8,
    packing: bool = False,
    progress: bool = False,
) -> Result:
    """The metrics of a model on rows of data, each with a 95 % interval.

    Rows that ask the same are one item with several references, asked once. Answers are greedy. What a figure is
    depends neither on `batch_size` nor on `packing` nor on the mesh in force, but for the rounding of float32.

    Args:
        model: the decoder.
        params: its tree, adapted or not.
        rows: a file, or whatever `read_rows` takes, or dicts such as {"prompt": ..., "completion": ...}; with
            `chosen` and `rejected` they are preferences.
        metrics: names of `jaxft.evaluation.METRICS`, or rows like those there.
        tokenizer: the model's, or the folder where it stands.
        graders: of answers, as `config.graders`: a list or a JSON file; the metric of one is called grader/NAME.
        normalize: how texts are read before `exact`, `contains` and `f1` compare them: none, spaces, lower or squad.
        cluster: a key of the rows: items with equal values of it are resampled together. "": each item by itself.
        chat: whether a prompt that is a text is a user's message.
        system: a system message for conversations that have none.
        fields: what the rows' keys are called, as of `read_rows`.
        max_new_tokens: the most tokens of an answer.
        batch_size: rows at once.
        packing: score several rows as one.
        progress: show a bar on a terminal's stderr.

    Returns:
        The figures, and every item's scores.

    Raises:
        UserError: an unknown metric, a metric that needs what the data do not have, rows that cannot be read, or none.
    """
    tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
    judges = read_graders(graders, "graders") if graders else ()
    table = table_of(metrics, normalize, judges)
    has_template = tokenizer.chat_template is not None
    items = read_items(rows, as_messages=has_template, cluster=cluster, fields=fields)
    check_needs(table, items, judges)
    return evaluate_items(
        model,
        params,
        items,
        table,
        tokenizer,
        judges,
        chat=chat or bool(system),
        system=system,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        packing=packing,
        progress=progress,
    )


def evaluate_items(
    model: Transformer,
    params: Mapping[str, Any],
    items: Sequence[Item],
    table: Sequence[Metric],
    tokenizer: Tokenizer,
    graders: Sequence[Grader] = (),
    *,
    chat: bool,
    system: str,
    max_new_tokens: int,
    batch_size: int,
    packing: bool = False,
    progress: bool = False,
    before: Callable[[Tokenizer], Before] | None = None,
) -> Result:
    """`evaluate` of questions and metrics that are known already; the arguments are its.

    `before`, if given, is for the tokenizer what puts passages before the questions.
    """
    asked = as_chats(items, chat, system)
    if before is not None:
        asked = with_passages(asked, before(tokenizer), model.config.max_length - max_new_tokens)
    scored = score(
        model,
        params,
        asked,
        tokenizer,
        table,
        graders,
        max_new_tokens=max_new_tokens,
        batching={"batch_size": batch_size, "packing": packing},
        progress=progress,
    )
    as_given = [
        dataclasses.replace(after, prompt=before.prompt)
        for before, after in zip(items, scored, strict=True)
    ]
    return summarize(table, as_given)


def table_of(names: Sequence[str], normalize: str, graders: Sequence[Grader]) -> list[Metric]:
    """The metrics of these names and of the graders."""
    named = metrics_of(names, normalize) if names or not graders else []
    return [*named, *(of_grader(grader.name) for grader in graders)]


def check_needs(
    table: Sequence[Metric], items: Sequence[Item], graders: Sequence[Grader] = ()
) -> None:
    """Raises UserError where a metric needs what no item has, or a grader what one has not."""
    first = items[0].origin
    formats = {row.format for item in items for row in item.rows}
    for metric in table:
        if metric.compares and not any(item.references for item in items):
            raise UserError(
                f"{first}: {metric.name} compares answers with references, and the rows have none: they need prompt "
                "and completion, or messages whose last is the assistant's"
            )
        if metric.needs == ANSWER and formats == {"text"}:
            raise UserError(f"{first}: {metric.name} judges answers, and a text alone asks nothing")
        if metric.needs in (PAIR, REWARDS) and formats != {"pair"}:
            raise UserError(f"{first}: {metric.name} needs rows of prompt, chosen and rejected")
        if metric.needs == LIKELIHOOD and formats == {PROMPT}:
            raise UserError(
                f"{first}: {metric.name} is of completions, and the rows have none; --metrics names others"
            )
    check_items(graders, {item.origin: {"reference": "", **item.values} for item in items})


def summarize(table: Sequence[Metric], items: Sequence[Item]) -> Result:
    """The figures of scored items, and their records."""
    records = [_record(item) for item in items]
    clusters = [item.cluster for item in items]
    figures = {}
    for metric in table:
        rows = rows_of(metric, items)
        figures[metric.name] = figure(rows, clusters, metric.value, metric.most)
        for record, row in zip(records, rows, strict=True):
            if not np.isnan(row).any():
                record["scores"][metric.name] = float(metric.value(row))
                record["statistics"][metric.name] = row.tolist()
    reasons = {item.origin: next(iter(item.unscored.values())) for item in items if item.unscored}
    return Result(figures, records, reasons)


def rows_of(metric: Metric, items: Sequence[Item]) -> np.ndarray:
    """The metric's numbers of every item; NaN where an item lacks what it needs."""
    able = [
        index
        for index, item in enumerate(items)
        if getattr(item, metric.needs) is not None and (item.references or not metric.compares)
    ]
    if not able:
        return np.full((len(items), 2), np.nan)
    some = metric.rows([items[index] for index in able])
    rows = np.full((len(items), some.shape[1]), np.nan)
    rows[able] = some
    return rows


def _record(item: Item) -> dict[str, Any]:
    record: dict[str, Any] = {
        "origin": item.origin,
        "cluster": item.cluster,
        "prompt": item.prompt,
        "references": list(item.references),
        "answer": item.answer,
        "tokens": dict(item.tokens),
        "scores": {},
        "statistics": {},
    }
    if item.cite is not None and item.answer is not None:
        record |= item.cite(item.answer)
    if item.unscored:
        record["unscored"] = dict(item.unscored)
    return record
