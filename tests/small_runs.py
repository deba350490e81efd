"""Runs over a tiny model with data and adapters, those of the TRL golden; the fixtures are for a conftest.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from jaxft.configuration import load_config
from jaxft.training import loop, program
from jaxft.training.loop import train

GOLDEN = Path(__file__).parent / "golden" / "trl"
RECIPE = str(Path(__file__).parents[1] / "configs" / "sft.py")


@pytest.fixture(autouse=True, scope="session")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Many of these runs compile the same programs: keep them for the session."""
    folder = tmp_path_factory.getbasetemp().parent / "compiled"
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(autouse=True)
def promotion() -> Iterator[None]:
    """Optax's own arithmetic needs JAX's standard promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def programs() -> dict[Any, program.Program]:
    """Programs of a file's runs, by all that makes them."""
    return {}


@pytest.fixture
def compiled_anew() -> None:
    """Asked for by tests of what a run compiles."""


@pytest.fixture
def plotted() -> None:
    """Asked for by tests of what a run draws."""


@pytest.fixture(autouse=True)
def shared_programs(
    request: pytest.FixtureRequest,
    programs: dict[Any, program.Program],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Runs of one configuration have one program, traced and compiled once a file.

    That two processes trace the same program is seen in test_processes.py, where runs are killed.
    """
    if "compiled_anew" in request.fixturenames:
        return
    make = loop.make_program

    def shared(config: Any, model: Any, method: Any, trainable: Any, reference: Any, steps: int):  # type: ignore[no-untyped-def]
        leaves, structure = jax.tree.flatten(trainable)
        read, beside = (config.optimizer, config.objective, config.method), reference.beside
        key = (
            tuple(part.to_json() for part in read),
            (config.seed, config.grad_accum, steps),
            (model, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)),
            (reference.config, beside if beside.__closure__ else beside.__code__, program.loss_of),
        )
        if key not in programs:
            programs[key] = make(config, model, method, trainable, reference, steps)
        return programs[key]

    monkeypatch.setattr(loop, "make_program", shared)


def undrawn(folder: Path, *_: Any) -> Path:
    """The plot's place, and nothing drawn there: drawing takes as long as a small run."""
    path = folder / "plots" / "loss.png"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")
    return path


@pytest.fixture(autouse=True)
def unplotted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw nothing where what they draw is not looked at."""
    if "plotted" not in request.fixturenames:
        monkeypatch.setattr(loop, "plot_run", undrawn)
        monkeypatch.setattr(loop, "plot_averages", lambda *_: None)


@pytest.fixture(scope="session")
def configure() -> Callable[..., ConfigDict]:
    """A small run's configuration: `configure("dora", steps=8, **{"data.packing": True})`."""

    def make(method: str = "lora", recipe: str = RECIPE, **overrides: Any) -> ConfigDict:
        small = {
            "model": str(GOLDEN / "model"),
            "data.train": str(GOLDEN / "data.jsonl"),
            "data.max_length": 256,
            "batch_size": 4,
            "eval_batch_size": 8,
            "steps": 6,
            "optimizer.learning_rate": 1e-2,
            "samples.count": 1,
            "samples.max_new_tokens": 4,
            "mesh.data": 1,
        }
        if method != "full":
            small["method.rank"] = 4
        return load_config(f"{recipe}:{method}", small | overrides)

    return make


def lines(workdir: Path, split: str = "train", *, timed: bool = False) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without what the clock says."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if timed or key != "tokens_per_second"}
        for row in rows
        if row["split"] == split
    ]


class Cut(Exception):
    """The power goes."""


def cut_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The run dies after the update of that step, before anything of it is written."""
    read = loop.Loop.read

    def dying(self: Any) -> None:
        if self.pending is not None and self.pending[0] > step:
            raise Cut
        read(self)

    monkeypatch.setattr(loop.Loop, "read", dying)


def adapter_of(workdir: Path) -> dict[str, np.ndarray]:
    """The tensors that a run exported."""
    folder = workdir / ("adapter" if (workdir / "adapter").exists() else "model")
    return load_file(next(folder.glob("*.safetensors")))


def held_out() -> dict[str, Any]:
    """Evaluation on the training rows: any will do."""
    return {"data.eval": str(GOLDEN / "data.jsonl"), "eval_every": 2, "checkpoint.every": 2}


def flip(file: Path, place: int = -1) -> None:
    """One bit of a file, the other way."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


PACKED = held_out() | {"data.packing": True}  # one shape, one program


def assert_same_end(one: Path, other: Path) -> None:
    """Metrics, samples and adapters of two runs, bit for bit."""
    for split in ("train", "eval"):
        assert lines(one, split) == lines(other, split)
    assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    ours, theirs = adapter_of(one), adapter_of(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)


@pytest.fixture(scope="module")
def whole(configure: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with jax.numpy_dtype_promotion("standard"):
        train(configure(**PACKED), folder)
    return folder
