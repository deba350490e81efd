"""Pure losses: (decoder's config, parameters, batch) -> (sum, weight)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from jaxft.objectives.cross_entropy import cross_entropy, token_log_probabilities
from jaxft.objectives.sft import sft

Objective = Callable[..., tuple[Any, Any]]
OBJECTIVES: dict[str, Objective] = {"sft": sft}


def objective_of(settings: Mapping[str, Any]) -> Objective:
    """The objective that `config.objective` names, with its other keys as arguments."""
    arguments = {key: value for key, value in settings.items() if key != "name"}
    return functools.partial(OBJECTIVES[settings["name"]], **arguments)


__all__ = ["OBJECTIVES", "cross_entropy", "objective_of", "sft", "token_log_probabilities"]
