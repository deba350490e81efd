"""What gives the loop its batches: fixed data are one feed, and completions that are sampled can be another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxft.data.batches import Batches


@dataclasses.dataclass(frozen=True)
class Fed:
    """A batch as the step takes it, and what the log says of it.

    Attributes:
        arrays: on the devices, by name.
        tokens: counts those of the whole batch, over all hosts.
        origins: gives the "path:line" of each of its examples.
        sums: name -> (sum, weight) of averages that are known of it before it is learned from.
        journal: lines for RUN/rollouts.jsonl.
        lines: what its owner should know, to be said.
    """

    arrays: Mapping[str, Any]
    tokens: Callable[[], int]
    origins: Callable[[], Sequence[str]]
    sums: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    journal: Sequence[Mapping[str, Any]] = ()
    lines: Sequence[str] = ()

    @property
    def numbers(self) -> dict[str, float]:
        """The averages; those of nothing are left out."""
        return {name: total / weight for name, (total, weight) in self.sums.items() if weight}


class Sampled(NamedTuple):
    """Completions that a policy gave: n = prompts x group, those of a prompt one after the other.

    Attributes:
        tokens: (n, new) int32 ids.
        lengths: (n,) int32, with the token that ended it.
        log_probabilities: (n, new) float32, under the policy at the temperature of the draws.
        truncated: (n,) whether the limit ended it.
        mismatches: (n,) int32, how many tokens of its first sample training's program would have drawn otherwise; 0
            where that was not asked, as is `apart`.
        apart: (n,) float32, |log p of the sampler - log p of training's program|, the mean over these tokens.
        busy: the share of its steps in which the sampler's slots had something to do.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    log_probabilities: np.ndarray
    truncated: np.ndarray
    mismatches: np.ndarray
    apart: np.ndarray
    busy: float


@dataclasses.dataclass(frozen=True)
class Policy:
    """What a feed that samples asks of the layers above.

    Attributes:
        config: of the run.
        tokenizer: the model's.
        sample: (standing, prompts, group=, temperature=, stream=, first=, learned=) -> `Sampled`; a prompt's draws
            depend on the seed, `stream` and its number, counted from `first`. Of completions that are `learned` from,
            training's program gives the log-probabilities and, with `config.rollout.exact`, has the last word.
        kept: standing -> what goes on standing while the run goes on.
        reference: (standing, placed batch) -> what a frozen policy says of it; None where none is asked.
        decode: ids of a completion -> its text.
        ask: (model's folder, conversations, sampling) -> answers.
        embed: texts -> (texts, features).
        agreed: what the first process has, on every one.
    """

    config: Any
    tokenizer: Any
    sample: Callable[..., Sampled]
    kept: Callable[[Any], Any]
    reference: Callable[[Any, Mapping[str, Any]], np.ndarray] | None
    decode: Callable[[list[int]], str]
    ask: Callable[..., Sequence[str]]
    embed: Callable[[Sequence[str]], np.ndarray]
    agreed: Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Given:
    """What a feed gets of the layers above.

    Attributes:
        place: a batch of this host's rows -> the global batch on the devices.
        policy: for feeds whose batches depend on the policy; None where nothing can be sampled.
    """

    place: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    policy: Policy | None = None


class Feed(Protocol):
    """The source of a run's batches.

    `state` is what stands on the devices as the batch is asked for, a `jaxft.training.standing.Standing`: its `params`
    are the policy. Fixed data ignore it.
    """

    @property
    def steps_per_epoch(self) -> int:
        """Batches in a pass over the data."""

    def next(self, state: Any) -> Fed:
        """The next batch."""

    def once(self, state: Any) -> Iterator[Fed]:
        """One pass from the beginning, as an evaluation takes it; `next` goes on where it stood."""

    def state(self) -> dict[str, Any]:
        """What `restore` needs to give the batch after the last one; fit for JSON."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state`. Raises UserError where that is of other data or settings."""


class Fixed:
    """Data that stay as they are, whatever the policy.

    Args:
        batches: of this host's rows.
        given: what lays them out on the devices.
    """

    def __init__(self, batches: Batches, given: Given) -> None:
        self.batches, self._given = batches, given
        self._number = 0

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        return self.batches.steps_per_epoch

    def next(self, state: Any) -> Fed:
        """The next batch of an endless row of epochs."""
        del state
        number, self._number = self._number, self._number + 1
        return self._fed(next(self.batches), number)

    def once(self, state: Any) -> Iterator[Fed]:
        """All batches, of batches that end."""
        del state
        return (self._fed(self.batches[number], number) for number in range(len(self.batches)))

    def _fed(self, rows: Mapping[str, Any], number: int) -> Fed:
        return Fed(
            self._given.place(rows),
            lambda: self.batches.tokens(number),
            lambda: self.batches.origins(number),
        )

    def state(self) -> dict[str, Any]:
        """That of the batches."""
        return self.batches.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """As that of the batches."""
        self.batches.restore(state)
        self._number = int(state["step"])
