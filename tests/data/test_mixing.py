"""Mixtures: shares, order, and what an epoch holds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxft.data import Batches, Example, Examples
from jaxft.data.mixing import mix, mix_order
from jaxft.errors import UserError

SIZES = st.lists(st.tuples(st.integers(1, 40), st.floats(0.1, 10)), min_size=1, max_size=4)


def examples_of(sizes):
    """Examples whose first token is their number."""
    return Examples.of(
        Example(np.array([n, 7, 8], np.int32), np.array([False, True, True]), f"s{source}:{n}")
        for n, source in enumerate(np.repeat(np.arange(len(sizes)), sizes))
    )


@given(sources=SIZES)
def test_an_epoch_holds_every_example_and_the_shares_all_the_way(sources):
    sizes, weights = zip(*sources, strict=True)
    order = mix_order(sizes, weights)
    assert set(order.tolist()) == set(range(sum(sizes)))
    source = np.repeat(np.arange(len(sizes)), sizes)[order]
    for index, weight in enumerate(weights):
        seen = np.cumsum(source == index)
        assert abs(seen[-1] - len(order) * weight / sum(weights)) <= len(sizes)
        assert np.abs(seen - seen[-1] * np.arange(1, len(order) + 1) / len(order)).max() <= len(
            sizes
        )
        times = np.bincount(order[source == index] - sum(sizes[:index]))
        assert times.max() - times.min() <= 1


def test_equal_weights_of_equal_sources_take_turns():
    assert mix_order([3, 3], [1, 1]).tolist() == [0, 3, 1, 4, 2, 5]


def test_batches_hold_the_mixture_and_know_it():
    base = examples_of([2, 4])
    mixed = mix(base, ["a", "b"], (2, 4), (2, 1))
    assert [int(e.tokens[0]) for e in mixed] == mix_order([2, 4], [2, 1]).tolist()
    assert [mixed.origin(i) for i in range(3)] == ["s0:0", "s1:2", "s0:1"]
    assert mixed.fingerprint not in (
        base.fingerprint,
        mix(base, ["a", "b"], (2, 4), (1, 1)).fingerprint,
    )
    batches = Batches(
        mixed, batch_size=4, max_length=8, packing=False, shuffle=True, seed=1, pad_id=0, epochs=1
    )
    seen = np.concatenate([batch["tokens"][batch["segments"][:, 0] > 0, 0] for batch in batches])
    assert sorted(seen.tolist()) == sorted(mix_order([2, 4], [2, 1]).tolist())


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ((2, 4), (1,), "has 1 weight, and config.data.train 2 sources"),
        ((2, 0), (1, 1), "b: none of its rows has a trained token"),
        ((2, 4), (1e6, 1), r"each of the 2 examples of a 2000000 times; give it less weight"),
    ],
)
def test_a_mixture_that_cannot_be_is_one_line(sizes, weights, message):
    with pytest.raises(UserError, match=message):
        mix(examples_of(sizes), ["a", "b"], sizes, weights)
