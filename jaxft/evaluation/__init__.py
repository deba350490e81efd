"""How good a model is on held-out rows: metrics with confidence, paired comparisons, contamination, lm-eval."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaxft.errors import UserError
from jaxft.evaluation.comparing import compare as compare
from jaxft.evaluation.confidence import Difference as Difference
from jaxft.evaluation.confidence import Figure as Figure
from jaxft.evaluation.metrics import METRICS as METRICS
from jaxft.evaluation.metrics import Metric as Metric

# From here on `jaxft.evaluation.evaluate` is the function.
from jaxft.evaluation.evaluate import Result as Result  # isort: skip
from jaxft.evaluation.evaluate import evaluate as evaluate  # isort: skip

if TYPE_CHECKING:
    from jaxft.evaluation.language_model import LanguageModel as LanguageModel


def __getattr__(name: str) -> Any:
    if name == "LanguageModel":  # needs the extra `lm-eval`
        try:
            return importlib.import_module("jaxft.evaluation.language_model").LanguageModel
        except ModuleNotFoundError as error:
            raise UserError(
                f"lm-eval's tasks need the package {error.name}: pip install 'jaxft[lm-eval]'"
            ) from error
    raise AttributeError(f"module 'jaxft.evaluation' has no attribute {name!r}")
