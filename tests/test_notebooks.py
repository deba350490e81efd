"""The notebooks run from the first cell to the last on the embedded base, in a folder of their own."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
FEW = {
    "first_adapter": "STEPS = 2",
    "tpu_pod": "STEPS = 2",
    "which_lever": (
        'SETTINGS = {"levers": ("prompt", "lora"), "budget": "0", "steps": 2, "seeds": 2, "metric": "loss", '
        '"search.rates": 1, "search.widen": 0, "search.parts": (1.0,), "data.packing": True, "data.max_length": 128, '
        '"max_new_tokens": 4}'
    ),
    "reinforcement": "STEPS = 2",
}  # what the cell tagged `parameters` says here


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def test_every_notebook_is_run_here():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(FEW)


@pytest.mark.parametrize("name", FEW)
def test_no_output_is_stored(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


def executed(name, folder):
    """The notebook, once it has run in a folder."""
    notebook = read(name)
    [parameters] = [
        cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())
    ]
    parameters.source = FEW[name]
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    client.execute()
    return notebook


@pytest.mark.thorough
@pytest.mark.filterwarnings("default")  # those of Jupyter's own packages
def test_a_pods_run_is_planned_and_made_on_one_device(tmp_path):
    notebook = executed("tpu_pod", tmp_path)
    assert (tmp_path / "runs/tpu/adapter/adapter_model.safetensors").stat().st_size > 0
    said = printed(notebook)
    assert "1 device of local" in said
    assert " -> " in said


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_first_adapter_is_made(tmp_path):
    notebook = executed("first_adapter", tmp_path)
    for adapter in ("runs/lora/adapter", "runs/dora/adapter", "my_adapter"):
        assert (tmp_path / adapter / "adapter_model.safetensors").stat().st_size > 0
    assert (tmp_path / "merged" / "model.safetensors").stat().st_size > 0
    assert "after saving and loading: 0.0" in printed(notebook)


@pytest.mark.slow
@pytest.mark.thorough  # tests/comparison holds the same laws
@pytest.mark.filterwarnings("default")
def test_the_levers_are_compared(tmp_path):
    notebook = executed("which_lever", tmp_path)
    found = json.loads((tmp_path / "runs/which/comparison.json").read_text())
    measured = [lever["name"] for lever in found["levers"] if not lever["reason"]]
    assert measured == ["prompt", "lora"]
    said = printed(notebook)
    assert all(sentence in said for sentence in found["verdict"]["sentences"])
    drawn = [
        output for cell in notebook.cells for output in cell.get("outputs", ()) if "data" in output
    ]
    assert sum("image/png" in output["data"] for output in drawn) == 2


@pytest.mark.thorough
@pytest.mark.filterwarnings("default")
def test_a_run_learns_from_rewards(tmp_path):
    notebook = executed("reinforcement", tmp_path)
    told = (tmp_path / "runs/rewards/rollouts.jsonl").read_text().splitlines()
    assert len(told) == 2 * 4 * 8
    assert (tmp_path / "runs/rewards/plots/metrics.png").stat().st_size > 0
    assert "update 2: reward" in printed(notebook)
