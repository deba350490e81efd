"""Examples as flat arrays are the examples, in memory or on the disk."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxft.data import Example, Examples
from jaxft.data import store as module

ORIGINS = st.sampled_from(["a.jsonl:1", "a.jsonl:22", "b:c.jsonl:3", "tfds:e2e", "x:y"])
SEQUENCES = st.lists(
    st.tuples(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9), ORIGINS), max_size=12
)


def examples_of(sequences):
    return [
        Example(np.asarray(ids, np.int32), np.asarray(ids) % 2 == 0, origin)
        for ids, origin in sequences
    ]


def same(left, right):
    return (
        left.tokens.tolist() == right.tokens.tolist()
        and left.trained.tolist() == right.trained.tolist()
        and left.origin == right.origin
        and (left.tokens.dtype, left.trained.dtype) == (np.int32, np.bool_)
    )


@pytest.mark.parametrize("limit", [2**26, 1, 7])
@given(sequences=SEQUENCES)
def test_what_is_put_in_comes_out(limit, sequences):
    """Also where temporary files take what exceeds a limit."""
    examples = examples_of(sequences)
    before, module.IN_MEMORY = module.IN_MEMORY, limit
    try:
        stored = Examples.of(examples)
    finally:
        module.IN_MEMORY = before
    assert len(stored) == len(examples)
    assert all(same(*pair) for pair in zip(stored, examples, strict=True))
    assert all(same(*pair) for pair in zip(stored[1:3], examples[1:3], strict=True))
    assert stored.lengths.tolist() == [len(example.tokens) for example in examples]
    assert stored.fingerprint == Examples.of(examples).fingerprint


def test_beyond_the_limit_the_tokens_are_on_the_disk(monkeypatch):
    monkeypatch.setattr(module, "IN_MEMORY", 4)
    stored = Examples.of(examples_of([([1, 2, 3], "a:1"), ([4, 5, 6], "a:2"), ([7], "a:3")]))
    assert isinstance(stored.tokens, np.memmap)
    assert stored[2].tokens.tolist() == [7]


@given(SEQUENCES, SEQUENCES)
def test_a_sources_fingerprint_is_of_its_examples_alone(left, right):
    """Wherever they stand among those of others."""
    ours = [(ids, "ours:1") for ids, _ in left]
    theirs = [(ids, "theirs:1") for ids, _ in right]
    mixed = [pair for i in range(12) for pair in (*ours[i : i + 1], *theirs[i : i + 1])]
    alone = Examples.of(examples_of(ours)).fingerprints
    among = Examples.of(examples_of(mixed)).fingerprints
    assert alone.get("ours") == among.get("ours")


@given(SEQUENCES, SEQUENCES)
def test_fingerprints_differ_where_examples_do(left, right):
    def content(sequences):
        return [ids for ids, _ in sequences]

    prints = [
        Examples.of(examples_of([(ids, "a:1") for ids in content(each)])).fingerprint
        for each in (left, right)
    ]
    assert (prints[0] == prints[1]) == (content(left) == content(right))
