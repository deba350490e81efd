"""Services that a run reports to: stand-ins take the calls that the real packages were seen to take."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from jaxft.errors import UserError
from jaxft.runs.metrics import Metrics
from jaxft.runs.reporters import reporters

CONFIG = {"seed": 1, "optimizer": {"learning_rate": 0.5, "options": {}}}


def run_of(seen: list[Any]) -> Any:
    """A run of W&B's or Trackio's kind, which notes what it is told."""
    return types.SimpleNamespace(
        log=lambda numbers, step: seen.append((step, numbers)), finish=lambda: seen.append("end")
    )


def test_wandb_gets_the_numbers_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run at W&B for one folder, however often it is taken up; without the package, one line."""
    seen: list[Any] = []

    def init(**arguments: Any) -> Any:
        seen.append((arguments["id"], arguments["resume"], arguments["config"]))
        return run_of(seen)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    metrics = Metrics(tmp_path / "metrics.jsonl", 0, reporters(("wandb",), tmp_path, {"seed": 1}))
    metrics.write("train", 1, {"loss": 2.0})
    metrics.close()
    assert seen == [(tmp_path.name, "allow", {"seed": 1}), (1, {"train/loss": 2.0}), "end"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb is not installed.*jaxft\[wandb\]"):
        reporters(("wandb",), tmp_path, {})


def test_trackio_gets_the_numbers_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run of the folder's name."""
    seen: list[Any] = []

    def init(**arguments: Any) -> Any:
        seen.append(arguments)
        return run_of(seen)

    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(init=init))
    (service,) = reporters(("trackio",), tmp_path, CONFIG)
    service.report("eval", 3, {"loss": 2.0})
    service.close()
    begun = {"project": "jaxft", "name": tmp_path.name, "resume": "allow", "config": CONFIG}
    assert seen == [begun, (3, {"eval/loss": 2.0}), "end"]


class Store:
    """MLflow's client, as far as it is used."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}

    def search_runs(self, experiments: list[str], wanted: str, max_results: int) -> list[Any]:
        assert (experiments, max_results) == (["7"], 1)
        return [self._run(name) for name, run in self.runs.items() if run["tag"] in wanted]

    def create_run(self, experiment: str, run_name: str, tags: dict[str, str]) -> Any:
        self.runs[run_name] = {"tag": tags["jaxft.workdir"], "metrics": [], "params": {}}
        return self._run(run_name)

    def update_run(self, run_id: str, status: str) -> None:
        self.runs[run_id]["status"] = status

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        assert len(params) <= 100
        self.runs[run_id]["metrics"] += [(one.key, one.value, one.step) for one in metrics]
        self.runs[run_id]["params"] |= {one.key: one.value for one in params}

    def set_terminated(self, run_id: str) -> None:
        self.runs[run_id]["status"] = "FINISHED"

    def _run(self, name: str) -> Any:
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=name))


def test_mlflow_gets_the_numbers_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder has one run, found again by its tag; nested keys are parameters by their whole names."""
    store = Store()
    entities = types.SimpleNamespace(
        Metric=lambda key, value, timestamp, step: types.SimpleNamespace(
            key=key, value=value, step=step
        ),
        Param=lambda key, value: types.SimpleNamespace(key=key, value=value),
    )
    fake = types.SimpleNamespace(
        set_experiment=lambda name: types.SimpleNamespace(experiment_id="7"),
        MlflowClient=lambda: store,
        entities=entities,
    )
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    folder = tmp_path / "it's a run"
    for step in (1, 2):
        (service,) = reporters(("mlflow",), folder, CONFIG)
        service.report("train", step, {"loss": 2.0 / step})
        service.close()
    assert store.runs == {
        folder.name: {
            "tag": str(folder),
            "metrics": [("train/loss", 2.0, 1), ("train/loss", 1.0, 2)],
            "params": {"seed": "1", "optimizer.learning_rate": "0.5", "optimizer.options": "{}"},
            "status": "FINISHED",
        }
    }
