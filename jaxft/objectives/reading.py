"""A run's data, read as its configuration and its objective say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxft.assets import model_folder
from jaxft.data import Examples, Summary, Tokenizer, load_tokenizer
from jaxft.data.mixing import mix, mix_line
from jaxft.data.report import Part
from jaxft.errors import UserError
from jaxft.formats.companions import merged_tokenizer
from jaxft.models import Config
from jaxft.objectives.objective import objective_of
from jaxft.runtime.sandbox import today
from jaxft.runtime.storage import fetched

TRAINING = "training data"
ADDED = "config.data.add_tokens"


def max_length_of(config: ConfigDict, model: Config) -> int:
    """The tokens of a row: `config.data.max_length`, or 1024, or the model's where that is less.

    Raises UserError where it exceeds the model's.
    """
    max_length = config.data.max_length or min(1024, model.max_length)
    if max_length > model.max_length:
        raise UserError(
            f"config.data.max_length {max_length} exceeds the model's {model.max_length}"
        )
    return int(max_length)


def tokenizer_of(config: ConfigDict) -> Tokenizer:
    """The tokenizer that `config.tokenizer` names, else the model's and what stands beside `config.adapter`.

    Its template writes the run's date or today. `config.data.add_tokens` are tokens of it.
    """
    options = config.data.chat_template, config.data.date or today()
    adapter = fetched(config.adapter) if config.adapter else None
    if config.tokenizer:
        tokenizer = load_tokenizer(config.tokenizer, *options)
    else:
        tokenizer = merged_tokenizer(model_folder(config.model, weights=False), adapter, *options)
    if not config.data.add_tokens:
        return tokenizer
    return tokenizer.with_tokens(config.data.add_tokens, ADDED)


def added_tokens(config: ConfigDict) -> tuple[int, ...]:
    """The ids of `config.data.add_tokens`; () without. Those that the tokenizer has already are among them."""
    texts = config.data.add_tokens
    return tokenizer_of(config).ids_of(texts) if texts else ()


def parts_of(config: ConfigDict, **settings: Any) -> list[Part]:
    """The training data and each held-out set.

    Args:
        config: of the run.
        settings: further arguments of `jaxft.objectives.kind.Read`.

    Raises:
        UserError: no training data are named, or rows that cannot be read.
    """
    read = objective_of(config).examples.read
    if not config.data.train:
        raise UserError("config.data.train: give a file to train on")
    parts = [Part(TRAINING, *read(config, config.data.train, held_out=False, **settings))]
    for name, paths in named_sets(config.data.eval).items():
        called = f"held-out data {name!r}" if name else "held-out data"
        parts.append(Part(called, *read(config, paths, held_out=True, **settings)))
    return parts


def named_sets(paths: Any) -> dict[str, Any]:
    """The held-out files of `config.data.eval` by name; a single one has the name ""."""
    if isinstance(paths, Mapping):
        return dict(paths)
    return {"": paths} if paths else {}


def epoch_of(config: ConfigDict, rows: Any, examples: Examples, summary: Summary) -> Examples:
    """What an epoch of training holds: every example, or a mixture as `config.data.mix` says."""
    if not config.data.mix:
        return examples
    return mix(examples, [source.name for source in rows.sources], summary.kept, config.data.mix)


def updates_of(config: ConfigDict, steps_per_epoch: int) -> int:
    """How many updates the run makes: `config.steps`, or those of `config.epochs`."""
    return config.steps or math.ceil(config.epochs * steps_per_epoch)


def source_lines(rows: Any) -> list[str]:
    """What was chosen in the sources."""
    return [f"{source.name}: {', '.join(source.notes)}" for source in rows.sources if source.notes]


def mix_lines(config: ConfigDict, rows: Any, summary: Summary) -> list[str]:
    """How the sources of the training data are mixed, if they are."""
    names = [source.name for source in rows.sources]
    return [mix_line(names, summary.kept, config.data.mix)] if config.data.mix else []


def date_lines(tokenizer: Tokenizer) -> list[str]:
    """The date that the chat template writes, if it writes one."""
    line = f"the chat template writes the date, in this run {tokenizer.date} (config.data.date)"
    return [line] if tokenizer.writes_date else []
