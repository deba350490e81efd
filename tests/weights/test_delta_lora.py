from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft

RATE, FACTOR, SCALE = 0.05, 2.0, 1.5
X = jax.random.normal(jax.random.key(0), (5, 6))
W = jax.random.normal(jax.random.key(1), (6, 8))


def loss_of(product):
    return jnp.mean(jnp.square(jnp.sin(product) - 0.5))


@jax.jit
def gradients(w, a, b):
    """Of a and b, with W a constant, as in the paper."""
    return jax.grad(lambda a, b: loss_of(X @ w + SCALE * (X @ a) @ b), argnums=(0, 1))(a, b)


def algorithm_1(a, b, steps, start):
    """The paper's algorithm with SGD: from step K on, W itself is written after each update."""
    w, losses = W, []
    for step in range(steps):
        losses.append(float(loss_of(X @ w + SCALE * (X @ a) @ b)))
        da, db = gradients(w, a, b)
        new_a, new_b = a - RATE * da, b - RATE * db
        if step >= start:
            w = w + FACTOR * SCALE * (new_a @ new_b - a @ b)
        a, b = new_a, new_b
    return w, a, b, losses


def ours(method, steps, params):
    @jax.jit
    def step(trainable, frozen):
        def loss(trainable):
            return loss_of(jaxft.contract(X, jaxft.combine(trainable, frozen)["q_proj"]["kernel"]))

        value, gradient = jax.value_and_grad(loss)(trainable)
        return jax.tree.map(lambda leaf, slope: leaf - RATE * slope, trainable, gradient), value

    losses, events = [], dict(method.events)
    for number in range(steps):
        params = events[number](params) if number in events else params
        trainable, frozen = jaxft.partition(params, method)
        trainable, value = step(trainable, frozen)
        params = jaxft.combine(trainable, frozen)
        losses.append(float(value))
    return params["q_proj"]["kernel"], losses


@pytest.mark.parametrize("start", [0, 1, 4])
def test_it_equals_the_papers_algorithm_with_a_written_base(start):
    method = jaxft.methods.delta_lora(rank=2, alpha=2 * SCALE, factor=FACTOR, start_step=start)
    params = jaxft.adapt({"q_proj": {"kernel": W}}, method, jax.random.key(2))
    kernel = params["q_proj"]["kernel"]
    w, a, b, losses = algorithm_1(kernel.a, kernel.b, 8, start)
    trained, our_losses = ours(method, 8, params)
    np.testing.assert_allclose(our_losses, losses, rtol=1e-5)
    np.testing.assert_allclose(trained.a, a, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(trained.b, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jaxft.materialize(trained), w + SCALE * a @ b, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(trained.base, W)
    assert not np.allclose(w, W, atol=1e-3)


def test_before_its_start_it_is_lora():
    lora = jaxft.methods.lora(rank=2, alpha=2 * SCALE)
    delta = jaxft.methods.delta_lora(rank=2, alpha=2 * SCALE, start_step=100)
    params = {"q_proj": {"kernel": W}}
    _, left = ours(lora, 3, jaxft.adapt(params, lora, jax.random.key(2)))
    _, right = ours(delta, 3, jaxft.adapt(params, delta, jax.random.key(2)))
    np.testing.assert_allclose(left, right, rtol=1e-6)


@pytest.mark.parametrize("start", [0, 2])
def test_it_is_exactly_a_lora_of_higher_rank(start):
    method = jaxft.methods.delta_lora(rank=2, factor=FACTOR, start_step=start)
    params = jaxft.adapt({"q_proj": {"kernel": W}}, method, jax.random.key(2))
    trained, _ = ours(method, 4, params)
    exported = trained.as_lora()
    assert exported.ranks == ((4,) if start else (2,))
    np.testing.assert_allclose(
        jaxft.materialize(exported), jaxft.materialize(trained), rtol=1e-4, atol=1e-4
    )


def test_the_lora_of_a_stack_has_true_ranks_first():
    method = jaxft.methods.delta_lora(rank=3, rank_pattern={r"layers\.1\.q_proj": 1})
    params = {"layers": {"q_proj": {"kernel": jax.random.normal(jax.random.key(1), (2, 6, 8))}}}
    params = jaxft.adapt(params, method, jax.random.key(2))
    kernel = params["layers"]["q_proj"]["kernel"]
    mask = jnp.asarray([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    filled = jax.random.normal(jax.random.key(3), kernel.b.shape) * mask[:, :, None]
    leaves = {"b": filled, "a": kernel.a + mask[:, None, :]}
    moved = jax.tree.map_with_path(lambda path, leaf: leaves.get(path[0].name, leaf), kernel).start(
        2.0
    )
    moved = jax.tree.map_with_path(
        lambda path, leaf: leaf * 1.5 if path[0].name in ("a", "b") else leaf, moved
    )
    exported = moved.as_lora()
    assert exported.ranks == (6, 2)
    assert not np.any(exported.a[1, :, 2:])
    assert not np.any(exported.b[1, 2:])
    np.testing.assert_allclose(
        jaxft.materialize(exported), jaxft.materialize(moved), rtol=1e-4, atol=1e-4
    )
