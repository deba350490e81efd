"""The scripts in experiments/: each says what it does, and methods.py draws what it measured."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxft.methods import METHODS

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
PNG = b"\x89PNG"


def call(*arguments: object) -> subprocess.CompletedProcess:
    """Runs methods.py as its user does."""
    words = [sys.executable, EXPERIMENTS / "methods.py", *arguments]
    return subprocess.run(
        list(map(str, words)),
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        check=False,
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A handful of rows in E2E's form."""
    folder = tmp_path_factory.mktemp("e2e")
    for name, places in {"valid": 12, "test": 6}.items():
        lines = [f"name : N{n} | area : riverside||N{n} is near the river ." for n in range(places)]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def measured(corpus, tmp_path_factory):
    """(folder, process) of two updates of two methods."""
    folder = tmp_path_factory.mktemp("results")
    process = call(
        *("--data", corpus, "--output", folder, "--methods", "lora", "vera"),
        *("--steps", 2, "--eval-every", 1, "--heldout", 4),
    )
    assert process.returncode == 0, process.stderr
    return folder, process


@pytest.mark.parametrize("script", sorted(EXPERIMENTS.glob("*.py")), ids=lambda path: path.stem)
def test_every_script_answers_help(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {script.name}")


def test_every_method_has_a_rate_and_a_line_of_its_own(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    script = runpy.run_path(str(EXPERIMENTS / "methods.py"))
    assert set(script["RATES"]) == set(script["STYLES"]) == set(METHODS)
    assert len(set(script["STYLES"].values())) == len(METHODS)


@pytest.mark.thorough
def test_the_curves_begin_at_the_same_loss_and_have_a_point_an_evaluation(measured):
    rows = json.loads((measured[0] / "methods.json").read_text())["rows"]
    assert [row["steps"] for row in rows] == [[0, 1, 2]] * 2
    assert rows[0]["losses"][0] == pytest.approx(rows[1]["losses"][0], rel=1e-5)
    assert all(row["output_bytes"] > 4 * row["trained"] for row in rows)


@pytest.mark.thorough
def test_the_table_is_printed_and_written(measured):
    folder, process = measured
    page = (folder / "methods.md").read_text()
    assert page in process.stdout
    assert page.count("\n| `") == 2
    assert "| `lora` | 299,008 |" in page


@pytest.mark.thorough
def test_the_plot_is_drawn_again_without_training(measured):
    folder, _ = measured
    plot = folder / "methods.png"
    assert plot.read_bytes().startswith(PNG)
    plot.unlink()
    process = call("--plot-only", "--output", folder)
    assert process.returncode == 0, process.stderr
    assert plot.read_bytes().startswith(PNG)


def test_a_folder_without_the_data_is_told(tmp_path):
    process = call("--data", tmp_path, "--output", tmp_path)
    assert process.returncode != 0
    assert process.stderr.strip().endswith(
        "--data takes the folder of E2E's valid.txt and test.txt"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.filterwarnings("ignore")
def test_a_qlora_step_keeps_no_float32_of_kernels_nor_of_the_adapters_gradients(monkeypatch):
    """qlora_memory.py at an eighth of its width: the adapters' gradients in bfloat16, what enters each layer, and
    some working space. 34 MB with the kernels dequantized as plain autodiff does it, 53 MB with float32 gradients.
    """
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    script = importlib.import_module("qlora_memory")
    for name, value in script.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    from jax.experimental import topologies

    small = {
        "vocabulary": 2048, "hidden": 1024, "intermediate": 2816, "heads": 8, "key_heads": 8, "layers": 6,
    }  # fmt: skip
    case = script.Case("small", script.LLAMA_65B | small, rank=64, length=256, limit=8.0)
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices[0]
    with jax.numpy_dtype_promotion("standard"):
        found = script.memory_of(script.compile_step(case, device))
    adapters = 6 * 64 * (4 * (1024 + 1024) + 3 * (1024 + 2816))
    assert found["temporaries"] < 2 * adapters + 2 * 6 * 256 * 1024 + 13e6
