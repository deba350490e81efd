"""Attention over a divided sequence is attention over the whole one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels import ring
from jaxft.kernels.attention import Branches, attention_reference
from jaxft.kernels.ring import ring_attention
from jaxft.mesh import AXES


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
    """A mesh of simulated devices."""
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    devices = np.asarray(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return jax.sharding.Mesh(devices, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)


# Two continuations behind the beginning that they share.
BRANCHES = Branches(
    jnp.broadcast_to(jnp.repeat(jnp.arange(3, dtype=jnp.int32), 16)[None, :], (2, 48)),
    jnp.broadcast_to(
        jnp.concatenate([jnp.arange(32), jnp.arange(16, 32)]).astype(jnp.int32)[None, :], (2, 48)
    ),
)


def inputs(length: int = 48, heads: int = 4, key_heads: int = 2) -> tuple[jax.Array, ...]:
    """Query, key, value, segments (three packed sequences and padding) and a cotangent."""
    rng = np.random.default_rng(0)
    draw = lambda count: jnp.asarray(rng.normal(size=(2, count, length, 8)), jnp.float32)  # noqa: E731
    ids = np.repeat([1, 2, 3, 0], [length // 2, length // 4, length // 8, length // 8])
    segments = jnp.asarray(np.stack([ids, np.ones_like(ids)]), jnp.int32)
    return draw(heads), draw(key_heads), draw(key_heads), segments, draw(heads)


@pytest.mark.parametrize(
    ("mesh", "settings"),
    [
        pytest.param({"context": 2}, {}, marks=pytest.mark.thorough),
        pytest.param({"context": 4, "data": 2}, {"window": 7}, marks=pytest.mark.thorough),
        ({"context": 3, "tensor": 2}, {"softcap": 2.0}),
        ({"context": 8}, {"window": 20, "softcap": 2.0}),
        ({"context": 4}, {"window": 9, "branches": BRANCHES}),
    ],
)
def test_a_ring_gives_one_devices_attention_and_gradients(
    mesh: dict[str, int], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and gradients to query, key and value, with segments, windows and a cap, in several blocks."""
    query, key, value, segments, cotangent = inputs()
    monkeypatch.setattr(ring, "BLOCK_ELEMENTS", 2 * 2 * 2 * 12)

    def reference(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return attention_reference(query, key, value, segments, segments, scale=0.3, **settings)

    def divided(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return ring_attention(query, key, value, segments, segments, scale=0.3, **settings)

    expected, back = jax.vjp(reference, query, key, value)
    wanted = back(cotangent)
    with jax.set_mesh(mesh_of(**mesh)):
        output, gradients = jax.jit(
            lambda *args: (divided(*args), jax.vjp(divided, *args)[1](cotangent))
        )(query, key, value)
    np.testing.assert_allclose(output, expected, atol=2e-6)
    for ours, theirs in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_every_device_does_the_same_work(size: int) -> None:
    """Of the causal pairs of chunks each device has the same number at each step of the ring; none is lost."""
    seen = set()
    for place in range(size):
        own = (place, 2 * size - 1 - place)
        for shift in range(size):
            other = (place - shift) % size
            keys = (other, 2 * size - 1 - other)
            pairs = {(q, k) for q in own for k in keys if k <= q}
            assert len(pairs) == (3 if shift == 0 else 2)
            if shift:  # as `_forward_here` has them
                side = 0 if shift <= place else 1
                assert pairs == {(own[1], keys[0]), (own[side], keys[side])}
            seen |= pairs
    assert len(seen) == size * (2 * size + 1)
    to_even, to_odd = ring._routes(size)
    for place in range(size):
        chunks = {2 * at for at, to in to_even if to == place}
        chunks |= {2 * at + 1 for at, to in to_odd if to == place}
        assert chunks == {place, 2 * size - 1 - place}
