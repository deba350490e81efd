"""The date that a run's chat template writes: that of its first day, on every day."""

from __future__ import annotations

import datetime
from pathlib import Path

from ml_collections import ConfigDict

from jaxft.configuration.keys import assign, conform
from jaxft.runs.folder import config_in
from jaxft.runtime import processes


def dated(config: ConfigDict, workdir: Path) -> ConfigDict:
    """The configuration with a date: its own, else that of the run in the folder, else the first process's today.

    A template that writes the date (`strftime_now`) would make other examples of the same rows on the next day.

    Args:
        config: as for `train`.
        workdir: RUN. Nothing is written.
    """
    if config.data.date:
        return config
    old = config_in(workdir)
    day = "" if old is None else old.data.date
    if not day:
        number = processes.as_first(datetime.date.today().toordinal())
        day = datetime.date.fromordinal(number).isoformat()
    config = conform(config, "configuration")
    assign(config, "data.date", day)
    return config
