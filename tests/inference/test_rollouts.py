"""Rollouts are what their definition says: each token the argmax of the whole pass's scores plus its own noise."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft.errors import UserError
from jaxft.formats.huggingface import load
from jaxft.inference.rollouts import Rollouts, sample_rollouts, slots_of
from jaxft.inference.sampling import draw
from jaxft.mesh import AXES
from jaxft.models.transformer import hidden_states, logits
from jaxft.training.sharding import make_mesh, shardings
from jaxft.tree import map_with_paths

GOLDEN = Path(__file__).parents[1] / "golden" / "models"
LENGTHS, GROUP, NEW = (9, 5, 7), 4, 12
EOS = (2, 7, 8, 9, 11, 12, 13, 20)  # many, so that completions end early
RULES = {"temperature": 1.3, "top_k": [0, 5, 0], "top_p": [1.0, 1.0, 0.8]}


@functools.cache
def folder(name: str) -> tuple[Any, Any]:
    model, params = load(GOLDEN / name)
    return model.config, params


def prompts() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens, segments = np.zeros((2, len(LENGTHS), max(LENGTHS)), np.int32)
    for row, length in enumerate(LENGTHS):
        tokens[row, -length:], segments[row, -length:] = rng.integers(3, 90, length), 1
    return tokens, segments


@functools.cache
def sampled(name: str = "gemma2", slots: int = 0) -> Rollouts:
    """By default of the model with windows and soft caps."""
    settings = {"group": GROUP, "max_new_tokens": NEW, "eos_ids": EOS, "slots": slots, **RULES}
    return sample_rollouts(*folder(name), *prompts(), jax.random.key(3), **settings)


@functools.partial(jax.jit, static_argnums=0)
def scores_of(config: Any, params: Any, tokens: jax.Array, segments: jax.Array) -> jax.Array:
    return logits(config, params, hidden_states(config, params, tokens, segments))


@pytest.mark.parametrize("name", ["gemma2", pytest.param("gpt2", marks=pytest.mark.thorough)])
def test_each_token_is_drawn_from_the_whole_passs_scores(name):
    found = sampled(name)
    tokens, _ = prompts()
    for row, length in enumerate(LENGTHS):
        mine = slice(row * GROUP, (row + 1) * GROUP)
        told = np.zeros((GROUP, max(LENGTHS) + NEW), np.int32)
        told[:, :length] = tokens[row, -length:]
        told[:, length : length + NEW] = found.tokens[mine]
        scores = scores_of(*folder(name), told, np.ones_like(told))
        for number in range(GROUP):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), row), number)
            keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(NEW))
            rules = (RULES["temperature"], RULES["top_k"][row], RULES["top_p"][row])
            rules = (jnp.full(NEW, x) for x in rules)
            want = draw(scores[number, length - 1 : length - 1 + NEW], keys, *rules)
            here = row * GROUP + number
            stop = found.lengths[here]
            np.testing.assert_array_equal(found.tokens[here, :stop], want.token[:stop])
            for ours, theirs in ((found.log_probabilities, want[1]), (found.log_masses, want[2])):
                np.testing.assert_allclose(ours[here, :stop], theirs[:stop], atol=1e-4)
                assert not ours[here, stop:].any()
            ends = np.isin(found.tokens[here, :stop], EOS)
            assert not ends[:-1].any()
            assert ends[-1] != found.truncated[here]
            assert stop == NEW or ends[-1]
    assert (found.log_masses[GROUP:] < 0).any()
    assert not found.log_masses[:GROUP].any()
    assert len(set(found.lengths.tolist())) > 3


def test_the_number_of_slots_changes_nothing():
    want = sampled()
    found = sampled(slots=2)
    np.testing.assert_array_equal(found.tokens, want.tokens)
    np.testing.assert_allclose(found.log_probabilities, want.log_probabilities, atol=1e-4)
    np.testing.assert_array_equal(found.lengths, want.lengths)
    assert found.slot_steps[0] == want.slot_steps[0] == (want.lengths - 1).sum()
    assert found.busy > want.busy


def test_how_many_slots():
    assert slots_of(64, 0) == 16
    assert slots_of(6, 100) == 6


def skewed(count: int) -> np.ndarray:
    """Lengths of mean 20 and at most 64 for 8 completions each."""
    lengths = np.random.default_rng(0).exponential(20, (count, 8))
    return np.clip(np.ceil(lengths), 1, 64).astype(np.int32)


def test_on_skewed_lengths_nine_of_ten_slot_steps_are_busy():
    limits = skewed(8)
    tokens = np.random.default_rng(1).integers(3, 90, (8, 5))
    settings = {"group": 8, "max_new_tokens": 64, "limits": limits}
    what = (*folder("llama"), tokens, np.ones_like(tokens), jax.random.key(0))
    found = sample_rollouts(*what, **settings)
    np.testing.assert_array_equal(found.lengths, limits.reshape(-1))
    used, could = found.slot_steps
    assert used == (limits - 1).sum()
    assert found.busy == used / could >= 0.9
    # without refilling and narrowing every completion waits for the longest
    assert used / (64 * (limits.max() - 1)) < 0.4


@pytest.mark.parametrize(
    "sizes", [(2, 2, 1, 2), pytest.param((4, 2, 1, 1), marks=pytest.mark.thorough)]
)
def test_the_mesh_changes_nothing(sizes):
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)))
    config, params = folder("llama")
    params = jaxft.adapt(params, jaxft.methods.lora(rank=4), jax.random.key(0))
    tokens, segments = prompts()
    settings = {"group": GROUP, "max_new_tokens": NEW, "eos_ids": EOS}
    want = sample_rollouts(config, params, tokens, segments, jax.random.key(0), **settings)
    laid = jax.device_put(params, shardings(params, mesh))
    with jax.set_mesh(mesh):
        found = sample_rollouts(
            config, laid, tokens, segments, jax.random.key(0), slots=8, **settings
        )
    np.testing.assert_array_equal(found.tokens, want.tokens)
    np.testing.assert_array_equal(found.lengths, want.lengths)
    np.testing.assert_allclose(found.log_probabilities, want.log_probabilities, atol=1e-4)


@pytest.mark.thorough
def test_an_adapter_over_codes_samples_as_the_dense_tree_that_it_equals():
    config, params = folder("llama")
    coded = jaxft.quantize_params(params, "nf4", group_size=16)
    coded = jaxft.adapt(coded, jaxft.methods.lora(rank=4), jax.random.key(0))
    coded = map_with_paths(lambda path, leaf: leaf + 0.1 if path.endswith("/b") else leaf, coded)
    tokens, segments = prompts()
    settings = {"group": GROUP, "max_new_tokens": NEW, "eos_ids": EOS}
    found, want, plain = (
        sample_rollouts(config, tree, tokens, segments, jax.random.key(0), **settings)
        for tree in (coded, jax.jit(jaxft.merge)(coded), params)
    )
    np.testing.assert_array_equal(found.tokens, want.tokens)
    assert (found.tokens != plain.tokens).any()


def test_the_public_function_takes_ids_and_marks_what_lies_behind_the_end():
    model, params = load(GOLDEN / "llama")
    settings = {"group": 2, "max_new_tokens": 5, "eos_ids": EOS, "seed": 1}
    asked = [[5, 6, 7], [8, 9]]
    tokens, log_p = jaxft.rollout(model, params, asked, **settings)
    assert tokens.shape == log_p.shape == (4, 5)
    assert ((log_p < 0) == (tokens >= 0)).all()
    swapped, _ = jaxft.rollout(model, params, asked[::-1], **settings)
    np.testing.assert_array_equal(swapped[[2, 3, 0, 1]], tokens)


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        (["a"], {}, "prompt 1: a text needs the model's tokenizer"),
        ([[5]], {"group": 0}, "group must be a whole number of at least 1, not 0"),
        ([[5]], {"group": 2.5}, "group must be a whole number of at least 1, not 2.5"),
        ([[5]], {"slots": -3}, "slots must be a whole number of at least 0, not -3"),
        ([[5], [5, -1]], {}, r"prompt 2: token ids are whole numbers of at least 0, not \[5, -1\]"),
        ([[5.5]], {}, r"prompt 1: token ids are whole numbers of at least 0, not \[5.5\]"),
        ([5], {}, "prompt 1: a text, messages or token ids are expected, not 5"),
    ],
)
def test_what_cannot_be_sampled_is_refused_in_one_line(prompts, settings, message):
    model, params = load(GOLDEN / "llama")
    with pytest.raises(UserError, match=message):
        jaxft.rollout(model, params, prompts, **settings)
