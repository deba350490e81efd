"""What the page knows of a run: read from its folder, and nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxft.configuration.keys import flatten
from jaxft.errors import UserError
from jaxft.evaluation.metrics import metrics_of
from jaxft.methods import METHODS, Method
from jaxft.objectives.objective import Metric, Objective, objective_of
from jaxft.runs.best import best_step
from jaxft.runs.folder import config_in
from jaxft.runs.metrics import read_metrics
from jaxft.runs.summary import NAME, read_summary
from jaxft.runtime import storage

OUTPUTS = ("adapter", "model")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's folder, read.

    Attributes:
        place: the folder, as the user named it.
        config: the run's.
        objective: the row of its objective.
        method: the row of its method, with its settings.
        lines: of metrics.jsonl.
        samples: of samples.jsonl.
        summary: what the run wrote of itself at its end; {} where an earlier jaxft did not.
        artefact: what it left: adapter or model, and the bytes of its files; None for nothing yet.
    """

    place: str
    config: ConfigDict
    objective: Objective
    method: Method
    lines: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    artefact: tuple[str, int] | None

    @property
    def name(self) -> str:
        """The folder's own name."""
        return Path(self.place).name or self.place

    @property
    def steps(self) -> int:
        """Updates made, as far as they are written."""
        return max((int(line["step"]) for line in self.lines), default=0)

    @property
    def state(self) -> str:
        """What to say where the run is not done; "" where it is."""
        planned, made = int(self.config.steps), self.steps
        further = self.summary and made > self.summary["steps"]  # it goes on beyond what it left
        short = made < planned and not self.config.patience
        if self.artefact is None or further or short:
            of = f" of {planned:,}" if planned > made else ""
            return f"not finished: {made:,}{of} updates so far"
        return ""

    def split(self, split: str, chosen: str | None = None) -> list[Mapping[str, Any]]:
        """The lines of "train" or "eval"; of `chosen`, a held-out set."""
        found = [line for line in self.lines if line["split"] == split]
        return [line for line in found if chosen is None or line.get("set", "") == chosen]

    @property
    def sets(self) -> list[str]:
        """Names of the held-out sets, the one that decides first; [""] for one without a name."""
        return list(dict.fromkeys(str(line.get("set", "")) for line in self.split("eval")))

    @property
    def metrics(self) -> list[Metric]:
        """What the run reports: of its objective, then `config.eval_metrics`."""
        names = self.config.eval_metrics
        found = metrics_of(names) if names else []
        asked = [Metric(one.name, "", "lower" if one.lower else "higher") for one in found]
        return [*self.objective.metrics, *asked]

    @property
    def exported(self) -> int | None:
        """The step whose weights the run left: the best where it was told to keep that, else the last.

        None where nothing was measured on held-out data.
        """
        values = {int(line["step"]): float(line[self.best.name]) for line in self.deciding}
        if not values:
            return None
        if self.config.checkpoint.best:
            return best_step(values, self.best.better)
        return max(values)

    @property
    def best(self) -> Metric:
        """The metric by which the best step is chosen."""
        return self.objective.best

    @property
    def deciding(self) -> list[Mapping[str, Any]]:
        """The evaluations of the first held-out set."""
        lines = self.split("eval", *self.sets[:1])
        return [line for line in lines if number_of(line.get(self.best.name)) is not None]

    def held_out(self, name: str) -> float | None:
        """A metric on the first held-out set, of the weights that the run left."""
        for line in reversed(self.deciding):
            if line["step"] == self.exported:
                return number_of(line.get(name))
        return None

    @property
    def tokens_per_second(self) -> float | None:
        """The median over the updates that are written."""
        found = [number_of(line.get("tokens_per_second")) for line in self.split("train")]
        speeds = [speed for speed in found if speed]
        return statistics.median(speeds) if speeds else None

    @property
    def seconds(self) -> float | None:
        """The time of all updates, by their median; compiling, evaluating and saving left out."""
        spans = [
            line["tokens"] / line["tokens_per_second"]
            for line in self.split("train")
            if line.get("tokens_per_second") and line.get("tokens")
        ]
        return statistics.median(spans) * self.steps if spans else None

    def fact(self, name: str) -> int | None:
        """A number of the run's own summary; None where it has none."""
        value = number_of(self.summary.get(name))
        return None if value is None else int(value)


def read_run(
    place: str | Path, folder: Path | None = None, config: ConfigDict | None = None
) -> Run:
    """Reads a run's folder.

    Args:
        place: RUN, as the page calls it.
        folder: where its logs and exports stand, if not there.
        config: the run's, if it is known.

    Raises:
        UserError: no such folder, one that is no run, or one whose configuration cannot be read.
    """
    root = storage.place(place)
    if config is None:
        config = _config(root)
    folder = folder or root
    row = METHODS[config.method.name](**_settings(config))
    return Run(
        place=str(place),
        config=config,
        objective=objective_of(config),
        method=row,
        lines=[line for line in read_metrics(folder / "metrics.jsonl") if _is_step(line["step"])],
        samples=_rows(folder / "samples.jsonl"),
        summary=read_summary(folder / NAME),
        artefact=_artefact(folder),
    )


def _config(root: Path) -> ConfigDict:
    if not root.is_dir():
        raise storage.no_folder(root, "a run is a folder that jaxft train wrote")
    config = config_in(root)
    if config is None:
        raise UserError(f"{root}: no run: it holds no config.json that jaxft train wrote")
    return config


def _settings(config: ConfigDict) -> dict[str, Any]:
    return {key: value for key, value in config.method.items() if key != "name"}


def _artefact(folder: Path) -> tuple[str, int] | None:
    for name in OUTPUTS:
        if (folder / name / "manifest.json").exists():
            files = storage.files_under(folder / name)
            return name, sum(storage.size_of(file) for file in files.values())
    return None


def _rows(file: Path) -> list[dict[str, Any]]:
    rows = []
    if file.exists():
        for text in file.read_bytes().decode("utf-8", "replace").split("\n"):
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(text)
                if isinstance(row, dict) and _is_step(row.get("step")) and "completion" in row:
                    rows.append(row)
    return rows


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def number_of(value: Any) -> float | None:
    """The value, if it is a number that is finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """{key: its value in each run} of the configuration's keys that are not the same in all."""
    flats = [flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for flat in flats for key in flat)
    found = {key: [flat.get(key) for flat in flats] for key in keys}
    return {key: values for key, values in found.items() if any(v != values[0] for v in values)}
