"""Rollouts and what graders say of them: rewards, their averages, and the lines of rollouts.jsonl."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from jaxft.data.feed import Policy, Sampled
from jaxft.data.sources import Row
from jaxft.errors import UserError
from jaxft.objectives.graders import Grader, Outside, case_of, grade, rewards_of
from jaxft.objectives.prompted import Judges
from jaxft.runtime.processes import first

Sums = dict[str, tuple[float, float]]


class Verdicts(NamedTuple):
    """What graders say of n completions.

    Attributes:
        rewards: (n, graders), NaN where one cannot judge.
        watched: (n, graders that only look on).
        reasons: of each completion, why a grader cannot judge it, by the grader's name.
    """

    rewards: Float32[np.ndarray, "n functions"]
    watched: Float32[np.ndarray, "n watching"]
    reasons: list[dict[str, str]]


def judged(
    judges: Judges, rows: Sequence[Row], sampled: Sampled, policy: Policy, outside: Outside
) -> Verdicts:
    """Asks the graders, in the first process of a run, and tells all what they said.

    Args:
        judges: who is asked.
        rows: those that asked, one a prompt.
        sampled: what was answered.
        policy: of the run.
        outside: what graders ask.
    """
    group = len(sampled.lengths) // len(rows)
    graders = (*judges.graders, *judges.watching)
    table = np.zeros((len(sampled.lengths), len(graders)), np.float32)
    reasons: list[dict[str, str]] = [{} for _ in sampled.lengths]
    if first():
        ids = ids_of(sampled)
        cases = [
            case_of(rows[index // group].values["item"], policy.decode(own), own)
            for index, own in enumerate(ids)
        ]
        said = grade(graders, cases, outside)
        table = rewards_of(said)
        for grader, column in zip(graders, said, strict=True):
            for index, one in enumerate(column):
                if one.reward is None:
                    reasons[index][grader.name] = one.reason
    table = policy.agreed(table)
    count = len(judges.graders)
    return Verdicts(table[:, :count], table[:, count:], reasons)


def joined(parts: Sequence[Verdicts]) -> Verdicts:
    """The verdicts of several parts of a batch, one after the other."""
    rewards, watched = (np.concatenate([part[index] for part in parts]) for index in (0, 1))
    return Verdicts(rewards, watched, [reason for part in parts for reason in part.reasons])


def ids_of(sampled: Sampled) -> list[list[int]]:
    """The completions' tokens, with the one that ended each."""
    pairs = zip(sampled.tokens, sampled.lengths, strict=True)
    return [tokens[:length].tolist() for tokens, length in pairs]


def total_of(rewards: np.ndarray, graders: Sequence[Grader]) -> np.ndarray:
    """The weighted sum of each row's rewards that can be judged, (n,); NaN where none can."""
    weights = np.asarray([grader.weight for grader in graders], np.float32)
    sums = np.nansum(rewards * weights, axis=1)
    return np.where(np.isnan(rewards).all(axis=1), np.nan, sums)


def sums_of(judges: Judges, sampled: Sampled, verdicts: Verdicts) -> Sums:
    """name -> (sum, weight) of a batch's averages, named as in TRL; they add up over batches."""
    total = total_of(verdicts.rewards, judges.graders)
    lengths, cut = sampled.lengths.astype(np.float64), sampled.truncated.astype(bool)
    sums = {
        "reward": _mean(total),
        "completions/mean_length": _mean(lengths),
        "completions/mean_terminated_length": _mean(lengths[~cut]),
        "completions/clipped_ratio": _mean(cut.astype(np.float64)),
        "rollout/unjudged": _mean(np.isnan(total).astype(np.float64)),
    }
    for grader, column in zip(judges.graders, verdicts.rewards.T, strict=True):
        sums[f"rewards/{grader.name}/mean"] = _mean(column)
    if judges.watching:
        sums["held_out/reward"] = _mean(total_of(verdicts.watched, judges.watching))
        for grader, column in zip(judges.watching, verdicts.watched.T, strict=True):
            sums[f"held_out/{grader.name}/mean"] = _mean(column)
    return sums


def spreads_of(judges: Judges, sampled: Sampled, verdicts: Verdicts, group: int) -> Sums:
    """The same of numbers that tell how a batch of groups is spread; over several batches they are means."""
    total = total_of(verdicts.rewards, judges.graders)
    several = (~np.isnan(total.reshape(-1, group))).sum(axis=1) > 1  # else there is no deviation
    ended = sampled.lengths[~sampled.truncated.astype(bool)].astype(np.float64)
    sums = {
        "reward_std": _one(_deviation(total)),
        "frac_reward_zero_std": _mean((same_rewards(total, group) & several).astype(np.float64)),
        "completions/min_length": _one(float(sampled.lengths.min())),
        "completions/max_length": _one(float(sampled.lengths.max())),
        "completions/min_terminated_length": _one(ended.min(initial=math.inf)),
        "completions/max_terminated_length": _one(ended.max(initial=-math.inf)),
        "rollout/busy": _one(sampled.busy),
        "rollout/mismatch": _one(float(sampled.mismatches.sum())),
        "rollout/logp_difference": _mean(sampled.apart),
    }
    for grader, column in zip(judges.graders, verdicts.rewards.T, strict=True):
        sums[f"rewards/{grader.name}/std"] = _one(_deviation(column))
    return sums


def same_rewards(total: np.ndarray, group: int) -> np.ndarray:
    """Whether the answers to a prompt all have one reward, (prompts,): nothing is learned from them."""
    groups = total.reshape(-1, group)
    known = np.isfinite(groups)
    high = np.where(known, groups, -np.inf).max(axis=1)
    low = np.where(known, groups, np.inf).min(axis=1)
    return (known.sum(axis=1) < 2) | (high - low <= 1e-8 * np.maximum(np.abs(high), 1.0))


def journal_of(
    judges: Judges,
    rows: Sequence[Row],
    sampled: Sampled,
    verdicts: Verdicts,
    advantages: np.ndarray,
    policy: Policy,
) -> list[dict[str, Any]]:
    """Lines for rollouts.jsonl, one a completion.

    `advantages` are (n,), or (n, new), of which the mean over the completion's tokens is told.
    """
    group = len(sampled.lengths) // len(rows)
    total = total_of(verdicts.rewards, judges.graders)
    lines = []
    for index, ids in enumerate(ids_of(sampled)):
        row, length = rows[index // group], int(sampled.lengths[index])
        gains = advantages[index] if advantages.ndim == 1 else advantages[index, :length].mean()
        line: dict[str, Any] = {
            "origin": row.origin,
            "prompt": row.values["prompt"],
            "completion": policy.decode(ids),
            "rewards": _named(judges.graders, verdicts.rewards[index]),
            "reward": _plain(total[index]),
            "advantage": _plain(gains),
            "length": length,
            "truncated": bool(sampled.truncated[index]),
        }
        if judges.watching:
            line["held_out"] = _named(judges.watching, verdicts.watched[index])
        if verdicts.reasons[index]:
            line["unjudged"] = verdicts.reasons[index]
        lines.append(line)
    return lines


def require_judged(verdicts: Verdicts, judges: Judges) -> None:
    """Raises UserError where not one answer of a batch could be judged by a grader that is learned from."""
    if np.isnan(verdicts.rewards).all():
        reasons = [reason for each in verdicts.reasons for reason in each.items()]
        name, why = reasons[0] if reasons else (judges.graders[0].name, "no reason is given")
        raise UserError(
            f"config.graders: not one answer of a whole batch could be judged; {name}: {why}"
        )


def _named(graders: Sequence[Grader], values: np.ndarray) -> dict[str, float | None]:
    return {grader.name: _plain(value) for grader, value in zip(graders, values, strict=True)}


def _plain(value: Any) -> float | None:
    return round(float(value), 6) if math.isfinite(value) else None


def _mean(values: np.ndarray) -> tuple[float, float]:
    return float(np.nansum(values, dtype=np.float64)), float((~np.isnan(values)).sum())


def _one(value: float) -> tuple[float, float]:
    return (float(value), 1.0) if math.isfinite(value) else (0.0, 0.0)


def _deviation(values: np.ndarray) -> float:
    """With n - 1 below, of those that are known; NaN where there are fewer than two."""
    known = values[~np.isnan(values)]
    return float(known.std(ddof=1)) if len(known) > 1 else math.nan
