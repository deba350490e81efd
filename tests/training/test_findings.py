"""What `jaxft data` warns of, `jaxft train` says too, once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxft.configuration import load_config
from jaxft.formats.config_file import model_config
from jaxft.objectives.preview import preview
from jaxft.runtime import processes
from jaxft.training.feed import prepare_data, warning_lines
from jaxft.training.loop import train
from jaxft.training.sharding import make_mesh
from tests.small_runs import GOLDEN, RECIPE

# Of each kind, rows of which the last two are not as they should be.
ROWS: dict[str, list[dict[str, Any]]] = {
    "sft": [
        {"prompt": "one", "completion": " a"},
        {"prompt": "two", "completion": " b"},
        {"prompt": "three", "completion": " "},
        {"prompt": "one", "completion": " a"},
    ],
    "dpo": [
        {"prompt": "one", "chosen": " a", "rejected": " b"},
        {"prompt": "two", "chosen": " c", "rejected": " d"},
        {"prompt": "one", "chosen": " a", "rejected": " b"},
        {"prompt": "one", "chosen": " b", "rejected": " a"},
    ],
    "kto": [
        {"prompt": "one", "completion": " a", "label": True},
        {"prompt": "two", "completion": " b", "label": False},
        {"prompt": "two", "completion": " c", "label": False},
        {"prompt": "two", "completion": " d", "label": False},
    ],
}
SAID = {
    "sft": ("1 of 4 (25 %) rows have an empty completion", "1 of 4 (25 %) examples are duplicates"),
    "dpo": ("1 of 4 (25 %) examples stand the other way", "1 of 4 (25 %) examples are duplicates"),
    "kto": ("1 desirable and 3 undesirable",),
}


def configured(kind: str, folder: Path, **changes: Any) -> Any:
    """A small run over the rows, held out as well."""
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[kind]))
    settings = {
        "model": str(GOLDEN / "model"),
        "data.train": str(path),
        "data.eval": str(path),
        "data.max_length": 64,
        "batch_size": 4,
        "eval_batch_size": 4,
        "mesh.data": 1,
        "samples.count": 0,
        **({} if kind == "sft" else {"objective.name": kind}),
    }
    recipe = RECIPE if kind == "sft" else RECIPE.replace("sft", "dpo")
    return load_config(f"{recipe}:lora", settings | changes)


@pytest.mark.parametrize("kind", ROWS)
def test_training_says_what_data_says(kind: str, tmp_path: Path) -> None:
    """Of training and held-out data, and of what stands in both; with place and remedy."""
    config = configured(kind, tmp_path)
    lines = preview(config, shown=0)
    shown = lines[lines.index("warnings:") + 1 : -1]
    model = model_config(GOLDEN / "model")
    data = prepare_data(config, model, make_mesh(config.mesh))
    told = warning_lines(config, data, model.vocabulary)
    assert [line.replace("warning: ", "  - ") for line in told] == shown
    for start in SAID[kind]:
        (line,) = (line for line in told if line.startswith(f"warning: training data: {start}"))
        assert kind == "kto" or f"{tmp_path}/{kind}.jsonl:" in line
    assert f"warning: held-out data: {SAID[kind][0]}" in "\n".join(told)
    assert "held-out data: 4 of 4 (100 %) examples stand in the training data as well" in told[-1]


def test_one_process_looks_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others neither say nor compute them."""
    config = configured("sft", tmp_path)
    data = prepare_data(config, model_config(GOLDEN / "model"), make_mesh(config.mesh))
    monkeypatch.setattr("jaxft.training.feed.first", lambda: False)
    monkeypatch.setattr("jaxft.objectives.texts.findings", None)
    assert processes.first()
    assert warning_lines(config, data, 1000) == []


def test_a_run_says_them_at_its_start_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], configure: Callable[..., Any]
) -> None:
    """And not when it goes on; a run over good data has none."""
    config = configured("sft", tmp_path, steps=1, **{"data.eval": ""})
    train(config, tmp_path / "run")
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(told) == 2
    assert told[0].endswith("take them out, unless the model is to answer with nothing")
    train(config, tmp_path / "run")
    config.steps = 2
    train(config, tmp_path / "run")
    assert "warning" not in capsys.readouterr().err
