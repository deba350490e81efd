"""Pure losses, (decoder's config, params, batch) -> (sum, what is counted beside it), and the table of objectives."""

from __future__ import annotations

from jaxft.objectives.cross_entropy import (
    cross_entropy,
    target_scores,
    token_log_probabilities,
)
from jaxft.objectives.objective import OBJECTIVES, Metric, Objective, objective_of
from jaxft.objectives.pairs import (
    LOSSES,
    completion_log_probabilities,
    preference_loss,
    settings_of,
)
from jaxft.objectives.sft import sft
from jaxft.objectives.sums import Counted, averages, counted

__all__ = [
    "LOSSES",
    "OBJECTIVES",
    "Counted",
    "Metric",
    "Objective",
    "averages",
    "completion_log_probabilities",
    "counted",
    "cross_entropy",
    "objective_of",
    "preference_loss",
    "settings_of",
    "sft",
    "target_scores",
    "token_log_probabilities",
]
