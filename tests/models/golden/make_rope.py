"""Writes rope.json: rotary frequencies of transformers 5.23. Needs the extra `reference`."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = [
    (64, 10000.0, 2048, None),
    (16, 500000.0, 2048, {"type": "linear", "factor": 4.0}),
    (16, 10000.0, 2048, {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0}),
    (
        64,
        500000.0,
        131072,
        {"rope_type": "llama3", "original_max_position_embeddings": 8192, **LLAMA3},
    ),
    (32, 10000.0, 512, {"rope_type": "llama3", **LLAMA3}),
    (64, 10000.0, 8192, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}),
    (
        64,
        1000000.0,
        32768,
        {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
            "beta_fast": 16,
            "beta_slow": 2,
            "mscale": 0.7,
            "mscale_all_dim": 1.1,
        },
    ),
    (32, 10000.0, 4096, {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.3}),
    (32, 10000.0, 64, {"rope_type": "yarn", "factor": 2.0}),
]


def frequencies(head_dim: int, theta: float, max_length: int, scaling: dict | None) -> dict:
    """One case with what transformers makes of it."""
    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        max_position_embeddings=max_length,
        rope_parameters={"rope_theta": theta, **(scaling or {"rope_type": "default"})},
    )
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        values, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        values, factor = ROPE_INIT_FUNCTIONS[kind](config)
    case = {"head_dim": head_dim, "theta": theta, "max_length": max_length, "scaling": scaling}
    return {**case, "frequencies": values.tolist(), "attention_factor": factor}


if __name__ == "__main__":
    text = json.dumps([frequencies(*case) for case in CASES])
    Path(__file__).with_name("rope.json").write_text(text + "\n")
