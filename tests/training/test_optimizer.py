"""Schedules are transformers', the optimizer sees the trainable tree alone, groups and decay go by pattern."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxft
from jaxft.errors import UserError
from jaxft.training.optimizer import make_optimizer, schedule
from jaxft.weights import Tied


def rates(settings: Any, steps: int) -> list[float]:
    """The rate of each update."""
    course = schedule(settings, steps)
    return [float(course(jnp.asarray(n))) for n in range(steps)]


@pytest.mark.parametrize(
    ("name", "course"),
    [
        ("linear", lambda u: 1 - u),
        ("cosine", lambda u: 0.5 * (1 + math.cos(math.pi * u))),
        ("constant", lambda u: 1.0),
        ("wsd", lambda u: 1.0 if u <= 0.75 else (1 - u) / 0.25),
    ],
)
def test_schedules_by_their_formulas(
    name: str, course: Callable[[float], float], configure: Callable[..., Any]
) -> None:
    """A warm-up from 0, then the course; the n-th update's rate is schedule(n)."""
    settings = configure(
        **{
            "optimizer.schedule": name,
            "optimizer.warmup_steps": 4,
            "optimizer.decay_steps": 4,
            "optimizer.learning_rate": 0.5,
            "steps": 20,
        }
    ).optimizer
    wanted = [0.5 * (n / 4 if n < 4 else course((n - 4) / 16)) for n in range(20)]
    np.testing.assert_allclose(rates(settings, 20), wanted, atol=1e-6)


def test_the_final_fraction_is_where_it_ends(configure: Callable[..., Any]) -> None:
    """The last rate of every falling schedule tends to learning_rate x final_fraction."""
    for name in ("linear", "cosine", "wsd"):
        settings = configure(
            **{"optimizer.schedule": name, "optimizer.final_fraction": 0.1}
        ).optimizer
        assert float(schedule(settings, 50)(jnp.asarray(50))) == pytest.approx(1e-3)


def tree() -> dict[str, Any]:
    """A tree with an adapter target, a norm, and a tied head, which is a weight without parts."""
    return {
        "q_proj": {"kernel": jnp.ones((4, 6))},
        "norm": {"scale": jnp.ones(4)},
        "head": {"kernel": Tied(path=("embed",), head_shape=(4, 9), head_dtype=jnp.float32)},
    }


def adapted(method: Any) -> tuple[Any, Any]:
    """(trainable, frozen) with every leaf moved off zero."""
    params = jaxft.adapt(tree(), method, jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + jnp.asarray(0.5, leaf.dtype), params)
    return jaxft.partition(params, method)


def test_no_slot_for_a_frozen_leaf(configure: Callable[..., Any]) -> None:
    """Adam's moments have exactly the trainable leaves' shapes."""
    method = jaxft.methods.lora_fa(rank=2)
    trainable, _ = adapted(method)
    optimizer = make_optimizer(configure().optimizer, method, trainable, 5)
    state = optimizer.init(trainable)
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert shapes == [(2, 6), (2, 6)]


def test_decay_by_pattern(configure: Callable[..., Any]) -> None:
    """With a zero gradient only what decays moves: norms and biases do not by default."""
    settings = configure(**{"optimizer.weight_decay": 0.1}).optimizer
    params = tree()
    optimizer = make_optimizer(settings, jaxft.methods.full(), params, 5)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params, frozen=zeros)
    np.testing.assert_allclose(
        updates["q_proj"]["kernel"], -0.1 * 1e-2 * np.ones((4, 6)), rtol=1e-6
    )
    np.testing.assert_array_equal(updates["norm"]["scale"], np.zeros(4))


def test_lora_plus_is_a_factor_on_bs_rate(configure: Callable[..., Any]) -> None:
    """b moves `ratio` times as far as under LoRA, a just as far."""
    moved = {}
    for method in (jaxft.methods.lora(rank=2), jaxft.methods.lora_plus(rank=2, ratio=8.0)):
        trainable, frozen = adapted(method)
        optimizer = make_optimizer(configure().optimizer, method, trainable, 5)
        grads = jax.tree.map(jnp.ones_like, trainable)
        updates, _ = optimizer.update(grads, optimizer.init(trainable), trainable, frozen=frozen)
        moved[method.name] = updates["q_proj"]["kernel"]
    np.testing.assert_allclose(moved["lora_plus"].b, 8.0 * moved["lora"].b, rtol=1e-6)
    np.testing.assert_array_equal(moved["lora_plus"].a, moved["lora"].a)


def test_lora_fa_v2_preconditions_by_the_frozen_a(configure: Callable[..., Any]) -> None:
    """Under plain SGD b's update is -rate (a^T a)^-1 g / s^2."""
    method = jaxft.methods.lora_fa_v2(rank=2, alpha=6.0)
    trainable, frozen = adapted(method)
    settings = configure(
        **{"optimizer.name": "sgd", "optimizer.clip_norm": 0.0, "optimizer.schedule": "constant"}
    ).optimizer
    optimizer = make_optimizer(settings, method, trainable, 5)
    grads = jax.tree.map(
        lambda leaf: jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape), trainable
    )
    updates, _ = optimizer.update(grads, optimizer.init(trainable), trainable, frozen=frozen)
    held = frozen["q_proj"]["kernel"]
    a, scale = np.asarray(held.a, np.float64), float(held.scale)
    wanted = -1e-2 * np.linalg.inv(a.T @ a) @ np.asarray(grads["q_proj"]["kernel"].b) / scale**2
    np.testing.assert_allclose(updates["q_proj"]["kernel"].b, wanted, rtol=1e-3)


@pytest.mark.parametrize("name", ["sgd", "adafactor", "lion", "adam"])
def test_any_optax_optimizer_by_name(name: str, configure: Callable[..., Any]) -> None:
    """The Optax function is called with the schedule and its own options."""
    settings = configure(**{"optimizer.name": name, "optimizer.clip_norm": 0.0}).optimizer
    params = tree()
    optimizer = make_optimizer(settings, jaxft.methods.full(), params, 5)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params, frozen=grads)
    course = schedule(settings, 5)
    own = getattr(optax, name)(course, **({"weight_decay": 0.0} if name == "lion" else {}))
    wanted, _ = own.update(grads, own.init(params), params)
    for ours, theirs in zip(jax.tree.leaves(updates), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_a_decay_that_the_optimizer_cannot_do_is_refused(configure: Callable[..., Any]) -> None:
    """Nothing is silently ignored."""
    settings = configure(**{"optimizer.name": "sgd", "optimizer.weight_decay": 0.1}).optimizer
    with pytest.raises(UserError, match="sgd takes none"):
        make_optimizer(settings, jaxft.methods.full(), tree(), 5)
