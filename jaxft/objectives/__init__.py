"""Pure losses: (decoder's config, parameters, batch) -> (sum, what is counted beside it)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from jaxft.objectives.cross_entropy import cross_entropy, token_log_probabilities
from jaxft.objectives.pairs import (
    LOSSES,
    Settings,
    completion_log_probabilities,
    preference_loss,
    with_likelihood_scale,
)
from jaxft.objectives.sft import sft
from jaxft.objectives.sums import Counted, averages, counted

Objective = Callable[..., tuple[Any, Any]]


def objective_of(settings: Mapping[str, Any]) -> Objective:
    """The objective that `config.objective` names, with the keys that it reads as arguments."""
    if settings["name"] == "sft":
        return functools.partial(sft, label_smoothing=settings["label_smoothing"])
    return functools.partial(preference_loss, settings=settings_of(settings))


def settings_of(settings: Mapping[str, Any]) -> Settings:
    """The keys of `config.objective` that a preference loss reads."""
    return Settings(**{field.name: settings[field.name] for field in dataclasses.fields(Settings)})


def preparation_of(settings: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """What the objective wants to be noted in a whole batch before it is taken in parts."""
    if settings["name"] == "sft":
        return dict
    return functools.partial(with_likelihood_scale, settings=settings_of(settings))


__all__ = [
    "LOSSES",
    "Counted",
    "averages",
    "completion_log_probabilities",
    "counted",
    "cross_entropy",
    "objective_of",
    "preference_loss",
    "preparation_of",
    "settings_of",
    "sft",
    "token_log_probabilities",
]
