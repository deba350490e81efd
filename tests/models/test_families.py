from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest

from jaxft.errors import UserError
from jaxft.formats.config_file import model_config
from jaxft.models import FAMILIES, family_of, module_names, tensors_of
from jaxft.models.transformer import initial_params
from jaxft.tree import flatten_with_paths

LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
QWEN2 = LLAMA | {"model_type": "qwen2", "num_key_value_heads": 2}
GEMMA2 = LLAMA | {"model_type": "gemma2", "num_key_value_heads": 2, "head_dim": 16}
GPT2 = {"model_type": "gpt2", "vocab_size": 96, "n_embd": 32, "n_layer": 4, "n_head": 4}
RAW = {"llama": LLAMA, "qwen2": QWEN2, "gemma2": GEMMA2, "gpt2": GPT2}


def read(raw):
    return family_of(raw["model_type"], "config.json").read(raw)


def test_llama_defaults_to_as_many_key_heads_as_heads():
    config = read(LLAMA)
    assert (config.heads, config.key_heads, config.head_dim) == (4, 4, 8)
    assert config.query_scale == 8**-0.5
    assert (config.rope_theta, config.rope_scaling, config.windows, config.tied) == (
        10000.0,
        (),
        (),
        False,
    )


@pytest.mark.parametrize(
    ("family", "heads", "key_heads"),
    [("qwen2", 64, 32), ("qwen3", 64, 32), ("gemma", 32, 16), ("gemma2", 8, 4)],
)
def test_a_family_has_its_own_number_of_key_heads_where_the_file_has_none(family, heads, key_heads):
    """As transformers 5.23 has it; what is there goes before it, and a null of qwen's means as many as heads."""
    raw = LLAMA | {"model_type": family, "hidden_size": 8 * heads, "num_attention_heads": heads}
    assert read(raw).key_heads == key_heads
    assert read(raw | {"num_key_value_heads": 2}).key_heads == 2
    assert read(raw | {"num_key_value_heads": None}).key_heads == heads


def test_llama_reads_a_head_dim_of_its_own_and_biases():
    config = read(LLAMA | {"head_dim": 16, "attention_bias": True, "mlp_bias": True})
    assert (config.head_dim, config.query_scale) == (16, 0.25)
    assert config.attention_bias
    assert config.output_bias
    assert config.mlp_bias


OLD = {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
NEW = {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "linear", "factor": 2.0}}


def test_rotary_settings_read_the_same_in_the_old_style_and_the_new():
    old, new = read(LLAMA | OLD), read(LLAMA | NEW)
    assert old.rope_theta == new.rope_theta == 5000.0
    assert dict(old.rope_scaling) == {"rope_type": "linear", "factor": 2.0}
    assert old.rope_scaling == new.rope_scaling
    assert read(LLAMA | {"rope_scaling": None}).rope_scaling == ()
    assert read(LLAMA | {"rope_parameters": {"rope_type": "default"}}).rope_scaling == ()


def test_qwen2_has_biases_on_q_k_v_alone_and_windows_only_when_they_are_on():
    config = read(QWEN2 | {"sliding_window": 8, "max_window_layers": 2})
    assert config.attention_bias
    assert not config.output_bias
    assert config.windows == ()
    window = {"use_sliding_window": True, "sliding_window": 8}
    assert read(QWEN2 | window | {"max_window_layers": 2}).windows == (0, 0, 8, 8)
    kinds = ["sliding_attention", "full_attention"] * 2
    assert read(QWEN2 | window | {"layer_types": kinds}).windows == (8, 0, 8, 0)


def test_smollm3_has_the_windows_of_kinds_that_are_named():
    """Whatever use_sliding_window says, as in transformers; where no kinds are named, that turns windows on."""
    raw = LLAMA | {"model_type": "smollm3", "sliding_window": 8, "no_rope_layer_interval": 2}
    kinds = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    assert read(raw | {"layer_types": kinds}).windows == (0, 0, 8, 0)
    assert read(raw).windows == ()
    assert read(raw | {"use_sliding_window": True}).windows == (0, 8, 0, 8)


@pytest.mark.parametrize("family", ["nemotron", "glm4"])
def test_a_proportional_rotary_turns_a_part_of_the_pairs_of_a_whole_head(family):
    """So it is in transformers, where the other kinds have angles for the part alone."""
    raw = LLAMA | {"model_type": family, "head_dim": 8, "num_key_value_heads": 2}
    part = {"rope_theta": 1e4, "partial_rotary_factor": 0.5}
    config = read(raw | {"rope_parameters": part | {"rope_type": "proportional"}})
    assert (config.rotary_dim, dict(config.rope_scaling)["partial_rotary_factor"]) == (0, 0.5)
    written = FAMILIES[family].write(config)
    assert written["rope_parameters"]["partial_rotary_factor"] == 0.5
    assert read(raw | {"rope_parameters": part | {"rope_type": "default"}}).rotary_dim == 4
    with pytest.raises(UserError, match=r"partial_rotary_factor 0.5 .* not known to stablelm"):
        read(raw | {"model_type": "stablelm", "rope_scaling": part | {"type": "proportional"}})


def test_gemma2_alternates_windows_in_the_old_style_and_the_new():
    old = read(GEMMA2 | {"sliding_window": 6})
    kinds = ["sliding_attention", "full_attention"] * 2
    new = read(GEMMA2 | {"sliding_window": 6, "layer_types": kinds})
    assert old.windows == new.windows == (6, 0, 6, 0)
    assert (old.attention_softcap, old.logit_softcap) == (50.0, 30.0)
    assert (old.norm_offset, old.norm_place, old.tied) == (1.0, "both", True)
    assert (old.embedding_scale, old.query_scale) == (32**0.5, 256**-0.5)
    assert old.activation == "gelu_tanh"
    assert read(GEMMA2 | {"attn_logit_softcapping": None}).attention_softcap is None


def test_gemma3_has_no_cap_on_attentions_logits():
    """As in transformers, which has gemma2's setting among gemma3's, and does not apply it."""
    raw = GEMMA2 | {"model_type": "gemma3_text", "attn_logit_softcapping": 1.5}
    config = read(raw)
    assert config.attention_softcap is None
    assert family_of("gemma3_text", "config.json").write(config)["attn_logit_softcapping"] is None


def test_gpt2_has_its_own_names_for_sizes():
    config = read(GPT2)
    assert (config.hidden, config.intermediate, config.layers, config.max_length) == (
        32,
        128,
        4,
        1024,
    )
    assert config.fused_qkv
    assert config.positions == "learned"
    assert (config.tied, config.activation, config.gated) == (True, "gelu_tanh", False)
    assert read(GPT2 | {"n_inner": 40, "n_positions": 64}).intermediate == 40
    for name in ("gelu_new", "relu2", "quick_gelu"):
        other = GPT2 | {"activation_function": name}
        assert FAMILIES["gpt2"].write(read(other))["activation_function"] == name


@pytest.mark.parametrize("family", RAW)
@pytest.mark.parametrize("tied", [True, False])
def test_the_table_of_tensors_names_every_leaf_of_the_tree(family, tied):
    config = read(RAW[family] | {"tie_word_embeddings": tied})
    leaves = {path for path, _ in flatten_with_paths(initial_params(config, jax.random.key(0)))}
    tensors = tensors_of(config)
    assert set(tensors) == leaves
    assert len({tensor.name for tensor in tensors.values()}) == len(tensors)
    stacked = {path for path, tensor in tensors.items() if "{layer}" in tensor.name}
    assert stacked == {path for path in leaves if path.startswith("layers/")}


def test_modules_have_the_names_that_peft_knows():
    names = module_names(read(LLAMA))
    assert names["layers/attention/q_proj/kernel"] == "model.layers.{layer}.self_attn.q_proj"
    assert names["layers/mlp/down_proj/kernel"] == "model.layers.{layer}.mlp.down_proj"
    assert names["head/kernel"] == "lm_head"
    names = module_names(read(GPT2))
    assert names["layers/attention/qkv_proj/kernel"] == "transformer.h.{layer}.attn.c_attn"
    assert names["head/kernel"] == "lm_head"  # tied: it has a name, though no tensor


def test_conv1d_is_stored_as_our_kernels_and_linear_transposed():
    assert tensors_of(read(LLAMA))["layers/attention/q_proj/kernel"].transposed
    assert not tensors_of(read(GPT2))["layers/attention/qkv_proj/kernel"].transposed
    assert not tensors_of(read(LLAMA))["embed/embedding"].transposed


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


def test_longrope_of_two_kinds_of_layers_begins_at_one_length(tmp_path):
    kinds = {
        "full_attention": LONG | {"original_max_position_embeddings": 16},
        "sliding_attention": LONG | {"original_max_position_embeddings": 32},
    }
    raw = GEMMA2 | {"model_type": "gemma3_text", "rope_parameters": kinds}
    raw["layer_types"] = [*kinds, *kinds]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="longrope with original lengths of 16 and 32"):
        model_config(tmp_path)


def test_every_golden_config_reads():
    folders = sorted((Path(__file__).parents[1] / "golden" / "models").glob("*/config.json"))
    assert len(folders) >= 10
    for path in folders:
        raw = json.loads(path.read_text())
        assert read(raw).vocabulary == raw["vocab_size"]


def test_gemma2_knows_its_activation_by_one_name():
    """As in transformers: folders that say hidden_act say the same as hidden_activation."""
    assert read(GEMMA2 | {"hidden_act": "silu"}).activation == "gelu_tanh"
    assert read(GEMMA2 | {"hidden_activation": "silu"}).activation == "silu"


def test_olmo2_has_no_bias_in_its_feed_forward():
    """As in transformers, which does not read llama's setting there."""
    assert not read(LLAMA | {"model_type": "olmo2", "mlp_bias": True}).mlp_bias


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"model_type": "lama"},
            r"unknown architecture 'lama' \(nearest: 'llama'\); jaxft knows llama, qwen2",
        ),
        (
            {"model_type": None},
            "no model_type, which names the architecture; jaxft knows llama, qwen2",
        ),
        ({"model_type": "arcee"}, "unknown architecture 'arcee'; jaxft knows llama, qwen2, qwen3"),
        (
            LLAMA | {"model_type": "smollm3", "no_rope_layers": [1]},
            "no_rope_layers has 1 layer, and num_hidden_layers is ",
        ),
        (LLAMA | {"hidden_act": "relu6"}, "unknown activation 'relu6'; jaxft knows swish, silu"),
        (
            GPT2 | {"add_cross_attention": True},
            "add_cross_attention = true is not known to jaxft's gpt2",
        ),
    ],
)
def test_what_is_unknown_is_one_clear_line(raw, message):
    with pytest.raises(UserError, match=message):
        read(raw)
