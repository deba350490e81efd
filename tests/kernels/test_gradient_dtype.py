"""jaxft.kernels.gradient_dtype: gradients of stored matrices in the type that computes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels.gradient_dtype import joined, narrowed

X = jax.random.normal(jax.random.key(0), (4, 8)).astype(jnp.bfloat16)
LAYERS = {
    "a": jax.random.normal(jax.random.key(1), (3, 8, 8)),
    "scale": jax.random.normal(jax.random.key(2), (3, 8)),
}


def loss(layers, narrow):
    def body(x, scanned):
        layer = joined(*scanned)
        y = x @ layer["a"].astype(x.dtype)
        return jnp.tanh(y * layer["scale"].astype(x.dtype)[None, :]), None

    cut = narrowed(layers, jnp.bfloat16 if narrow else jnp.float32)
    return jnp.sum(jax.lax.scan(body, X, cut)[0].astype(jnp.float32))


def test_values_and_gradients_are_those_of_the_plain_scan():
    """A product in bfloat16 has a gradient in bfloat16: stacking it so loses nothing."""
    ours, plain = (jax.value_and_grad(loss)(LAYERS, narrow) for narrow in (True, False))
    jax.tree.map(np.testing.assert_array_equal, ours, plain)


def test_matrices_alone_are_narrowed_and_only_where_the_product_is_narrower():
    _, taps = narrowed(LAYERS, jnp.bfloat16)
    assert [None if tap is None else (tap.shape, tap.dtype) for tap in taps] == [
        ((3, 8, 8), jnp.bfloat16),
        None,
    ]
    assert narrowed(LAYERS, jnp.float32)[1] == [None, None]


@pytest.mark.parametrize("narrow", [True, False])
def test_no_stack_of_float32_gradients_is_formed(narrow):
    """The backward loop carries the gradients as it stacks them: in bfloat16, or else in float32."""
    text = str(jax.make_jaxpr(jax.grad(lambda layers: loss(layers, narrow)))(LAYERS))
    last = text[text.rindex("scan[") :]
    assert ("bf16[3,8,8] = scan" in text or "bf16[3,8,8]" in last) == narrow
