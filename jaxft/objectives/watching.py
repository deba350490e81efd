"""What a careful colleague says of a run that learns from rewards, while it is under way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MOST = 96  # points that are remembered; beyond, neighbours become one
LEAST = 9  # points before anything is said to rise
SURE = 6.0  # standard errors by which what has risen stands above its beginning: it is asked at every batch
UNSURE = 1.0  # and below which it has not
IN_A_ROW = 3
TOO_OFTEN = 0.1  # of answers cut off
BY_LENGTH = 0.5  # correlation of rewards with lengths inside of groups
LONGER = 1.2

NAMES = ("reward", "length", "watched", "by_length", "truncated")


class Watch:
    """Remembers a few numbers of each batch of rollouts, and says once what they mean.

    Args:
        max_new_tokens: `config.rollout.max_new_tokens`.
    """

    def __init__(self, max_new_tokens: int) -> None:
        self._limit = max_new_tokens
        self._points: list[list[float]] = []  # of `width` batches each
        self._open: list[list[float]] = []  # batches of a point that is not whole yet
        self._width = 1
        self._same = 0  # batches in a row whose groups all have one reward each
        self._said: list[str] = []

    def state(self) -> dict[str, Any]:
        """All that is remembered, fit for JSON."""
        return {
            "points": _written(self._points),
            "open": _written(self._open),
            "width": self._width,
            "same": self._same,
            "said": list(self._said),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state`."""
        self._points, self._open = _read(state["points"]), _read(state["open"])
        self._width, self._same = int(state["width"]), int(state["same"])
        self._said = list(state["said"])

    def lines(
        self,
        *,
        reward: float,
        length: float,
        watched: float,
        by_length: float,
        truncated: float,
        same: float,
    ) -> list[str]:
        """What is to be said after a batch.

        Args:
            reward: its mean reward.
            length: its mean length of an answer.
            watched: the mean reward of graders that only look on; nan without any.
            by_length: the correlation of rewards with lengths inside of its groups.
            truncated: the share of answers that were cut off.
            same: the share of groups whose answers all have one reward.
        """
        self._remember([reward, length, watched, by_length, truncated])
        self._same = self._same + 1 if same >= 1.0 else 0
        found = {
            "same": self._all_same(reward),
            "truncated": self._cut_off(),
            "watched": self._watched(),
            "length": self._only_longer(),
        }
        new = {key: line for key, line in found.items() if line and key not in self._said}
        self._said += new
        return list(new.values())

    def _remember(self, point: list[float]) -> None:
        self._open.append(point)
        if len(self._open) == self._width:
            self._points.append(np.mean(self._open, axis=0).tolist())
            self._open = []
        if len(self._points) == MOST:
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [np.mean(pair, axis=0).tolist() for pair in pairs]
            self._width *= 2

    def _column(self, name: str) -> np.ndarray:
        values = np.asarray(self._points, np.float64).reshape(-1, len(NAMES))
        return values[:, NAMES.index(name)]

    def _all_same(self, reward: float) -> str:
        if self._same < IN_A_ROW:
            return ""
        return (
            f"in {IN_A_ROW} batches of rollouts all answers to a prompt had one reward (the mean is {reward:.3g}): "
            "nothing is learned from them; begin from a policy that is right now and then, let graders give shares "
            "of a reward, or raise config.rollout.group or config.rollout.temperature"
        )

    def _cut_off(self) -> str:
        share = self._column("truncated")[-IN_A_ROW:]
        if len(share) < IN_A_ROW or share.mean() <= TOO_OFTEN:
            return ""
        return (
            f"{100 * share.mean():.0f} % of the answers reach config.rollout.max_new_tokens={self._limit} and are cut "
            "off: raise it, or let them teach nothing (config.objective.mask_truncated=True)"
        )

    def _watched(self) -> str:
        watched = self._column("watched")
        if np.isnan(watched).any():
            return ""
        reward = self._column("reward")
        if not (risen(reward) > SURE and risen(watched) < UNSURE):
            return ""
        return (
            f"the reward has risen from {_early(reward):.3g} to {_late(reward):.3g}, and that of the held-out graders "
            f"has not ({_early(watched):.3g}, now {_late(watched):.3g}): the policy learns to please the graders and "
            "not what they stand for; read rollouts.jsonl"
        )

    def _only_longer(self) -> str:
        reward, length = self._column("reward"), self._column("length")
        if not (risen(reward) > SURE and risen(length) > SURE):
            return ""
        if _late(length) < LONGER * _early(length) or _late(self._column("by_length")) < BY_LENGTH:
            return ""
        return (
            f"the reward rises with the length of the answers ({_early(length):.0f} tokens at first, "
            f"{_late(length):.0f} now), and the longer one of a group's answers has the higher reward: see in "
            "rollouts.jsonl whether graders pay for length"
        )


def risen(values: Sequence[float] | np.ndarray) -> float:
    """By how many standard errors the last third of a row of numbers stands above its first; 0 for a short one.

    >>> round(risen([0, 1, 0, 0, 1, 0, 9, 9, 8]), 1), risen([0.0, 1.0])
    (17.7, 0.0)
    """
    values = np.asarray(values, np.float64)
    third = len(values) // 3
    if len(values) < LEAST or not np.isfinite(values).all():
        return 0.0
    first, last = values[:third], values[-third:]
    error = math.sqrt((first.var(ddof=1) + last.var(ddof=1)) / third)
    away = float(last.mean() - first.mean())
    return away / error if error else math.copysign(math.inf, away) if away else 0.0


def correlation(rewards: np.ndarray, lengths: np.ndarray) -> float:
    """Of rewards with lengths inside of groups, (groups, group) each; 0 where nothing differs, nan for no reward."""
    rewards, lengths = np.asarray(rewards, np.float64), np.asarray(lengths, np.float64)
    lengths = np.where(np.isnan(rewards), np.nan, lengths)
    judged = ~np.isnan(rewards).all(axis=1)
    rewards, lengths = rewards[judged], lengths[judged]
    if not len(rewards):
        return math.nan
    rewards = np.nan_to_num(rewards - np.nanmean(rewards, axis=1, keepdims=True))
    lengths = np.nan_to_num(lengths - np.nanmean(lengths, axis=1, keepdims=True))
    scale = math.sqrt(float(np.square(rewards).sum() * np.square(lengths).sum()))
    return float((rewards * lengths).sum()) / scale if scale else 0.0


def _early(values: np.ndarray) -> float:
    return float(values[: len(values) // 3].mean())


def _late(values: np.ndarray) -> float:
    return float(values[-(len(values) // 3) :].mean())


def _written(rows: list[list[float]]) -> list[list[float | None]]:
    """JSON has no nan."""
    return [[None if math.isnan(value) else value for value in row] for row in rows]


def _read(rows: Sequence[Sequence[float | None]]) -> list[list[float]]:
    return [[math.nan if value is None else float(value) for value in row] for row in rows]
