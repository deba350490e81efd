"""A tree tells by which names its leaves stand on disk, whatever its family."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import jax
import pytest

from jaxft.formats.config_file import model_config
from jaxft.formats.naming import as_in, names_in, with_family
from jaxft.models import FAMILIES, tensors_of
from jaxft.models.transformer import initial_params
from jaxft.weights import of_the_model, saved_in

SCRIPT = Path(__file__).parent.parent / "golden/family_folders.py"
specification = importlib.util.spec_from_file_location("family_folders", SCRIPT)
golden = importlib.util.module_from_spec(specification)
specification.loader.exec_module(golden)
CASES = {
    name: case["config"]
    for name, case in golden.cases().items()
    if case["config"]["model_type"] in FAMILIES
}


def tree_of(raw, folder):
    (folder / "config.json").write_text(json.dumps(raw))
    config = model_config(folder)
    return config, jax.eval_shape(lambda: initial_params(config, jax.random.key(0)))


@pytest.mark.parametrize("name", CASES)
def test_the_names_in_a_tree_are_those_of_its_family(name, tmp_path):
    """Where two families have the same leaves by other names, the tree remembers which it is."""
    config, params = tree_of(CASES[name], tmp_path)
    found, expected = names_in(with_family(params, config)), tensors_of(config)
    assert {path: found[path] for path in expected} == expected


def test_only_a_tree_that_does_not_tell_remembers_its_family(tmp_path):
    config, params = tree_of(CASES["llama"], tmp_path)
    assert with_family(params, config) == params
    config, params = tree_of(CASES["seed_oss"] | {"attention_out_bias": False}, tmp_path)
    assert saved_in(with_family(params, config)).family == ""  # llama's names
    config, params = tree_of(CASES["starcoder2"], tmp_path)
    known = with_family(params, config)
    assert saved_in(known).family == "starcoder2"
    assert saved_in(of_the_model(known)).family == "starcoder2"


def test_names_follow_an_adapters_file(tmp_path):
    _, params = tree_of(CASES["llama"], tmp_path)
    table = names_in(params)
    among = as_in(["model.language_model.layers.0.self_attn.q_proj.lora_A.weight"], table)
    path = "layers/attention/q_proj/kernel"
    assert among[path].name == "model.language_model.layers.{layer}.self_attn.q_proj.weight"
    assert as_in(["model.layers.0.self_attn.q_proj.lora_A.weight"], among) == table
    assert as_in(["lm_head.lora_A.weight"], table) == table
