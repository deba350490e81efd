"""`jaxft.train`: a run, or the runs of `config.population` together."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from jaxft.runs.result import Result
from jaxft.training import loop
from jaxft.training.population import train_population


def train(config: ConfigDict, workdir: str | Path) -> Result:
    """Fine-tunes as `config` says and writes the run's folder; on a folder that exists, goes on.

    Args:
        config: as `configs/sft.py:get_config` makes it. With `population`, its members train together, each into
            RUN/members/NAME (see `jaxft.training.population.population`).
        workdir: RUN. After a run that was cut short it holds a checkpoint, from which this call goes on.

    Raises:
        UserError: a mistake in the configuration, the model, the data or the folder.
    """
    return train_population(config, workdir) if config.population else loop.train(config, workdir)
