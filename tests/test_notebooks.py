"""The notebooks run from the first cell to the last on the embedded base, in a folder of their own."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
FEW = {"first_adapter": "STEPS = 2"}  # what the cell tagged `parameters` says here


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


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of Jupyter's own packages
def test_the_first_adapter_is_made(tmp_path):
    notebook = read("first_adapter")
    [parameters] = [
        cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())
    ]
    parameters.source = FEW["first_adapter"]
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    for adapter in ("runs/lora/adapter", "runs/dora/adapter", "my_adapter"):
        assert (tmp_path / adapter / "adapter_model.safetensors").stat().st_size > 0
    assert (tmp_path / "merged" / "model.safetensors").stat().st_size > 0
    assert "after saving and loading: 0.0" in printed(notebook)
