from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft.weights import Tied

EMBEDDING = jax.random.normal(jax.random.key(0), (8, 6))
HIDDEN = jax.random.normal(jax.random.key(1), (3, 6))
IDS = jnp.asarray([1, 7], jnp.int32)


def model(**settings):
    tied = Tied(path=("embed", "embedding"), head_shape=(6, 8), head_dtype=jnp.dtype("float32"))
    params = {"embed": {"embedding": EMBEDDING}, "head": {"kernel": tied}}
    if not settings:
        return params
    params = jaxft.adapt(params, jaxft.methods.lora(rank=2, **settings), jax.random.key(2))

    def moved(leaf):
        return dataclasses.replace(leaf, b=jax.random.normal(jax.random.key(3), leaf.b.shape))

    return jax.tree.map(
        lambda leaf: moved(leaf) if hasattr(leaf, "b") else leaf,
        params,
        is_leaf=lambda x: hasattr(x, "b"),
    )


def scores(params):
    return jaxft.contract(HIDDEN, jaxft.bind(params["head"]["kernel"], params))


def rows(params):
    return jaxft.take(jaxft.bind(params["embed"]["embedding"], params), IDS)


def test_a_tied_head_is_the_embedding_transposed_and_holds_nothing():
    params = model()
    np.testing.assert_allclose(scores(params), HIDDEN @ EMBEDDING.T, rtol=1e-6)
    assert jax.tree.leaves(params["head"]) == []
    assert params["head"]["kernel"].shape == (6, 8)


def test_an_adapter_on_the_embedding_leaves_the_head_as_in_peft():
    params = model(targets=("embed/embedding",))
    np.testing.assert_array_equal(scores(params), scores(model()))
    assert not np.allclose(rows(params), rows(model()))


def test_unless_it_is_tied_too():
    params = model(targets=("embed/embedding",), tie_adapters=True)
    dense = jaxft.materialize(params["embed"]["embedding"])
    np.testing.assert_allclose(scores(params), HIDDEN @ dense.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(rows(params), dense[IDS], rtol=1e-5, atol=1e-5)


def test_an_adapter_on_the_head_leaves_the_embedding():
    params = model(targets=("head",))
    np.testing.assert_array_equal(rows(params), rows(model()))
    assert not np.allclose(scores(params), scores(model()))


@pytest.mark.parametrize(
    ("settings", "tied"),
    [
        ({"targets": ("embed/embedding",)}, False),
        ({"targets": ("embed/embedding",), "tie_adapters": True}, True),
        ({"targets": ("head",)}, False),
        ({"targets": ("head", "embed/embedding")}, False),
    ],
)
def test_merging_unties_only_where_the_two_differ(settings, tied):
    params = model(**settings)
    merged = jaxft.merge(params)
    np.testing.assert_allclose(scores(merged), scores(params), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(rows(merged), rows(params), rtol=1e-4, atol=1e-4)
    assert isinstance(merged["head"]["kernel"], Tied) == tied


def test_a_tree_without_adapters_merges_to_itself():
    merged = jaxft.merge(model())
    assert merged["embed"]["embedding"] is EMBEDDING
    assert isinstance(merged["head"]["kernel"], Tied)
