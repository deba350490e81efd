from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft.weights import LoRA, contract


def stacks():
    kernels = jax.random.normal(jax.random.key(0), (3, 8, 6))
    a, b = (
        jax.random.normal(jax.random.key(1), (3, 8, 2)),
        jax.random.normal(jax.random.key(2), (3, 2, 6)),
    )
    yield "dense", kernels
    yield "lora", LoRA(base=kernels, a=a, b=b, scale=jnp.asarray([0.5, 1.0, 2.0]), ranks=(2, 2, 2))
    yield "int8", jaxft.quantize(kernels, "int8", group_size=4)


@pytest.mark.parametrize(
    ("name", "stack"), list(stacks()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_each_row_meets_the_weight_of_its_group(name, stack):
    x, groups = (
        jax.random.normal(jax.random.key(3), (2, 4, 8)),
        jnp.asarray([[0, 2, 1, 2], [2, 2, 0, 0]]),
    )
    found = contract(x, stack, groups)
    dense = jaxft.materialize(stack)
    np.testing.assert_allclose(
        found, jnp.einsum("bti,btio->bto", x, dense[groups]), rtol=1e-4, atol=1e-4
    )


def test_a_row_of_no_group_gives_zero_and_gradients_stay_in_their_group():
    (_, kernels), *_ = stacks()
    x, groups = jnp.ones((3, 8)), jnp.asarray([1, -1, 1])
    np.testing.assert_array_equal(contract(x, kernels, groups)[1], jnp.zeros(6))
    slope = jax.grad(lambda kernels: contract(x, kernels, groups).sum())(kernels)
    np.testing.assert_array_equal(slope[0], jnp.zeros((8, 6)))
    np.testing.assert_allclose(slope[1], 2 * jnp.ones((8, 6)))
