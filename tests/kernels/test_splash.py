"""The library's kernel computes what `attention_reference` defines; where it stands in a program for TPUs."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels import splash
from jaxft.kernels.attention import Branches, attention, attention_reference
from jaxft.kernels.splash import FOREVER
from jaxft.models.config import Config
from jaxft.models.transformer import hidden_states, initial_params
from jaxft.training.sharding import make_mesh

from .test_attention import assert_close, inputs, with_gradients

forward = functools.partial(splash.forward, interpret=True)
backward = functools.partial(splash.backward, interpret=True)


@pytest.fixture
def as_on_tpu(monkeypatch):
    """`attention` with the branch for TPUs taken, and the kernels run as plain operations."""
    monkeypatch.setattr(splash, "forward", forward)
    monkeypatch.setattr(splash, "backward", backward)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, tpu, default: tpu(*arrays))


def text_for_tpus(function, *arrays):
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()


def kernels_in(text):
    return text.count("@tpu_custom_call")


@pytest.mark.parametrize(
    ("length", "head_dim", "options"),
    [
        pytest.param(256, 64, {}, marks=pytest.mark.thorough),
        pytest.param(384, 64, {"softcap": 2.0}, marks=pytest.mark.thorough),
        (512, 64, {"window": 100}),
        (768, 64, {"window": 300}),  # three blocks of keys: parts of the queries' gradient
        pytest.param(768, 64, {"softcap": 2.0}, marks=pytest.mark.thorough),
        (1152, 128, {}),  # nine blocks of 128: two kernels for the gradients
    ],
)
def test_equals_the_reference_with_its_gradients(as_on_tpu, length, head_dim, options):
    """Packed segments and padding; grouped heads; one block and several; window and soft cap."""
    arrays = inputs(length, head_dim=head_dim)
    kernel = with_gradients(attention, *arrays, **options)
    assert_close(kernel, with_gradients(attention_reference, *arrays, **options), 4e-6)


@pytest.mark.parametrize("window", [100, FOREVER])
def test_a_traced_window_takes_the_kernel_that_was_made_for_it(as_on_tpu, window):
    arrays = inputs(256, head_dim=64)

    def traced(*arrays, scale):
        options = {"window": jnp.asarray(window, jnp.int32), "windows": (100, FOREVER)}
        return attention(*arrays, scale=scale, **options)

    kernel = with_gradients(traced, *arrays)
    assert_close(kernel, with_gradients(attention_reference, *arrays, window=window), 4e-6)


def test_padding_gives_zeros_and_no_nan(as_on_tpu):
    query, key, value, _ = inputs(128, head_dim=64)
    nothing = jnp.zeros((2, 128), jnp.int32)
    for array in with_gradients(attention, query, key, value, nothing):
        np.testing.assert_array_equal(array, 0.0)


def test_bfloat16_is_as_near_as_blocks_are(as_on_tpu):
    narrow = inputs(256, head_dim=64, dtype=jnp.bfloat16)
    wide = [x.astype(jnp.float32) for x in narrow[:3]]
    kernel = with_gradients(attention, *narrow)
    want = with_gradients(attention_reference, *wide, narrow[3])
    assert {array.dtype for array in kernel} == {jnp.dtype(jnp.bfloat16)}
    assert_close([x.astype(jnp.float32) for x in kernel], want, 1.5e-2)


@pytest.mark.parametrize("sizes", [{"fsdp": 2}, {"data": 2, "tensor": 2}])
def test_each_device_computes_its_rows_and_heads(as_on_tpu, sizes):
    arrays = inputs(128, head_dim=64)
    mesh = make_mesh({"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | sizes)
    with jax.set_mesh(mesh):
        kernel = with_gradients(attention, *arrays)
    assert_close(kernel, with_gradients(attention_reference, *arrays), 4e-6)


@pytest.mark.parametrize(
    ("length", "head_dim", "options", "kernels"),
    [
        (256, 64, {}, 2),  # forward; backward, of one block of keys
        (768, 64, {"window": 100}, 4),  # of three
        (1152, 64, {}, 3),  # of nine: for queries, and for keys and values
        (256, 80, {}, 0),
        (200, 64, {}, 0),
        (256, 64, {"branches": True}, 0),
        (256, 64, {"window": jnp.int32(100)}, 0),  # what it may be is not known
        (256, 64, {"window": jnp.int32(100), "windows": (100, FOREVER)}, 4),
    ],
)
def test_stands_in_programs_for_tpus_where_it_fits(length, head_dim, options, kernels):
    query, key, value, segments = inputs(length, head_dim=head_dim)
    if "branches" in options:
        options = {"branches": Branches(jnp.zeros_like(segments), jnp.zeros_like(segments))}

    def gradients(query, key, value):
        def total(query, key, value):
            return attention(query, key, value, segments, segments, scale=0.3, **options).sum()

        return jax.grad(total, argnums=(0, 1, 2))(query, key, value)

    assert kernels_in(text_for_tpus(gradients, query, key, value)) == kernels


def test_rows_or_heads_that_the_mesh_does_not_divide_stay_in_blocks():
    query, key = (jax.ShapeDtypeStruct((2, heads, 256, 64), jnp.float32) for heads in (4, 2))
    for sizes, fits in (({"fsdp": 2}, True), ({"fsdp": 4}, False), ({"tensor": 4}, False)):
        mesh = make_mesh({"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | sizes)
        with jax.set_mesh(mesh):
            assert splash.fits(query, key) == fits


def test_layers_of_two_windows_have_a_kernel_for_each():
    """Which of the two a layer takes is data: the layers are one program."""
    config = Config(
        family="llama", vocabulary=64, hidden=64, intermediate=64, layers=4, heads=2, key_heads=1,
        head_dim=64, max_length=256, windows=(0, 32, 0, 32),
    )  # fmt: skip
    for windows, kernels in (((0, 32, 0, 32), 2), ((32,) * 4, 1), ((), 1)):
        model = dataclasses.replace(config, windows=windows)
        params = jax.eval_shape(lambda key: initial_params(config, key), jax.random.key(0))
        tokens = jax.ShapeDtypeStruct((1, 128), jnp.int32)
        run = functools.partial(hidden_states, model)
        assert kernels_in(text_for_tpus(run, params, tokens)) == kernels
