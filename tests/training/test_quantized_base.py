"""Runs over a quantized base: what is counted, refused, and left in the folder where the start moved the base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxft
from jaxft.errors import UserError
from jaxft.formats.merge import merge_folder
from jaxft.training.loop import train
from tests.small_runs import GOLDEN

Configure = Callable[..., Any]


def test_codes_count_as_the_parameters_that_they_stand_for(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many as without quantization (84,734 in tests/training/test_faults.py)."""
    train(configure("qlora", steps=1), tmp_path / "run")
    assert "lora: 6,144 of 84,734 parameters train" in capsys.readouterr().err


def test_a_start_that_moves_the_base_leaves_it_beside_the_adapter(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Adapter and base go together, another base is refused, and a run taken up again begins from the same."""
    settings = {"method.init": "pissa", "base.double_quant": False}
    run = tmp_path / "run"
    train(configure("qlora", steps=2, **settings), run)
    said = capsys.readouterr().err
    assert f"jaxft generate --model {run / 'base'} --adapter {run / 'adapter'}" in said
    options = json.loads((run / "adapter/adapter_config.json").read_text())
    assert options["base_model_name_or_path"] == str(run / "base")
    assert merge_folder(run / "base", run / "adapter", tmp_path / "merged") < 1e-4
    with pytest.raises(UserError, match="was trained over another base: nf4 in groups of 64"):
        merge_folder(GOLDEN / "model", run / "adapter", tmp_path / "other")
    files = [run / "base/model.safetensors", run / "adapter/adapter_model.safetensors"]
    before = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    train(configure("qlora", steps=2, **settings), run)
    assert [file.read_bytes() for file in files] == before


def test_pissa_over_a_dense_base_is_an_adapter_of_the_base_as_it_was(
    configure: Configure, tmp_path: Path
) -> None:
    train(configure("lora", steps=2, **{"method.init": "pissa"}), tmp_path / "run")
    assert not (tmp_path / "run/base").exists()
    _, params = jaxft.load(GOLDEN / "model")
    read = jaxft.load_adapter(params, tmp_path / "run/adapter")
    changed = jaxft.merge(read)["layers"]["attention"]["q_proj"]["kernel"]
    before = params["layers"]["attention"]["q_proj"]["kernel"]
    moved = np.linalg.norm(changed - before) / np.linalg.norm(before)
    assert 0 < moved < 0.5


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("full", {"base.quantize": "nf4"}, "codes cannot be trained: take an adapter"),
        ("lora", {"method.init": "loftq"}, "loftq makes up for quantizing"),
        (
            "qlora",
            {"method.init": "pissa", "base.quantize": "int4", "base.group_size": 16},
            "written beside the adapter",
        ),
        ("qlora", {"base.quantize": "int4", "base.group_size": 5}, "groups of 5 do not divide"),
        (
            "qlora",
            {"method.init": "pissa", "adapter": str(GOLDEN / "adapters/lora")},
            "config.method.init pissa begins anew",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    configure: Configure, tmp_path: Path, method: str, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        train(configure(method, **settings), tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method.init": "pisa"}, r"default \| loftq \| pissa, not 'pisa' \(nearest: 'pissa'"),
        ({"method.init_iterations": 0}, "takes a whole number from 1, not 0"),
        ({"base.quantize": "nf5"}, r"not 'nf5' \(nearest: 'nf4'"),
    ],
)
def test_an_unknown_name_is_refused(configure: Configure, settings: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        configure("qlora", **settings)
