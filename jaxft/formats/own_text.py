"""The text on which a folder that was made of another is measured: the run's own, where it is found."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxft.assets import quickstart_data
from jaxft.configuration import from_json
from jaxft.data import Row, Tokenizer, load_tokenizer, prepare_examples, read_rows
from jaxft.errors import UserError
from jaxft.models.config import Config
from jaxft.objectives import objective_of
from jaxft.runtime import storage

ROWS = 64  # read at most
TOKENS = 2048  # measured at most, but for the last row's
WIDEST = 512  # tokens of a row
LONGEST = 8192  # tokens of a row before it is cut

Piece = tuple[np.ndarray, np.ndarray]  # ids, and which of them are targets


@dataclasses.dataclass(frozen=True)
class Text:
    """What is measured.

    Attributes:
        name: where it is from, for a message.
        pieces: (ids, which of them are targets) of each row.
        random: whether it is no text at all, because the folder has no tokenizer.
    """

    name: str
    pieces: list[Piece]
    random: bool = False


def text_for(model: Path, config: Config, beside: str | Path) -> Text:
    """The text for a model, of the run in whose folder `beside` stands, if it does.

    Held-out data come before training data, these before what the run answered in RUN/samples.jsonl, and that before
    the text that is embedded in jaxft. Data at a URL are not fetched.

    Args:
        model: a folder, for its tokenizer.
        config: the model's.
        beside: RUN/adapter, RUN/model, or any other folder.
    """
    run = storage.place(beside).parent
    settings = _settings_of(run)
    tokenizer = _tokenizer(model, settings, beside)
    if tokenizer is None:
        return _random(config)
    tries = list[tuple[str, Callable[[], Iterable[Row]]]]()
    loss_on = "all"
    if settings is not None:
        loss_on = settings.data.loss_on
        for kind, paths in _paths(settings):
            read = functools.partial(_rows, settings, paths, kind == "held-out", tokenizer)
            tries.append((f"the run's {kind} data ({paths})", read))
        said = functools.partial(_samples, run)
        tries.append((f"what the run was asked ({run / 'samples.jsonl'})", said))
    for name, rows in tries:
        if pieces := _pieces(rows, tokenizer, config, loss_on):
            return Text(name, pieces)
    pieces = _pieces(_embedded, tokenizer, config, "all")
    return Text("English text that comes with jaxft", pieces) if pieces else _random(config)


def _settings_of(run: Path) -> ConfigDict | None:
    """The configuration of the run in that folder; None if there is none."""
    try:
        return from_json((run / "config.json").read_text(encoding="utf-8"))
    except (UserError, OSError, ValueError):
        return None


def _tokenizer(model: Path, settings: ConfigDict | None, beside: str | Path) -> Tokenizer | None:
    """The run's tokenizer with the template that it trained by; None if the folder has none."""
    own = storage.place(beside)
    named = str(own / "chat_template.jinja") if (own / "chat_template.jinja").is_file() else ""
    folder, date = model, ""
    if settings is not None:
        named, date = named or settings.data.chat_template, settings.data.date
        folder = Path(settings.tokenizer or model)
    for at, by in ((own, named), (folder, named), (model, named), (model, "")):
        try:
            return load_tokenizer(at, by, date)
        except (UserError, OSError):
            continue
    return None


def _paths(settings: ConfigDict) -> Iterator[tuple[str, Any]]:
    """(kind, paths) of the run's data on this machine."""
    held_out = settings.data.eval
    if isinstance(held_out, Mapping):
        held_out = next(iter(held_out.values()), "")
    for kind, paths in (("held-out", held_out), ("training", settings.data.train)):
        if paths and "://" not in str(paths) and "tfds:" not in str(paths):
            yield kind, paths


def _rows(settings: ConfigDict, paths: Any, held_out: bool, tokenizer: Tokenizer) -> Iterable[Row]:
    as_messages = tokenizer.chat_template is not None
    kind = objective_of(settings).examples
    return kind.rows(settings, paths, held_out=held_out, as_messages=as_messages)


def _samples(run: Path) -> Iterator[Row]:
    """The held-out prompts that the run answered, each with the answer in the data."""
    lines = (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    known: set[str] = set()
    for number, line in enumerate(lines, start=1):
        sample = json.loads(line)
        prompt, answer = sample["prompt"], sample["reference"]
        if json.dumps(prompt) in known:
            continue
        known.add(json.dumps(prompt))
        said = answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]
        yield Row(
            f"samples.jsonl:{number}", "prompt_completion", {"prompt": prompt, "completion": said}
        )


def _embedded() -> Iterator[Row]:
    for row in read_rows(quickstart_data("heldout")):
        yield Row(row.origin, "text", {"text": row.values["completion"].strip()})


def _pieces(
    rows: Callable[[], Iterable[Row]], tokenizer: Tokenizer, config: Config, loss_on: str
) -> list[Piece]:
    """The first rows as tokens; [] where they cannot be had."""
    try:
        some = itertools.islice(rows(), ROWS)
        examples, _ = prepare_examples(
            some, tokenizer, max_length=LONGEST, loss_on=loss_on, vocabulary_size=config.vocabulary
        )
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return []
    pieces, held = list[Piece](), 0
    for example in examples:
        if held >= TOKENS:
            break
        pieces.append(_window(example.tokens, example.trained, min(WIDEST, config.max_length)))
        held += len(pieces[-1][0])
    return pieces


def _window(tokens: np.ndarray, trained: np.ndarray, width: int) -> Piece:
    """At most `width` tokens, from the beginning, or so that the first target stands in their middle."""
    first = int(np.argmax(trained))
    start = 0 if first < width - 1 else first - width // 2
    ids, targets = (
        np.asarray(tokens[start : start + width]),
        np.array(trained[start : start + width]),
    )
    targets[:1] = False
    return ids, targets


def _random(config: Config) -> Text:
    """Rows of random tokens, the same every time."""
    shape = (4, min(32, config.max_length))
    ids = np.random.default_rng(0).integers(0, config.vocabulary, shape).astype(np.int32)
    targets = np.arange(shape[1]) > 0
    return Text("random ids (the folder has no tokenizer)", [(row, targets) for row in ids], True)
