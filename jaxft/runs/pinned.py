"""Names of the hub in a run's configuration: each with the commit that it meant on the run's first day."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from jaxft.configuration.keys import assign, conform, flatten
from jaxft.runs.folder import config_in
from jaxft.runtime import hub, processes

KEYS = ("model", "adapter", "tokenizer", "objective.reference")


def pinned(config: ConfigDict, workdir: Path) -> ConfigDict:
    """The configuration in which each name of the hub says its commit.

    A name without a revision takes the commit of the run in the folder, so that a run goes on upon what it began with,
    whatever the hub has meanwhile; else the newest. All processes take that of the first.

    Args:
        config: as for `train`.
        workdir: RUN. Nothing is written.
    """
    named = {key: hub.meant(name) for key, name in flatten(config).items() if key in KEYS and name}
    found = {key: repository for key, repository in named.items() if repository}
    if not found:
        return config
    before = config_in(workdir)
    old = flatten(before) if before is not None else {}
    config = conform(config, "configuration")
    for key, repository in found.items():
        known = hub.meant(old[key]) if old.get(key) else None
        if known is None or known.name != repository.name or repository.revision:
            known = hub.Repository(repository.name, _of_first(hub.commit_of(repository)))
        assign(config, key, str(known))
    return config


def _of_first(commit: str) -> str:
    """The first process's commit, which is told in numbers."""
    parts = [int(commit[index : index + 4], 16) for index in range(0, len(commit), 4)]
    return "".join(f"{processes.as_first(part):04x}" for part in parts)
