"""An adapter that was trained over a quantized base is read over the same codes."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

import jaxft
from jaxft.errors import UserError
from jaxft.formats.merge import merge_folder
from jaxft.formats.trained_base import load_trained_base
from jaxft.inference.opening import open_model
from jaxft.quantizing import quantization_of
from jaxft.tree import flatten_with_paths

FOLDER = Path(__file__).parents[1] / "golden" / "trl" / "model"  # in float32


def trained(folder, param_dtype="float32", **quantize):
    """An adapter of a run over the folder quantized so, and that base's tree."""
    method = jaxft.methods.lora(rank=2)
    _, params = jaxft.load(FOLDER, param_dtype=param_dtype, **quantize)
    adapted = jaxft.adapt(params, method, jax.random.key(0))
    jaxft.save_adapter(adapted, folder, method=method, base=FOLDER)
    return params


def same(left, right):
    pairs = zip(flatten_with_paths(left), flatten_with_paths(right), strict=True)
    for (path, one), (_, other) in pairs:
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other), err_msg=path)


@pytest.mark.parametrize(
    "quantize",
    [
        {"quantize": "nf4"},
        {"quantize": "nf4", "double_quant": False, "group_size": 32},
        {"quantize": "int8", "group_size": -1},
        {"quantize": "int4", "group_size": 16},
    ],
)
def test_the_dense_folder_is_quantized_as_the_card_says(tmp_path, quantize, capsys):
    base = trained(tmp_path / "adapter", **quantize)
    _, found, scheme = load_trained_base(FOLDER, tmp_path / "adapter")
    assert scheme == quantize["quantize"]
    same(found, base)
    _, opened = open_model(str(FOLDER), str(tmp_path / "adapter"))
    assert quantization_of(opened) == quantization_of(base)
    assert f"the adapter's base lies in {scheme}, as in training" in capsys.readouterr().err


def test_a_dense_base_stays_dense(tmp_path):
    base = trained(tmp_path / "adapter")
    _, found, scheme = load_trained_base(FOLDER, tmp_path / "adapter")
    assert scheme == ""
    same(found, base)


def test_codes_that_were_rounded_in_another_dtype_are_found(tmp_path):
    """The weights lay in bfloat16 in training, and the question is asked in float32."""
    base = trained(tmp_path / "adapter", "bfloat16", quantize="nf4")
    _, direct = jaxft.load(FOLDER, quantize="nf4")
    assert quantization_of(base) != quantization_of(direct)
    _, found, _ = load_trained_base(FOLDER, tmp_path / "adapter")
    assert quantization_of(found) == quantization_of(base)
    merge_folder(FOLDER, tmp_path / "adapter", tmp_path / "merged")  # over the same base
    _, merged = jaxft.load(tmp_path / "merged")
    same(merged, jaxft.merge(jaxft.load_adapter(found, tmp_path / "adapter")))


def test_a_folder_that_is_quantized_so_is_read_as_it_is(tmp_path):
    base = trained(tmp_path / "adapter", quantize="nf4")
    module, _ = jaxft.load(FOLDER)
    jaxft.save(module, base, tmp_path / "nf4", like=FOLDER)
    _, found, scheme = load_trained_base(tmp_path / "nf4", tmp_path / "adapter")
    assert scheme == "nf4"
    assert quantization_of(found) == quantization_of(base)


def test_of_an_adapter_of_another_maker_nothing_is_claimed_of_its_training(tmp_path, capsys):
    base = trained(tmp_path / "adapter", quantize="nf4")
    module, _ = jaxft.load(FOLDER)
    jaxft.save(module, base, tmp_path / "nf4", like=FOLDER)
    (tmp_path / "adapter" / "README.md").unlink()
    open_model(str(tmp_path / "nf4"), str(tmp_path / "adapter"))
    assert capsys.readouterr().err.endswith("the adapter's base lies in nf4\n")


def test_another_base_is_refused(tmp_path):
    trained(tmp_path / "adapter", quantize="nf4")
    card = tmp_path / "adapter" / "README.md"
    digest = card.read_text().partition('"digest": "')[2][:16]
    written = card.read_text()
    card.write_text(written.replace(digest, "0" * 16))
    said = f"was trained over another base: nf4 in groups of 64, digest {'0' * 16}"
    with pytest.raises(UserError, match=said):
        load_trained_base(FOLDER, tmp_path / "adapter")
    card.write_text(written.replace('"digest": ', '"digits": '))
    with pytest.raises(UserError, match=r"README\.md: does not say how the base was quantized"):
        load_trained_base(FOLDER, tmp_path / "adapter")
