"""The curves of preference losses are those of TRL's trainers from the same adapter, order and schedule."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxft.configuration import load_config
from jaxft.objectives import pairs
from jaxft.training import loop
from tests.small_runs import GOLDEN, Cut, cut_at, lines

pytestmark = pytest.mark.slow

FOLDER = GOLDEN.parent / "preferences"
CURVES = json.loads((FOLDER / "curves.json").read_text())
RECIPE = str(Path(__file__).parents[2] / "configs" / "dpo.py")
COMPILED = {"sigmoid", "accumulated", "synced", "kto", "orpo"}
# These begin as `sigmoid` does. Of the others, the first updates tell one from each other.
WHOLE = {"aot", "aot_unpaired"}
FIRST = 3
# TRL's setting -> ours, where the values are the same.
SAME = {
    "learning_rate": "optimizer.learning_rate",
    "lr_scheduler_type": "optimizer.schedule",
    "warmup_steps": "optimizer.warmup_steps",
    "weight_decay": "optimizer.weight_decay",
    "max_grad_norm": "optimizer.clip_norm",
    "max_steps": "steps",
    "max_length": "data.max_length",
    "gradient_accumulation_steps": "grad_accum",
    "beta": "objective.beta",
    "label_smoothing": "objective.label_smoothing",
    "simpo_gamma": "objective.gamma",
    "use_weighting": "objective.wpo",
    "f_alpha_divergence_coef": "objective.alpha",
    "desirable_weight": "objective.desirable_weight",
    "undesirable_weight": "objective.undesirable_weight",
    "ref_model_sync_steps": "objective.reference_every",
    "cpo_alpha": "objective.sft_weight",
}
DIVERGENCES = {"js_divergence": "js", "alpha_divergence": "alpha"}


def objective_of(curve: dict[str, Any]) -> str:
    """Our name of the loss."""
    if curve["trainer"] != "dpo":
        return curve["settings"].get("loss_type", curve["trainer"])
    name = curve["settings"].get("loss_type", ["sigmoid"])[0]
    return "dpo" if name == "sigmoid" else name


def overrides_of(curve: dict[str, Any]) -> dict[str, Any]:
    """TRL's settings in jaxft's words."""
    settings = curve["settings"]
    parts = settings["gradient_accumulation_steps"]
    divergence = settings.get("f_divergence_type", "reverse_kl")
    name = objective_of(curve)
    return {
        "model": str(GOLDEN / "model"),
        "adapter": str(GOLDEN / "adapters" / curve["start"]) if curve["start"] else "",
        "data.train": str(FOLDER / f"{curve['data']}.jsonl"),
        "data.shuffle": False,
        "mesh.data": 1,
        "batch_size": settings["per_device_train_batch_size"] * parts,
        "objective.name": name,
        "objective.length_normalize": name == "ipo",
        "objective.f_divergence": DIVERGENCES.get(divergence, divergence),
        "objective.sft_weight": settings.get("loss_weights", [1.0, 0.0])[1],
    } | {ours: settings[key] for key, ours in SAME.items() if key in settings}


def run(
    curve: dict[str, Any], folder: Path, updates: int | None = None, **changes: Any
) -> list[dict[str, Any]]:
    """The lines of our run of a curve, or of its first updates."""
    method = "full" if curve["start"] is None else {"dora": "dora"}.get(curve["start"], "lora")
    config: ConfigDict = load_config(f"{RECIPE}:{method}", overrides_of(curve) | changes)
    if updates is None:
        loop.train(config, folder)
        return lines(folder)
    with pytest.MonkeyPatch.context() as patch:
        cut_at(patch, updates)
        with pytest.raises(Cut):
            loop.train(config, folder)
    found = lines(folder)
    assert len(found) == updates
    return found


def assert_is_trls(ours: list[dict[str, Any]], curve: dict[str, Any]) -> None:
    names = {
        "losses": "loss",
        "chosen": "rewards/chosen",
        "rejected": "rewards/rejected",
        "margins": "rewards/margins",
        "accuracies": "rewards/accuracies",
        "kl": "kl",
    }
    if curve["trainer"] != "kto":
        del names["kl"]
    for key, name in names.items():
        wanted = [np.nan if value is None else value for value in curve.get(key, [])][: len(ours)]
        if wanted:
            found = [row.get(name, np.nan) for row in ours]
            if key == "accuracies":  # before anything moves, rewards are 0 up to rounding
                found, wanted = found[2:], wanted[2:]
            np.testing.assert_allclose(found, wanted, atol=3e-4, rtol=1e-4, err_msg=key)
    np.testing.assert_allclose(
        [row["learning_rate"] for row in ours], curve["learning_rates"][: len(ours)], atol=1e-7
    )
    np.testing.assert_allclose(
        [row["grad_norm"] for row in ours], curve["grad_norms"][: len(ours)], rtol=2e-3, atol=1e-5
    )


class Eager:
    """`jax` without its `jit`."""

    jit = staticmethod(lambda function, **options: function)
    __getattr__ = staticmethod(partial(getattr, jax))


@pytest.fixture(scope="session")
def model() -> Callable[..., Any]:
    """Log-probabilities of a batch: one compiled function for all curves."""
    return jax.jit(pairs.position_log_probabilities, static_argnums=0, static_argnames="collisions")


@pytest.fixture
def shared(model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop's own step, run as it stands around the compiled model, so that no curve compiles the model again."""
    monkeypatch.setattr(pairs, "position_log_probabilities", model)
    monkeypatch.setattr(loop, "jax", Eager())
    monkeypatch.setattr(loop.Loop, "weigh", lambda *_: None)  # nothing is compiled


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize(
    ("name", "updates"),
    [
        *((name, None if name in WHOLE else FIRST) for name in sorted(CURVES.keys() - COMPILED)),
        *(
            pytest.param(name, None, marks=pytest.mark.thorough)
            for name in sorted(CURVES.keys() - COMPILED - WHOLE)
        ),
    ],
)
def test_curve_is_trls(name: str, updates: int | None, tmp_path: Path) -> None:
    """Losses, rewards, margins, accuracies, rates and gradient norms of 20 updates, or of the first of the 20."""
    assert_is_trls(run(CURVES[name], tmp_path / "run", updates), CURVES[name])


@pytest.mark.parametrize("name", sorted(COMPILED))
def test_curve_of_the_compiled_step_is_trls(name: str, tmp_path: Path) -> None:
    """One of each kind of program: a reference in the step, parts, a copy that moves, KTO's, none."""
    assert_is_trls(run(CURVES[name], tmp_path / "run"), CURVES[name])


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize(
    "changes",
    [
        {"data.share_prompt": False},
        {"objective.precompute": True},
        {"objective.reference": str(GOLDEN / "model"), "objective.precompute": True},
    ],
    ids=["separate", "precomputed", "folder"],
)
def test_other_ways_to_the_same_curve(changes: dict[str, Any], tmp_path: Path) -> None:
    """Prompts written twice, the reference beforehand, and the reference as a folder change no number."""
    ours = run(CURVES["sigmoid"], tmp_path / "run", 2 * FIRST, **changes)
    assert_is_trls(ours, CURVES["sigmoid"])
