from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft.weights import DoRA
from jaxft.weights.dora import column_norm

SCALE = 2.0


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def parts():
    return {"a": normal(1, 6, 2), "b": normal(2, 2, 8), "magnitude": normal(3, 8) + 3.0}


def plain(base, parts, x, bias, norm):
    """The paper's equation 5 with its norm given: what a reader would write down."""
    moved = base + SCALE * parts["a"] @ parts["b"]
    return x @ (moved * (parts["magnitude"] / norm)[None, :]) + bias[None, :]


def ours(base, parts, x, bias):
    weight = DoRA(base, parts["a"], parts["b"], jnp.asarray(SCALE), magnitude=parts["magnitude"])
    return jaxft.contract(x, weight) + bias[None, :]


def test_the_magnitude_begins_as_the_norm_of_each_output_feature():
    base = normal(0, 6, 8)
    params = jaxft.adapt(
        {"q_proj": {"kernel": base}}, jaxft.methods.dora(rank=2), jax.random.key(0)
    )
    expected = np.linalg.norm(np.asarray(base), axis=0)
    np.testing.assert_allclose(params["q_proj"]["kernel"].magnitude, expected, rtol=1e-6)


def test_the_norm_is_a_constant_to_the_gradient():
    """The gradients are those of the equation with the norm frozen, and not those with it moving."""
    base, x, bias, weights = normal(0, 6, 8), normal(4, 5, 6), normal(5, 8), parts()

    def loss(function):
        return lambda parts: jnp.sum(jnp.sin(function(parts)))

    norm = column_norm(base + SCALE * weights["a"] @ weights["b"])
    frozen = jax.grad(loss(lambda parts: plain(base, parts, x, bias, norm)))(weights)
    moving = jax.grad(
        loss(
            lambda parts: plain(
                base, parts, x, bias, column_norm(base + SCALE * parts["a"] @ parts["b"])
            )
        )
    )(weights)
    found = jax.grad(loss(lambda parts: ours(base, parts, x, bias)))(weights)
    for part in weights:
        np.testing.assert_allclose(found[part], frozen[part], rtol=1e-4, atol=1e-4)
    assert not np.allclose(found["a"], moving["a"], rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(found["magnitude"], moving["magnitude"], rtol=1e-3, atol=1e-4)


def test_the_magnitudes_gradient_is_a_finite_difference():
    """The norm does not depend on the magnitude: there the true slope is taken."""
    base, x, bias, weights = normal(0, 6, 8), normal(4, 5, 6), normal(5, 8), parts()
    direction, small = normal(6, 8), 1e-2

    def loss(magnitude):
        return jnp.sum(jnp.sin(ours(base, weights | {"magnitude": magnitude}, x, bias)))

    middle = weights["magnitude"]
    slope = jnp.sum(jax.grad(loss)(middle) * direction)
    difference = (loss(middle + small * direction) - loss(middle - small * direction)) / (2 * small)
    np.testing.assert_allclose(slope, difference, rtol=2e-2, atol=2e-2)


def test_a_magnitude_of_zero_has_a_gradient_of_zero():
    """The output, of which the gradient is made, then tells nothing: it is not 0 / 0."""
    base, x, bias, weights = normal(0, 6, 8), normal(4, 5, 6), normal(5, 8), parts()
    magnitude = weights["magnitude"].at[2].set(0.0)
    gradient = jax.grad(lambda m: jnp.sum(ours(base, weights | {"magnitude": m}, x, bias)))(
        magnitude
    )
    assert gradient[2] == 0.0
    assert np.all(np.isfinite(gradient))
    assert np.all(gradient[3:] != 0.0)


def test_the_gradient_of_the_input_is_that_of_the_dense_kernel():
    base, x, bias, weights = normal(0, 6, 8), normal(4, 5, 6), normal(5, 8), parts()
    weight = DoRA(
        base, weights["a"], weights["b"], jnp.asarray(SCALE), magnitude=weights["magnitude"]
    )
    dense = jaxft.materialize(weight)
    found = jax.grad(lambda x: jnp.sum(jnp.sin(ours(base, weights, x, bias))))(x)
    expected = jax.grad(lambda x: jnp.sum(jnp.sin(x @ dense + bias[None, :])))(x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_bias_is_never_scaled():
    base, bias, weights = normal(0, 6, 8), normal(5, 8), parts()
    np.testing.assert_array_equal(ours(base, weights, jnp.zeros((1, 6)), bias)[0], bias)


@pytest.mark.parametrize("trainable", [("b", "magnitude"), ("magnitude",), ("a", "b", "magnitude")])
def test_dora_takes_any_partition_of_its_parts(trainable):
    """DoRA under LoRA-FA's partition: a stays, b and the magnitude train."""
    method = jaxft.methods.dora(rank=2, trainable=trainable)
    params = jaxft.adapt({"q_proj": {"kernel": normal(0, 6, 8)}}, method, jax.random.key(0))
    trained, frozen = jaxft.partition(params, method)
    kernel = trained["q_proj"]["kernel"]
    assert set(weights_parts(kernel)) == set(trainable)
    assert (frozen["q_proj"]["kernel"].a is None) == ("a" in trainable)


def weights_parts(kernel):
    return [
        part
        for part in ("base", "a", "b", "scale", "magnitude")
        if getattr(kernel, part) is not None
    ]


def test_an_embeddings_norm_runs_over_the_vocabulary():
    embedding = normal(0, 8, 6)
    params = jaxft.adapt(
        {"embed": {"embedding": embedding}},
        jaxft.methods.dora(rank=2, targets=("embedding",)),
        jax.random.key(0),
    )
    weight = params["embed"]["embedding"]
    assert weight.magnitude.shape == (6,)
    moved = DoRA(
        weight.base, weight.a, normal(2, 2, 6), jnp.asarray(SCALE), magnitude=weight.magnitude
    )
    dense = np.asarray(embedding + SCALE * weight.a @ moved.b)
    ratio = np.asarray(weight.magnitude) / np.linalg.norm(dense, axis=0)
    ids = jnp.asarray([3, 7], jnp.int32)
    np.testing.assert_allclose(
        jaxft.take(moved, ids), dense[[3, 7]] * ratio[None], rtol=1e-4, atol=1e-5
    )


def test_a_layer_left_out_is_untouched_by_its_magnitude():
    method = jaxft.methods.dora(rank=2, layers_to_transform=(0,))
    base = normal(0, 2, 6, 8)
    params = jaxft.adapt({"layers": {"q_proj": {"kernel": base}}}, method, jax.random.key(0))
    kernel = params["layers"]["q_proj"]["kernel"]
    gradient = jax.grad(
        lambda m: jnp.sum(
            jaxft.materialize(
                DoRA(kernel.base, kernel.a, kernel.b, kernel.scale, magnitude=m, ranks=kernel.ranks)
            )
        )
    )(kernel.magnitude)
    assert not np.any(gradient[1])
    np.testing.assert_array_equal(jaxft.materialize(kernel)[1], base[1])
