"""jaxft.formats.merge: base and adapter become one folder, and the deviation is measured."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from jaxft.errors import UserError
from jaxft.formats import load, save
from jaxft.formats.manifest import check_manifest, write_manifest
from jaxft.formats.merge import merge_folder
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
    assert f"({relative:.3g} of the largest logit)" in capsys.readouterr().out
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
