"""The objectives that learn from rewards: what a reward is compared with, where the KL stands, and what goes together.

The losses are rows of `jaxft.objectives.policy.LOSSES`, and each has a row here under the same name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxft.errors import UserError
from jaxft.objectives import baselines
from jaxft.objectives.completions import Settings
from jaxft.objectives.policy import LOSSES, Clip, divergence, rewards_less_kl


class Judgement(NamedTuple):
    """What is known of n completions before they are learned from.

    Attributes:
        rewards: (n, functions), NaN where one cannot be judged.
        weights: (functions,), of each in the sum.
        group: completions a prompt.
        mask: (n, new), 1 at sampled tokens.
        sampled: log pi_old (n, new).
        reference: log pi_ref (n, new); None without one.
        greedy: (prompts, functions), the rewards of the greedy answers; None where they are not asked.
    """

    rewards: Float[np.ndarray, "n functions"]
    weights: tuple[float, ...]
    group: int
    mask: Any
    sampled: Any
    reference: Any = None
    greedy: Any = None


Baseline = Callable[[Mapping[str, Any], Judgement], Array]


def of_one_reward(judged: Judgement) -> Bool[np.ndarray, " n"]:
    """Whether each grader says the same of all answers to the prompt: nothing can be learned from them.

    Eight rewards of 0.7 have a mean that is not 0.7 in float32, and advantages of 6e-4 (as TRL's are): an optimizer
    like Adam, to which the size of gradients is nothing, would make a whole update of them.
    """
    grouped = judged.rewards.reshape(-1, judged.group, judged.rewards.shape[1])
    first = grouped[:, :1]
    same = (grouped == first) | (np.isnan(grouped) & np.isnan(first))
    return np.repeat(same.all(axis=(1, 2)), judged.group)


def of_group(settings: Mapping[str, Any], judged: Judgement) -> Array:
    """GRPO's and its relatives'."""
    found = baselines.advantages(
        judged.rewards,
        judged.group,
        scale=settings["scale"],
        weights=judged.weights,
        combine=settings["combine"],
    )
    return jnp.where(of_one_reward(judged), 0.0, found)


def unscaled(settings: Mapping[str, Any], judged: Judgement) -> Array:
    """Dr. GRPO's: r - mean_G."""
    return of_group({**settings, "scale": "none"}, judged)


def of_others(settings: Mapping[str, Any], judged: Judgement) -> Array:
    """RLOO's, whose KL is taken off the reward."""
    rewards = baselines.total(jnp.asarray(judged.rewards), judged.weights)
    if judged.reference is None:
        found = baselines.leave_one_out(rewards, judged.group)
        return jnp.where(of_one_reward(judged), 0.0, found)
    rewards = rewards_less_kl(
        rewards,
        judged.sampled,
        judged.reference,
        judged.mask,
        beta=settings["beta"],
        kl=settings["kl"],
    )
    return baselines.leave_one_out(rewards, judged.group)


def of_returns(settings: Mapping[str, Any], judged: Judgement) -> Array:
    """REINFORCE++'s, whose KL is taken off the reward of each token."""
    penalties = None
    if judged.reference is not None:
        apart = divergence(judged.sampled, judged.reference, judged.mask, settings["kl"])
        penalties = settings["beta"] * apart
    several = judged.group if judged.group > 1 else None
    return baselines.whitened_returns(
        judged.rewards, judged.mask, penalties, group=several, weights=judged.weights
    )


def of_greedy(settings: Mapping[str, Any], judged: Judgement) -> Array:
    """ReMax's."""
    del settings
    return baselines.over_greedy(
        judged.rewards, judged.greedy, weights=judged.weights, group=judged.group
    )


def kl_of_rewards(settings: Mapping[str, Any], judged: Judgement) -> tuple[float, float]:
    """(sum, tokens) of the KL that is taken off the rewards; (0, 0) without a reference."""
    if judged.reference is None:
        return 0.0, 0.0
    apart = divergence(judged.sampled, judged.reference, judged.mask, settings["kl"])
    return float(apart.sum()), float(judged.mask.sum())


@dataclasses.dataclass(frozen=True)
class Rewarding:
    """How an objective turns rewards into advantages.

    Attributes:
        baseline: (settings of `config.objective`, what is known) -> (n,) or (n, new).
        least: completions of a prompt that it needs.
        in_reward: the KL is taken off the reward, and is no part of the loss.
        greedy: it asks for the greedy answer to each prompt.
        epsilon, epsilon_high: the clip where `config.objective` names none; a high one of 0 is epsilon's.
        clips: the loss cuts ratios.
        scales: it takes `scale` and `combine`.
    """

    baseline: Baseline
    least: int = 2
    in_reward: bool = False
    greedy: bool = False
    epsilon: float = 0.2
    epsilon_high: float = 0.0
    clips: bool = True
    scales: bool = False


REWARDING: dict[str, Rewarding] = {
    "dapo": Rewarding(of_group, epsilon_high=0.28, scales=True),
    "grpo": Rewarding(of_group, scales=True),
    "bnpo": Rewarding(of_group, scales=True),
    "dr_grpo": Rewarding(unscaled),
    "gspo": Rewarding(of_group, epsilon=3e-4, epsilon_high=4e-4, scales=True),
    "cispo": Rewarding(of_group, epsilon_high=5.0, scales=True),
    "rloo": Rewarding(of_others, in_reward=True),
    "reinforce_pp": Rewarding(of_returns, least=1, in_reward=True),
    "remax": Rewarding(of_greedy, least=1, greedy=True, clips=False),
}


def settings_of(settings: Mapping[str, Any]) -> Settings:
    """The keys of `config.objective` that the loss reads."""
    row = REWARDING[settings["name"]]
    low = settings["epsilon"] or row.epsilon
    high = settings["epsilon_high"] or (row.epsilon_high if not settings["epsilon"] else 0.0) or low
    return Settings(
        name=settings["name"],
        clip=Clip(low, high, settings["delta"] or None),
        beta=0.0 if row.in_reward else settings["beta"],
        kl=settings["kl"],
        kl_corrected=settings["kl_corrected"],
        importance=settings["importance"],
        entropy_share=settings["entropy_share"],
    )


def asks_reference(settings: Mapping[str, Any]) -> bool:
    """Whether a frozen policy is asked at all."""
    return bool(settings["beta"])


def check_rewarded(flat: Mapping[str, Any], changed: Collection[str]) -> None:
    """Raises UserError for settings that the objective would ignore, and for values that do not go together.

    Args:
        flat: each key's value by the key's full name.
        changed: the keys whose values are not the recipe's defaults.
    """
    name = flat["objective.name"]
    row, group = REWARDING[name], flat["rollout.group"]
    if group < row.least:
        raise UserError(
            f"config.rollout.group: {name} compares an answer with the others to its prompt, and needs at least "
            f"{row.least}, not {group}"
        )
    for key, only in (
        ("format", "auto"),
        ("loss_on", "completion"),
        ("mix", ()),
        ("retrieve", ""),
        ("packing", False),
    ):
        if flat[f"data.{key}"] != only:
            raise UserError(f"config.data.{key}: prompts take {only!r} alone")
    for key in ("scale", "combine"):
        if f"objective.{key}" in changed and not row.scales:
            takers = ", ".join(other for other, one in REWARDING.items() if one.scales)
            raise UserError(f"config.objective.{key}: {name} takes none; it is for {takers}")
    for key in ("epsilon", "epsilon_high", "delta"):
        if f"objective.{key}" in changed and not row.clips:
            raise UserError(f"config.objective.{key}: {name} has no ratio to cut")
    if "objective.importance" in changed and LOSSES[name].ratio is not None:
        raise UserError(f"config.objective.importance: {name} has a ratio of its own")
    if flat["objective.delta"] and flat["objective.delta"] <= 1.0 + (
        flat["objective.epsilon_high"] or row.epsilon_high or row.epsilon
    ):
        raise UserError(
            f"config.objective.delta: {flat['objective.delta']} is below 1 + epsilon_high, where ratios are cut already"
        )
    if flat["objective.reference"] == "none" and flat["objective.beta"]:
        raise UserError(
            "config.objective.beta weighs the KL to a reference, and config.objective.reference is none"
        )
    if "objective.reference_every" in changed and not flat["objective.beta"]:
        raise UserError(
            "config.objective.reference_every: without beta there is no reference that could move"
        )
    if flat["rollout.ahead"] and flat["rollout.updates"] > 1:
        raise UserError(
            "config.rollout.ahead: 1 goes with config.rollout.updates=1: what is sampled ahead would be of a policy "
            "several updates old"
        )
    if flat["population"]:
        raise UserError("config.population: runs that learn from rewards are made one at a time")
    if flat["mesh.context"] != 1:
        raise UserError(
            "config.mesh.context: rollouts are not divided along their length: 1 is taken"
        )
