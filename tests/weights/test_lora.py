from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxft
from jaxft.methods import METHODS
from jaxft.tree import flatten_with_paths
from jaxft.weights import LoRA, precondition_by_a
from jaxft.weights.lora import drop, up


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def adapted_stack(method, seed=5):
    return jaxft.adapt(
        {"layers": {"q_proj": {"kernel": normal(2, 3, 6, 8)}}}, method, jax.random.key(seed)
    )


def test_the_start_is_pytorchs_kaiming_uniform_and_zero():
    method = jaxft.methods.lora(rank=64)
    kernel = jaxft.adapt({"q_proj": {"kernel": jnp.zeros((400, 8))}}, method, jax.random.key(0))
    kernel = kernel["q_proj"]["kernel"]
    bound = 1.0 / math.sqrt(400)
    assert float(jnp.max(jnp.abs(kernel.a))) <= bound
    np.testing.assert_allclose(float(jnp.std(kernel.a)), bound / math.sqrt(3), rtol=0.02)
    assert not np.any(kernel.b)


def test_the_product_with_b_and_its_gradients_are_those_of_a_plain_one():
    narrow, b, seen = normal(0, 2, 5, 3), normal(1, 3, 7), normal(2, 2, 5, 7)
    found, pull = jax.vjp(up, narrow, b)
    expected, plain = jax.vjp(jnp.matmul, narrow, b)
    jax.tree.map(
        lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5),
        (found, pull(seen)),
        (expected, plain(seen)),
    )


def test_layers_of_a_stack_start_differently():
    a = adapted_stack(jaxft.methods.lora(rank=2))["layers"]["q_proj"]["kernel"].a
    assert not np.allclose(a[0], a[1])


@pytest.mark.parametrize(("name", "expected"), [("lora", 12.0 / 4), ("rslora", 12.0 / 2)])
def test_the_scale_is_alpha_over_rank_or_its_root(name, expected):
    method = METHODS[name](rank=4, alpha=12.0)
    kernel = jaxft.adapt({"q_proj": {"kernel": jnp.zeros((6, 8))}}, method, jax.random.key(0))
    assert float(kernel["q_proj"]["kernel"].scale) == expected


def test_each_layer_has_the_scale_of_its_own_rank_and_alpha():
    method = jaxft.methods.rslora(
        rank=4, alpha=8.0, rank_pattern={"layers.1.q_proj": 1}, alpha_pattern={r"layers\.2.*": 2.0}
    )
    kernel = adapted_stack(method)["layers"]["q_proj"]["kernel"]
    np.testing.assert_allclose(kernel.scale, [4.0, 8.0, 1.0])
    assert kernel.ranks == (4, 1, 4)
    assert not np.any(kernel.a[1, :, 1:])


def kept_shapes(params, method, x, key=None):
    """Shapes of what is kept for the backward pass of a product whose input no one else keeps."""
    trainable, frozen = jaxft.partition(params, method)

    def run(trainable, x):
        params = jaxft.combine(trainable, frozen)
        params = params if key is None else jaxft.bind_dropout(params, key)
        return jaxft.contract(x + 1.0, params["q_proj"]["kernel"])

    backward = jax.eval_shape(lambda trainable, x: jax.vjp(run, trainable, x)[1], trainable, x)
    return [leaf.shape for leaf in jax.tree.leaves(backward)]


@pytest.mark.parametrize("row", ["lora", "lora_fa", "lora_fa_v2"])
def test_lora_fa_keeps_x_a_and_not_x(row):
    method = METHODS[row](rank=2)
    params = jaxft.adapt({"q_proj": {"kernel": normal(1, 6, 8)}}, method, jax.random.key(0))
    kept = kept_shapes(params, method, normal(0, 32, 6))
    assert kept.count((32, 2)) == 1
    assert kept.count((32, 6)) == (1 if row == "lora" else 0)


def test_lora_fa_needs_less_memory_in_the_compiled_step():
    """Twelve layers of a (4096, 64) input: LoRA keeps every input, LoRA-FA every (4096, 2) product."""
    kernels = {"layers": {"q_proj": {"kernel": jnp.ones((12, 64, 64))}}}

    def temporary_bytes(method):
        params = jaxft.adapt(kernels, method, jax.random.key(0))
        trainable, frozen = jaxft.partition(params, method)

        def loss(trainable, x):
            layers = jaxft.combine(trainable, frozen)["layers"]
            step = lambda x, layer: (jaxft.contract(x, layer["q_proj"]["kernel"]), None)  # noqa: E731
            return jnp.sum(jax.lax.scan(step, x, layers)[0])

        compiled = jax.jit(jax.grad(loss)).lower(trainable, jnp.ones((4096, 64))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    inputs = 12 * 4096 * 64 * 4
    lora, lora_fa = (temporary_bytes(METHODS[name](rank=2)) for name in ("lora", "lora_fa"))
    assert lora - lora_fa > 0.9 * inputs


def test_dropout_is_reproducible_off_without_a_key_and_right_on_average():
    method = jaxft.methods.lora(rank=2, alpha=2.0, dropout=0.25)
    params = jaxft.adapt({"q_proj": {"kernel": jnp.zeros((6, 8))}}, method, jax.random.key(0))
    kernel = dataclasses.replace(params["q_proj"]["kernel"], b=normal(4, 2, 8))
    x = normal(3, 4000, 6) + 1.0

    @jax.jit
    def run(key):
        return jaxft.contract(x, jaxft.bind_dropout(kernel, key))

    first, again, other = run(jax.random.key(1)), run(jax.random.key(1)), run(jax.random.key(2))
    plain = jaxft.contract(x, kernel)
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    np.testing.assert_allclose(plain, x @ kernel.a @ kernel.b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jnp.mean(first, 0), jnp.mean(plain, 0), atol=0.05)


def test_dropout_takes_the_share_it_says_and_scales_the_rest():
    dropped = drop(jnp.ones((100, 100)), 0.25, jax.random.key(0))
    np.testing.assert_allclose(jnp.unique(dropped), [0.0, 1.0 / 0.75], rtol=1e-6)
    assert abs(float(jnp.mean(dropped == 0.0)) - 0.25) < 0.02


def test_each_kernel_and_each_layer_drops_its_own():
    method = jaxft.methods.lora(rank=2, dropout=0.5)
    kernels = {"layers": {name: {"kernel": normal(2, 3, 6, 8)} for name in ("q_proj", "k_proj")}}
    bound = jaxft.bind_dropout(jaxft.adapt(kernels, method, jax.random.key(0)), jax.random.key(1))
    keys = [bound["layers"][name]["kernel"].key for name in ("q_proj", "k_proj")]
    data = np.concatenate([jax.random.key_data(key) for key in keys])
    assert len({tuple(row) for row in data}) == 6


def test_the_dropped_input_is_not_kept_beside_the_input():
    method = jaxft.methods.lora(rank=2, dropout=0.5)
    params = jaxft.adapt({"q_proj": {"kernel": normal(1, 6, 8)}}, method, jax.random.key(0))
    assert kept_shapes(params, method, normal(0, 32, 6), jax.random.key(0)).count((32, 6)) == 1


@pytest.mark.parametrize("row", ["lora", "dora", "lora_fa", "delta_lora"])
def test_padded_ranks_stay_exact_under_adamw_with_decay(row):
    """A layer of rank 1 in a stack of rank 3 trains as it does alone, and its padding stays zero."""
    method = METHODS[row](rank=3, alpha=3.0, rank_pattern={"layers.1.q_proj": 1})
    params = adapted_stack(method)
    whole = params["layers"]["q_proj"]["kernel"]
    alone = jax.tree.map(lambda leaf: leaf[1], whole)
    narrow = {part: getattr(alone, part)[:, :1] for part in ("a", "a0") if hasattr(alone, part)}
    narrow |= {part: getattr(alone, part)[:1] for part in ("b", "b0") if hasattr(alone, part)}
    alone = {"q_proj": {"kernel": jax.tree.unflatten(*_replaced(alone, narrow))}}
    x = normal(3, 4, 6)

    def loss_stacked(params):
        def body(_, layer):
            return None, jnp.sum(jnp.sin(jaxft.contract(x, layer["q_proj"]["kernel"])))

        return jnp.sum(jax.lax.scan(body, None, params["layers"])[1])

    def loss_alone(params):
        return jnp.sum(jnp.sin(jaxft.contract(x, params["q_proj"]["kernel"])))

    trained = train(params, method, loss_stacked)["layers"]["q_proj"]["kernel"]
    trained_alone = train(alone, METHODS[row](rank=1), loss_alone)["q_proj"]["kernel"]
    np.testing.assert_allclose(trained.a[1, :, :1], trained_alone.a, atol=1e-5)
    np.testing.assert_allclose(trained.b[1, :1], trained_alone.b, atol=1e-5)
    assert not np.any(trained.a[1, :, 1:])
    assert not np.any(trained.b[1, 1:])


def _replaced(weight, parts):
    leaves, structure = jax.tree_util.tree_flatten_with_path(weight)
    return structure, [parts.get(path[0].name, leaf) for path, leaf in leaves]


def train(params, method, loss, steps=5):
    trainable, frozen = jaxft.partition(params, method)
    optimizer = optax.adamw(0.05, weight_decay=0.1)

    @jax.jit
    def step(trainable, state):
        gradient = jax.grad(lambda tree: loss(jaxft.combine(tree, frozen)))(trainable)
        with jax.numpy_dtype_promotion("standard"):  # Optax's own arithmetic asks for it
            updates, state = optimizer.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state

    state = optimizer.init(trainable)
    for _ in range(steps):
        trainable, state = step(trainable, state)
    return jaxft.combine(trainable, frozen)


def test_a_layer_left_out_never_changes():
    method = jaxft.methods.lora(rank=2, layers_to_transform=(0, 2))
    params = adapted_stack(method)
    trained = train(
        params,
        method,
        lambda params: jnp.sum(jnp.sin(jaxft.materialize(params["layers"]["q_proj"]["kernel"]))),
    )
    kernel = trained["layers"]["q_proj"]["kernel"]
    assert not np.any(kernel.a[1])
    assert not np.any(kernel.b[1])
    dense = jaxft.materialize(kernel)
    np.testing.assert_array_equal(dense[1], kernel.base[1])
    assert not np.allclose(dense[0], kernel.base[0])


def test_the_preconditioner_is_pefts_formula():
    """G' = (1/s^2) (a^T a)^-1 G, with G b's gradient; in PEFT's orientation (1/s^2) G (A A^T)^-1."""
    method = jaxft.methods.lora_fa_v2(rank=3, alpha=6.0)
    params = jaxft.adapt({"q_proj": {"kernel": normal(1, 6, 8)}}, method, jax.random.key(0))
    trainable, frozen = jaxft.partition(params, method)
    gradient = jax.tree.map(lambda leaf: normal(2, *leaf.shape), trainable)
    frozen_kernel = frozen["q_proj"]["kernel"]
    made = method.precondition(gradient["q_proj"]["kernel"], frozen_kernel)
    a_torch = np.asarray(frozen_kernel.a, np.float64).T
    g_torch = np.asarray(gradient["q_proj"]["kernel"].b, np.float64).T
    expected = g_torch @ np.linalg.pinv(a_torch @ a_torch.T + 1e-8 * np.eye(3)) / 2.0**2
    np.testing.assert_allclose(made.b, expected.T, rtol=1e-4)
    assert [path for path, _ in flatten_with_paths(made)] == ["b"]


def test_the_preconditioned_step_moves_the_kernel_along_its_projected_gradient():
    """A step of SGD in b then changes W by -lr P dL/dW, P the projection on a's columns: for any scale."""
    weight, a = normal(1, 6, 8), normal(2, 6, 3)
    target = normal(3, 6, 8)
    lora = LoRA(weight, a, jnp.zeros((3, 8)), jnp.asarray(5.0), ranks=(3,))
    slope = weight - target  # of |W - target|^2 / 2
    gradient_b = 5.0 * a.T @ slope
    hole = LoRA(None, None, gradient_b, None, ranks=(3,))
    moved = precondition_by_a(hole, lora)
    change = 5.0 * a @ moved.b
    projection = a @ jnp.linalg.solve(a.T @ a, a.T)
    np.testing.assert_allclose(change, projection @ slope, rtol=1e-3, atol=1e-4)


def test_the_preconditioner_leaves_padding_at_zero():
    method = jaxft.methods.lora_fa_v2(
        rank=3, rank_pattern={"layers.1.q_proj": 1}, layers_to_transform=(0, 1)
    )
    params = adapted_stack(method)
    trainable, frozen = jaxft.partition(params, method)
    gradient = jax.grad(
        lambda tree: jnp.sum(
            jnp.sin(jaxft.materialize(jaxft.combine(tree, frozen)["layers"]["q_proj"]["kernel"]))
        )
    )(trainable)["layers"]["q_proj"]["kernel"]
    made = precondition_by_a(gradient, frozen["layers"]["q_proj"]["kernel"]).b
    assert np.all(np.isfinite(made))
    assert not np.any(made[1, 1:])
    assert not np.any(made[2])
    one = jax.tree.map(lambda leaf: leaf[1], frozen["layers"]["q_proj"]["kernel"])
    column = one.a[:, :1]
    expected = gradient.b[1, :1] / jnp.sum(column**2) / one.scale**2
    np.testing.assert_allclose(made[1, :1], expected, rtol=1e-4)


def test_the_preconditioner_gives_lapack_one_layer_at_a_time():
    """Batched calls that run beside each other can wait for each other's threads for ever."""
    adapter = {"base": None, "scale": jnp.ones(3), "ranks": (4,) * 3}
    frozen = LoRA(a=jnp.ones((3, 8, 4)), b=None, **adapter)
    gradient = LoRA(a=None, b=jnp.ones((3, 4, 16)), **adapter)
    text = jax.jit(precondition_by_a).lower(gradient, frozen).compile().as_text()
    calls = [line for line in text.splitlines() if "lapack" in line]
    assert calls
    assert not any("f32[3," in line for line in calls)
