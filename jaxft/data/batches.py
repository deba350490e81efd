"""The iterator of batches: order from the seed, exact state after every batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import grain

from jaxft.data.examples import Example
from jaxft.data.packing import Batch, collate, length_buckets, pack, smallest_bucket
from jaxft.errors import UserError

AHEAD = 4  # batches made while the device works


class Batches:
    """Yields batches of `batch_size` rows, epoch after epoch, made ahead of time in a thread.

    Batch n is a pure function of (examples, seed, n), so the state is one number and any batch can
    be had by `batches[n]`. An epoch holds every example once; its last batch is filled up with
    empty rows (segment 0, weight 0). Without `shuffle`, rows stand in the order of the examples;
    with it, each epoch has an order of its own.

    Packed rows have `max_length` places. Otherwise a row holds one example, and a batch is as long
    as the smallest bucket that holds its longest row; the order is never changed for that.

    Args:
      examples: to train on, none longer than `max_length`.
      batch_size: rows of a batch.
      max_length: places of a packed row, and the largest bucket.
      packing: several examples in a row.
      shuffle: another order in each epoch.
      seed: of the order; any integer, of which 32 bits count.
      pad_id: the token in unused places.
      epochs: how many; None goes on for ever.
      buckets: ascending lengths, the last at least the longest example; None: `length_buckets`.
      collate: makes the batch of rows of examples; by default `jaxft.data.packing.collate`.
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
        collate: Callable[..., Batch] = collate,
    ) -> None:
        lengths = [len(example.tokens) for example in examples]
        if max(lengths) > max_length:
            raise ValueError(f"an example of {max(lengths)} tokens exceeds max_length={max_length}")
        rows = pack(lengths, max_length) if packing else [[i] for i in range(len(lengths))]
        self.rows = len(rows)
        self.fill = sum(lengths) / (len(rows) * max_length)
        self.steps_per_epoch = -(-len(rows) // batch_size)
        make = functools.partial(
            _make_batch,
            examples,
            batch_size=batch_size,
            buckets=[max_length] if packing else list(buckets or length_buckets(max_length)),
            pad_id=pad_id,
            collate=collate,
        )
        order = grain.MapDataset.source(rows)
        order = order.shuffle(seed=seed % 2**32) if shuffle else order
        # `repeat` comes last: an epoch ends with its own partial batch.
        self._batches = order.batch(batch_size, batch_fn=make).repeat(epochs)
        self._iterator = self._new_iterator()

    def _new_iterator(self) -> grain.DatasetIterator:
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
        return iter(self._batches.to_iter_dataset(options))

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

    def state(self) -> dict[str, Any]:
        """What `restore` needs to yield the batch after the last one yielded; fit for JSON."""
        step = int(self._iterator.get_state()["next_index"])
        return {"step": step, "rows": self.rows, "steps_per_epoch": self.steps_per_epoch}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a `state`.

        Raises:
          UserError: the state is of other data or of another batch size.
        """
        own = self.state()
        for name in ("rows", "steps_per_epoch"):
            if state[name] != own[name]:
                raise UserError(
                    f"the data changed: {name.replace('_', ' ')} was {state[name]} when the "
                    f"checkpoint was written and is {own[name]} now"
                )
        self._iterator = self._new_iterator()
        self._iterator.set_state({"next_index": state["step"]})


def _make_batch(
    examples: Sequence[Example],
    rows: Sequence[Sequence[int]],
    *,
    batch_size: int,
    buckets: Sequence[int],
    pad_id: int,
    collate: Callable[..., Batch],
) -> Batch:
    """The batch of the rows, each given by the indices of its examples."""
    chosen = [[examples[index] for index in row] for row in rows]
    longest = max(sum(len(example.tokens) for example in row) for row in chosen)
    length = smallest_bucket(longest, buckets)
    return collate(chosen, batch_size=batch_size, length=length, pad_id=pad_id)
