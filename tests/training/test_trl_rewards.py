"""The curves of TRL's GRPOTrainer and RLOOTrainer on recorded rollouts: all that they log of each update."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from jaxft.objectives import rollouts
from jaxft.objectives.judging import Verdicts
from jaxft.training import policy
from jaxft.training.loop import train
from tests.small_runs import lines

FOLDER = Path(__file__).parents[1] / "golden"
RECIPE = str(Path(__file__).parents[2] / "configs" / "rl.py")
RECORDED = json.loads((FOLDER / "rollouts.json").read_text())
GROUP, NEW = RECORDED["settings"]["group"], RECORDED["settings"]["new"]
# How TRL calls a key, and what it is here.
KEYS = {
    "num_iterations": "rollout.updates",
    "beta": "objective.beta",
    "epsilon_high": "objective.epsilon_high",
    "mask_truncated_completions": "objective.mask_truncated",
    "top_entropy_quantile": "objective.entropy_share",
    "importance_sampling_level": "objective.importance",
    "delta": "objective.delta",
    "temperature": "rollout.temperature",
    "ref_model_sync_steps": "objective.reference_every",
}
COMBINE = {"sum_then_normalize": "sum", "normalize_then_sum": "normalize"}
ORDINARY = ("grpo with KL, two passes",)


class Said(NamedTuple):
    tokens: Any
    lengths: Any
    log_probabilities: Any
    log_masses: Any
    truncated: Any
    busy: float = 1.0


def keys_of(settings: dict[str, Any]) -> dict[str, Any]:
    """TRL's settings of a run as keys of ours; `dr_grpo` scales nothing as it is."""
    weights = settings.get("reward_weights", [1.0])
    found = {
        "objective.name": settings.get("loss_type", "rloo"),
        "objective.epsilon": 0.2,
        "graders": [
            {"type": "regex", "pattern": "a", "name": name, "weight": weight}
            for name, weight in zip(("first", "second"), weights, strict=False)
        ],
    }
    if "loss_type" not in settings:
        found["objective.kl"] = "k1"
    elif settings["loss_type"] != "dr_grpo":
        found["objective.scale"] = settings.get("scale_rewards", "group")
        combine = settings.get("multi_objective_aggregation", "sum_then_normalize")
        found["objective.combine"] = COMBINE[combine]
    return found | {KEYS[key]: value for key, value in settings.items() if key in KEYS}


def replayed(monkeypatch: pytest.MonkeyPatch, functions: int) -> None:
    """Rollouts are those of the file, and rewards those of so many of its functions."""
    batches = RECORDED["rollouts"]
    left = {"sampled": iter(batches), "judged": iter(batches)}

    def sample(config: Any, params: Any, prompts: Any, key: Any, **_: Any) -> Said:
        said = next(left["sampled"])["completions"]
        lengths = np.asarray([len(ids) for ids in said], np.int32)
        ids = np.asarray([each + [0] * (NEW - len(each)) for each in said], np.int32)
        nothing = np.zeros(ids.shape, np.float32)  # the run asks training's program
        return Said(ids, lengths, nothing, nothing, ~(ids == 2).any(axis=1))

    def judged(judges: Any, rows: Any, *_: Any) -> Verdicts:
        batch = next(left["judged"])
        assert [row.values["prompt"] for row in rows] == batch["prompts"]
        rewards = np.asarray(batch["rewards"][:functions], np.float32).T
        return Verdicts(rewards, rewards[:, :0], [{} for _ in rewards])

    monkeypatch.setattr(policy, "sample_rollouts", sample)
    monkeypatch.setattr(rollouts, "judged", judged)


@pytest.mark.parametrize(
    "name",
    [
        name if name in ORDINARY else pytest.param(name, marks=pytest.mark.thorough)
        for name in RECORDED["curves"]
    ],
)
def test_the_curves_are_those_of_trl(
    name: str, configure: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curve = RECORDED["curves"][name]
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": text} for batch in RECORDED["rollouts"] for text in batch["prompts"]]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {
        "data.train": str(prompts),
        "data.shuffle": False,
        "batch_size": len(RECORDED["rollouts"][0]["prompts"]),
        "rollout.group": GROUP,
        "rollout.max_new_tokens": NEW,
        "optimizer.learning_rate": RECORDED["settings"]["learning_rate"],
        "optimizer.clip_norm": RECORDED["settings"]["max_grad_norm"],
        "optimizer.schedule": "constant",
        "steps": len(curve["updates"]),
    }
    keys |= keys_of(curve["settings"])
    replayed(monkeypatch, len(keys["graders"]))
    train(configure("full", RECIPE, **keys), tmp_path / "run")
    ours = lines(tmp_path / "run")
    assert len(ours) == len(curve["updates"])
    for number, (line, expected) in enumerate(zip(ours, curve["updates"], strict=True), start=1):
        for key, value in expected.items():
            assert line[key] == pytest.approx(value, abs=1e-3, rel=1e-3), (number, key)
