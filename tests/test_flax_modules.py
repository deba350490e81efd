"""A model in another author's style, adapted, trained and merged without a line of it changed."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxft
from jaxft.errors import UserError
from jaxft.methods import METHODS
from jaxft.weights import weights_of


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(nn.LayerNorm()(x))
        return x + nn.Dense(8)(nn.gelu(nn.Dense(12)(x))), None


class Model(nn.Module):
    """Embedding with `attend` as its head, attention of DenseGenerals, an Einsum, Dense with a bias."""

    def setup(self):
        self.embed = nn.Embed(10, 8)
        self.mix = nn.Einsum((8, 2, 4), "...d,dhk->...hk")
        self.layer = Layer()

    def __call__(self, ids):
        x = self.embed(ids)
        x, _ = self.layer(x + self.mix(x).reshape(x.shape))
        return self.embed.attend(x)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return stack(name="layers")(x)[0]


IDS = jax.random.randint(jax.random.key(0), (4, 6), 0, 10)
MODEL = Model()
PARAMS = MODEL.init(jax.random.key(1), IDS)["params"]
CONTRACTED = (("out", 2), ("layers/attention/*", 1))
TARGETS = ("kernel", "embed")


def adapted_params(name, params=PARAMS, targets=TARGETS, **settings):
    method = METHODS[name](rank=2, targets=targets, **settings)
    key = jax.random.key(2)
    return jaxft.adapt(params, method, key, contracted=CONTRACTED), method


def run(params, model=MODEL, x=IDS):
    with jaxft.adapted():
        return model.apply({"params": jaxft.bind(params, params)}, x)


def train(params, method, steps=8):
    trainable, frozen = jaxft.partition(params, method)
    optimizer = optax.adam(0.02)

    def loss(trainable):
        scores = run(jaxft.combine(trainable, frozen))
        return optax.softmax_cross_entropy_with_integer_labels(scores, IDS[:, ::-1]).mean()

    @jax.jit
    def step(trainable, state):
        value, gradient = jax.value_and_grad(loss)(trainable)
        with jax.numpy_dtype_promotion("standard"):  # Optax's own arithmetic asks for it
            updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(trainable, updates), state, value

    state, losses = optimizer.init(trainable), []
    for _ in range(steps):
        trainable, state, value = step(trainable, state)
        losses.append(float(value))
    return jaxft.combine(trainable, frozen), losses


def test_every_kind_of_layer_is_adapted():
    params, _ = adapted_params("lora")
    assert {path for path, _ in weights_of(params)} == {
        "embed/embedding",
        "mix/kernel",
        "layer/Dense_0/kernel",
        "layer/Dense_1/kernel",
        *(f"layer/attention/{name}/kernel" for name in ("query", "key", "value", "out")),
    }
    out = params["layer"]["attention"]["out"]["kernel"]
    assert (out.shape, out.a.shape, out.b.shape) == ((2, 4, 8), (8, 2), (2, 8))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])
def test_a_fresh_adapter_changes_nothing(name):
    params, _ = adapted_params(name, targets=("kernel",) if name == "vera" else TARGETS)
    np.testing.assert_allclose(run(params), MODEL.apply({"params": PARAMS}, IDS), atol=1e-5)


@pytest.mark.parametrize("name", ["lora", "dora", "vera", "lora_fa"])
def test_it_trains_and_merges_into_the_plain_module(name):
    params, method = adapted_params(name, targets=("kernel",) if name == "vera" else TARGETS)
    trained, losses = train(params, method)
    assert losses[-1] < losses[0]
    _, before = jaxft.partition(params, method)
    _, after = jaxft.partition(trained, method)
    for left, right in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert left is right
    # In the plain module the head is the embedding again: PEFT's rule leaves the adapter out of it,
    # but a module whose head is `attend` has one embedding alone, whose adapter acts in both.
    merged = MODEL.apply({"params": jaxft.merge(trained)}, IDS)
    np.testing.assert_allclose(merged, run(trained), rtol=1e-3, atol=1e-4)
    assert not np.allclose(merged, MODEL.apply({"params": PARAMS}, IDS), atol=1e-3)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_layers_under_a_scan_are_adapted_as_a_stack(name):
    model, x = Scanned(), jax.random.normal(jax.random.key(3), (2, 5, 8))
    plain = model.init(jax.random.key(1), x)["params"]
    params, method = adapted_params(
        name, plain, ("kernel",), rank_pattern={r"layers\.1\.Dense_0": 1}
    )
    np.testing.assert_allclose(run(params, model, x), model.apply({"params": plain}, x), atol=1e-5)
    trainable, frozen = jaxft.partition(params, method)
    moved = jax.tree.map(
        lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), trainable
    )
    params = jaxft.combine(moved, frozen)
    merged = model.apply({"params": jaxft.merge(params)}, x)
    np.testing.assert_allclose(run(params, model, x), merged, rtol=1e-3, atol=1e-4)


def test_a_model_without_weights_runs_untouched():
    with jaxft.adapted():
        inside = MODEL.apply({"params": PARAMS}, IDS)
    np.testing.assert_array_equal(inside, MODEL.apply({"params": PARAMS}, IDS))


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_a_layer_computes_in_its_own_dtype(dtype):
    layer, x = nn.Dense(6, dtype=dtype), jnp.ones((2, 4))
    plain = layer.init(jax.random.key(0), x)["params"]
    params, _ = adapted_params("lora", plain, ("kernel",))
    assert run(params, layer, x).dtype == layer.apply({"params": plain}, x).dtype


class Odd(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.ones, (4, 6))


@pytest.mark.parametrize(
    ("layer", "contracted", "message"),
    [
        (
            Odd(),
            (),
            "kernel: jaxft.adapted knows no Odd.__call__ with an adapted weight; it knows Dense, ",
        ),
        (nn.Conv(6, (1,)), (), "kernel: jaxft.adapted knows no Conv.__call__"),
        (
            nn.DenseGeneral(6, axis=(-2, -1)),
            (),
            r"its kernel is contracted over 2 axes: say so by `adapt\(",
        ),
        (nn.DenseGeneral(6, batch_dims=(0,)), (), "batched axes"),
        (nn.Einsum((6, 4), "...d,kd->...k"), (), "the equation ...d,kd->...k is no product"),
    ],
)
def test_what_is_not_known_is_refused_by_name(layer, contracted, message):
    x = jnp.ones((2, 3, 4))
    params, _ = adapted_params("lora", layer.init(jax.random.key(0), x)["params"], ("kernel",))
    with pytest.raises(UserError, match=message):
        run(params, layer, x)


def test_vera_unbound_says_what_to_do():
    params, _ = adapted_params("vera", targets=("kernel",))
    with (
        pytest.raises(UserError, match=r"is not bound: pass jaxft.bind\(params, params\)"),
        jaxft.adapted(),
    ):
        MODEL.apply({"params": params}, IDS)
