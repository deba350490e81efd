"""The iterator of batches: order from the seed, exact state after every batch, the same on any number of hosts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain

from jaxft.data.packing import Batch, collate, length_buckets, pack, smallest_bucket
from jaxft.data.store import Example, Examples
from jaxft.errors import UserError, counted

AHEAD = 4  # batches made while the device works


class Batches:
    """Yields batches of `batch_size` rows, epoch after epoch, made ahead of time in a thread.

    Batch n is a pure function of (examples, seed, n), so the state is one number and any batch can
    be had by `batches[n]`. An epoch holds every example once; its last batch is filled up with
    empty rows (segment 0, weight 0). Without `shuffle`, rows stand in the order of the examples;
    with it, each epoch has an order of its own.

    Packed rows have `max_length` positions. Otherwise a row holds one example, and a batch is as long
    as the smallest bucket that holds its longest row; the order is never changed for that.

    Of several hosts each makes the rows that its devices need. Batch n as a whole, its length and
    the state are the same on all, whatever their number: a run may go on with other hosts.

    Args:
      examples: to train on, none longer than `max_length`.
      batch_size: rows of a batch, over all hosts.
      max_length: positions of a packed row, and the largest bucket.
      packing: several examples in a row.
      shuffle: another order in each epoch.
      seed: of the order; any integer, of which 32 bits count.
      pad_id: the token in unused positions.
      epochs: how many; None goes on for ever.
      buckets: ascending lengths, the last at least the longest example; None: `length_buckets`.
      host_rows: (first, last + 1) of the rows of each batch that this host makes; None: all.
      collate: makes the batch of rows of examples; by default `jaxft.data.packing.collate`.

    Attributes:
      dataset: the `grain.IterDataset` underneath.
      rows: in an epoch.
      fill: the share of a packed row's positions that hold a token.
      steps_per_epoch: batches in an epoch.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        max_length: int,
        packing: bool,
        shuffle: bool,
        seed: int,
        pad_id: int,
        epochs: int | None = None,
        buckets: Sequence[int] | None = None,
        host_rows: tuple[int, int] | None = None,
        collate: Callable[..., Batch] = collate,
    ) -> None:
        self._examples = Examples.of(examples)
        lengths = self._examples.lengths
        if lengths.max() > max_length:
            raise ValueError(
                f"an example of {counted(int(lengths.max()), 'token')} exceeds max_length={max_length}"
            )
        self._packed = pack(lengths.tolist(), max_length) if packing else None
        self.rows = len(self._packed or lengths)
        self.fill = int(lengths.sum()) / (self.rows * max_length)
        self.steps_per_epoch = -(-self.rows // batch_size)
        self._settings = {
            "seed": seed, "shuffle": shuffle, "packing": packing,
            "batch_size": batch_size, "max_length": max_length,
        }  # fmt: skip
        make = functools.partial(
            self._make,
            host_rows=host_rows or (0, batch_size),
            buckets=[max_length] if packing else list(buckets or length_buckets(max_length)),
            pad_id=pad_id,
            collate=collate,
        )
        order = grain.MapDataset.range(self.rows)
        order = order.shuffle(seed=seed % 2**32) if shuffle else order
        # `repeat` comes last: an epoch ends with its own partial batch.
        self._order = order.batch(batch_size, batch_fn=list).repeat(epochs)
        self._batches = self._order.map(make)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
        self.dataset = self._batches.to_iter_dataset(options)
        self._iterator = iter(self.dataset)

    def _make(
        self,
        rows: Sequence[int],
        *,
        host_rows: tuple[int, int],
        buckets: Sequence[int],
        pad_id: int,
        collate: Callable[..., Batch],
    ) -> Batch:
        """The part that this host makes of the batch of the rows, as long as all hosts' longest row asks for."""
        chosen = [self._indices(row) for row in rows]
        lengths = self._examples.lengths
        longest = max(int(lengths[indices].sum()) for indices in chosen)
        return collate(
            [[self._examples[index] for index in indices] for indices in chosen[slice(*host_rows)]],
            batch_size=host_rows[1] - host_rows[0],
            length=smallest_bucket(longest, buckets),
            pad_id=pad_id,
        )

    def _indices(self, row: int) -> list[int]:
        return [row] if self._packed is None else self._packed[row]

    def __len__(self) -> int:
        """Batches in all epochs; sys.maxsize if they never end."""
        return len(self._batches)

    def __getitem__(self, step: int) -> Batch:
        """Batch number `step`, counted from 0 over all epochs."""
        return self._batches[step]

    def __iter__(self) -> Batches:
        """Itself: iteration goes on where it stands."""
        return self

    def __next__(self) -> Batch:
        """The next batch."""
        return next(self._iterator)

    def tokens(self, step: int) -> int:
        """Tokens in batch number `step` as a whole, over all hosts."""
        rows = [self._indices(row) for row in self._order[step]]
        return sum(int(self._examples.lengths[indices].sum()) for indices in rows)

    def origins(self, step: int) -> list[str]:
        """The "path:line" of each example in batch number `step`, over all hosts."""
        rows = [self._indices(row) for row in self._order[step]]
        return [self._examples.origin(index) for indices in rows for index in indices]

    def state(self) -> dict[str, Any]:
        """What `restore` needs to yield the batch after the last one yielded; fit for JSON.

        It names no host: all have the same.
        """
        step = int(self._iterator.get_state()["next_index"])
        prints = {"data": self._examples.fingerprint, "sources": self._examples.fingerprints}
        return {"step": step, **self._settings, **prints}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state`.

        Raises:
          UserError: the state is of other data, another seed, or other settings of the batches.
        """
        own = self.state()
        if state.keys() != own.keys():
            raise UserError("the checkpoint's data state is of another version of jaxft")
        for name in self._settings:
            if state[name] != own[name]:
                raise UserError(
                    f"the order of the data changed: {name} was {state[name]} when the checkpoint "
                    f"was written and is {own[name]} now"
                )
        if state["data"] != own["data"]:
            raise UserError(_what_changed(state["sources"], own["sources"]))
        self._iterator = iter(self.dataset)
        self._iterator.set_state({"next_index": state["step"]})


def _what_changed(saved: Mapping[str, str], own: Mapping[str, str]) -> str:
    """The file whose examples are not those of the checkpoint; or that the files are others."""
    changed = [name for name in own if own[name] != saved.get(name, own[name])]
    if changed:
        was, now = (prints[changed[0]][:12] for prints in (saved, own))
        return (
            f"{changed[0]}: its examples changed since the checkpoint was written (fingerprint "
            f"{was}, now {now}); put the old file and chat template back or begin in a new folder"
        )
    if sorted(saved.values()) != sorted(own.values()):
        return (
            f"the data changed: the checkpoint was written with {', '.join(saved)}, and now it is "
            f"{', '.join(own)}"
        )
    return "the data changed: its files are the same, and stand in another order or mixture"
