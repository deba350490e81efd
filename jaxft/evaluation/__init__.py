"""How good a model is on held-out rows: metrics with confidence, paired comparisons, contamination, lm-eval."""

from __future__ import annotations

from jaxft.evaluation.comparing import compare as compare
from jaxft.evaluation.confidence import Difference as Difference
from jaxft.evaluation.confidence import Figure as Figure
from jaxft.evaluation.metrics import METRICS as METRICS
from jaxft.evaluation.metrics import Metric as Metric

# From here on `jaxft.evaluation.evaluate` is the function.
from jaxft.evaluation.evaluate import Result as Result  # isort: skip
from jaxft.evaluation.evaluate import evaluate as evaluate  # isort: skip
