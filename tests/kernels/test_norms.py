from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxft.errors import UserError
from jaxft.kernels.activations import activate, gated
from jaxft.kernels.norms import layer_norm, rms_norm


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def plain_rms_norm(x, scale, epsilon, offset):
    wide = np.asarray(x, np.float64)
    root = np.sqrt((wide**2).mean(-1, keepdims=True) + epsilon)
    return wide / root * (offset + np.asarray(scale, np.float64))


def plain_layer_norm(x, scale, bias, epsilon):
    wide = np.asarray(x, np.float64)
    root = np.sqrt(wide.var(-1, keepdims=True) + epsilon)
    return (wide - wide.mean(-1, keepdims=True)) / root * np.asarray(scale) + np.asarray(bias)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(dtype, offset):
    x, scale = normal(0, 2, 3, 16, dtype=dtype), normal(1, 16)
    result = rms_norm(x, scale, epsilon=1e-5, offset=offset)
    assert result.dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    want = plain_rms_norm(x, scale, 1e-5, offset)
    np.testing.assert_allclose(np.asarray(result, np.float64), want, rtol=tolerance, atol=tolerance)


def test_a_norm_without_a_scale_or_a_bias_has_that_of_one_and_zero():
    x, scale = normal(0, 2, 3, 16), normal(1, 16)
    weightless = rms_norm(x, None, epsilon=1e-5)
    np.testing.assert_allclose(weightless, rms_norm(x, jnp.ones(16), epsilon=1e-5), rtol=1e-6)
    unbiased = layer_norm(x, scale, None, epsilon=1e-5)
    np.testing.assert_allclose(unbiased, layer_norm(x, scale, jnp.zeros(16), epsilon=1e-5))
    offset = layer_norm(x, scale, None, epsilon=1e-5, offset=1.0)
    np.testing.assert_allclose(offset, layer_norm(x, scale + 1.0, None, epsilon=1e-5), rtol=1e-5)


def test_layer_norm():
    x, scale, bias = normal(0, 2, 3, 16), normal(1, 16), normal(2, 16)
    result = layer_norm(x, scale, bias, epsilon=1e-5)
    np.testing.assert_allclose(result, plain_layer_norm(x, scale, bias, 1e-5), rtol=1e-5, atol=1e-6)


def test_gated_knows_its_activations():
    gate, up = normal(0, 2, 3, 16), normal(1, 2, 3, 16)
    for name, function in {
        "silu": lambda x: x / (1 + jnp.exp(-x)),
        "relu": lambda x: jnp.where(x > 0, x, 0.0),
        "relu_squared": lambda x: jnp.where(x > 0, x**2, 0.0),
        "quick_gelu": lambda x: x / (1 + jnp.exp(-1.702 * x)),
        "gelu": lambda x: x * jax.scipy.stats.norm.cdf(x),
        "gelu_tanh": lambda x: (
            x * (1 + jnp.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + 0.044715 * x**3))) / 2
        ),
    }.items():
        np.testing.assert_allclose(gated(gate, up, name), function(gate) * up, atol=1e-6)
        np.testing.assert_allclose(activate(up, name), function(up), atol=1e-6)
    with pytest.raises(UserError, match=r"'gelu_tan'.*nearest: 'gelu_tanh'"):
        gated(gate, up, "gelu_tan")


CASES = {
    "rms_norm": (lambda x, s: rms_norm(x, s, epsilon=1e-5, offset=1.0), [(2, 5, 7), (7,)]),
    "layer_norm": (
        lambda x, s, b: layer_norm(x, s, b, epsilon=1e-5),
        [(2, 5, 7), (7,), (7,)],
    ),
    "gated": (lambda gate, up: gated(gate, up, "gelu"), [(2, 5, 7), (2, 5, 7)]),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_finite_differences(name):
    function, shapes = CASES[name]
    arguments = [normal(seed, *shape) for seed, shape in enumerate(shapes)]
    check_grads(function, arguments, order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_a_frozen_scale_has_no_gradient_computed(name):
    """A sum over all tokens, (hidden,) wide, occurs only where the scale is differentiated."""
    function, shapes = CASES[name]
    arguments = [normal(seed, *shape) for seed, shape in enumerate(shapes)]

    def sums(*places):
        gradient = jax.grad(lambda *a: jnp.sum(jnp.sin(function(*a))), argnums=places)
        return str(jax.make_jaxpr(gradient)(*arguments)).count("f32[7] = reduce_sum")

    assert sums(0) == 0
    assert sums(*range(len(shapes))) == len(shapes) - 1


@pytest.mark.parametrize("name", CASES)
def test_only_the_inputs_are_kept_for_the_backward_pass(name):
    function, shapes = CASES[name]
    arguments = [normal(seed, *shape) for seed, shape in enumerate(shapes)]
    _, transpose = jax.vjp(function, *arguments)
    kept = [leaf.size for leaf in jax.tree.leaves(transpose)]
    assert 0 < sum(kept) <= sum(argument.size for argument in arguments)
