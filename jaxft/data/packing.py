"""How sequences of many lengths become rows of few shapes: packed, or padded to a bucket."""

from __future__ import annotations

import bisect
import collections
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int32

from jaxft.data.store import Example

Batch = dict[str, Int32[np.ndarray, "batch length"] | Float32[np.ndarray, "batch length"]]


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Best-fit decreasing: the longest sequence first, each to the fullest row that has room.

    Rows stand in the order of their first sequence, and sequences in a row in their own order.

    >>> pack([2, 5, 3, 1], max_length=6)
    [[0, 2], [1, 3]]

    Args:
      lengths: of the sequences, each between 1 and `max_length`.
      max_length: room of a row.

    Returns:
      The indices of the sequences in each row; each index once.

    Raises:
      ValueError: a length out of range.

    The algorithm is "best-fit packing" of https://arxiv.org/abs/2404.10830.
    """
    if any(not 1 <= length <= max_length for length in lengths):
        raise ValueError(f"lengths must be between 1 and {max_length}")
    rows: list[list[int]] = []
    with_room: dict[int, collections.deque[int]] = collections.defaultdict(collections.deque)
    rooms: list[int] = []  # the keys of `with_room` that hold a row, ascending
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(rooms, lengths[index])
        if at == len(rooms):
            row, room = len(rows), max_length
            rows.append([])
        else:
            room = rooms[at]
            row = with_room[room].popleft()
            if not with_room[room]:
                del rooms[at]
        rows[row].append(index)
        left = room - lengths[index]
        if left:
            if not with_room[left]:
                bisect.insort(rooms, left)
            with_room[left].append(row)
    return sorted(sorted(row) for row in rows)


def length_buckets(max_length: int, smallest: int = 64) -> list[int]:
    """Lengths that batches are padded to: powers of two and the middles between, then `max_length`.

    At most a third of a row is lost, and a model is compiled for few shapes.

    >>> length_buckets(512)
    [64, 96, 128, 192, 256, 384, 512]
    """
    lengths, power = [], smallest
    while power < max_length:
        lengths += [length for length in (power, power + power // 2) if length < max_length]
        power *= 2
    return [*lengths, max_length]


def smallest_bucket(length: int, buckets: Sequence[int]) -> int:
    """The first of the ascending `buckets` that holds `length`."""
    return buckets[bisect.bisect_left(buckets, length)]


def collate(
    rows: Sequence[Sequence[Example]], *, batch_size: int, length: int, pad_id: int
) -> Batch:
    """Writes rows of sequences into one batch; rows that are missing at the end stay empty.

    Args:
      rows: at most `batch_size` rows; the sequences of a row have at most `length` tokens together.
      batch_size: rows of the result.
      length: positions of a row.
      pad_id: the token in unused positions.

    Returns:
      tokens, segments (0 where unused, then 1, 2, ...), positions (from 0 in each segment) as
      int32, and weights (1.0 where the token is a trained target) as float32; all (batch, length).
    """
    shape = (batch_size, length)
    tokens = np.full(shape, pad_id, dtype=np.int32)
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    weights = np.zeros(shape, np.float32)
    for index, row in enumerate(rows):
        start = 0
        for segment, example in enumerate(row, start=1):
            part = (index, slice(start, start + len(example.tokens)))
            tokens[part] = example.tokens
            segments[part] = segment
            positions[part] = np.arange(len(example.tokens))
            weights[part] = example.trained
            start += len(example.tokens)
    weights[positions == 0] = 0.0  # nothing in its segment stands before it
    return {"tokens": tokens, "segments": segments, "positions": positions, "weights": weights}
