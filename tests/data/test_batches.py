from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
from grain.experimental import LimitIterDataset, assert_equal_output_after_checkpoint
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


def changed(examples, index, **changes):
    return [
        *examples[:index],
        dataclasses.replace(examples[index], **changes),
        *examples[index + 1 :],
    ]


@pytest.mark.parametrize(
    "other",
    [
        lambda examples: examples[:-1],
        lambda examples: [examples[1], examples[0], *examples[2:]],
        lambda examples: changed(examples, 7, tokens=examples[7].tokens[::-1].copy()),
        lambda examples: changed(examples, 7, trained=~examples[7].trained),
    ],
    ids=["an example less", "another order", "other tokens", "other trained tokens"],
)
def test_a_state_of_other_data_is_refused(other):
    """Also where rows and steps are as many as before; the file is named."""
    examples = make_examples(20)
    state = json.loads(json.dumps(batches_of(examples).state()))
    with pytest.raises(UserError, match=r"^t: its examples changed since the checkpoint"):
        batches_of(other(examples)).restore(state)
    batches_of(list(examples)).restore(state)


def from_files(*names):
    """Four examples, each from the file named."""
    return [
        dataclasses.replace(e, origin=f"{name}:{i}")
        for i, (e, name) in enumerate(zip(make_examples(4), names, strict=True))
    ]


def test_the_file_that_changed_is_named():
    state = batches_of(from_files("a", "a", "b", "b")).state()
    one = from_files("a", "a", "b", "b")
    with pytest.raises(UserError, match=r"^b: its examples changed"):
        batches_of(changed(one, 3, tokens=one[3].tokens + 1)).restore(state)
    with pytest.raises(UserError, match=r"written with a, b, and now it is a, c"):
        batches_of(from_files("a", "a", "a", "c")[:2] + from_files("a", "c", "c", "c")[3:]).restore(
            state
        )


def test_a_renamed_file_is_the_same_data_and_another_mixture_is_not():
    state = batches_of(from_files("a", "a", "b", "b")).state()
    batches_of(from_files("c", "c", "d", "d")).restore(state)
    one = from_files("a", "a", "b", "b")
    with pytest.raises(UserError, match="another order or mixture"):
        batches_of([one[2], one[0], one[1], one[3]]).restore(state)


@pytest.mark.parametrize(
    "settings",
    [{"seed": 4}, {"shuffle": False}, {"packing": True}, {"batch_size": 5}, {"max_length": 33}],
)
def test_a_state_of_another_order_is_refused(settings):
    state = batches_of(make_examples(20)).state()
    ((name, value),) = settings.items()
    with pytest.raises(UserError, match=f"{name} was .* and is {value} now"):
        batches_of(make_examples(20), buckets=None, **settings).restore(state)


def test_a_state_that_is_none_is_refused():
    with pytest.raises(UserError, match="another version"):
        batches_of(make_examples(20)).restore({"step": 3, "rows": 20})


@pytest.mark.parametrize("packing", [False, True])
def test_grains_own_test_of_a_checkpoint_at_every_step(packing):
    """Two epochs and a half: on the boundary and in a later epoch as well."""
    batches = batches_of(make_examples(22), packing=packing)
    steps = 2 * batches.steps_per_epoch + batches.steps_per_epoch // 2
    assert_equal_output_after_checkpoint(LimitIterDataset(batches.dataset, count=steps))


class Stateful:
    """Batches as Grain's test wants a dataset: an iterator anew with each `iter`."""

    def __init__(self, make, steps):
        self.make, self.steps = make, steps

    def __iter__(self):
        return StatefulIterator(self.make(), self.steps)


class StatefulIterator:
    def __init__(self, batches, steps):
        self.batches, self.steps = batches, steps

    def __iter__(self):
        return self

    def __next__(self):
        if self.batches.state()["step"] == self.steps:
            raise StopIteration
        return next(self.batches)

    def get_state(self):
        return self.batches.state()

    def set_state(self, state):
        self.batches.restore(json.loads(json.dumps(state)))


def test_our_state_passes_grains_test_as_well():
    examples = make_examples(22)
    make = lambda: batches_of(examples, packing=True)  # noqa: E731
    assert_equal_output_after_checkpoint(Stateful(make, 2 * make().steps_per_epoch + 1))


def of_hosts(examples, count, **settings):
    """The iterators of so many hosts, each of an equal share of the 4 rows."""
    share = 4 // count
    rows = [(host * share, (host + 1) * share) for host in range(count)]
    return [batches_of(examples, host_rows=part, **settings) for part in rows]


def joined(parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_hosts_together_make_the_same_global_batches(count, packing):
    """Rows, their order and the length of each batch, over more than an epoch."""
    examples = make_examples(22)
    whole = batches_of(examples, packing=packing)
    hosts = of_hosts(examples, count, packing=packing)
    for _ in range(whole.steps_per_epoch + 2):
        assert_equal(joined([next(host) for host in hosts]), next(whole))


@settings(deadline=None, max_examples=8)
@given(
    counts=st.lists(st.sampled_from([1, 2, 4]), min_size=2, max_size=4),
    stops=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    packing=st.booleans(),
)
def test_other_hosts_go_on_without_repeating_or_skipping(counts, stops, packing):
    """A run that is stopped and taken up by as many hosts as there happen to be."""
    examples = make_examples(22)
    whole = batches_of(examples, packing=packing)
    state = whole.state()
    for count, stop in zip(counts, stops, strict=False):
        hosts = of_hosts(examples, count, packing=packing)
        for host in hosts:
            host.restore(json.loads(json.dumps(state)))
        for _ in range(stop):
            assert_equal(joined([next(host) for host in hosts]), next(whole))
        state = hosts[0].state()
        assert all(host.state() == state for host in hosts)


@given(
    lengths=st.lists(st.integers(2, 32), min_size=1, max_size=40),
    packing=st.booleans(),
    shuffle=st.booleans(),
    batch_size=st.integers(1, 5),
)
@settings(deadline=None, max_examples=50)
def test_an_epoch_holds_every_token_once(lengths, packing, shuffle, batch_size):
    """Every token of the data has a number of its own; so have those that batches hold."""
    edges = np.cumsum([0, *lengths])
    examples = [
        Example(np.arange(a, b, dtype=np.int32), np.arange(a, b) % 2 == 0, "t:1")
        for a, b in itertools.pairwise(edges)
    ]
    batches = batches_of(
        examples, packing=packing, shuffle=shuffle, batch_size=batch_size, epochs=2
    )
    for epoch in range(2):
        found, targets = [], 0
        for step in range(batches.steps_per_epoch):
            batch = batches[epoch * batches.steps_per_epoch + step]
            found += batch["tokens"][batch["segments"] > 0].tolist()
            targets += int(batch["weights"].sum())
            assert batches.tokens(epoch * batches.steps_per_epoch + step) == np.count_nonzero(
                batch["segments"]
            )
        assert sorted(found) == list(range(sum(lengths)))
        assert targets == sum(int(e.trained[1:].sum()) for e in examples)


def test_a_batch_knows_where_its_examples_stand():
    examples = make_examples(22)
    batches = batches_of(examples, packing=True, epochs=2)
    for step, batch in enumerate(batches):
        assert batches.origins(step) == [f"t:{number + 1}" for number in numbers(batch)]


def test_an_example_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="exceeds max_length=8"):
        batches_of(make_examples(20), max_length=8)
