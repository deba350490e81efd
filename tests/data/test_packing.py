from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxft.data import Example, length_buckets, pack
from jaxft.data.packing import collate, smallest_bucket

lengths_and_room = st.integers(1, 60).flatmap(
    lambda room: st.tuples(st.lists(st.integers(1, room), max_size=60), st.just(room))
)


def example(start, length):
    trained = np.arange(length) > 0
    return Example(np.arange(start, start + length, dtype=np.int32), trained, f"t:{start}")


def plain_best_fit(lengths, room):
    """The algorithm, plainly: each sequence, longest first, to the fullest row with room."""
    rows = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        sums = [sum(lengths[i] for i in row) for row in rows]
        fitting = [s for s in sums if s + lengths[index] <= room]
        if fitting:
            rows[sums.index(max(fitting))].append(index)
        else:
            rows.append([index])
    return rows


@given(lengths_and_room)
def test_packing_keeps_every_sequence_once_and_within_the_room(case):
    lengths, room = case
    rows = pack(lengths, room)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= room for row in rows)


@given(lengths_and_room)
def test_packing_is_best_fit_decreasing(case):
    """Rows of equal room are interchangeable: the number of rows and their sums are what counts."""
    lengths, room = case
    rows, plain = pack(lengths, room), plain_best_fit(lengths, room)
    assert sorted(sum(lengths[i] for i in r) for r in rows) == sorted(
        sum(lengths[i] for i in r) for r in plain
    )


@given(lengths_and_room)
def test_rows_stand_in_the_order_of_their_first_sequence(case):
    rows = pack(*case)
    assert rows == sorted(sorted(row) for row in rows)


def test_rows_are_filled_to_95_percent_on_lengths_like_those_of_e2e():
    lengths = np.random.default_rng(0).normal(60, 15, 2000).clip(15, 130).astype(int).tolist()
    for room in (512, 1024):
        assert sum(lengths) / (len(pack(lengths, room)) * room) > 0.95


@pytest.mark.parametrize("lengths", [[0], [5, 11]])
def test_a_length_out_of_range_is_refused(lengths):
    with pytest.raises(ValueError, match="between 1 and 10"):
        pack(lengths, 10)


@given(lengths_and_room)
def test_a_packed_batch_holds_every_token_in_a_segment_of_its_own(case):
    lengths, room = case
    examples = [example(1000 * i + 1, length) for i, length in enumerate(lengths)]
    rows = pack(lengths, room)
    packed = [[examples[i] for i in row] for row in rows]
    batch = collate(packed, batch_size=len(rows) + 1, length=room, pad_id=7)
    for array in batch.values():
        assert array.shape == (len(rows) + 1, room)
    for index, row in enumerate(packed):
        for segment, sequence in enumerate(row, start=1):
            place = batch["segments"][index] == segment
            np.testing.assert_array_equal(batch["tokens"][index][place], sequence.tokens)
            np.testing.assert_array_equal(batch["weights"][index][place], sequence.trained)
            np.testing.assert_array_equal(
                batch["positions"][index][place], np.arange(len(sequence.tokens))
            )
    unused = batch["segments"] == 0
    assert (batch["tokens"][unused] == 7).all()
    assert not batch["weights"][unused].any()
    assert (~unused).sum() == sum(lengths)


def test_dtypes_of_a_batch():
    batch = collate([[example(1, 3)]], batch_size=1, length=4, pad_id=0)
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "tokens": "int32", "segments": "int32", "positions": "int32", "weights": "float32",
    }  # fmt: skip


def test_the_first_token_of_a_segment_is_never_a_target():
    eager = Example(np.array([5, 6], np.int32), np.array([True, True]), "t:1")
    batch = collate([[eager, eager]], batch_size=1, length=5, pad_id=0)
    assert batch["weights"].tolist() == [[0, 1, 0, 1, 0]]


@given(st.integers(2, 5000))
def test_buckets_ascend_to_the_maximum_and_waste_at_most_a_third(max_length):
    buckets = length_buckets(max_length)
    assert buckets == sorted(set(buckets))
    assert buckets[-1] == max_length
    for length in range(64, max_length + 1, 7):
        assert length <= smallest_bucket(length, buckets) <= max(64, 1.5 * length)
