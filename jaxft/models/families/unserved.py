"""What architectures have that the decoder cannot be configured to: told by the keys of their config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# (what it is, keys of which one says that it is there).
PARTS = (
    (
        "experts",
        (
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
            "moe_num_experts",
            "enable_moe_block",
        ),
    ),
    ("latent attention", ("kv_lora_rank",)),
    ("linear attention", ("linear_num_key_heads", "linear_num_value_heads", "linear_attn_config")),
    ("state-space layers", ("state_size", "ssm_state_size", "mamba_d_state", "mamba_num_heads")),
    ("short convolutions", ("conv_L_cache",)),
    ("recurrent layers", ("lru_width", "rwkv_hidden_size")),
    ("an encoder", ("is_encoder_decoder", "encoder_layers", "encoder_attention_heads")),
    ("positions by a bias on the scores", ("alibi", "relative_attention_num_buckets")),
    ("a mixture of residual streams", ("altup_num_inputs", "hc_mult")),
)


def missing_in(raw: Mapping[str, Any]) -> str:
    """The parts that a config.json names and no family has, each with the key that says so; "" where there is none."""
    found = []
    for part, keys in PARTS:
        key = next((key for key in keys if raw.get(key)), None)
        if key is not None:
            found.append(f"{part} ({key})")
    return ", ".join(found)
