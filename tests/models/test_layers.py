from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from jaxft.errors import UserError
from jaxft.models import layers

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("rope.json").read_text())


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
    result = layers.rms_norm(x, scale, epsilon=1e-5, offset=offset)
    assert result.dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    want = plain_rms_norm(x, scale, 1e-5, offset)
    np.testing.assert_allclose(np.asarray(result, np.float64), want, rtol=tolerance, atol=tolerance)


def test_layer_norm():
    x, scale, bias = normal(0, 2, 3, 16), normal(1, 16), normal(2, 16)
    result = layers.layer_norm(x, scale, bias, epsilon=1e-5)
    np.testing.assert_allclose(result, plain_layer_norm(x, scale, bias, 1e-5), rtol=1e-5, atol=1e-6)


def test_gated_knows_its_activations():
    gate, up = normal(0, 2, 3, 16), normal(1, 2, 3, 16)
    for name, function in {
        "silu": lambda x: x / (1 + jnp.exp(-x)),
        "gelu": lambda x: x * jax.scipy.stats.norm.cdf(x),
        "gelu_tanh": lambda x: (
            x * (1 + jnp.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + 0.044715 * x**3))) / 2
        ),
    }.items():
        np.testing.assert_allclose(layers.gated(gate, up, name), function(gate) * up, atol=1e-6)
        np.testing.assert_allclose(layers.activate(up, name), function(up), atol=1e-6)
    with pytest.raises(UserError, match=r"'gelu_tan'.*nearest: 'gelu_tanh'"):
        layers.gated(gate, up, "gelu_tan")


CASES = {
    "rms_norm": (lambda x, s: layers.rms_norm(x, s, epsilon=1e-5, offset=1.0), [(2, 5, 7), (7,)]),
    "layer_norm": (
        lambda x, s, b: layers.layer_norm(x, s, b, epsilon=1e-5),
        [(2, 5, 7), (7,), (7,)],
    ),
    "gated": (lambda gate, up: layers.gated(gate, up, "gelu"), [(2, 5, 7), (2, 5, 7)]),
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


def test_rotary_rotates_the_halves_by_position_times_frequency():
    """As transformers' llama: x cos + rotate_half(x) sin."""
    x, frequencies = normal(0, 2, 3, 5, 8), np.asarray([1.0, 0.5, 0.1, 0.01], np.float32)
    positions = np.asarray([[0, 1, 2, 0, 1], [7, 8, 9, 10, 11]], np.int32)
    angles = np.concatenate([positions[..., None] * frequencies] * 2, axis=-1)[:, None]
    half = np.concatenate([-x[..., 4:], x[..., :4]], axis=-1)
    want = 1.25 * (x * np.cos(angles) + half * np.sin(angles))
    np.testing.assert_allclose(layers.rotary(x, positions, frequencies, 1.25), want, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rotary_by_a_product_is_rotary_by_halves_bit_for_bit(dtype):
    """What TPUs compute, beside what all others do."""
    x, angles = normal(0, 2, 3, 5, 8).astype(dtype), normal(1, 2, 1, 5, 4)
    both = [
        jax.jit(function)(x, jnp.cos(angles), jnp.sin(angles))
        for function in (layers.rotated_by_product, layers.rotated_by_halves)
    ]
    assert both[0].dtype == dtype
    np.testing.assert_array_equal(*both)


def test_the_gradient_of_rotary_is_autodiffs():
    """The rotation back, which the rule calls, is the transpose of the rotation."""
    x, frequencies = normal(0, 2, 3, 5, 8), np.asarray([1.0, 0.5, 0.1, 0.01], np.float32)
    positions = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)
    angles = positions.astype(jnp.float32)[:, None, :, None] * frequencies[None, None, None, :]
    ways = (
        lambda x: layers.rotary(x, positions, frequencies, 1.25),
        lambda x: layers.rotated_by_halves(x, 1.25 * jnp.cos(angles), 1.25 * jnp.sin(angles)),
    )
    gradients = [jax.vjp(way, x)[1](normal(1, *x.shape))[0] for way in ways]
    np.testing.assert_allclose(*gradients, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 1000))
def test_rotary_scores_depend_on_the_distance_alone(shift):
    query, key = normal(0, 1, 1, 4, 8), normal(1, 1, 1, 4, 8)
    frequencies, _ = layers.rope_frequencies(8, 10000.0, None, 2048)

    def scores(shift):
        positions = jnp.arange(4, dtype=jnp.int32)[None] + shift
        rotated = [layers.rotary(x, positions, frequencies, 1.0)[0, 0] for x in (query, key)]
        return rotated[0] @ rotated[1].T

    np.testing.assert_allclose(scores(shift), scores(0), atol=2e-3)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: str(case["scaling"]))
def test_rope_frequencies_equal_transformers(case):
    frequencies, factor = layers.rope_frequencies(
        case["head_dim"], case["theta"], case["scaling"], case["max_length"]
    )
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, case["frequencies"], rtol=1e-6)
    assert factor == pytest.approx(case["attention_factor"], rel=1e-12)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "dynamic", "factor": 2.0}, "'dynamic': known are default, linear, llama3, yarn"),
        ({"rope_type": "lama3"}, "nearest: 'llama3'"),
        ({"rope_type": "llama3", "factor": 2.0}, "'llama3' lacks 'low_freq_factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_rope_scaling_that_is_not_known_is_refused(scaling, message):
    with pytest.raises(UserError, match=message):
        layers.rope_frequencies(8, 10000.0, scaling, 64)
