"""The loss curves are those of TRL's SFTTrainer from the same adapter, order and schedule."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxft.training.loop import train
from tests.small_runs import GOLDEN, Cut, cut_at, lines

SCRIPT = GOLDEN.parent / "family_folders.py"
specification = importlib.util.spec_from_file_location("family_folders", SCRIPT)
folders = importlib.util.module_from_spec(specification)
specification.loader.exec_module(folders)

FAMILIES = json.loads(folders.CURVES.read_text())
CURVES = json.loads((GOLDEN / "curves.json").read_text())
# One of each weight, a schedule, parts of a batch, and decay; what the others do stands in their first updates.
WHOLE = {"dora", "full_decayed", "lora", "lora_accumulated", "lora_cosine", "vera"}
FIRST = 3
VARIANTS = ("decayed", "accumulated", "cosine", "clipped", "all_tokens", "messages", "v2_bf16")


def method_of(name: str) -> str:
    """The row of a curve: its name without the variant."""
    return next((name[: -len(v) - 1] for v in VARIANTS if name.endswith(v)), name)


def overrides_of(curve: dict[str, Any]) -> dict[str, Any]:
    """TRL's settings in jaxft's words."""
    settings = curve["settings"]
    start = curve["start"]
    return {
        "adapter": str(GOLDEN / start) if start else "",
        "data.train": str(GOLDEN / curve["data"]),
        "data.shuffle": False,
        "data.max_length": settings["max_length"],
        "data.loss_on": "all" if settings["completion_only_loss"] is False else "completion",
        "batch_size": settings["per_device_train_batch_size"]
        * settings["gradient_accumulation_steps"],
        "grad_accum": settings["gradient_accumulation_steps"],
        "steps": settings["max_steps"],
        "optimizer.learning_rate": settings["learning_rate"],
        "optimizer.schedule": settings["lr_scheduler_type"],
        "optimizer.warmup_steps": settings["warmup_steps"],
        "optimizer.weight_decay": settings["weight_decay"],
        "optimizer.clip_norm": settings["max_grad_norm"],
    }


def assert_is_trls(ours: list[dict[str, Any]], curve: dict[str, Any], *, tolerance: float) -> None:
    """Losses to the tolerance, gradient norms to ten times it, relatively; rates and tokens."""

    def assert_close(ours_name: str, theirs: str, **within: float) -> None:
        found = [row[ours_name] for row in ours]
        np.testing.assert_allclose(found, curve[theirs][: len(ours)], **within)

    assert_close("loss", "losses", atol=tolerance)
    assert_close("learning_rate", "learning_rates", atol=1e-7)
    assert_close("grad_norm", "grad_norms", rtol=10 * tolerance)
    assert_close("trained_tokens", "tokens", rtol=0)


@pytest.mark.parametrize(
    ("name", "updates"),
    [
        pytest.param(name, updates, marks=[pytest.mark.thorough] if updates is None and name not in WHOLE else [])
        for name in sorted(set(CURVES) - {"lora_fa_v2_bf16"})
        for updates in ((None,) if name in WHOLE else (FIRST, None))
    ],
)  # fmt: skip
def test_curve_is_trls(
    name: str,
    updates: int | None,
    configure: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Losses, rates and gradient norms of 20 updates, or of the first of the 20.

    lora_fa_v2 differs by design: PEFT adds Adam's epsilon before the bias correction, Optax after.
    """
    curve = CURVES[name]
    config = configure(method_of(name), **overrides_of(curve))
    if updates is None:
        train(config, tmp_path / "run")
    else:
        cut_at(monkeypatch, updates)
        with pytest.raises(Cut):
            train(config, tmp_path / "run")
    ours = lines(tmp_path / "run")
    assert len(ours) == (updates or 20)
    assert_is_trls(ours, curve, tolerance=1e-3 if name == "lora_fa_v2" else 3e-5)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_curve_of_a_family_is_trls(
    name: str, configure: Callable[..., Any], tmp_path: Path
) -> None:
    """LoRA on families with norms of queries and keys, and a window on some layers: ten updates."""
    case = FAMILIES[name]
    model = folders.write_folder(case, tmp_path / "model")
    folders.write_tokenizer(model)
    adapter = folders.write_adapter(case["adapter"], tmp_path / "adapter")
    changes = overrides_of(case | {"start": adapter}) | {"model": str(model)}
    train(configure("lora", **changes), tmp_path / "run")
    ours = lines(tmp_path / "run")
    assert len(ours) == 10
    assert_is_trls(ours, case, tolerance=3e-5)
