from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels.attention import Branches, attention, attention_reference

SCALE = 0.3
OPTIONS = ("scale", "softcap")
attend = jax.jit(attention, static_argnames=OPTIONS)
attend_plainly = jax.jit(attention_reference, static_argnames=OPTIONS)


def inputs(length, heads=4, key_heads=2, head_dim=8, batch=2, dtype=jnp.float32, seed=0):
    """Queries, keys, values, and two packed segments followed by padding (first row), one whole."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = [(batch, count, length, head_dim) for count in (heads, key_heads, key_heads)]
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    segments = np.ones((batch, length), np.int32)
    segments[0, length // 3 :] = 2
    segments[0, length - length // 5 :] = 0
    return *(array.astype(dtype) for array in arrays), jnp.asarray(segments)


def with_gradients(function, query, key, value, segments, **options):
    """The output, and the gradients of a fixed random projection of it."""

    def run(query, key, value):
        output = function(query, key, value, segments, segments, scale=SCALE, **options)
        direction = jax.random.normal(jax.random.key(9), output.shape)
        return jnp.sum(output.astype(jnp.float32) * direction), output

    gradients, output = jax.jit(jax.grad(run, argnums=(0, 1, 2), has_aux=True))(query, key, value)
    return output, *gradients


def assert_close(left, right, tolerance):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, np.abs(b).max()), rtol=0)


@pytest.mark.parametrize(
    ("length", "options"),
    [
        (7, {}),
        (256, {}),
        (300, {"softcap": 2.0}),
        (300, {"window": 100}),
        (1025, {"window": 17, "softcap": 5.0}),
    ],
)
def test_equals_the_reference_with_its_gradients(length, options):
    """One block, several, a ragged last one; window and soft cap; packed segments and padding."""
    arrays = inputs(length)
    fast = with_gradients(attention, *arrays, **options)
    assert_close(fast, with_gradients(attention_reference, *arrays, **options), 2e-6)


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 1), (9, 3)])
def test_query_heads_share_key_heads_in_order(heads, key_heads):
    """Query head n reads key head n // (heads / key_heads)."""
    query, key, value, segments = inputs(140, heads, key_heads)
    repeated = [jnp.repeat(x, heads // key_heads, axis=1) for x in (key, value)]
    want = attend_plainly(query, *repeated, segments, segments, scale=SCALE)
    assert_close(attend(query, key, value, segments, segments, scale=SCALE), want, 2e-6)


def test_reference_equals_softmax_row_by_row():
    query, key, value, segments = inputs(11, heads=1, key_heads=1)
    output = attend_plainly(query, key, value, segments, segments, window=4, scale=SCALE)
    query, key, value, segments = (np.asarray(x) for x in (query, key, value, segments))
    for batch, row in np.ndindex(segments.shape):
        seen = [
            column
            for column in range(row + 1)
            if segments[batch, column] == segments[batch, row] != 0 and row - column < 4
        ]
        want = np.zeros(8)
        if seen:
            scores = SCALE * key[batch, 0][seen] @ query[batch, 0, row]
            weights = np.exp(scores - scores.max())
            want = weights @ value[batch, 0][seen] / weights.sum()
        np.testing.assert_allclose(output[batch, 0, row], want, atol=1e-5)


def test_padding_gives_zeros_and_no_nan():
    for function in (attention, attention_reference):
        query, key, value, _ = inputs(20)
        nothing = jnp.zeros((2, 20), jnp.int32)
        for array in with_gradients(function, query, key, value, nothing):
            np.testing.assert_array_equal(array, 0.0)


@pytest.mark.parametrize("offset", [5, [5, 5]])
def test_decoding_with_an_offset_equals_the_last_rows(offset):
    """Queries at a scalar offset, or one a row, into a cache whose tail is not written yet."""
    query, key, value, segments = inputs(9)
    segments = jnp.ones_like(segments)
    whole = attend_plainly(query, key, value, segments, segments, window=3, scale=SCALE)
    written = segments.at[:, 8:].set(0)
    last = attend_plainly(
        query[:, :, 5:8],
        key,
        value,
        segments[:, 5:8],
        written,
        offset=jnp.asarray(offset, jnp.int32),
        window=3,
        scale=SCALE,
    )
    assert_close(last, whole[:, :, 5:8], 1e-6)


def test_bfloat16_accumulates_in_float32():
    narrow = inputs(300, dtype=jnp.bfloat16)
    wide = [x.astype(jnp.float32) for x in narrow[:3]]
    output = with_gradients(attention, *narrow)
    want = with_gradients(attention_reference, *wide, narrow[3])
    assert {array.dtype for array in output} == {jnp.dtype(jnp.bfloat16)}
    assert_close([x.astype(jnp.float32) for x in output], want, 1.5e-2)


def test_composes_with_scan_over_windows_vmap_and_checkpoint():
    """Layers that differ in a traced window, rematerialised, under vmap: as one by one."""
    query, key, value, segments = inputs(140)
    windows = jnp.asarray([5, 1000, 60], jnp.int32)

    def deep(function, query, checkpoint):
        def layer(x, window):
            return x + function(x, key, value, segments, segments, window=window, scale=SCALE), None

        return jnp.sum(jax.lax.scan(checkpoint(layer), query, windows)[0] ** 2)

    several = jnp.stack([query, query + 1.0])
    fast = jax.jit(
        jax.vmap(jax.grad(functools.partial(deep, attention, checkpoint=jax.checkpoint)))
    )(several)
    plain = functools.partial(deep, attention_reference, checkpoint=lambda layer: layer)
    plain = jax.jit(jax.grad(plain))
    assert_close(fast, jnp.stack([plain(x) for x in several]), 1e-5)


def test_a_policy_can_keep_what_the_backward_pass_needs():
    """With output and log-sum-exp saved by name, nothing of the forward pass is done again."""
    query, key, value, segments = inputs(140)

    def products(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        run = jax.checkpoint(
            lambda query: attention(query, key, value, segments, segments, scale=SCALE),
            policy=policy,
        )
        gradient = jax.grad(lambda query: jnp.sum(jnp.sin(run(query))))
        return str(jax.make_jaxpr(gradient)(query)).count("dot_general")

    named = products("attention_output", "attention_log_sum_exp")
    assert products() - named == 4  # two products a block, two blocks


def test_scores_above_the_diagonal_of_blocks_are_not_computed():
    """And no array of all scores exists: forward and backward."""
    query, key, value, segments = inputs(512, batch=1, heads=2, key_heads=2)
    text = (
        jax.jit(functools.partial(with_gradients, attention))
        .lower(query, key, value, segments)
        .as_text()
    )
    assert "1x2x128x128x" in text
    assert "512x512" not in text


def branched(length):
    """One segment of a beginning and two branches behind it, one after the other, and padding at the end."""
    start, middle, end = length // 4, length // 2, length - 3
    numbers, positions = np.zeros((2, 2, length), np.int32)
    positions[:] = np.arange(length)
    numbers[:, start:middle], numbers[:, middle:end] = 1, 2
    positions[:, middle:end] = start + np.arange(end - middle)
    segments = np.ones((2, length), np.int32)
    segments[:, end:] = 0
    return (
        jnp.asarray(segments),
        Branches(jnp.asarray(numbers), jnp.asarray(positions)),
        start,
        middle,
        end,
    )


@pytest.mark.parametrize("length", [24, 300])
@pytest.mark.parametrize("options", [{}, {"window": 9}, {"window": 70, "softcap": 2.0}], ids=str)
def test_a_branch_sees_the_beginning_and_itself(length, options):
    """Both forms equal the sequences one by one, and each other with their gradients."""
    query, key, value, _ = inputs(length)
    segments, branches, start, middle, end = branched(length)
    fast = with_gradients(attention, query, key, value, segments, branches=branches, **options)
    plain = with_gradients(
        attention_reference, query, key, value, segments, branches=branches, **options
    )
    assert_close(fast, plain, 2e-6)
    for first, last in ((start, middle), (middle, end)):
        places = np.r_[:start, first:last]
        parts = [x[:, :, places] for x in (query, key, value)]
        alone = attend_plainly(*parts, *[segments[:, places]] * 2, scale=SCALE, **options)
        assert_close(fast[0][:, :, places], alone, 2e-6)
