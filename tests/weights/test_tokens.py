"""jaxft.weights.tokens: rows of a vocabulary, more than a base has or trained in its place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft import methods
from jaxft.errors import UserError
from jaxft.models.transformer import fitted
from jaxft.tree import flatten_with_paths
from jaxft.vocabulary import by_path, size_of, training_tokens, with_room
from jaxft.weights import base_of, materialize, token_rows, widened

TOKENS = (6, 1, 8)  # of a vocabulary of 7, made larger by 2


def matrices():
    """An embedding (vocabulary, hidden) and a head (hidden, vocabulary), with room, and rows that train in them."""
    draw = np.random.default_rng(0)
    embedding, head = (jnp.asarray(draw.normal(size=s), jnp.float32) for s in ((7, 4), (4, 7)))
    rows = jnp.asarray(draw.normal(size=(3, 4)), jnp.float32)
    made = {}
    for name, base, is_head in (("embedding", embedding, False), ("head", head, True)):
        wide = widened(base, 9, is_head)
        made[name] = (base, wide, token_rows(wide, TOKENS, {}, rows=rows, head=is_head))
    return rows, made


@pytest.mark.parametrize("name", ["embedding", "head"])
def test_products_and_rows_are_those_of_the_dense_matrix(name):
    rows, made = matrices()
    base, wide, trained = made[name]
    turned = (lambda x: x.T) if name == "head" else (lambda x: x)
    dense = np.concatenate([turned(base), np.tile(np.mean(turned(base), axis=0), (2, 1))])
    np.testing.assert_allclose(turned(materialize(wide)), dense, rtol=1e-6)
    dense[list(TOKENS)] = rows
    np.testing.assert_allclose(turned(materialize(trained)), dense, rtol=1e-6)
    for weight in (wide, trained):
        whole = materialize(weight)
        assert weight.shape == whole.shape
        x, y = jnp.ones((2, 3, whole.shape[0])), jnp.ones((2, 3, whole.shape[1]))
        np.testing.assert_allclose(jaxft.contract(x, weight), x @ whole, rtol=1e-5)
        np.testing.assert_allclose(jaxft.contract_transposed(y, weight), y @ whole.T, rtol=1e-5)
        if name == "embedding":
            ids = jnp.arange(9, dtype=jnp.int32).reshape(3, 3)
            np.testing.assert_array_equal(jaxft.take(weight, ids), whole[ids])
    assert base_of(trained) is wide


@pytest.mark.parametrize("name", ["embedding", "head"])
def test_the_rows_gradient_is_that_of_the_dense_matrix(name):
    """Of the tokens that were looked up or whose logits count, and 0 for others."""
    rows, made = matrices()
    _, wide, _ = made[name]
    ids = jnp.asarray([[1, 8, 1], [3, 6, 0]])
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4)), jnp.float32)

    def apply(weight):
        found = jaxft.take(weight, ids) if name == "embedding" else jaxft.contract(x, weight)
        return jnp.sum(jnp.sin(found))

    def by_rows(rows):
        return apply(token_rows(wide, TOKENS, {}, rows=rows, head=name == "head"))

    def by_matrix(rows):
        dense, at = materialize(wide), np.asarray(TOKENS)
        return apply(dense.at[:, at].set(rows.T) if name == "head" else dense.at[at].set(rows))

    found, expected = jax.grad(by_rows)(rows), jax.grad(by_matrix)(rows)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(found).max() > 0


def tree(tied):
    """A decoder's embedding and head beside a projection."""
    draw = np.random.default_rng(2)
    embedding = jnp.asarray(draw.normal(size=(7, 4)), jnp.float32)
    head = jnp.asarray(draw.normal(size=(4, 7)), jnp.float32)
    if tied:
        head = jaxft.weights.Tied(("embed", "embedding"), (4, 7), jnp.dtype("float32"))
    layers = {"attention": {"q_proj": {"kernel": jnp.ones((2, 4, 4))}}}
    return {"embed": {"embedding": embedding}, "head": {"kernel": head}, "layers": layers}


@pytest.mark.parametrize("tied", [False, True])
def test_a_tokens_rows_train_beside_an_adapter_and_are_merged(tied):
    method = methods.lora(rank=2, trainable_token_indices={"embed": (8, 0), "head": (8, 0)})
    params = jaxft.adapt(tree(tied), method, jax.random.key(0), vocabulary=9)
    assert size_of(params) == 9
    assert params["head"]["kernel"].shape == (4, 9)
    trainable, _ = jaxft.partition(params, method)
    paths = [path for path, _ in flatten_with_paths(trainable)]
    rows = [path for path in paths if path.endswith("/rows")]
    assert rows == ["embed/embedding/rows", "head/kernel/rows"][: 1 if tied else 2]
    assert len(paths) == len(rows) + 2
    merged = jaxft.merge(params)
    assert merged["embed"]["embedding"].shape == (9, 4)
    np.testing.assert_array_equal(
        merged["embed"]["embedding"][:7], params["embed"]["embedding"].base.base
    )
    head = materialize(jaxft.bind(merged["head"]["kernel"], merged))
    assert head.shape == (4, 9)
    assert not [leaf for leaf in jax.tree.leaves(merged) if not isinstance(leaf, jax.Array)]


def test_full_tuning_trains_a_larger_matrix():
    params = jaxft.adapt(tree(False), methods.full(), jax.random.key(0), vocabulary=9)
    assert isinstance(params["embed"]["embedding"], jax.Array)
    assert params["embed"]["embedding"].shape == (9, 4)
    assert params["head"]["kernel"].shape == (4, 9)


def test_room_that_is_there_is_not_made_again():
    before = tree(False)
    assert with_room(before, 5)["embed"]["embedding"] is before["embed"]["embedding"]
    assert size_of(with_room(before, 5)) == 7


def test_layers_with_inputs_of_their_own_get_no_new_tokens():
    params = {**tree(True), "layer_embed": {"embedding": jnp.ones((7, 2))}}
    with pytest.raises(UserError, match=r"layer_embed: the layers .* 7 tokens, and a new token"):
        with_room(params, 8)
    assert size_of(with_room(params, 7)) == 7


def test_rows_of_a_head_that_differ_from_the_embeddings_act_there_alone():
    params = training_tokens(tree(True), {"embed/embedding": (1,), "head/kernel": (2,)})
    changed = params["embed"]["embedding"]
    changed = jaxft.weights.replace(changed, rows=changed.rows + 1.0)
    params = {**params, "embed": {"embedding": changed}}
    head = materialize(jaxft.bind(params["head"]["kernel"], params))
    np.testing.assert_array_equal(head, tree(True)["embed"]["embedding"].T)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ((7,), "7 is no token of the model, which has rows for 7: config.data.add_tokens adds"),
        ((-1,), "-1 is no token"),
        ((2, 2), "the token 2 is named twice"),
        ({"embd": (1,)}, "'embd' is neither the embedding nor the head"),
    ],
)
def test_what_is_no_token_is_refused(tokens, message):
    with pytest.raises(UserError, match=message):
        by_path(tokens, tree(False))


def test_an_adapted_embedding_trains_no_rows():
    method = methods.lora(rank=2, targets=("embed", "q_proj"), trainable_token_indices=(1,))
    with pytest.raises(UserError, match="embed/embedding is adapted; PEFT's format holds"):
        jaxft.adapt(tree(False), method, jax.random.key(0))


def test_a_shape_follows_the_tree():
    model, params = jaxft.load("tiny")
    assert fitted(model.config, with_room(params, 3000)).vocabulary == 3000
