from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from jaxft.kernels import jax_private, splash
from jaxft.kernels.attention import attention, attention_reference

from .test_attention import assert_close, inputs, with_gradients


@pytest.fixture
def looked_for_again():
    """What was found before is forgotten, before and after."""
    jax_private.splash_gradients.cache_clear()
    yield
    jax_private.splash_gradients.cache_clear()


def test_this_jax_has_both_kernels():
    """A version of JAX that has not runs, without the fast kernel: this test says so first."""
    assert jax_private.splash_gradients() is not None


@pytest.mark.parametrize("name", ["_splash_attention_bwd_dkv", "_splash_attention_bwd_dq"])
@pytest.mark.parametrize("other", [None, lambda q, k, v, new_argument: q])
def test_without_them_attention_is_computed_by_blocks_on_tpus_too(
    monkeypatch, looked_for_again, name, other
):
    """Gone, or with other arguments: the program for TPUs calls no kernel, and computes the same."""
    monkeypatch.setattr(splash_attention_kernel, name, other)
    arrays = inputs(256, head_dim=64)
    assert not splash.fits(*arrays[:2])
    traced = jax.jit(lambda *arrays: attention(*arrays, arrays[-1], scale=0.125)).trace(*arrays)
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("tpu",)).as_text()
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, tpu, default: tpu(*arrays))
    found, plain = (with_gradients(way, *arrays) for way in (attention, attention_reference))
    assert_close(found, plain, 4e-6)
    assert np.isfinite(found[0]).all()
