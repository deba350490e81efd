"""Tiny random Hugging Face folders, and what transformers says about them: models/<name>/.

Each folder holds config.json, the weights (float32, every norm and bias off its trivial value) and
expected.npz:

    input_ids, attention_mask, position_ids          (batch, length), no padding
    left_*, right_*                                  the same rows shortened and padded on one side
    logits, left_logits, right_logits                (batch, length, vocabulary) float32
    prompt_ids, prompt_mask, generated               left-padded prompts; prompts and greedy tokens

Position ids are those of transformers' `generate`: cumsum(mask) - 1, and where the mask is 0, 0.
Logits in a padded place mean nothing: compare where the mask is 1.

transformers 5 writes `rope_parameters`; older files have `rope_theta` and `rope_scaling` at the top
level (null where nothing is scaled), its kind under `type` in the oldest and `rope_type` later, and
`torch_dtype` for `dtype`. The folders in OLD_STYLE are rewritten so, that both styles are read.

    python tests/golden/make_models.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.utils.logging import disable_progress_bar

FOLDER = Path(__file__).parent / "models"
LENGTH = 12
SHORT = (12, 9, 5)  # true lengths of the padded rows
PAD = 0  # any token does, where the mask is 0

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD,
    "dtype": "float32",
}
BASE_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def llama(**changes: object) -> LlamaConfig:
    return LlamaConfig(**{**SMALL, "rope_parameters": BASE_ROPE, **changes})


def configurations() -> dict[str, PretrainedConfig]:
    """Name of the folder -> configuration."""
    return {
        "llama": llama(num_hidden_layers=3),
        "llama_bias": llama(attention_bias=True, mlp_bias=True, head_dim=12, rms_norm_eps=1e-5),
        "llama_tied": llama(tie_word_embeddings=True, num_key_value_heads=1),
        "llama_old": llama(
            rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e3}
        ),
        "llama_linear": llama(
            rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
        ),
        "llama_llama3": llama(
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            head_dim=16,
        ),
        "llama_yarn": llama(
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 4.0,
                "beta_slow": 1.0,
            },
            head_dim=16,
        ),
        "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True, rope_parameters=BASE_ROPE),
        "gemma2": Gemma2Config(
            **{**SMALL, "num_hidden_layers": 4, "hidden_size": 24, "intermediate_size": 28},
            head_dim=10,
            query_pre_attn_scalar=20,
            attn_logit_softcapping=1.5,
            final_logit_softcapping=2.0,
            sliding_window=4,
            rope_parameters=BASE_ROPE,
        ),
        "gpt2": GPT2Config(
            vocab_size=96,
            n_positions=64,
            n_embd=28,
            n_layer=2,
            n_head=4,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=PAD,
            dtype="float32",
        ),
    }


SHARDED = "llama_bias"  # saved in several files with an index
OLD_STYLE = ("llama_old", "qwen2")


@torch.no_grad()
def randomise(model: PreTrainedModel, seed: int) -> None:
    """Every parameter of one dimension (norms, biases) moves; matrices get a scale that tells."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter += 0.3 * noise
        else:
            parameter.copy_(noise * (1.5 / parameter.shape[-1] ** 0.5))


def padded(ids: np.ndarray, side: str, lengths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The first `lengths` tokens of each row, pushed to the other side of the padding; its mask."""
    tokens, mask = np.full_like(ids, PAD), np.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(ids.shape[1] - length, None) if side == "left" else slice(0, length)
        tokens[row, place] = ids[row, :length]
        mask[row, place] = 1
    return tokens, mask


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """The inputs as transformers wants them, and its logits."""
    positions = np.maximum(mask.cumsum(-1) - 1, 0) * mask
    logits = model(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        position_ids=torch.from_numpy(positions),
    ).logits
    return {
        "input_ids": ids.astype(np.int32),
        "attention_mask": mask.astype(np.int32),
        "position_ids": positions.astype(np.int32),
        "logits": logits.float().numpy(),
    }


def expected(model: PreTrainedModel, vocabulary: int) -> dict[str, np.ndarray]:
    """All that expected.npz holds."""
    generator = np.random.default_rng(0)
    ids = generator.integers(3, vocabulary, (len(SHORT), LENGTH))
    result = logits_of(model, ids, np.ones_like(ids))
    for side in ("left", "right"):
        part = logits_of(model, *padded(ids, side, SHORT))
        result |= {f"{side}_{name}": value for name, value in part.items()}
    prompts, mask = padded(ids[:, :8], "left", (8, 6, 3))
    generated = model.generate(
        input_ids=torch.from_numpy(prompts),
        attention_mask=torch.from_numpy(mask),
        max_new_tokens=10,
        do_sample=False,
    )
    return result | {
        "prompt_ids": prompts.astype(np.int32),
        "prompt_mask": mask.astype(np.int32),
        "generated": generated.numpy().astype(np.int32),
    }


def to_old_style(file: Path) -> None:
    """Rewrite config.json as transformers 4 wrote it."""
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    config["torch_dtype"] = config.pop("dtype")
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write(name: str, config: PretrainedConfig, seed: int) -> None:
    folder = FOLDER / name
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(model, seed)
    model.save_pretrained(folder, **({"max_shard_size": "40KB"} if name == SHARDED else {}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if name in OLD_STYLE:
        to_old_style(folder / "config.json")
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype="float32"
    ).eval()
    result = expected(loaded, config.vocab_size)
    assert np.array_equal(result["logits"], expected(model, config.vocab_size)["logits"]), name
    np.savez_compressed(folder / "expected.npz", **result)


def main() -> None:
    disable_progress_bar()
    shutil.rmtree(FOLDER, ignore_errors=True)
    for seed, (name, config) in enumerate(configurations().items()):
        write(name, config, seed)
        size = sum(file.stat().st_size for file in (FOLDER / name).iterdir())
        print(f"{name}: {size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
