"""Quantized bases on disk: rounded while they stream, written and read as bitsandbytes does, merged."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import jaxft
from jaxft.errors import UserError
from jaxft.formats import load, save
from jaxft.formats.merge import merge_folder, quantize_folder
from jaxft.weights import quantized_in


def assert_same(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), left, right)


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_streaming_gives_what_quantizing_the_tree_gives(golden, model_of, scheme):
    """All projections, and neither the embedding nor the head nor the norms."""
    _, dense = model_of("llama")
    _, params = load(golden / "models/llama", quantize=scheme, group_size=8)
    assert_same(params, jaxft.quantize_params(dense, scheme, group_size=8))
    assert {path.split("/")[1] for path, _ in quantized_in(params)} == {"attention", "mlp"}


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize(
    "settings",
    [
        {"quantize": "nf4"},
        {"quantize": "nf4", "group_size": 32, "double_quant": False},
        {"quantize": "fp4"},
        {"quantize": "int8", "group_size": -1},
    ],
)
def test_a_bitsandbytes_folder_is_written_and_read_back(golden, tmp_path, name, settings):
    source = golden / "models" / name
    model, params = load(source, **settings)
    save(model, params, tmp_path / "out", like=source)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["load_in_8bit"] == (settings["quantize"] == "int8")
    _, read = load(tmp_path / "out")
    assert jax.tree.structure(read) == jax.tree.structure(params)
    assert_same(read, params)


def test_a_quantized_folder_is_not_quantized_again(golden, tmp_path, capsys):
    relative = quantize_folder(golden / "models/llama", tmp_path / "out", "int8")
    assert 0 < relative < 0.1
    assert f"({relative:.3g} of the largest logit)" in capsys.readouterr().out
    with pytest.raises(UserError, match="is quantized already"):
        quantize_folder(tmp_path / "out", tmp_path / "again")


def test_what_the_format_has_no_place_for_is_refused(golden, tmp_path):
    model, params = load(golden / "models/llama", quantize="int4", group_size=8)
    with pytest.raises(UserError, match="int4 in groups of 8: bitsandbytes"):
        save(model, params, tmp_path / "out")


@pytest.fixture
def adapter(golden, tmp_path):
    """A LoRA trained over llama in nf4, off its start."""
    _, params = load(golden / "models/llama", quantize="nf4")
    params = jaxft.adapt(params, jaxft.methods.lora(rank=2), jax.random.key(0))
    moved = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + 0.1 if path[-1] == jax.tree_util.GetAttrKey("b") else leaf, params
    )
    jaxft.save_adapter(moved, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_card_tells_the_bases_quantization_and_merging_keeps_to_it(
    golden, adapter, tmp_path, capsys
):
    assert (
        "- the base was quantized: nf4, groups of 64, scales quantized too"
        in (adapter / "README.md").read_text()
    )
    assert merge_folder(golden / "models/llama", adapter, tmp_path / "dense") < 3e-5
    merge_folder(golden / "models/llama", adapter, tmp_path / "nf4", quantize="nf4")
    assert capsys.readouterr().out.count("largest deviation") == 3
    assert quantized_in(load(tmp_path / "nf4")[1])


def test_an_adapter_trained_over_codes_is_not_merged_into_another_base(golden, adapter, tmp_path):
    with pytest.raises(
        UserError, match="was trained over another base: nf4 in groups of 64, digest"
    ):
        merge_folder(golden / "models/llama_linear", adapter, tmp_path / "out")
