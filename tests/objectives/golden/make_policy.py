"""Values and gradients of TRL's policy losses, and its advantages: policy.json.

    batches       name -> log_probabilities, old, reference, advantages, mask, entropies
    losses        of each: batch, trainer, settings, loss, gradient
    rewards       name -> a table, null where a reward cannot be judged
    advantages    of each: rewards, group, trainer, settings, advantages

TRL's own code runs: `_compute_loss` of a trainer that was never set up, whose model "computes" the recorded
log-probabilities, and the lines of `_generate_and_score_completions` that turn rewards into advantages.

    python tests/objectives/golden/make_policy.py
"""

from __future__ import annotations

import collections
import inspect
import json
import math
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from trl.trainer import grpo_trainer, rloo_trainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

FILE = Path(__file__).with_name("policy.json")
LONGEST, ITEMS = 16, 37

SETTINGS: list[dict[str, Any]] = [
    *({"loss": name} for name in ("grpo", "bnpo", "dapo", "dr_grpo", "cispo")),
    *({"loss": name, "beta": 0.07} for name in ("grpo", "bnpo", "dapo", "dr_grpo", "cispo")),
    {"loss": "grpo", "importance": "sequence"},
    {"loss": "grpo", "importance": "sequence", "beta": 0.2, "epsilon": 0.03, "epsilon_high": 0.04},
    {"loss": "dapo", "importance": "sequence", "delta": 1.3},
    {"loss": "dapo", "epsilon": 0.1, "epsilon_high": 0.28},
    {"loss": "grpo", "epsilon_high": 0.28, "delta": 1.5},
    {"loss": "cispo", "epsilon_high": 5.0},
    {"loss": "cispo", "epsilon_high": 1.1, "importance": "sequence"},
    {"loss": "grpo", "beta": 0.3, "kl_corrected": False},
    {"loss": "dapo", "on_policy": True},
    {"loss": "grpo", "on_policy": True, "beta": 0.1},
    {"loss": "dapo", "share": 0.3, "beta": 0.1},
    {"loss": "rloo"},
    {"loss": "rloo", "epsilon": 0.5, "epsilon_high": 1.0},
]


def batch(rows: int, length: int, seed: int) -> dict[str, torch.Tensor]:
    """Log-probabilities whose ratios lie on both sides of every bound; the second row has no token."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    new = -normal(rows, length).exp()
    lengths = torch.randint(1, length + 1, (rows, 1), generator=draw)
    mask = (torch.arange(length)[None, :] < lengths).long()
    if rows > 1:
        mask[1] = 0
    return {
        "log_probabilities": new,
        "old": new + 0.25 * normal(rows, length),
        "reference": new + 0.5 * normal(rows, length),
        "advantages": normal(rows),
        "mask": mask,
        "entropies": normal(rows, length).abs(),
    }


def stand_in(settings: dict[str, Any], given: dict[str, Any], new: torch.Tensor) -> SimpleNamespace:
    """What `_compute_loss` asks of its trainer."""
    epsilon = settings.get("epsilon", 0.2)
    same = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, device="cpu",
        pad_across_processes=lambda x, dim, pad_index: x,
    )  # fmt: skip
    args = SimpleNamespace(
        use_bias_correction_kl=settings.get("kl_corrected", True),
        delta=settings.get("delta"),
        steps_per_generation=1,
    )
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, given["entropies"], None),
        aux_loss_enabled=False, off_policy_mask_threshold=None, use_vllm=False, accelerator=same, args=args,
        top_entropy_quantile=settings.get("share", 1.0), beta=settings.get("beta", 0.0),
        importance_sampling_level=settings.get("importance", "token"), loss_type=settings["loss"],
        epsilon_low=epsilon, epsilon_high=settings.get("epsilon_high", epsilon), model=torch.nn.Linear(1, 1),
        current_gradient_accumulation_steps=1, max_completion_length=LONGEST, _entropy_bonus_enabled=False,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
    )  # fmt: skip
    trainer.get_high_entropy_mask = lambda *x: GRPOTrainer.get_high_entropy_mask(trainer, *x)
    return trainer


def loss_of(settings: dict[str, Any], given: dict[str, Any]) -> tuple[float, list]:
    """TRL's loss of a batch and its gradient."""
    new = given["log_probabilities"].clone().requires_grad_(True)
    mask = given["mask"]
    inputs = {
        "prompt_ids": torch.zeros(len(mask), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(mask), 1, dtype=torch.long),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": given["advantages"],
        "ref_per_token_logps": given["reference"],
        "num_items_in_batch": torch.tensor(float(ITEMS)),
        "old_logps": (given["old"] * mask).sum(1),
    }
    if not settings.get("on_policy"):
        inputs["old_per_token_logps"] = given["old"]
    trainer = RLOOTrainer if settings["loss"] == "rloo" else GRPOTrainer
    compute = inspect.unwrap(trainer._compute_loss)
    loss = compute(stand_in(settings, given, new), None, inputs)
    loss.backward()
    return loss.item(), new.grad.tolist()


NONE = math.nan
REWARDS: dict[str, list] = {
    "one": [[1.0], [0.0], [0.5], [0.25], [3.0], [3.0], [3.0], [3.0], [-1.0], [2.0], [0.1], [0.2]],
    "unjudged": [
        [1.0], [NONE], [0.5], [0.25], [NONE], [NONE], [NONE], [NONE], [NONE], [2.0], [NONE], [NONE],
    ],
    "two": [
        [1.0, 10.0], [0.0, NONE], [NONE, 30.0], [0.5, 20.0], [NONE, NONE], [1.0, 0.0], [1.0, NONE], [0.0, 4.0],
        [2.0, NONE], [2.0, NONE], [2.0, NONE], [2.0, 1.0],
    ],
}  # fmt: skip
ADVANTAGES: list[dict[str, Any]] = [
    *({"scale": scale} for scale in ("group", "batch", "none")),
    {"combine": "normalize"},
    {"combine": "normalize", "scale": "none"},
    {"loss": "rloo"},
]
BEGIN = "unscorable_mask = torch.isnan(rewards_per_func)"
END = "# Slice to keep only the local part"
COMBINE = {"sum": "sum_then_normalize", "normalize": "normalize_then_sum"}


def advantages_of(settings: dict[str, Any], table: list, group: int, weights: list) -> list[float]:
    """What TRL's lines make of a table of rewards."""
    module = rloo_trainer if settings.get("loss") == "rloo" else grpo_trainer
    trainer = RLOOTrainer if settings.get("loss") == "rloo" else GRPOTrainer
    source = textwrap.dedent(inspect.getsource(trainer._generate_and_score_completions))
    lines = source[source.index(BEGIN) : source.index(END)]
    names = {
        "rewards_per_func": torch.tensor(table),
        "device": "cpu",
        "num_generations": group,
        "self": SimpleNamespace(
            reward_weights=torch.tensor(weights),
            scale_rewards=settings.get("scale", "group"),
            multi_objective_aggregation=COMBINE[settings.get("combine", "sum")],
            reward_funcs=weights,
            reward_clip_range=None,
            beta=0.0,
            normalize_advantages=False,
        ),
    }
    exec(textwrap.dedent("    " + lines), vars(module) | names, names)
    return names["advantages"].tolist()


def plain(value: Any) -> Any:
    """Tensors as lists, NaN as null."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, list):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def main() -> None:
    """Writes the file."""
    batches = {"four": batch(4, 9, 0), "one": batch(1, 5, 1)}
    losses = []
    for name, given in batches.items():
        for settings in SETTINGS:
            loss, gradient = loss_of(settings, given)
            losses.append({"batch": name, "settings": settings, "loss": loss, "gradient": gradient})
    found = []
    for name, table in REWARDS.items():
        weights = [1.0, 0.3][: len(table[0])]
        for group in (2, 4, 12):
            for settings in ADVANTAGES:
                advantages = advantages_of(settings, table, group, weights)
                found.append(
                    {
                        "rewards": name,
                        "group": group,
                        "weights": weights,
                        "settings": settings,
                        "advantages": advantages,
                    }
                )
    whole = {
        "longest": LONGEST,
        "items": ITEMS,
        "batches": {
            name: {key: plain(value) for key, value in given.items()}
            for name, given in batches.items()
        },
        "losses": losses,
        "rewards": {name: plain(table) for name, table in REWARDS.items()},
        "advantages": found,
    }
    FILE.write_text(json.dumps(whole) + "\n")


if __name__ == "__main__":
    main()
