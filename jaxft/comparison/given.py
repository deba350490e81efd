"""What a comparison is given: rows that train, rows that tune, rows that test, and what stands beside them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxft.assets import general_texts, model_folder
from jaxft.data.sources import Row
from jaxft.data.tokenizer import Tokenizer, load_tokenizer
from jaxft.errors import UserError, counted
from jaxft.evaluation.asking import as_chats
from jaxft.evaluation.contamination import words_of
from jaxft.evaluation.evaluate import check_needs
from jaxft.evaluation.items import PROMPT, Item
from jaxft.evaluation.metrics import Metric, metrics_of, of_grader
from jaxft.evaluation.reading import read_items
from jaxft.formats.config_file import model_config
from jaxft.objectives.graders import Grader, read_graders
from jaxft.retrieval import update_index

FEWEST = 20  # questions of a test, from which on the intervals hold (evaluation.confidence); and of training
FEWEST_TUNING, MOST_TUNING = 10, 200
NAMED = 5  # rows of an overlap that a line names


@dataclasses.dataclass(frozen=True)
class Given:
    """What every lever gets.

    Attributes:
        config: of the comparison.
        folder: RUN.
        tokenizer: the model's.
        width: of the model.
        train, tuning, test: the questions of the rows that train, that choose settings, and that are decided upon.
        aside: texts that nothing is trained on.
        metric: of the scores.
        graders: of answers; () for none.
        files: the rows of `train` and `tuning` for runs, by what they are: "answers", "pairs", "prompts", and the
            same with "tuning " before it.
        index: the documents' folder; "" for none.
        overlap: origins of test rows that stand in the training rows too, and were left out.
        has: of each key of `levers.NEEDS`, whether it is there.
    """

    config: ConfigDict
    folder: Path
    tokenizer: Tokenizer
    width: int
    train: list[Item]
    tuning: list[Item]
    test: list[Item]
    aside: list[Item]
    metric: Metric
    graders: tuple[Grader, ...]
    files: Mapping[str, str]
    index: str
    overlap: tuple[str, ...]
    has: Mapping[str, bool]

    @property
    def worth(self) -> float | None:
        """The smallest gain that counts; None where it is told by what the levers score."""
        if self.config.worth:
            return float(self.config.worth)
        return None if self.metric.most is None else self.metric.most / 20


def read_given(config: ConfigDict, folder: Path) -> Given:
    """Reads and checks all that is given, and writes the rows for the runs into RUN/data, and RUN/index.

    Raises:
        UserError: rows that cannot be read, too few for a verdict, or a metric that they do not fit.
    """
    for key in ("train", "eval"):
        if not config.data[key]:
            raise UserError(f"config.data.{key} is needed: a comparison is made on data of yours")
    tokenizer = load_tokenizer(model_folder(config.model, weights=False))
    graders = read_graders(graders_in(config.graders)) if config.graders else ()
    learned = _items(config, config.data.train, tokenizer)
    tested = _items(config, config.data.eval, tokenizer)
    test, overlap = without_overlap(tested, learned)
    check_enough(config, learned, tested, test)
    metric = _metric(config, test, graders)
    check_needs([metric], test, graders)
    tuning = _tuning(config, learned)
    train = [item for item in learned if item not in tuning]
    aside = read_items(config.data.untouched or str(general_texts()))
    files = _written(folder / "data", train, tuning)
    return Given(
        config=config,
        folder=folder,
        tokenizer=tokenizer,
        width=model_config(model_folder(config.model, weights=False)).hidden,
        train=train,
        tuning=tuning,
        test=test,
        aside=aside,
        metric=metric,
        graders=tuple(graders),
        files=files,
        index=_indexed(config, folder),
        overlap=tuple(overlap),
        has={
            "answers": "answers" in files,
            "questions": any(item.references and item.prompt for item in train),
            "pairs": "pairs" in files,
            "documents": bool(config.data.documents),
            "grader": bool(graders) and "prompts" in files,
        },
    )


def graders_in(source: str) -> Any:
    """A file's name, or the graders that `config.graders` writes out as JSON."""
    return json.loads(source) if source.lstrip().startswith(("[", "{")) else source


def _items(config: ConfigDict, source: str, tokenizer: Tokenizer) -> list[Item]:
    has_template = tokenizer.chat_template is not None
    wanted = {"auto": has_template, "true": True, "false": False}[config.data.chat]
    if wanted and not has_template:
        raise UserError(
            f"config.data.chat: {tokenizer.name} has no chat template; take false, or auto"
        )
    items = read_items(source, as_messages=has_template, fields=config.data.fields)
    return as_chats(items, wanted, "")


def without_overlap(
    tested: Sequence[Item], learned: Iterable[Item]
) -> tuple[list[Item], list[str]]:
    """The test questions that no training row holds word for word, and the origins of the others."""
    known = {words_of(row) for item in learned for row in item.rows}
    kept, gone = list[Item](), list[str]()
    for item in tested:
        if any(words_of(row) in known for row in item.rows):
            gone.append(item.origin)
        else:
            kept.append(item)
    return kept, gone


def check_enough(
    config: ConfigDict, learned: Sequence[Item], tested: Sequence[Item], test: Sequence[Item]
) -> None:
    if len(test) < FEWEST:
        gone = len(tested) - len(test)
        first = next((item.origin for item in tested if item not in test), "")
        but = f" (and {gone:,} that stand in the training rows too, first {first})" if gone else ""
        raise UserError(
            f"config.data.eval: {config.data.eval}: {counted(len(test), 'question')}{but}: too few for any verdict, "
            f"which needs at least {FEWEST}"
        )
    if len(learned) < FEWEST:
        raise UserError(
            f"config.data.train: {config.data.train}: {counted(len(learned), 'question')}: too few to tune and to "
            f"choose by, which needs at least {FEWEST}"
        )


def _metric(config: ConfigDict, test: Sequence[Item], graders: Sequence[Grader]) -> Metric:
    if config.metric != "auto":
        return metrics_of([config.metric], config.normalize)[0]
    if graders:
        return of_grader(graders[0].name)
    formats = {row.format for item in test for row in item.rows}
    usual = {frozenset({"pair"}): "preference_accuracy", frozenset({"text"}): "loss"}
    return metrics_of([usual.get(frozenset(formats), "f1")], config.normalize)[0]


def _tuning(config: ConfigDict, learned: Sequence[Item]) -> list[Item]:
    """Some of the questions, whatever their order in the file."""
    usual = min(max(len(learned) // 10, FEWEST_TUNING), MOST_TUNING)
    count = config.data.tuning or usual
    if count > len(learned) // 2:
        raise UserError(
            f"config.data.tuning: {count:,} of {counted(len(learned), 'question')} leave too few to train on"
        )
    chosen = np.random.default_rng(config.seed).permutation(len(learned))[:count]
    return [learned[place] for place in sorted(chosen)]


def _written(folder: Path, train: Sequence[Item], tuning: Sequence[Item]) -> dict[str, str]:
    """Writes the rows by what they are, and gives the files; what neither part has is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for what, read in KINDS.items():
        parts = {
            name: [read(item, row) for item in items for row in item.rows]
            for name, items in (("", train), ("tuning ", tuning))
        }
        kept = {name: [row for row in rows if row is not None] for name, rows in parts.items()}
        if not all(kept.values()):
            continue
        for name, rows in kept.items():
            file = folder / f"{name}{what}.jsonl".replace(" ", "_")
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.write_text(text, encoding="utf-8")
            files[f"{name}{what}"] = str(file)
    return files


def _with_tools(row: Row, values: dict[str, Any]) -> dict[str, Any]:
    return {**values, "tools": row.values["tools"]} if row.values.get("tools") else values


def _answer(_: Item, row: Row) -> dict[str, Any] | None:
    """The row as an example; of a pair, its chosen answer."""
    values = row.values
    if row.format == "messages":
        return _with_tools(row, {"messages": values["messages"]})
    if row.format == "text":
        return {"text": values["text"]}
    right = values.get("completion", values.get("chosen"))
    if right is None:
        return None
    return _with_tools(row, {"prompt": values["prompt"], "completion": right})


def _pair(_: Item, row: Row) -> dict[str, Any] | None:
    if row.format != "pair":
        return None
    keys = ("prompt", "chosen", "rejected")
    return _with_tools(row, {key: row.values[key] for key in keys})


def _prompt(item: Item, row: Row) -> dict[str, Any] | None:
    """The question with all that its row has, for graders."""
    if row.format == "text" or not item.prompt:
        return None
    asked = {} if row.format == PROMPT or not item.references else {"reference": item.references[0]}
    return _with_tools(row, {**item.values, **asked, "prompt": item.prompt})


KINDS = {"answers": _answer, "pairs": _pair, "prompts": _prompt}


def _indexed(config: ConfigDict, folder: Path) -> str:
    if not config.data.documents:
        return ""
    index = folder / "index"
    update_index(index, list(config.data.documents), {"tokenizer": config.model})
    return str(index)
