"""Every family's folder reads as the model that transformers computes, and is written back as it was."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxft.formats import load, save
from jaxft.formats.config_file import model_config
from jaxft.models import FAMILIES, logits, tensors_of
from jaxft.models.transformer import cached_hidden_states, empty_cache, initial_params
from jaxft.tree import flatten_with_paths

SCRIPT = Path(__file__).parent.parent / "golden/family_folders.py"
specification = importlib.util.spec_from_file_location("family_folders", SCRIPT)
golden = importlib.util.module_from_spec(specification)
specification.loader.exec_module(golden)

CASES = golden.cases()
SERVED = [name for name, case in CASES.items() if case["config"]["model_type"] in FAMILIES]
TOLERANCE = 1e-4  # of the largest logit


@functools.cache
def expected():
    with np.load(golden.LOGITS) as file:
        return dict(file)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """`folder_of("llama")`: the case as a Hugging Face folder."""
    return functools.cache(
        lambda name: golden.write_folder(CASES[name], tmp_path_factory.mktemp("families") / name)
    )


def tensors(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", SERVED)
def test_logits_are_those_of_transformers(folder_of, name):
    """Of two sequences that are longer than the windows and the original rotary length, padded and packed too."""
    model, params = load(folder_of(name))
    batch = golden.rows(expected()["tokens"])
    inputs = (batch[part] for part in ("tokens", "segments", "positions"))
    found = np.asarray(jax.jit(model.apply)({"params": params}, *inputs))
    assert golden.deviation(found, expected()[name], batch) < TOLERANCE


@pytest.mark.parametrize("name", SERVED)
def test_every_leaf_has_a_name_on_disk_and_every_tensor_a_leaf(folder_of, name):
    """A fresh tree of the shape alone is the one that the folder is read into."""
    config = model_config(folder_of(name))
    fresh = jax.eval_shape(lambda: initial_params(config, jax.random.key(0)))
    _, params = load(folder_of(name))
    shapes = {path: leaf.shape for path, leaf in flatten_with_paths(fresh)}
    assert {path: leaf.shape for path, leaf in flatten_with_paths(params)} == shapes
    assert tensors_of(config).keys() == shapes.keys()


def from_cache(model, params, batch, ends):
    """The logits of the rows of a batch, from one of `ends` to the next at a time."""
    config = model.config

    @jax.jit
    def advance(tokens, segments, positions, cache, index):
        places = (tokens, segments, positions)
        hidden, cache = cached_hidden_states(config, params, *places, cache, index)
        return logits(config, params, hidden), cache

    inputs = [jnp.asarray(batch[part]) for part in ("tokens", "segments", "positions")]
    cache, found = empty_cache(config, *inputs[0].shape), []
    for start, end in itertools.pairwise(ends):
        part = (array[:, start:end] for array in inputs)
        scores, cache = advance(*part, cache, jnp.asarray(start, jnp.int32))
        found.append(scores)
    return np.concatenate(found, axis=1)


STEPS = {"halves": (0, 12, 24), "tokens": (0, 12, *range(13, 25))}


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("steps", ["halves", pytest.param("tokens", marks=pytest.mark.thorough)])
def test_a_cache_gives_the_logits_of_the_whole(folder_of, name, steps):
    """A prompt, and then as much again, at once or token by token: whole, and padded on the left."""
    model, params = load(folder_of(name))
    batch = golden.rows(expected()["tokens"])
    batch = {part: array[1:3] for part, array in batch.items()}
    found = from_cache(model, params, batch, STEPS[steps])
    assert golden.deviation(found, expected()[name], batch) < TOLERANCE


@pytest.mark.parametrize("name", SERVED)
def test_a_folder_is_written_as_it_was_read(folder_of, tmp_path, name):
    """Bit for bit; and its config.json, made from the shape alone, reads as the same shape."""
    source = folder_of(name)
    model, params = load(source)
    save(model, params, tmp_path / "like", like=source)
    save(model, params, tmp_path / "own")
    before = tensors(source)
    for written in (tensors(tmp_path / "like"), tensors(tmp_path / "own")):
        assert written.keys() == before.keys()
        assert all(np.array_equal(written[key], before[key]) for key in before)
    assert model_config(tmp_path / "own") == model_config(source)
