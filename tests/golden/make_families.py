"""One tiny random model of each family, and what transformers says about it: families.json and families.npz.

Every norm, bias and scalar is off its trivial value, and the shapes are odd: one key head, a head that is no part of
the hidden size where the family allows it, windows and original rotary lengths below the length of the sequences.
Nothing of the weights is stored: `family_folders.py` draws them by name. The script sees to it that transformers
itself gives the same logits whole, from a cache step by step, padded on the left, and packed, to 3e-5 of the largest.

    python tests/golden/make_families.py            (or the names of some cases, which are then printed alone)
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from family_folders import LEFT, LOGITS, TABLE, deviation, rows, write_folder
from safetensors.numpy import load_file
from transformers import AutoConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

LENGTH, WINDOW, ORIGINAL = 24, 6, 8
SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
KINDS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}


def of(kind: str, **settings: Any) -> dict[str, Any]:
    return {"model_type": kind, **SMALL, **settings}


def longrope(features: int) -> dict[str, Any]:
    """Other factors below the original length than beyond it, one for each pair of features."""
    steps = np.arange(features // 2)
    long, short = (1.5 + 0.5 * steps).tolist(), (1.0 + 0.125 * steps).tolist()
    return {"type": "longrope", "long_factor": long, "short_factor": short}


VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
GEMMA3: dict[str, Any] = {
    "head_dim": 10,
    "query_pre_attn_scalar": 20,
    "sliding_window": WINDOW,
    "num_hidden_layers": 6,
}
GEMMA4: dict[str, Any] = {
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": WINDOW,
    "final_logit_softcapping": 3.0,
    "vocab_size_per_layer_input": 40,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
}
# config.json as transformers 5 writes it, after it has read this one.
WRITTEN: dict[str, dict[str, Any]] = {
    "llama": of("llama", head_dim=10, attention_bias=True, mlp_bias=True),
    "mistral": of("mistral", sliding_window=WINDOW, head_dim=10),
    "ministral3": of(
        "ministral3",
        head_dim=12,
        rope_parameters={**YARN, "rope_theta": 1e6, "mscale": 1.0, "mscale_all_dim": 1.0}
        | {"llama_4_scaling_beta": 0.5, "max_position_embeddings": 64},
    ),
    "qwen2": of("qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    "qwen3": of("qwen3", head_dim=10, attention_bias=True, tie_word_embeddings=True),
    "qwen3_window": of(
        "qwen3", head_dim=8, use_sliding_window=True, sliding_window=WINDOW, layer_types=KINDS
    ),
    "gemma": of("gemma", head_dim=10),
    "gemma2": of(
        "gemma2",
        head_dim=10,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=2.0,
        sliding_window=WINDOW,
    ),
    "gemma3_text": of(
        "gemma3_text",
        **GEMMA3,
        layer_types=KINDS + KINDS[:2],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
        },
    ),
    "gemma3": {
        "model_type": "gemma3",
        "text_config": of("gemma3_text", **GEMMA3),
        "vision_config": VISION,
        "mm_tokens_per_image": 4,
        "tie_word_embeddings": True,
    },
    "gemma4_text": of(
        "gemma4_text",
        **GEMMA4,
        hidden_size_per_layer_input=6,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
    ),
    "gemma4_text_keys": of(
        "gemma4_text",
        **GEMMA4,
        hidden_size_per_layer_input=0,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
    ),
    "phi3": of("phi3", partial_rotary_factor=0.67, num_attention_heads=2, sliding_window=WINDOW),
    "phi3_longrope": of(
        "phi3",
        num_attention_heads=2,
        partial_rotary_factor=0.67,
        original_max_position_embeddings=ORIGINAL,
        rope_parameters=longrope(8) | {"rope_theta": 1e4},
        tie_word_embeddings=True,
    ),
    "smollm3": of("smollm3", no_rope_layer_interval=2, tie_word_embeddings=True),
    "olmo2": of("olmo2", attention_bias=True),
    "olmo3": of("olmo3", sliding_window=WINDOW, layer_types=KINDS),
    "granite": of(
        "granite",
        embedding_multiplier=3.0,
        logits_scaling=2.5,
        residual_multiplier=0.4,
        attention_multiplier=0.3,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    ),
    "glm4": of("glm4", head_dim=12, attention_bias=True),
    "exaone4": of("exaone4", sliding_window=WINDOW, sliding_window_pattern=2),
    "exaone4_full": of("exaone4", sliding_window=None, layer_types=["full_attention"] * 4)
    | {"tie_word_embeddings": True},
    "seed_oss": of("seed_oss", head_dim=10, attention_bias=True, attention_out_bias=True)
    | {"mlp_bias": True},
    "cohere2": of("cohere2", sliding_window=WINDOW, layer_types=KINDS, logit_scale=0.3),
    "starcoder2": of("starcoder2", sliding_window=WINDOW),
    "starcoder2_plain": of("starcoder2", use_bias=False, tie_word_embeddings=False),
    "stablelm": of("stablelm", hidden_size=32, use_qkv_bias=True, partial_rotary_factor=0.25),
    "stablelm_parallel": of("stablelm", hidden_size=32, use_parallel_residual=True)
    | {"qk_layernorm": True, "num_key_value_heads": 2, "partial_rotary_factor": 0.5},
    "nemotron": of("nemotron", head_dim=12, attention_bias=True, mlp_bias=True),
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 40,
        "n_positions": 32,
        "n_embd": 24,
        "n_layer": 3,
        "n_head": 4,
        "n_inner": 20,
        "activation_function": "gelu",
    },
}
# config.json word for word, in the spelling of folders that were written before transformers 5.
AS_FOUND: dict[str, dict[str, Any]] = {
    "mistral_old": of("mistral", sliding_window=None, rope_theta=5e3, rope_scaling=None),
    "llama_old": of(
        "llama", rope_theta=5e3, rope_scaling={"type": "linear", "factor": 2.0}, head_dim=None
    ),
    "gemma3_text_old": of(
        "gemma3_text",
        **GEMMA3,
        rope_theta=5e3,
        rope_local_base_freq=100.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        sliding_window_pattern=3,
    ),
    "phi3_longrope_old": of(
        "phi3",
        num_attention_heads=2,
        original_max_position_embeddings=32,
        rope_scaling=longrope(12),
        rope_theta=1e4,
    ),
    "olmo3_old": of(
        "olmo3", sliding_window=WINDOW, rope_theta=5e3, rope_scaling=YARN, attention_bias=False
    ),
    "cohere2_old": of("cohere2", sliding_window=WINDOW, sliding_window_pattern=2, rope_theta=5e3),
    "smollm3_old": of("smollm3", no_rope_layers=[1, 0, 1, 1], rope_theta=5e3, rope_scaling=None),
    "exaone4_old": of("exaone4", sliding_window=WINDOW, rope_theta=5e3)
    | {"sliding_window_pattern": "LLLG", "layer_types": KINDS},
    "glm4_old": of("glm4", head_dim=12, partial_rotary_factor=0.5, rope_theta=1e4),
}


def architecture(raw: dict[str, Any]) -> type[PreTrainedModel]:
    """The class with the head, by transformers' own table."""
    config = AutoConfig.for_model(**json.loads(json.dumps(raw)))
    return transformers.AutoModelForCausalLM._model_mapping[type(config)]


def described(raw: dict[str, Any], found: bool) -> dict[str, Any]:
    """The case as families.json holds it: what a fresh model is saved as, less the weights."""
    kind = architecture(raw)
    config = AutoConfig.for_model(**json.loads(json.dumps(raw)))
    with tempfile.TemporaryDirectory() as name:
        kind(config).float().save_pretrained(name)
        written = json.loads((Path(name) / "config.json").read_text())
        before = load_file(Path(name) / "model.safetensors")
    tensors = {
        name: [round(float(array.mean())) if array.ndim < 2 else 0, *array.shape]
        for name, array in sorted(before.items())
    }
    return {"config": {**raw, "architectures": [kind.__name__]} if found else written} | {
        "tensors": tensors
    }


@torch.no_grad()
def whole(model: PreTrainedModel, **inputs: np.ndarray) -> np.ndarray:
    given = {name: torch.from_numpy(array.astype(np.int64)) for name, array in inputs.items()}
    return model(**given, use_cache=False).logits.numpy()


@torch.no_grad()
def step_by_step(model: PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    """A prompt that is longer than the original rotary length, then one token after another."""
    cache, start, found = None, ORIGINAL + 1, []
    for part in (tokens[:, :start], *np.split(tokens[:, start:], LENGTH - start, axis=1)):
        output = model(torch.from_numpy(part), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits.numpy())
    return np.concatenate(found, axis=1)


def check_itself(model: PreTrainedModel, tokens: np.ndarray, logits: np.ndarray) -> float:
    """The largest deviation of transformers from itself: cached, padded and packed."""
    batch = rows(tokens)
    of, mask = batch["of"], batch["segments"]
    padded = whole(
        model,
        input_ids=batch["tokens"][2:3],
        attention_mask=mask[2:3],
        position_ids=batch["positions"][2:3],
    )
    # Packed sequences are told apart by position ids that begin again, where no mask is given.
    packed = whole(model, input_ids=batch["tokens"][3:], position_ids=batch["positions"][3:])
    found = np.concatenate([step_by_step(model, tokens), padded, packed])
    assert of.shape[1] == LENGTH
    assert LEFT < LENGTH
    return deviation(found, logits, batch)


def main() -> None:
    disable_progress_bar()
    set_verbosity_error()
    every = WRITTEN | AS_FOUND
    chosen = sys.argv[1:] or list(every)
    tokens = np.random.Generator(np.random.PCG64(0)).integers(3, 40, (2, LENGTH))
    table, logits = {}, {}
    for name in chosen:
        case = described(every[name], name in AS_FOUND)
        with tempfile.TemporaryDirectory() as folder:
            path = write_folder(case, Path(folder) / name)
            model, problems = architecture(every[name]).from_pretrained(
                path, attn_implementation="eager", dtype="float32", output_loading_info=True
            )
            model.eval()
        assert not any(problems.values()), (name, problems)
        table[name], logits[name] = case, whole(model, input_ids=tokens)
        itself = check_itself(model, tokens, logits[name])
        size = np.abs(logits[name]).max()
        print(f"{name}: {len(case['tensors'])} tensors, logits to {size:.2f}, itself {itself:.1e}")
        assert itself < 3e-5, name
    if chosen == list(every):
        lines = ",\n".join(
            f"{json.dumps(name)}: {json.dumps(case)}" for name, case in table.items()
        )
        TABLE.write_text(f"{{\n{lines}\n}}\n")
        np.savez_compressed(LOGITS, tokens=tokens.astype(np.int32), **logits)


if __name__ == "__main__":
    main()
