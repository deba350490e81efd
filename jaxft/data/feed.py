"""What gives the loop its batches: fixed data are one feed, and completions that are sampled can be another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from jaxft.data.batches import Batches


@dataclasses.dataclass(frozen=True)
class Fed:
    """A batch as the step takes it, and what the log says of it.

    Attributes:
        arrays: on the devices, by name.
        tokens: counts those of the whole batch, over all hosts.
        origins: gives the "path:line" of each of its examples.
    """

    arrays: Mapping[str, Any]
    tokens: Callable[[], int]
    origins: Callable[[], Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Given:
    """What a feed gets of the layers above.

    Attributes:
        place: a batch of this host's rows -> the global batch on the devices.
    """

    place: Callable[[Mapping[str, Any]], Mapping[str, Any]]


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
