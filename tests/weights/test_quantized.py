"""jaxft.weights.quantized.weight: codes and scales are bitsandbytes', and a product dequantizes as it goes."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxft
from jaxft.errors import UserError
from jaxft.tree import count, size_bytes
from jaxft.weights import Flattened, take
from jaxft.weights.quantized.codebooks import (
    FP4,
    NF4,
    decode,
    decode_dynamic,
    decode_reference,
    dynamic_table,
)

GOLDEN = np.load(Path(__file__).parent / "golden/quantized.npz")
INTEGERS = json.loads((Path(__file__).parent / "golden/integers.json").read_text(encoding="ascii"))
NAMES = ("even", "ties", "flat", "odd", "halves")
SCHEMES = ("nf4", "fp4", "int4", "int8")


def kernel_of(rows, columns, seed=0):
    return jax.random.normal(jax.random.key(seed), (rows, columns))


def error(kernel, weight):
    return float(jnp.mean(jnp.square(jaxft.materialize(weight) - kernel)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_codes_scales_and_values_are_those_of_bitsandbytes(name, scheme):
    """Bit for bit, zero blocks and ties included."""
    stored = GOLDEN[name]
    weight = jaxft.quantize(jnp.asarray(stored.T), scheme, double_quant=False)
    assert isinstance(weight, Flattened) == (stored.shape[1] % 64 != 0)
    inner = getattr(weight, "blocks", weight)
    codes = np.concatenate([inner.codes & 15, inner.codes >> 4]).T.reshape(-1)[: stored.size]
    codes = np.pad(codes, (0, stored.size % 2))
    packed = GOLDEN[f"{name}_{scheme}_codes"][:, 0]
    last = stored.size // 2  # an odd count's last half byte is padding
    np.testing.assert_array_equal(((codes[::2] << 4) | codes[1::2])[:last], packed[:last])
    np.testing.assert_array_equal(
        np.asarray(inner.scales).T.reshape(-1), GOLDEN[f"{name}_{scheme}_absmax"]
    )
    np.testing.assert_array_equal(jaxft.materialize(weight).T, GOLDEN[f"{name}_{scheme}_dense"])


@pytest.mark.parametrize("name", NAMES)
def test_double_quantization_is_that_of_bitsandbytes(name):
    weight = jaxft.quantize(jnp.asarray(GOLDEN[name].T), "nf4")
    inner = getattr(weight, "blocks", weight)
    np.testing.assert_array_equal(
        np.asarray(inner.scales).T.reshape(-1), GOLDEN[f"{name}_nf4_dq_absmax"]
    )
    np.testing.assert_allclose(inner.nested, GOLDEN[f"{name}_nf4_dq_nested"], rtol=1e-6)
    np.testing.assert_allclose(inner.mean, GOLDEN[f"{name}_nf4_dq_mean"], rtol=1e-6)
    np.testing.assert_allclose(
        jaxft.materialize(weight).T, GOLDEN[f"{name}_nf4_dq_dense"], rtol=0, atol=1e-6
    )


def test_codes_are_decoded_as_their_tables_say():
    codes = jnp.arange(16, dtype=jnp.uint8)
    for table in (NF4, FP4):
        np.testing.assert_array_equal(decode(codes, table), decode_reference(codes, table))
    codes = jnp.arange(256, dtype=jnp.uint8)
    table = dynamic_table()
    np.testing.assert_allclose(table, GOLDEN["dynamic"], rtol=0, atol=1e-7)
    np.testing.assert_allclose(decode_dynamic(codes), decode_reference(codes, table), rtol=1e-6)


@pytest.mark.parametrize(("double", "most"), [(True, 0.52), (False, 0.57)])
def test_four_bits_take_four_bits(double, most):
    kernel = kernel_of(512, 256)
    weight = jaxft.quantize(kernel, "nf4", double_quant=double)
    assert size_bytes(weight) / count(kernel) <= most
    held = sum(leaf.on_device_size_in_bytes() for leaf in jax.tree.leaves(weight))
    assert held / count(kernel) <= most


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=8, deadline=None)
@given(rows=st.sampled_from([64, 192]), symmetric=st.booleans(), seed=st.integers(0, 99))
def test_products_and_gradients_are_those_of_the_dense_value(scheme, rows, symmetric, seed):
    weight = jaxft.quantize(kernel_of(rows, 24, seed), scheme, symmetric=symmetric)
    dense, x = jaxft.materialize(weight), kernel_of(3, rows, seed + 1)
    largest = float(jnp.max(jnp.abs(x @ dense)))
    np.testing.assert_allclose(jaxft.contract(x, weight), x @ dense, rtol=0, atol=1e-5 * largest)
    ours = jax.grad(lambda x: jnp.sum(jnp.sin(jaxft.contract(x, weight))))(x)
    theirs = jax.grad(lambda x: jnp.sum(jnp.sin(x @ dense)))(x)
    largest = float(jnp.max(jnp.abs(theirs)))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("parts", [2, 4])
def test_packed_in_parts_a_weight_is_the_same(scheme, parts):
    """Its values, products, rows and gradients; and each part of its bytes holds the codes of that run of rows."""
    kernel = kernel_of(64, 6)
    plain = jaxft.quantize(kernel, scheme, group_size=8, double_quant=False)
    weight = plain.divided(parts)
    x = kernel_of(5, 64, seed=1)
    dense = np.asarray(jaxft.materialize(plain))
    np.testing.assert_array_equal(jaxft.materialize(weight), dense)
    np.testing.assert_array_equal(take(weight, jnp.arange(64)), dense)
    np.testing.assert_allclose(jaxft.contract(x, weight), x @ dense, rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(jaxft.contract(x, weight))))(x)
    expected = jax.grad(lambda x: jnp.sum(jnp.sin(x @ dense)))(x)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)
    rows = 64 // parts
    for part in range(parts):
        own = jaxft.quantize(
            kernel[part * rows : (part + 1) * rows], scheme, group_size=8, double_quant=False
        )
        np.testing.assert_array_equal(np.split(np.asarray(weight.codes), parts)[part], own.codes)
    back = jax.tree.map(np.asarray, weight).divided(1)
    np.testing.assert_array_equal(back.codes, plain.codes)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("many", [1, 1000], ids=["at once", "by runs"])
@pytest.mark.parametrize(("rows", "group"), [(64, 8), (64, 64), (48, 48)])
def test_as_on_tpus_a_product_is_the_same(monkeypatch, scheme, many, rows, group):
    """By a matrix that stands and over two axes of rows: with many groups, one group a column, and few in a half."""
    kernel = kernel_of(rows, 6)
    weight = jaxft.quantize(kernel, scheme, group_size=group, symmetric=False)
    x, y = kernel_of(30, rows, 1).reshape(2, 15, rows), kernel_of(30, 6, 2).reshape(2, 15, 6)

    def both():
        return jaxft.contract(x, weight), jaxft.contract_transposed(y, weight)

    plain = both()
    chosen = []

    def on_tpu(*operands, tpu, default):
        chosen.append(tpu.__name__)
        return tpu(*operands)

    monkeypatch.setattr(jax.lax, "platform_dependent", on_tpu)
    monkeypatch.setattr("jaxft.weights.quantized.weight.MANY", many)
    for ours, theirs in zip(both(), plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    assert set(chosen) == {"at_once" if many == 1 else "by_units"}


def test_no_float_of_a_kernels_size_is_kept_for_the_backward_pass():
    weight = jaxft.quantize(kernel_of(256, 128), "nf4")

    def loss(x, weight):
        return jnp.sum(jnp.tanh(jaxft.contract(x, weight)))

    x = kernel_of(2, 256)
    kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(lambda x: loss(x, weight), x)[1], x))
    assert kept
    assert all(leaf.size < 256 * 128 / 2 or leaf.dtype == jnp.uint8 for leaf in kept)


@pytest.mark.parametrize("group", [32, 64, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_integers_err_no_more_than_either_step_in_use(bits, group):
    """The steps of Qwix and torchao (half a step beyond the largest code) and the plain one."""
    kernel = kernel_of(128, 32)
    weight = jaxft.quantize(kernel, f"int{bits}", group_size=group)
    rows = 128 if group == -1 else group
    blocks = np.asarray(kernel).reshape(-1, rows, 32)
    high = 2 ** (bits - 1) - 1
    for most in (high, high + 0.5):
        step = np.abs(blocks).max(1, keepdims=True) / most
        theirs = np.clip(np.round(blocks / step), -high - 1, high) * step
        assert error(kernel, weight) <= np.mean((theirs - blocks) ** 2) * 1.000001


@pytest.mark.parametrize("name", sorted(INTEGERS))
def test_integers_err_no_more_than_qwixs_and_torchaos(name):
    """Symmetric and asymmetric, in groups and by columns: golden/make_integers.py says what they leave."""
    make = runpy.run_path(str(Path(__file__).parent / "golden/make_integers.py"))
    kernel = jnp.asarray(make["kernel"](name))
    ours = {}
    for entry, theirs in INTEGERS[name].items():
        _, mapping, bits, group = entry.split()
        settings = (mapping.startswith("symmetric"), int(bits), int(group) or -1)
        if settings not in ours:
            symmetric, bits, group = settings
            weight = jaxft.quantize(kernel, f"int{bits}", group_size=group, symmetric=symmetric)
            ours[settings] = error(kernel, weight)
        assert ours[settings] <= theirs * 1.001, entry
    assert len(ours) == 16


def test_offset_integers_err_less_on_what_is_not_centred():
    kernel = jnp.abs(kernel_of(128, 32))
    offset = jaxft.quantize(kernel, "int4", symmetric=False)
    assert error(kernel, offset) < error(kernel, jaxft.quantize(kernel, "int4"))


def test_nf4_errs_less_than_int4_and_fp4_on_normal_numbers():
    kernel = kernel_of(1024, 64)
    errors = {s: error(kernel, jaxft.quantize(kernel, s, double_quant=False)) for s in SCHEMES}
    assert errors["int8"] < errors["nf4"] < min(errors["int4"], errors["fp4"])


def test_a_stack_is_quantized_layer_by_layer():
    stack = jnp.stack([kernel_of(64, 16, seed) for seed in range(3)])
    for rows in (64, 40):
        whole = jaxft.quantize(stack[:, :rows], "nf4")
        assert whole.shape == (3, rows, 16)
        for layer in range(3):
            one = jaxft.quantize(stack[layer, :rows], "nf4")
            sliced = jax.tree.map(lambda part, layer=layer: part[layer], whole)
            jax.tree.map(np.testing.assert_array_equal, sliced, one)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"scheme": "nf5"}, r"unknown quantization scheme 'nf5'.*nf4"),
        ({"scheme": "int4", "group_size": 48}, "groups of 48 do not divide the 64 rows"),
        ({"group_size": 0}, "a group of 0 rows"),
    ],
)
def test_a_mistake_is_one_clear_line(arguments, line):
    with pytest.raises(UserError, match=line):
        jaxft.quantize(kernel_of(64, 8), **arguments)


def test_codes_are_neither_quantized_again_nor_trained():
    params = {"q_proj": {"kernel": kernel_of(64, 8)}}
    params = jaxft.quantize_params(params, "nf4")
    with pytest.raises(UserError, match="q_proj/kernel is a Quantized weight already"):
        jaxft.quantize_params(params)
    with pytest.raises(UserError, match=r"is quantized \(nf4\) and cannot train: train an adapter"):
        jaxft.partition(params, jaxft.methods.full())
