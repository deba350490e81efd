"""Products are counted as often as they run."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxft.planning.flops import count_flops


def test_a_product_of_matrices_costs_two_operations_a_summand():
    left, right = jnp.ones((3, 4, 5)), jnp.ones((3, 5, 6))
    assert count_flops(jax.make_jaxpr(jnp.matmul)(left, right)) == 2 * 3 * 4 * 5 * 6


def test_loops_count_as_often_as_they_run_and_branches_as_the_dearest():
    square = jnp.ones((8, 8))
    once = 2 * 8**3

    def body(carry, _):
        dear = jax.lax.cond(carry[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, carry)
        return dear, None

    scanned = jax.make_jaxpr(lambda x: jax.lax.scan(body, x, length=5)[0])(square)
    assert count_flops(scanned) == 5 * 2 * once


def test_a_choice_by_platform_counts_as_what_is_for_any_other():
    square = jnp.ones((8, 8))

    def chosen(x):
        return jax.lax.platform_dependent(x, tpu=lambda x: x @ x @ x, default=lambda x: x @ x)

    assert count_flops(jax.make_jaxpr(chosen)(square)) == 2 * 8**3


def test_the_backward_pass_and_rematerialisation_are_counted():
    x, w = jnp.ones((4, 8)), jnp.ones((8, 8))
    once = 2 * 4 * 8 * 8

    def loss(function):
        return lambda x: jnp.sum(function(function(x)))

    product = lambda x: jnp.sin(x @ w)  # noqa: E731
    plain = count_flops(jax.make_jaxpr(jax.grad(loss(product)))(x))
    again = count_flops(jax.make_jaxpr(jax.grad(loss(jax.checkpoint(product))))(x))
    assert (plain, again) == (4 * once, 6 * once)
