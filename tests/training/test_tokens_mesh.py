"""Rows of added tokens on a mesh: the losses and the adapter of one device, and a plan of the same run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxft.inference.opening import open_model, open_words
from jaxft.planning import plan
from jaxft.planning.topology import local_devices
from jaxft.training.loop import train
from tests.small_runs import GOLDEN, adapter_of, lines

pytestmark = [pytest.mark.slow, pytest.mark.thorough]
MODEL = str(GOLDEN / "model")
ADDED = {"data.add_tokens": ("<place>", "<end>", "<new>"), "steps": 2, "batch_size": 8}
MESHES = {
    "fsdp": {"mesh.fsdp": 8},
    "tensor": {"mesh.tensor": 2, "mesh.fsdp": 2, "mesh.data": 2},
}


@pytest.fixture(scope="module")
def alone(
    configure: Callable[..., Any], token_rows: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run on one device."""
    import jax

    folder = tmp_path_factory.mktemp("alone") / "run"
    with jax.numpy_dtype_promotion("standard"):
        train(
            configure(**ADDED, **{"data.train": token_rows, "mesh.data": 1, "mesh.fsdp": 1}), folder
        )
    return folder


@pytest.mark.parametrize("axes", MESHES)
def test_a_mesh_trains_the_rows_as_one_device_does(
    axes: str, configure: Callable[..., Any], token_rows: str, alone: Path, tmp_path: Path
) -> None:
    """The same losses, and a saved adapter with the same tokens that says the same."""
    train(configure(**ADDED, **{"data.train": token_rows}, **MESHES[axes]), tmp_path / "run")
    ours, theirs = (
        [line["loss"] for line in lines(run) if line["split"] == "train"]
        for run in (tmp_path / "run", alone)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    saved, expected = adapter_of(tmp_path / "run"), adapter_of(alone)
    assert saved.keys() == expected.keys()
    for name, array in expected.items():  # Adam's step is as large where a gradient is nearly 0
        np.testing.assert_allclose(saved[name], array, atol=1e-3, err_msg=name)
    words = open_words(MODEL, str(tmp_path / "run/adapter")).tokenizer
    ids = np.asarray([words.encode("1 <place> 1 <end>")])
    logits = []
    for run in (tmp_path / "run", alone):
        model, params = open_model(MODEL, str(run / "adapter"))
        logits.append(model.apply({"params": params}, ids))
    np.testing.assert_allclose(*logits, atol=2e-3 * np.abs(logits[1]).max())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_plan_counts_the_rows(
    method: str, configure: Callable[..., Any], token_rows: str
) -> None:
    """Of three tokens, in the embedding and in the head: those that train, and below an adapter those under them."""
    with_tokens, without = (
        plan(configure(method, **more, **{"data.train": token_rows}), local_devices())
        for more in (ADDED, {"batch_size": 8, "steps": 2})
    )
    hidden = json.loads(Path(MODEL, "config.json").read_text())["hidden_size"]
    rows = 2 * 3 * hidden * 4
    assert with_tokens.adapter_bytes - without.adapter_bytes == rows
    assert with_tokens.base_bytes - without.base_bytes == (0 if method == "full" else rows)
    assert with_tokens.optimizer_bytes - without.optimizer_bytes == 2 * rows
