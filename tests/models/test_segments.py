from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft.models import Config, Transformer, logits, tensors_of
from jaxft.models.segments import segments_of, start_of
from jaxft.models.transformer import cached_hidden_states, empty_cache, initial_params

CONFIG = Config(
    family="llama",
    vocabulary=24,
    hidden=16,
    intermediate=20,
    layers=3,
    heads=4,
    key_heads=2,
    head_dim=4,
    max_length=32,
    query_scale=0.5,
    windows=(3, 0, 4),
)
WIDER = dataclasses.replace(CONFIG, parts=((2, ()), (1, (("intermediate", 28), ("key_heads", 4)))))
TOKENS = jax.random.randint(jax.random.key(1), (2, 9), 0, 24)


def test_a_segment_is_a_decoder_with_its_layers_alone():
    first, second = segments_of(WIDER)
    assert (first.name, first.start, first.config.layers) == ("layers_0", 0, 2)
    assert (first.config.windows, second.config.windows) == ((3, 0), (4,))
    assert (first.config.intermediate, second.config.intermediate) == (20, 28)
    assert start_of(WIDER, "layers_1/mlp/up_proj/kernel") == 2
    assert segments_of(CONFIG) == (("layers", 0, CONFIG),)
    with pytest.raises(ValueError, match=r"parts of \[2\] layers are no 3 layers"):
        segments_of(dataclasses.replace(CONFIG, parts=((2, ()),)))


def test_layers_in_two_segments_compute_what_they_do_in_one():
    whole = initial_params(CONFIG, jax.random.key(0))
    layers = whole.pop("layers")
    cut = whole | {
        "layers_0": jax.tree.map(lambda leaf: leaf[:2], layers),
        "layers_1": jax.tree.map(lambda leaf: leaf[2:], layers),
    }
    config = dataclasses.replace(CONFIG, parts=((2, ()), (1, ())))
    found = Transformer(config).apply({"params": cut}, TOKENS)
    expected = Transformer(CONFIG).apply({"params": whole | {"layers": layers}}, TOKENS)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_cache_holds_segments_of_different_shapes():
    params = initial_params(WIDER, jax.random.key(0))
    expected = Transformer(WIDER).apply({"params": params}, TOKENS)
    cache, found = empty_cache(WIDER, 2, 9), []
    assert [array.shape[2] for array in cache["key"].values()] == [2, 4]
    positions = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), (2, 9))
    for start, stop in ((0, 5), (5, 9)):
        places = (TOKENS[:, start:stop], jnp.ones((2, stop - start), jnp.int32))
        part = positions[:, start:stop]
        index = jnp.asarray(start, jnp.int32)
        hidden, cache = cached_hidden_states(WIDER, params, *places, part, cache, index)
        found.append(logits(WIDER, params, hidden))
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), expected, rtol=1e-4, atol=1e-6)


def test_the_table_of_tensors_counts_layers_through():
    table = tensors_of(WIDER)
    names = table["layers_1/mlp/up_proj/kernel"].names(2, (1, 16, 28))
    assert names == ["model.layers.2.mlp.up_proj.weight"]
    assert "layers/mlp/up_proj/kernel" not in table


def test_both_segments_train():
    method = jaxft.methods.lora(rank=2)
    params = jaxft.adapt(initial_params(WIDER, jax.random.key(0)), method, jax.random.key(1))
    trainable, frozen = jaxft.partition(params, method)

    def loss(trainable):
        tree = jaxft.combine(trainable, frozen)
        return jnp.mean(Transformer(WIDER).apply({"params": tree}, TOKENS) ** 2)

    slopes = jax.grad(loss)(trainable)
    for name in ("layers_0", "layers_1"):
        assert float(jnp.abs(slopes[name]["mlp"]["up_proj"]["kernel"].b).max()) > 0
