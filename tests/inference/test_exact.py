"""Training's program says which tokens of a rollout are not its own, and has them drawn again."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxft.formats.huggingface import load
from jaxft.inference import exact
from jaxft.inference.exact import exactly, group_rows, score
from jaxft.inference.rollouts import Prompts, Rollouts, prompts_of, sample
from jaxft.tree import map_with_paths

GOLDEN = Path(__file__).parents[1] / "golden" / "models"
GROUP, NEW, KEY = 3, 10, 5
EOS = (2, 7, 8, 9, 11, 12)
ENDS = {"eos_ids": EOS}


@functools.cache
def policy() -> tuple[Any, Any]:
    model, params = load(GOLDEN / "gemma2")
    return model.config, params


@functools.cache
def asked() -> Prompts:
    rng = np.random.default_rng(1)
    tokens = rng.integers(3, 90, (3, 6))
    segments = (np.arange(6)[None, :] >= np.asarray([0, 3, 1])[:, None]).astype(np.int32)
    rules = {"temperature": 1.2, "top_k": [0, 6, 0], "top_p": [1.0, 1.0, 0.9]}
    return prompts_of(tokens * segments, segments, group=GROUP, limits=NEW, **rules)


def drawn(params: Any) -> Rollouts:
    return sample(policy()[0], params, asked(), jax.random.key(KEY), max_new_tokens=NEW, **ENDS)


def disturbed(params: Any) -> Any:
    """The parameters as if a sampler computed with other roundings, and far coarser ones."""

    def move(path: str, leaf: Any) -> Any:
        noise = jax.random.normal(jax.random.key(len(path)), leaf.shape, leaf.dtype)
        return leaf * (1.0 + 0.05 * noise)

    return map_with_paths(move, params)


def test_in_float32_no_token_is_drawn_otherwise():
    config, params = policy()
    found = drawn(params)
    scored = score(config, params, asked(), jax.random.key(KEY), found, rows=2)
    assert not scored.differs.any()
    np.testing.assert_allclose(scored.log_probabilities, found.log_probabilities, atol=1e-4)
    np.testing.assert_allclose(scored.log_masses, found.log_masses, atol=1e-4)


def test_exact_rollouts_are_those_of_the_trained_policy():
    config, params = policy()
    want, off = drawn(params), drawn(disturbed(params))
    key = jax.random.key(KEY)
    assert score(config, params, asked(), key, off).differs.any()
    assert (want.tokens != off.tokens).any()
    found = exactly(config, params, asked(), key, off, **ENDS)
    assert found.mismatches > 0
    assert found.redrawn > 0
    assert not found.scored.differs.any()
    for name in ("tokens", "lengths", "truncated", "group"):
        np.testing.assert_array_equal(getattr(found.rollouts, name), getattr(want, name))
    again = score(config, params, asked(), key, want)
    np.testing.assert_allclose(found.rollouts.log_probabilities, again.log_probabilities, atol=1e-4)


def test_nothing_is_compiled_anew_however_many_tokens_differ(monkeypatch):
    config, params = policy()
    want, key, shapes, before = drawn(params), jax.random.key(KEY), list[Any](), exact.sample

    def watched(config: Any, params: Any, prompts: Any, *rest: Any, **settings: Any) -> Any:
        shapes.append((prompts.tokens.shape, settings["slots"]))
        return before(config, params, prompts, *rest, **settings)

    monkeypatch.setattr(exact, "sample", watched)
    exactly(config, params, asked(), key, drawn(disturbed(params)), **ENDS)
    programs = exact.run_score._cache_size()
    tokens = want.tokens.copy()
    tokens[4, 0] += 1
    found = exactly(config, params, asked(), key, want._replace(tokens=tokens), **ENDS)
    assert found.mismatches > 0
    np.testing.assert_array_equal(found.rollouts.tokens, want.tokens)
    assert len(shapes) == 2
    assert len(set(shapes)) == 1
    assert exact.run_score._cache_size() == programs


def test_a_group_stands_behind_its_prompt():
    found = drawn(policy()[1])
    rows = group_rows(asked(), found)
    for row in range(3):
        known = int(asked().segments[row].sum())
        for number in range(GROUP):
            own = rows["branches"][row] == number + 1
            length = found.lengths[row * GROUP + number]
            told = found.tokens[row * GROUP + number, :length]
            np.testing.assert_array_equal(rows["tokens"][row][own], told)
            np.testing.assert_array_equal(rows["positions"][row][own], known + np.arange(length))
            assert rows["index"][row, number * NEW] == known - 1


@pytest.mark.thorough
def test_exact_through_the_public_function():
    import jaxft

    model, params = load(GOLDEN / "gemma2")
    settings = {"group": 2, "max_new_tokens": 6, "eos_ids": EOS}
    plain, exactly_drawn = (
        jaxft.rollout(model, params, [[5, 6, 7], [8]], exact=wanted, **settings)
        for wanted in (False, True)
    )
    np.testing.assert_array_equal(plain[0], exactly_drawn[0])
    np.testing.assert_allclose(plain[1], exactly_drawn[1], atol=1e-4)
