"""`jaxft quickstart`, cut short: what it prints and what it leaves behind."""

from __future__ import annotations

import contextlib
import io
import json

import jax
import pytest

from jaxft.errors import UserError
from jaxft.quickstart import quickstart

SHORT = {"steps": 2, "batch_size": 2, "optimizer.warmup_steps": 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tmp_path_factory.mktemp("quickstart") / "run"


@pytest.fixture(scope="module")
def printed(run):
    # Optax's own arithmetic needs JAX's standard promotion.
    promotion = jax.numpy_dtype_promotion("standard")
    with promotion, contextlib.redirect_stdout(io.StringIO()) as text:
        quickstart(run, SHORT)
    return text.getvalue()


def test_it_shows_base_and_tuned_model_figures_and_the_next_command(printed, run):
    assert printed.count("\n  base ") == printed.count("\n  tuned ") == 3
    assert f"{run}/plots/loss.png" in printed
    assert "exactly right" in printed
    assert "jaxft train --config configs/sft.py:lora" in printed


def test_it_leaves_a_whole_run_behind(printed, run):
    assert (run / "plots" / "loss.png").stat().st_size > 0
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    assert json.loads((run / "config.json").read_text())["model"] == "tiny"


def test_the_figures_are_those_of_the_run(printed, run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["split"] == "eval"]
    row = next(line for line in printed.splitlines() if line.startswith("loss  "))
    assert [float(word) for word in row.split()[1:]] == [
        round(x, 3) for x in (losses[0], losses[-1])
    ]


def test_on_another_runs_folder_it_says_what_to_do(printed, run):
    with pytest.raises(UserError, match=r"seed: 42 -> 7.*jaxft quickstart --workdir OTHER"):
        quickstart(run, {**SHORT, "seed": 7})
