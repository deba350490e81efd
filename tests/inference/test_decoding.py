"""Decoding with a cache says what the whole pass says, and compiles once for a bucket of sizes."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft.formats.huggingface import load
from jaxft.inference import decoding
from jaxft.inference.decoding import decode, generate_tokens, greedy_reference
from jaxft.models.transformer import (
    cached_hidden_states,
    empty_cache,
    hidden_states,
    logits,
    positions_of,
)
from jaxft.tree import map_with_paths

GOLDEN = Path(__file__).parents[1] / "golden" / "models"
EOS = 2
NONE = (-1, -1, -1)  # no model says these: as many ids of an EOS for one program


@functools.cache
def folder(name: str) -> tuple[Any, Any, dict[str, np.ndarray]]:
    model, params = load(GOLDEN / name)
    return model.config, params, dict(np.load(GOLDEN / name / "expected.npz"))


@functools.partial(jax.jit, static_argnums=0)
def scores_of(config: Any, params: Any, tokens: jax.Array, segments: jax.Array) -> jax.Array:
    return logits(config, params, hidden_states(config, params, tokens, segments))


def whole(config: Any, params: Any, tokens: Any, segments: Any = None) -> np.ndarray:
    """The logits of the whole forward pass."""
    segments = np.ones_like(tokens) if segments is None else segments
    return np.asarray(scores_of(config, params, tokens, segments))


@pytest.fixture
def say() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """The llama's answers to its golden prompts; keywords replace the arguments."""
    config, params, expected = folder("llama")

    def answers(**changes: Any) -> tuple[np.ndarray, np.ndarray]:
        given = {"config": config, "params": params, "tokens": expected["prompt_ids"]}
        given |= {"segments": expected["prompt_mask"], "key": jax.random.key(0)}
        given |= {"max_new_tokens": 10, "temperature": 0.0, "top_k": 0, "top_p": 1.0}
        given |= {"eos_ids": NONE}
        return generate_tokens(**given | changes)

    return answers


@pytest.mark.parametrize("name", ["llama_llama3", "qwen2", "gemma2", "gpt2"])
def test_greedy_tokens_are_those_of_transformers(name, say):
    config, params, expected = folder(name)
    want = expected["generated"][:, expected["prompt_ids"].shape[1] :]
    ids, lengths = say(
        config=config,
        params=params,
        tokens=expected["prompt_ids"],
        segments=expected["prompt_mask"],
        max_new_tokens=want.shape[1],
        eos_ids=(EOS, *NONE[1:]),
    )
    np.testing.assert_array_equal(ids, want)
    ends = np.where((want == EOS).any(axis=1), (want == EOS).argmax(axis=1) + 1, want.shape[1])
    np.testing.assert_array_equal(lengths, ends)


def test_logits_from_the_cache_are_those_of_the_whole_pass():
    config, params, expected = folder("gemma2")  # windows, soft caps and left padding
    tokens = jnp.asarray(expected["left_input_ids"])
    segments = jnp.asarray(expected["left_attention_mask"])
    positions, (rows, length) = positions_of(segments), tokens.shape
    want = whole(config, params, tokens, segments)
    step, head = jax.jit(cached_hidden_states, static_argnums=0), jax.jit(logits, static_argnums=0)
    cache, parts = empty_cache(config, rows, length + 3), []
    for start in range(0, length, 4):
        part = (x[:, start : start + 4] for x in (tokens, segments, positions))
        hidden, cache = step(config, params, *part, cache, jnp.int32(start))
        parts.append(np.asarray(head(config, params, hidden)))
    error = np.where(segments[:, :, None] != 0, np.concatenate(parts, axis=1) - want, 0.0)
    assert np.abs(error).max() < 1e-5 * np.abs(want).max()


def test_the_side_and_the_amount_of_padding_change_nothing(say):
    _, _, expected = folder("llama")
    tokens, mask = expected["prompt_ids"], expected["prompt_mask"]
    right_tokens, right_mask = np.zeros_like(tokens), np.zeros_like(mask)
    for row, length in enumerate(mask.sum(axis=1)):
        right_tokens[row, :length], right_mask[row, :length] = tokens[row, -length:], 1
    wide = ((0, 0), (3, 5))
    want = say()[0]
    np.testing.assert_array_equal(say(tokens=right_tokens, segments=right_mask)[0], want)
    padded = say(tokens=np.pad(tokens, wide), segments=np.pad(mask, wide))[0]
    np.testing.assert_array_equal(padded, want)


def test_one_program_serves_a_bucket(say):
    say()
    say(temperature=1.0)
    before = decode._cache_size()
    rng = np.random.default_rng(0)
    for rows, length, new in ((3, 1, 1), (4, 17, 32), (3, 32, 20)):
        tokens = rng.integers(3, 96, (rows, length))
        shapes = {"tokens": tokens, "segments": np.ones_like(tokens), "max_new_tokens": new}
        assert say(**shapes, eos_ids=(rows, *NONE[1:]))[0].shape == (rows, new)
        say(**shapes, temperature=0.5 * rows, top_k=rows, top_p=0.9, key=jax.random.key(rows))
    assert decode._cache_size() == before


def test_a_row_ends_with_its_first_eos(say):
    whole, _ = say()
    eos = int(whole[1, 4])
    ids, lengths = say(eos_ids=(eos, *NONE[1:]))
    for row, want in enumerate(whole):
        places = np.flatnonzero(want == eos)
        length = places[0] + 1 if len(places) else len(want)
        assert lengths[row] == length
        np.testing.assert_array_equal(ids[row], np.where(np.arange(len(want)) < length, want, 0))
    assert lengths[1] <= 5


def test_every_eos_of_a_model_ends_a_row(say):
    whole, _ = say()
    _, lengths = say(eos_ids=tuple(whole[:, 0].tolist()))
    np.testing.assert_array_equal(lengths, 1)


def test_draws_depend_on_the_key_and_the_stream_alone(say):
    first, _ = say(temperature=1.0)
    np.testing.assert_array_equal(first, say(temperature=1.0)[0])
    assert (first != say(temperature=1.0, key=jax.random.key(1))[0]).any()
    _, _, expected = folder("llama")
    order = np.asarray([2, 0, 1])
    moved = {"tokens": expected["prompt_ids"][order], "segments": expected["prompt_mask"][order]}
    np.testing.assert_array_equal(say(temperature=1.0, **moved, streams=order)[0], first[order])
    same = {"tokens": np.full((3, 4), 7), "segments": np.ones((3, 4), int)}
    drawn, _ = say(temperature=1.0, **same)
    assert len({tuple(row) for row in drawn.tolist()}) == 3


def test_the_likeliest_token_alone_is_greedy(say):
    want = say()[0]
    np.testing.assert_array_equal(say(temperature=1.0, top_k=1)[0], want)
    np.testing.assert_array_equal(say(temperature=1.0, top_p=0.0)[0], want)


def test_a_long_prompt_is_read_in_chunks(say, monkeypatch):
    want = say()[0]
    monkeypatch.setattr(decoding, "CHUNK", 8)
    # another room than that of all other tests: the program is traced with this CHUNK
    ids, _ = say(max_new_tokens=decoding.LEAST_LENGTH + 1)
    np.testing.assert_array_equal(ids[:, : want.shape[1]], want)


def test_greedy_is_its_definition(say):
    config, params, expected = folder("llama")
    reference = jax.jit(greedy_reference, static_argnums=(0, 3))
    want = reference(config, params, expected["prompt_ids"][:1], 2)
    np.testing.assert_array_equal(say(max_new_tokens=2)[0][:1], want)


def adapted(params: Any) -> Any:
    """DoRA with dropout on one projection and VeRA on another, each part of them off its start."""
    dora = jaxft.methods.dora(rank=2, dropout=0.5, targets=("q_proj",))
    vera = jaxft.methods.vera(rank=2, targets=("o_proj",))

    def move(path: str, leaf: Any) -> Any:
        if path.split("/")[-1] not in ("a", "b", "magnitude", "d", "g") or path.startswith("vera/"):
            return leaf
        return leaf + 0.1 * jax.random.normal(jax.random.key(len(path)), leaf.shape, leaf.dtype)

    params = jaxft.adapt(params, dora, jax.random.key(0))
    return map_with_paths(move, jaxft.adapt(params, vera, jax.random.key(1)))


def test_an_adapted_model_says_what_the_merged_one_says_without_dropout(say):
    params = jax.jit(adapted)(folder("llama")[1])
    ids, _ = say(params=params)
    np.testing.assert_array_equal(ids, say(params=jax.jit(jaxft.merge)(params))[0])
    assert (ids != say()[0]).any()


def test_in_bfloat16_each_token_is_the_likeliest_but_for_rounding(say):
    config, params, expected = folder("llama")
    config = dataclasses.replace(config, dtype="bfloat16")
    params = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16), params)
    ids, _ = say(config=config, params=params)
    length = expected["prompt_ids"].shape[1]
    tokens = np.concatenate([expected["prompt_ids"][:1], ids[:1]], axis=1)
    scores = whole(config, params, tokens)[0, length - 1 : -1]
    chosen = np.take_along_axis(scores, ids[0][:, None], axis=1)[:, 0]
    assert (scores.max(axis=1) - chosen).max() < 0.05 * np.abs(scores).max()


@pytest.fixture(scope="module")
def longrope(tmp_path_factory):
    """A phi3 that turns by other angles from its ninth token on: (config, params)."""
    script = GOLDEN.parent / "family_folders.py"
    specification = importlib.util.spec_from_file_location("family_folders", script)
    golden = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(golden)
    source = golden.cases()["phi3_longrope"]
    model, params = load(golden.write_folder(source, tmp_path_factory.mktemp("longrope")))
    return model.config, params


@pytest.mark.parametrize(
    "length",
    [3, pytest.param(8, marks=pytest.mark.thorough), 36],
    ids=["before", "at", "beyond"],
)
def test_angles_that_change_with_the_length_are_those_of_the_whole(longrope, monkeypatch, length):
    """Answers that cross the original length of longrope, and prompts beyond it that are read in chunks."""
    monkeypatch.setattr(decoding, "CHUNK", 32)
    config, params = longrope
    tokens = np.random.default_rng(0).integers(3, 40, (2, length)).astype(np.int32)
    settings = {"max_new_tokens": 8, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "eos_ids": NONE}
    mask, key = np.ones_like(tokens), jax.random.key(0)
    found, _ = generate_tokens(config, params, tokens, mask, key, **settings)
    told = np.concatenate([tokens, found], axis=1)
    for end in range(length, length + 8):
        seen = np.broadcast_to(np.arange(told.shape[1]) < end, told.shape).astype(np.int32)
        scores = whole(config, params, told, seen)[:, end - 1]
        np.testing.assert_array_equal(found[:, end - length], scores.argmax(axis=-1))
