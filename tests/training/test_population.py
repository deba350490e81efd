"""Runs that train together are, each, what they would be alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxft
from jaxft.configuration.populations import members_of
from jaxft.errors import UserError
from jaxft.training import loop
from jaxft.training.population import population
from tests.small_runs import GOLDEN, RECIPE, Cut, adapter_of, cut_at, held_out, lines

pytestmark = pytest.mark.slow

SMALL = held_out() | {"data.packing": True, "steps": 4, "samples.count": 0}
TWO = (
    {"name": "wide", "method.rank": 6, "optimizer.weight_decay": 0.1, "seed": 1},
    {
        "name": "late",
        "method.targets": ("q_proj", "down_proj"),
        "optimizer.schedule": "cosine",
        "optimizer.warmup_steps": 2,
        "method.alpha": 8.0,
    },
)


@pytest.fixture(scope="module")
def together(configure: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A population of two that nothing happened to."""
    folder = tmp_path_factory.mktemp("together") / "run"
    with jax.numpy_dtype_promotion("standard"):
        jaxft.train(configure(**SMALL, population=TWO), folder)
    return folder


def assert_as_alone(member: Path, alone: Path) -> None:
    """The same lines of metrics to 1e-5, and the same files."""
    for split in ("train", "eval"):
        ours, theirs = lines(member, split), lines(alone, split)
        assert [line.keys() for line in ours] == [line.keys() for line in theirs]
        for one, other in zip(ours, theirs, strict=True):
            for key in set(one) - {"split"}:
                np.testing.assert_allclose(one[key], other[key], atol=1e-5, err_msg=key)
    names = [{path.name for path in folder.iterdir()} for folder in (member, alone)]
    assert names[0] == names[1] | {"ended.json"}
    ours, theirs = adapter_of(member), adapter_of(alone)
    assert {name: array.shape for name, array in ours.items()} == {
        name: array.shape for name, array in theirs.items()
    }
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("name", ["late", pytest.param("wide", marks=pytest.mark.thorough)])
def test_each_member_is_the_run_that_it_would_be_alone(
    name: str, together: Path, configure: Callable[..., Any], tmp_path: Path
) -> None:
    """Losses to 1e-5, with ranks, targets, rates, schedules, decay and seeds of their own."""
    member, config = together / "members" / name, members_of(configure(**SMALL, population=TWO))
    loop.train(config[name], tmp_path / name)
    configs = [(folder / "config.json").read_text() for folder in (member, tmp_path / name)]
    assert configs[0] == configs[1]
    assert_as_alone(member, tmp_path / name)
    told = json.loads((together / "population.json").read_text())
    losses = [one["metrics"]["eval_loss"] for one in told]
    assert sorted(losses) == losses
    assert {one["name"]: one["steps"] for one in told} == {"wide": 4, "late": 4}


def test_going_on_equals_never_stopping(
    together: Path,
    configure: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit, also where one member had come further than the other."""
    config = configure(**SMALL, population=TWO)
    with monkeypatch.context() as patch:
        cut_at(patch, 3)
        with pytest.raises(Cut):
            jaxft.train(config, tmp_path / "cut")
    first, second = (tmp_path / "cut" / "members" / name for name in ("wide", "late"))
    assert len(lines(first)) == 3
    shutil.rmtree(second / "checkpoints" / "2")  # killed before this one was whole
    jaxft.train(config, tmp_path / "cut")
    for name in ("wide", "late"):
        cut, whole = (folder / "members" / name for folder in (tmp_path / "cut", together))
        for split in ("train", "eval"):
            assert lines(cut, split) == lines(whole, split)
        for tensor, array in adapter_of(whole).items():
            np.testing.assert_array_equal(adapter_of(cut)[tensor], array, err_msg=tensor)


@pytest.mark.thorough
def test_killed_by_the_kernel_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """`jaxft train` as a process, killed three times where it has told so many updates."""
    keys = SMALL | {
        "model": GOLDEN / "model",
        "data.train": GOLDEN / "data.jsonl",
        "data.max_length": 256,
    }
    keys |= {
        "batch_size": 4,
        "steps": 12,
        "mesh.data": 1,
        "method.rank": 4,
        "population": json.dumps(TWO),
    }
    words = [f"--config.{key}={value}" for key, value in keys.items()]
    start = [sys.executable, "-m", "jaxft", "train", "--config", f"{RECIPE}:lora", *words]

    def told(folder: Path) -> int:
        file = folder / "members" / "late" / "metrics.jsonl"
        return file.read_text().count("train") if file.exists() else 0

    for name, kills in (("whole", ()), ("killed", (1, 5, 8))):
        for updates in kills:
            process = subprocess.Popen([*start, "--workdir", str(tmp_path / name)])
            while told(tmp_path / name) < updates and process.poll() is None:
                time.sleep(0.01)
            process.kill()
            process.wait()
        subprocess.run([*start, "--workdir", str(tmp_path / name)], check=True)
    for member in ("wide", "late"):
        whole, killed = (tmp_path / name / "members" / member for name in ("whole", "killed"))
        for split in ("train", "eval"):
            assert lines(killed, split) == lines(whole, split)
        for tensor, array in adapter_of(whole).items():
            np.testing.assert_array_equal(adapter_of(killed)[tensor], array, err_msg=tensor)


@pytest.mark.thorough
def test_the_worse_ones_may_end_early(configure: Callable[..., Any], tmp_path: Path) -> None:
    """Successive halving; and the same calls again, of a process that goes on, give what stands in the folder."""
    rates = [
        {"name": str(n), "optimizer.learning_rate": rate} for n, rate in enumerate((1e-2, 1e-5))
    ]
    config = configure(**SMALL, population=tuple(rates))
    for _ in range(2):
        with population(config, tmp_path / "run") as runs:
            losses = runs.advance(2)
            assert losses["0"] < losses["1"]
            runs.keep(["0"])
            assert runs.active in (("0",), ())
            after = runs.advance(4)
            result = runs.finish()
        assert set(losses) == {"0", "1"}
        assert set(after) == {"0"}
        assert result.metrics["eval_loss"] == after["0"]
    steps = {
        one["name"]: one["steps"]
        for one in json.loads((tmp_path / "run" / "population.json").read_text())
    }
    assert steps == {"0": 4, "1": 2}
    assert len(lines(tmp_path / "run" / "members" / "1")) == 2
    assert (tmp_path / "run" / "members" / "1" / "adapter").exists()


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora_fa", {"method.dropout": 0.1}),
        ("dora", {}),
        ("vera", {"method.rank": 6}),
        ("delta_lora", {"method.start_step": 2}),
        ("lora_plus", {"base.quantize": "nf4"}),
        ("lora", {"data.packing": False}),
        ("lora", {"method.train_also": ("final_norm",), "grad_accum": 2}),
    ],
)
def test_every_method_trains_together(
    method: str, settings: dict[str, Any], configure: Callable[..., Any], tmp_path: Path
) -> None:
    members = (
        {"name": "a", "seed": 1, "method.targets": ("q_proj", "v_proj")},
        {"name": "b", "optimizer.learning_rate": 1e-3, "optimizer.b2": 0.99},
    )
    config = configure(method, **SMALL | settings, population=members)
    jaxft.train(config, tmp_path / "run")
    for name, alone in members_of(config).items():
        loop.train(alone, tmp_path / name)
        assert_as_alone(tmp_path / "run" / "members" / name, tmp_path / name)


@pytest.mark.thorough
@pytest.mark.parametrize("settings", [{}, {"objective.reference_every": 2}])
def test_preferences_train_together(
    settings: dict[str, Any], configure: Callable[..., Any], tmp_path: Path
) -> None:
    pairs = str(GOLDEN.parent / "preferences" / "pairs.jsonl")
    members = ({"name": "a", "seed": 1}, {"name": "b", "method.rank": 2})
    recipe = str(Path(__file__).parents[2] / "configs" / "dpo.py")
    own = SMALL | settings | {"data.train": pairs, "data.eval": pairs, "data.packing": False}
    config = configure("lora", recipe, **own, population=members)
    jaxft.train(config, tmp_path / "run")
    for name, alone in members_of(config).items():
        loop.train(alone, tmp_path / name)
        assert_as_alone(tmp_path / "run" / "members" / name, tmp_path / name)


@pytest.mark.thorough
def test_a_member_goes_on_as_a_run_of_its_own(
    together: Path, configure: Callable[..., Any], tmp_path: Path
) -> None:
    shutil.copytree(together / "members" / "wide", tmp_path / "wide")
    config = members_of(configure(**SMALL | {"steps": 6}, population=TWO))["wide"]
    assert loop.train(config, tmp_path / "wide").steps == 6
    assert [line["step"] for line in lines(tmp_path / "wide")] == [1, 2, 3, 4, 5, 6]


def test_what_must_be_common_is_refused_by_name(
    configure: Callable[..., Any], tmp_path: Path
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join((GOLDEN / "data.jsonl").read_text().splitlines(keepends=True)[:8]))
    alone = {"name": "a"}, {"name": "b", "data.train": str(few)}
    for method, settings, said in [
        (
            "lora",
            {"population": alone, "steps": 0, "epochs": 1.0},
            "a has .* updates and b .*config.steps",
        ),
        (
            "full",
            {"population": ({"seed": 1}, {"seed": 2})},
            "members share one base, and method full",
        ),
        ("lora", {"population": alone, "checkpoint.local": "x"}, "no config.checkpoint.local"),
    ]:
        with pytest.raises(UserError, match=said):
            jaxft.train(configure(method, **settings), tmp_path / "run")
        assert not (tmp_path / "run").exists()
