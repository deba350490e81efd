"""PiSSA and LoftQ: where a and b begin, what the base becomes, and that a dense base is left alone."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft.errors import UserError
from jaxft.weights import LoRA, LowRankStart, alternate, materialize
from jaxft.weights.low_rank_starts import principal

GOLDEN = np.load(Path(__file__).parent / "golden/started.npz")
RANK = 6
METHOD = jaxft.methods.lora(rank=RANK, alpha=12.0, init="pissa")


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def nf4(kernel):
    return jaxft.quantize(jnp.asarray(kernel), "nf4", double_quant=False)


@pytest.fixture(scope="module")
def fresh():
    """A stack of two adapted kernels, with one rank smaller."""
    tree = {"layers": {"q_proj": {"kernel": normal(0, 2, 12, 10)}}}
    method = jaxft.methods.lora(
        rank=4, alpha=8.0, init="pissa", rank_pattern={r"layers\.1\.q_proj": 3}
    )
    return jaxft.adapt(tree, method, jax.random.key(0))["layers"]["q_proj"]["kernel"]


@pytest.fixture
def moved(fresh):
    """The first layer's adapter after some training."""
    one = jax.tree.map(lambda part: part[0], fresh)
    return jaxft.weights.replace(one, a=one.a + 0.3, b=one.b - 0.2)


def test_principal_parts_are_pefts_pissa():
    kernel = GOLDEN["weight"].T
    a, b = principal(kernel, RANK)
    np.testing.assert_allclose(a @ b, GOLDEN["pissa_change"].T, atol=1e-6)
    np.testing.assert_allclose(kernel - a @ b, GOLDEN["pissa_rest"].T, atol=1e-6)
    np.testing.assert_allclose(np.sum(a * a, 0), np.sum(b * b, 1), rtol=1e-4)


def test_pissa_begins_at_the_same_product_under_any_scale():
    tree = {"q_proj": {"kernel": jnp.asarray(GOLDEN["weight"].T)}}
    weight = jaxft.adapt(tree, METHOD, jax.random.key(0))["q_proj"]["kernel"]
    started = weight.scale * (weight.a @ weight.b)
    np.testing.assert_allclose(started, GOLDEN["pissa_scaled_change"].T, atol=1e-6)


@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq_is_pefts(iterations):
    base, (a, b) = alternate(GOLDEN["weight"].T, RANK, "loftq", iterations, nf4)
    expected = GOLDEN[f"loftq_{iterations}_base"].T
    np.testing.assert_allclose(materialize(base), expected, atol=1e-6)
    np.testing.assert_allclose(a @ b, GOLDEN[f"loftq_{iterations}_change"].T, atol=1e-6)


@pytest.mark.parametrize("start", ["loftq", "pissa"])
@pytest.mark.parametrize("scheme", ["nf4", "int4", "int8"])
def test_what_is_left_of_the_error_is_smaller_than_that_of_rounding_and_falls(start, scheme):
    kernel = GOLDEN["weight"].T

    def quantize(array):
        return jaxft.quantize(jnp.asarray(array), scheme)

    def left(iterations):
        base, (a, b) = alternate(kernel, RANK, start, iterations, quantize)
        return np.linalg.norm(kernel - np.asarray(materialize(base)) - a @ b)

    plain = np.linalg.norm(kernel - np.asarray(materialize(quantize(kernel))))
    assert left(1) < 0.95 * plain
    assert left(5) < left(1)


def test_a_fresh_one_changes_nothing_in_any_dtype(fresh):
    for dtype in (jnp.float32, jnp.bfloat16):
        one = jax.tree.map(lambda part: part[0], fresh)
        x = normal(1, 5, 12).astype(dtype)
        assert jnp.array_equal(jaxft.contract(x, one), jaxft.contract(x, one.base))


def test_it_contracts_looks_up_and_merges_as_what_it_equals(moved):
    dense = moved.base + moved.scale * (moved.a @ moved.b - moved.a0 @ moved.b0)
    x, y = normal(2, 3, 12), normal(3, 3, 10)
    close = {"rtol": 0.0, "atol": 1e-4}
    np.testing.assert_allclose(materialize(moved), dense, **close)
    np.testing.assert_allclose(jaxft.contract(x, moved), x @ dense, **close)
    np.testing.assert_allclose(jaxft.contract_transposed(y, moved), y @ dense.T, **close)
    np.testing.assert_allclose(jaxft.take(moved, jnp.asarray([3, 1])), dense[jnp.asarray([3, 1])], **close)  # fmt: skip


def test_on_disk_it_is_a_lora_of_twice_the_true_rank(fresh):
    stack = jaxft.weights.replace(fresh, a=1.3 * fresh.a)
    plain = stack.as_lora()
    assert type(plain) is LoRA
    assert plain.ranks == (8, 6)
    np.testing.assert_allclose(materialize(plain), materialize(stack), atol=1e-4)
    assert not plain.a[1, :, 6:].any()
    assert not plain.b[1, 6:].any()


def test_the_adapter_left_out_is_the_model_it_began_from(moved):
    assert moved.base_of() is moved.base
    began = jaxft.weights.replace(moved, moved=True).base_of()
    expected = moved.base + moved.scale * (moved.a0 @ moved.b0)
    np.testing.assert_allclose(materialize(began), expected, atol=1e-5)


def test_a_and_b_train_and_where_they_began_does_not():
    tree = jaxft.adapt({"q_proj": {"kernel": normal(0, 8, 6)}}, METHOD, jax.random.key(0))
    trainable, frozen = jaxft.partition(tree, METHOD)
    assert trainable["q_proj"]["kernel"].a0 is None
    assert frozen["q_proj"]["kernel"].a is None
    assert isinstance(tree["q_proj"]["kernel"], LowRankStart)


def test_a_start_that_there_cannot_be_is_refused():
    dense = {"q_proj": {"kernel": normal(0, 8, 6)}}
    codes = {"q_proj": {"kernel": jaxft.quantize(normal(0, 8, 6), "int8", group_size=2)}}

    def begin(tree, **settings):
        return jaxft.adapt(tree, jaxft.methods.lora(**settings), jax.random.key(0))

    with pytest.raises(
        UserError, match="loftq makes up for quantizing, and q_proj/kernel is dense"
    ):
        begin(dense, init="loftq")
    with pytest.raises(UserError, match="is quantized, and its dense values are needed"):
        begin(codes, init="pissa")
    with pytest.raises(UserError, match="has no 7 principal parts: take a rank of at most 6"):
        begin(dense, init="pissa", rank=7)
    with pytest.raises(UserError, match=r"init takes default \| loftq \| pissa, not 'pisa'"):
        jaxft.methods.lora(init="pisa")
    for row in (jaxft.methods.dora, jaxft.methods.vera, jaxft.methods.delta_lora):
        with pytest.raises(UserError, match="takes no init: it is a way to begin LoRA"):
            row(init="pissa")
