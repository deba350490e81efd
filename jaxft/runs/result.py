"""What a run gives back."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        workdir: the run's folder.
        steps: updates made in all.
        metrics: the last training and held-out numbers, as `train_loss`, `eval_loss`, ...
        output: RUN/adapter, or RUN/model after full tuning.
        plot: RUN/plots/loss.png.
        data_wait: seconds that the updates made by this call waited for their batches.
        trained: how many parameters train.
        peak: bytes that the largest step needs on a device, by its compiler; 0 where this call made no update.
    """

    workdir: Path
    steps: int
    metrics: dict[str, float]
    output: Path
    plot: Path
    data_wait: float
    trained: int = 0
    peak: int = 0
