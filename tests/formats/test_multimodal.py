"""Of a folder with vision the text is served: transformers' Gemma3ForConditionalGeneration, with text alone."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

import jaxft
from jaxft.errors import UserError
from jaxft.formats.config_file import model_config

SCRIPT = Path(__file__).parent.parent / "golden/family_folders.py"
specification = importlib.util.spec_from_file_location("family_folders", SCRIPT)
golden = importlib.util.module_from_spec(specification)
specification.loader.exec_module(golden)
CASE = golden.cases()["gemma3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = golden.write_folder(CASE, tmp_path_factory.mktemp("multimodal") / "gemma3")
    (found / "processor_config.json").write_text("{}")
    return found


def tensors(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def renamed(folder, target, before, after):
    """The folder with the names of its tensors in another spelling."""
    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    moved = {name.replace(before, after): array for name, array in tensors(folder).items()}
    safetensors.numpy.save_file(moved, target / "model.safetensors")
    return target


def test_its_texts_logits_are_those_of_transformers_in_both_spellings(folder, tmp_path, capsys):
    other = renamed(folder, tmp_path / "other", "language_model.model.", "model.language_model.")
    with np.load(golden.LOGITS) as file:
        tokens, expected = file["tokens"], file["gemma3"]
    for source in (folder, other):
        model, params = jaxft.load(source)
        found = np.asarray(jax.jit(model.apply)({"params": params}, tokens))
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
        said = capsys.readouterr().err
        assert f"{source}: its text is read; multi_modal_projector, vision_tower stay" in said


@pytest.mark.parametrize(
    ("top", "text", "tied"), [(None, False, True), (False, True, True), (False, False, False)]
)
def test_a_head_that_is_nowhere_is_the_embedding_unless_config_json_says_no(
    folder, tmp_path, top, text, tied
):
    """As transformers' classes of gemma3 and mistral3 have it, and llava's, whose text goes before its top level."""
    raw = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": top}
    raw["text_config"]["tie_word_embeddings"] = text
    (tmp_path / "config.json").write_text(json.dumps(raw))
    shutil.copy(folder / "model.safetensors", tmp_path / "model.safetensors")
    if tied:
        assert jaxft.load(tmp_path)[0].config.tied
    else:
        with pytest.raises(UserError, match=r"the tensor lm_head\.weight is missing"):
            jaxft.load(tmp_path)


def test_what_is_not_text_is_kept_when_the_whole_is_saved(folder, tmp_path):
    model, params = jaxft.load(folder)
    params["final_norm"]["scale"] = params["final_norm"]["scale"] + 0.5
    jaxft.save(model, params, tmp_path / "saved", like=folder)
    before, after = tensors(folder), tensors(tmp_path / "saved")
    assert after.keys() == before.keys()
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    assert changed == ["language_model.model.norm.weight"]
    raw = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert raw["vision_config"] == CASE["config"]["vision_config"]
    assert (tmp_path / "saved" / "processor_config.json").exists()
    assert model_config(tmp_path / "saved") == model_config(folder)


def test_alone_the_text_is_written_as_a_model_of_its_own(folder, tmp_path):
    model, params = jaxft.load(folder)
    jaxft.save(model, params, tmp_path / "text")
    raw = json.loads((tmp_path / "text" / "config.json").read_text())
    assert (raw["model_type"], raw["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])
    names = tensors(tmp_path / "text")
    assert all(name.startswith("model.") and "language" not in name for name in names)
    assert model_config(tmp_path / "text") == model_config(folder)


def test_an_adapter_is_named_as_peft_names_it_over_the_whole_and_read_by_either_name(
    folder, tmp_path
):
    _, params = jaxft.load(folder)
    method = jaxft.methods.lora(rank=2, targets=("q_proj",))
    adapted = jaxft.adapt(params, method, jax.random.key(0))
    trainable, frozen = jaxft.partition(adapted, method)
    adapted = jaxft.combine(jax.tree.map(lambda leaf: leaf + 0.1, trainable), frozen)
    jaxft.save_adapter(adapted, tmp_path / "adapter", method=method)
    names = safetensors.numpy.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    first = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
    assert first in names
    shorter = {name.replace("model.language_model.", "model."): x for name, x in names.items()}
    text = tmp_path / "text"
    text.mkdir()
    (text / "adapter_config.json").write_text(
        (tmp_path / "adapter" / "adapter_config.json").read_text()
    )
    safetensors.numpy.save_file(shorter, text / "adapter_model.safetensors")
    for source in (tmp_path / "adapter", text):
        again = jaxft.load_adapter(params, source)
        kernel = again["layers"]["attention"]["q_proj"]["kernel"]
        np.testing.assert_array_equal(
            kernel.b, adapted["layers"]["attention"]["q_proj"]["kernel"].b
        )


def test_an_adapter_of_the_vision_too_is_refused_with_what_to_do(folder, tmp_path):
    """What PEFT makes of `target_modules=["q_proj"]` over the whole."""
    _, params = jaxft.load(folder)
    method = jaxft.methods.lora(rank=2, targets=("q_proj",))
    adapted = jaxft.adapt(params, method, jax.random.key(0))
    jaxft.save_adapter(adapted, tmp_path, method=method)
    names = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    vision = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    names[vision] = np.zeros((2, 16), np.float32)
    safetensors.numpy.save_file(names, tmp_path / "adapter_model.safetensors")
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"of another part of the model than its text.*target_modu"):
        jaxft.load_adapter(params, tmp_path)


def test_a_text_of_an_architecture_that_is_not_served_is_named(folder, tmp_path):
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"] |= {"model_type": "gemma3_moe_text", "num_experts": 8}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    message = (
        r"unknown architecture 'gemma3_moe_text' \(nearest: 'gemma3_text'\): it has experts "
        r"\(num_experts\), which jaxft does not serve; jaxft knows llama"
    )
    with pytest.raises(UserError, match=message):
        model_config(tmp_path)
