"""jaxft.formats.merge: base and adapter become one folder, and the deviation is measured."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from jaxft.errors import UserError
from jaxft.formats import load, save
from jaxft.formats.manifest import check_manifest, write_manifest
from jaxft.formats.merge import merge_folder
from jaxft.formats.safetensors import open_folder
from jaxft.formats.trained_base import trained_on_chats


@pytest.mark.parametrize(
    ("adapter", "base"),
    [
        ("gpt2_vera", "gpt2"),
        ("qwen2_embedding_head", "qwen2"),
    ],
)
def test_the_merged_folder_gives_the_adapters_logits(
    golden, logits_of, deviation, tmp_path, capsys, adapter, base
):
    folders = golden / "models" / base, golden / "adapters" / adapter
    relative = merge_folder(*folders, tmp_path / "out")
    assert 0 < relative < 1e-5
    said = capsys.readouterr().out
    assert "merged: on 124 tokens of random ids (the folder has no tokenizer) the loss is" in said
    assert "100 % of the next tokens stay the same" in said
    assert "usual" not in said  # of no text nothing is
    model, params = load(tmp_path / "out")
    assert model.config.tied == (base == "gpt2")
    expected = np.load(golden / "adapters" / adapter / "expected.npz")
    assert deviation(logits_of(model, params, expected["input_ids"]), expected["logits"]) < 1e-4


def test_the_bases_dtype_and_division_into_files_stay_and_rounding_is_measured(golden, tmp_path):
    model, params = load(golden / "models/llama_bias", dtype="bfloat16")
    save(model, params, tmp_path / "base", like=golden / "models/llama_bias")
    relative = merge_folder(tmp_path / "base", golden / "adapters/bias_lora", tmp_path / "out")
    assert 1e-4 < relative < 0.1
    names = [{file.name for file in (tmp_path / name).iterdir()} for name in ("base", "out")]
    assert names[0] == names[1]
    shard = "model-00001-of-00003.safetensors"
    sizes = [(tmp_path / name / shard).stat().st_size for name in ("base", "out")]
    assert sizes[0] == sizes[1]


def test_the_folder_must_be_new(golden, tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        merge_folder(golden / "models/llama", golden / "adapters/lora", tmp_path)


def test_a_merged_folder_is_asked_as_its_adapter_was_trained(golden, tmp_path):
    shutil.copytree(golden / "adapters" / "gpt2_vera", tmp_path / "adapter")
    write_manifest(tmp_path / "adapter", trained_on="chats")
    merge_folder(golden / "models" / "gpt2", tmp_path / "adapter", tmp_path / "out")
    assert trained_on_chats(tmp_path / "out") is True
    assert check_manifest(tmp_path / "out", required=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_may_be_chosen(golden, tmp_path, dtype):
    folders = golden / "models/llama", golden / "adapters/lora"
    relative = merge_folder(*folders, tmp_path / "out", dtype=dtype)
    assert relative < {"float32": 1e-5, "bfloat16": 0.3, "float16": 3e-2}[dtype]
    assert (relative > 1e-5) == (dtype != "float32")
    stored = {str(tensor.dtype) for tensor in open_folder(tmp_path / "out").values()}
    assert stored == {{"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == dtype


def test_a_dtype_goes_with_quantization(golden, tmp_path):
    folders = golden / "models/llama", golden / "adapters/lora"
    merge_folder(*folders, tmp_path / "out", quantize="nf4", dtype="bfloat16")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"
    stored = open_folder(tmp_path / "out")
    assert stored["model.embed_tokens.weight"].dtype == "BF16"


def test_an_unknown_dtype_and_weights_that_float16_cannot_hold_are_refused(golden, tmp_path):
    folders = golden / "models/llama", golden / "adapters/lora"
    with pytest.raises(UserError, match=r"dtype 'float23' is not one of .* \(nearest: 'float32'"):
        merge_folder(*folders, tmp_path / "out", dtype="float23")
    model, params = load(golden / "models/llama")
    params["final_norm"]["scale"] = params["final_norm"]["scale"] * 1e6
    save(model, params, tmp_path / "large", like=golden / "models/llama")
    with pytest.raises(UserError, match=r"--dtype float16: final_norm/scale holds .*take bfloat16"):
        merge_folder(tmp_path / "large", folders[1], tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
