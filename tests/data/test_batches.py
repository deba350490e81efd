from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.data import Batches, Example
from jaxft.errors import UserError


def make_examples(count, seed=0):
    """Sequences of 2 to 30 tokens that begin with their own number."""
    generator = np.random.default_rng(seed)
    examples = []
    for number in range(count):
        length = int(generator.integers(2, 31))
        tokens = np.concatenate([[number], generator.integers(1000, 2000, length - 1)])
        examples.append(Example(tokens.astype(np.int32), np.arange(length) > 0, f"t:{number + 1}"))
    return examples


def batches_of(examples, **changes):
    arguments = {
        "batch_size": 4,
        "max_length": 32,
        "packing": False,
        "shuffle": True,
        "seed": 3,
        "pad_id": 0,
        "epochs": None,
        "buckets": (8, 16, 32),
    }
    return Batches(examples, **(arguments | changes))


def numbers(batch):
    """The numbers of a batch's examples, row by row."""
    starts = (batch["positions"] == 0) & (batch["segments"] > 0)
    return batch["tokens"][starts].tolist()


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


def test_in_order_rows_stand_as_in_the_file_and_the_last_batch_is_filled_with_empty_rows():
    examples = make_examples(78)
    batches = list(batches_of(examples, shuffle=False, epochs=1))
    assert len(batches) == 20
    assert [numbers(b) for b in batches[:19]] == [list(range(i, i + 4)) for i in range(0, 76, 4)]
    assert numbers(batches[19]) == [76, 77]
    assert batches[19]["tokens"].shape[0] == 4
    assert not batches[19]["segments"][2:].any()
    assert not batches[19]["weights"][2:].any()


def test_a_batch_is_as_long_as_the_smallest_bucket_that_holds_its_longest_row():
    examples = make_examples(40)
    for step, batch in enumerate(batches_of(examples, shuffle=False, epochs=1)):
        longest = max(len(e.tokens) for e in examples[4 * step : 4 * step + 4])
        assert batch["tokens"].shape == (4, next(n for n in (8, 16, 32) if n >= longest))


@pytest.mark.parametrize("packing", [False, True])
def test_each_epoch_holds_every_example_once_in_another_order(packing):
    examples = make_examples(30)
    batches = batches_of(examples, packing=packing, epochs=3)
    orders = []
    for _ in range(3):
        epoch = [next(batches) for _ in range(batches.steps_per_epoch)]
        orders.append([n for batch in epoch for n in numbers(batch)])
        assert sorted(orders[-1]) == list(range(30))
    assert orders[0] != orders[1] != orders[2]
    with pytest.raises(StopIteration):
        next(batches)


def test_the_order_comes_from_the_seed_alone():
    examples = make_examples(30)
    first = [numbers(b) for b in batches_of(examples, epochs=2)]
    assert [numbers(b) for b in batches_of(examples, epochs=2)] == first
    assert [numbers(b) for b in batches_of(examples, epochs=2, seed=4)] != first


@pytest.mark.parametrize("seed", [-1, 2**40 + 5])
def test_any_integer_is_a_seed(seed):
    first = next(batches_of(make_examples(30), seed=seed))
    assert_equal(next(batches_of(make_examples(30), seed=seed % 2**32)), first)


def test_packed_rows_have_the_full_length_and_lose_no_token():
    examples = make_examples(30)
    batches = batches_of(examples, packing=True, epochs=1, buckets=None)
    whole = list(batches)
    assert {batch["tokens"].shape for batch in whole} == {(4, 32)}
    tokens = sum(int((batch["segments"] > 0).sum()) for batch in whole)
    assert tokens == sum(len(example.tokens) for example in examples)
    assert batches.fill == tokens / (32 * batches.rows)


@settings(deadline=None, max_examples=25)
@given(stop=st.integers(0, 25), packing=st.booleans(), shuffle=st.booleans())
def test_restoring_goes_on_as_if_never_stopped(stop, packing, shuffle):
    """Also in a later epoch and on the boundary of two; the state passes through JSON."""
    examples = make_examples(22)
    running = batches_of(examples, packing=packing, shuffle=shuffle)
    for _ in range(stop):
        next(running)
    fresh = batches_of(examples, packing=packing, shuffle=shuffle)
    fresh.restore(json.loads(json.dumps(running.state())))
    for _ in range(8):
        assert_equal(next(fresh), next(running))
    assert fresh.state() == running.state()


def test_the_state_does_not_run_ahead_with_the_batches_made_ahead():
    batches = batches_of(make_examples(40))
    for step in range(5):
        assert batches.state()["step"] == step
        next(batches)


def test_a_state_goes_back_too():
    batches = batches_of(make_examples(20))
    state = batches.state()
    first = next(batches)
    next(batches)
    batches.restore(state)
    assert_equal(next(batches), first)


def test_any_batch_can_be_had_by_its_number():
    examples = make_examples(22)
    batches = batches_of(examples, epochs=2)
    for step, batch in enumerate(batches_of(examples, epochs=2)):
        assert_equal(batches[step], batch)
    assert len(batches) == 2 * batches.steps_per_epoch


def test_a_state_of_other_data_is_refused():
    state = batches_of(make_examples(20)).state()
    with pytest.raises(
        UserError, match="rows was 20 when the checkpoint was written and is 24 now"
    ):
        batches_of(make_examples(24)).restore(state)
    with pytest.raises(UserError, match=r"steps per epoch was 5 .* is 4 now"):
        batches_of(make_examples(20), batch_size=5).restore(state)


def test_an_example_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="exceeds max_length=8"):
        batches_of(make_examples(20), max_length=8)
