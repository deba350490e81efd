"""The services that a run reports to beside metrics.jsonl: `config.report_to` names them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from jaxft.errors import UserError

MOST_PARAMETERS = 100  # that MLflow takes at once; each of at most LONGEST_PARAMETER letters
LONGEST_PARAMETER = 6000


class Reporter(Protocol):
    """Where numbers go beside metrics.jsonl."""

    def report(self, split: str, step: int, numbers: Mapping[str, float]) -> None:
        """Takes one line's numbers."""

    def close(self) -> None:
        """Writes what is left."""


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, workdir: Path) -> None:
        with _needs("tensorboard"):
            from tensorboardX import SummaryWriter
        self._writer = SummaryWriter(str(workdir / "tensorboard"))

    def report(self, split: str, step: int, numbers: Mapping[str, float]) -> None:
        """Scalars `split/name`."""
        for name, value in _named(split, numbers).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


class Wandb:
    """A run at Weights & Biases with the folder's name, which goes on when the folder does."""

    def __init__(self, workdir: Path, config: Mapping[str, Any]) -> None:
        with _needs("wandb"):
            import wandb
        name = workdir.absolute().name
        self._run = wandb.init(
            project="jaxft",
            name=name,
            id=name,
            resume="allow",
            dir=str(workdir),
            config=dict(config),
        )

    def report(self, split: str, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers `split/name`."""
        self._run.log(_named(split, numbers), step=step)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


class Trackio:
    """A run of Trackio, on this machine, with the folder's name, which goes on when the folder does."""

    def __init__(self, workdir: Path, config: Mapping[str, Any]) -> None:
        with _needs("trackio"):
            import trackio
        self._run = trackio.init(
            project="jaxft", name=workdir.absolute().name, resume="allow", config=dict(config)
        )

    def report(self, split: str, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers `split/name`."""
        self._run.log(_named(split, numbers), step=step)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


class MLflow:
    """A run of MLflow's experiment `jaxft`, where MLFLOW_TRACKING_URI says; the folder's own, which goes on with it."""

    def __init__(self, workdir: Path, config: Mapping[str, Any]) -> None:
        with _needs("mlflow"):
            import mlflow
        folder = str(workdir.absolute())
        experiment = mlflow.set_experiment("jaxft").experiment_id
        self._client = mlflow.MlflowClient()
        self._metric = mlflow.entities.Metric
        quote = '"' if "'" in folder else "'"
        wanted = f"tags.`jaxft.workdir` = {quote}{folder}{quote}"
        found = self._client.search_runs([experiment], wanted, max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {"jaxft.workdir": folder}
        self._id = self._client.create_run(
            experiment, run_name=workdir.absolute().name, tags=tags
        ).info.run_id
        parameters = [
            mlflow.entities.Param(key, str(value)[:LONGEST_PARAMETER])
            for key, value in _flat("", config).items()
        ]
        for start in range(0, len(parameters), MOST_PARAMETERS):
            some = parameters[start : start + MOST_PARAMETERS]
            self._client.log_batch(self._id, params=some)

    def report(self, split: str, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers `split/name`, all of a line at once."""
        now = int(1000 * time.time())
        metrics = [
            self._metric(name, value, now, step) for name, value in _named(split, numbers).items()
        ]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        """Ends the run."""
        self._client.set_terminated(self._id)


def _named(split: str, numbers: Mapping[str, float]) -> dict[str, float]:
    return {f"{split}/{name}": value for name, value in numbers.items()}


def _flat(prefix: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """{"section.key": value} of nested keys."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        inner = _flat(f"{prefix}{key}.", value) if isinstance(value, Mapping) and value else None
        found |= {f"{prefix}{key}": value} if inner is None else inner
    return found


@contextlib.contextmanager
def _needs(extra: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"config.report_to: {extra} is not installed: pip install 'jaxft[{extra}]'"
        ) from error


def reporters(names: tuple[str, ...], workdir: Path, config: Mapping[str, Any]) -> list[Reporter]:
    """The services that `config.report_to` names.

    Raises:
        UserError: the package of one is not installed.
    """
    makers: dict[str, Callable[[], Reporter]] = {
        "tensorboard": lambda: TensorBoard(workdir),
        "wandb": lambda: Wandb(workdir, config),
        "trackio": lambda: Trackio(workdir, config),
        "mlflow": lambda: MLflow(workdir, config),
    }
    return [makers[name]() for name in names]
