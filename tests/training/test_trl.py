"""The loss curves are those of TRL's SFTTrainer from the same adapter, order and schedule."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxft.training.loop import train

from .conftest import GOLDEN, lines

CURVES = json.loads((GOLDEN / "curves.json").read_text())
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


@pytest.mark.parametrize("name", sorted(set(CURVES) - {"lora_fa_v2_bf16"}))
def test_curve_is_trls(name: str, configure: Callable[..., Any], tmp_path: Path) -> None:
    """Losses, rates and gradient norms of 20 updates.

    lora_fa_v2 differs by design: PEFT adds Adam's epsilon before the bias correction, Optax after.
    """
    curve = CURVES[name]
    train(configure(method_of(name), **overrides_of(curve)), tmp_path / "run")
    ours = lines(tmp_path / "run")
    tolerance = 1e-3 if name == "lora_fa_v2" else 3e-5
    np.testing.assert_allclose([row["loss"] for row in ours], curve["losses"], atol=tolerance)
    np.testing.assert_allclose(
        [row["learning_rate"] for row in ours], curve["learning_rates"], atol=1e-7
    )
    np.testing.assert_allclose(
        [row["grad_norm"] for row in ours], curve["grad_norms"], rtol=10 * tolerance
    )
    assert [row["trained_tokens"] for row in ours] == curve["tokens"]
