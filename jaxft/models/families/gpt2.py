"""GPT-2: learned positions, layer norms, one kernel for q, k and v, and kernels that are stored (in, out)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxft.errors import UserError
from jaxft.models.config import Config
from jaxft.models.families.common import SPELLINGS, activation_of
from jaxft.models.families.family import Family, Tensor

UNKNOWN = ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention")
LAYER = "transformer.h.{layer}"
MODULES = {
    "layers/attention_norm": (f"{LAYER}.ln_1", "scale"),
    "layers/attention/qkv_proj": (f"{LAYER}.attn.c_attn", "kernel"),
    "layers/attention/o_proj": (f"{LAYER}.attn.c_proj", "kernel"),
    "layers/mlp_norm": (f"{LAYER}.ln_2", "scale"),
    "layers/mlp/up_proj": (f"{LAYER}.mlp.c_fc", "kernel"),
    "layers/mlp/down_proj": (f"{LAYER}.mlp.c_proj", "kernel"),
    "final_norm": ("transformer.ln_f", "scale"),
}


def read(raw: Mapping[str, Any]) -> Config:
    for flag in UNKNOWN:
        if raw.get(flag, False):
            raise UserError(f"config.json: {flag} = true is not known to jaxft's gpt2")
    heads, hidden = raw["n_head"], raw["n_embd"]
    head_dim = hidden // heads
    return Config(
        family="gpt2",
        vocabulary=raw["vocab_size"],
        hidden=hidden,
        intermediate=raw.get("n_inner") or 4 * hidden,
        layers=raw["n_layer"],
        heads=heads,
        key_heads=heads,
        head_dim=head_dim,
        max_length=raw.get("n_positions", 1024),
        norm="layer",
        norm_epsilon=raw.get("layer_norm_epsilon", 1e-5),
        activation=activation_of(raw.get("activation_function", "gelu_new")),
        gated=False,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        fused_qkv=True,
        positions="learned",
        query_scale=head_dim**-0.5 if raw.get("scale_attn_weights", True) else 1.0,
        tied=bool(raw.get("tie_word_embeddings", True)),
    )


def write(config: Config) -> dict[str, Any]:
    return {
        "activation_function": {**SPELLINGS, "gelu_tanh": "gelu_new"}[config.activation],
        "layer_norm_epsilon": config.norm_epsilon,
        "n_embd": config.hidden,
        "n_head": config.heads,
        "n_inner": config.intermediate,
        "n_layer": config.layers,
        "n_positions": config.max_length,
        "scale_attn_weights": config.query_scale != 1.0,
    }


def tensors(config: Config) -> dict[str, Tensor]:
    found = {
        "embed/embedding": Tensor("transformer.wte.weight"),
        "positions/embedding": Tensor("transformer.wpe.weight"),
    }
    for path, (module, leaf) in MODULES.items():
        found[f"{path}/{leaf}"] = Tensor(f"{module}.weight")
        found[f"{path}/bias"] = Tensor(f"{module}.bias")
    if not config.tied:
        found["head/kernel"] = Tensor("lm_head.weight", transposed=True)
    return found


FAMILY = Family(
    "GPT2LMHeadModel",
    read,
    write,
    tensors,
    prefix="transformer.",
    ignored=("attn.bias", "attn.masked_bias"),
)
