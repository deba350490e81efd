"""The golden folders, read once, and one way to run a model."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxft.formats import load

GOLDEN = Path(__file__).parent.parent / "golden"


@functools.cache
def read_model(name: str):
    return load(GOLDEN / "models" / name)


@functools.cache
def _apply(model):
    return jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs))


def run_model(model, params, *inputs) -> np.ndarray:
    """Logits (batch, length, vocabulary) of a tree, compiled once for each structure."""
    return np.asarray(_apply(model)(params, *(np.asarray(array, np.int32) for array in inputs)))


def relative_deviation(logits, expected, mask=None) -> float:
    """The largest difference where the mask is 1, relative to the largest logit."""
    seen = np.ones(expected.shape[:2]) if mask is None else mask
    difference = np.abs(logits - expected)[seen > 0].max()
    return float(difference / np.abs(expected[seen > 0]).max())


@pytest.fixture
def golden() -> Path:
    return GOLDEN


@pytest.fixture
def model_of():
    """`model, params = model_of("llama")`: a golden model, read once."""
    return read_model


@pytest.fixture
def logits_of():
    return run_model


@pytest.fixture
def deviation():
    return relative_deviation


@pytest.fixture
def copy_of(golden, tmp_path):
    """`folder = copy_of("models/llama")`: a copy to spoil."""

    def copy(name: str) -> Path:
        folder = tmp_path / "copy"
        shutil.copytree(golden / name, folder)
        return folder

    return copy


@pytest.fixture
def edit():
    """`edit(file, key=value)` changes a JSON file; a value of `...` takes the key out."""

    def edit_json(file: Path, **changes) -> None:
        value = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: item for key, item in value.items() if item is not ...}))

    return edit_json
