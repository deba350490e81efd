"""PEFT adapters over the folders of models/, and the logits PEFT gives with them: adapters/<name>/.

Every adapter tensor is off its starting value, so that a forgotten one shows. expected.npz holds
input_ids (batch, length) int32, no padding, and logits (batch, length, vocabulary) float32 of
`PeftModel.from_pretrained` on the saved folder. `base_model_name_or_path` is the base's folder
relative to adapters/<name>. Where PEFT saves the embedding's base weight beside its adapter
(`embed_tokens.base_layer.weight`), it stays: readers meet such files.

    python tests/golden/make_models.py && python tests/golden/make_adapters.py      (or the names of some)
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).parent
FOLDER = HERE / "adapters"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PROJECTIONS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def lora(targets: list[str], **changes: object) -> LoraConfig:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": targets, "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**settings, **changes})


def vera(targets: list[str], **changes: object) -> VeraConfig:
    settings = {"r": 6, "target_modules": targets, "projection_prng_key": 7}
    return VeraConfig(**{**settings, "task_type": "CAUSAL_LM", **changes})


def configurations() -> dict[str, tuple[str, PeftConfig]]:
    """Name of the adapter -> (name of its base, configuration). New ones at the end: the place is the seed."""
    return {
        "lora": ("llama", lora(PROJECTIONS)),
        "rslora": ("llama", lora(["q_proj", "v_proj"], use_rslora=True)),
        "dora": ("llama", lora(PROJECTIONS, use_dora=True)),
        "vera": ("llama", vera(["q_proj", "v_proj", "down_proj"])),
        "vera_unsaved": (
            "llama",
            vera(["q_proj", "k_proj", "up_proj"], save_projection=False, projection_prng_key=42),
        ),
        "save_norm": (
            "llama",
            lora(["q_proj"], modules_to_save=["norm", "post_attention_layernorm"]),
        ),
        "save_head": ("llama", lora(["q_proj"], modules_to_save=["lm_head"])),
        "save_embedding": ("llama", lora(["q_proj"], modules_to_save=["embed_tokens"])),
        "save_embedding_tied": ("llama_tied", lora(["q_proj"], modules_to_save=["embed_tokens"])),
        "patterns": (
            "llama",
            lora(
                ["q_proj", "v_proj", "down_proj"],
                rank_pattern={r"layers\.0\.self_attn\.q_proj": 2, "v_proj": 6, r".*\.2\.mlp.*": 3},
                alpha_pattern={r"layers\.[12]\.self_attn\.q_proj": 10, "v_proj": 3},
            ),
        ),
        "patterns_rsdora": (
            "llama",
            lora(
                ["q_proj", "o_proj"],
                use_rslora=True,
                use_dora=True,
                rank_pattern={r"layers\.1\.self_attn\.q_proj": 8},
                alpha_pattern={r"^model\.layers\.2\..*": 2},
            ),
        ),
        "layers": ("llama", lora(["q_proj", "up_proj"], layers_to_transform=[0, 2])),
        "layers_dora": (
            "llama",
            lora(["q_proj"], layers_to_transform=[1], layers_pattern="layers", use_dora=True),
        ),
        "bias_lora": ("llama_bias", lora(PROJECTIONS)),
        "bias_dora": ("llama_bias", lora(PROJECTIONS, use_dora=True)),
        "embedding": ("llama", lora(["embed_tokens", "q_proj"])),
        "embedding_tied": ("llama_tied", lora(["embed_tokens", "q_proj"])),
        "embedding_dora": ("llama", lora(["embed_tokens", "q_proj"], use_dora=True)),
        "head": ("llama", lora(["lm_head", "v_proj"])),
        "head_tied": ("llama_tied", lora(["lm_head", "v_proj"])),
        "head_dora": ("llama", lora(["lm_head", "v_proj"], use_dora=True)),
        "qwen2_embedding_head": ("qwen2", lora(["embed_tokens", "lm_head", "k_proj"])),
        "gemma2": ("gemma2", lora(PROJECTIONS)),
        "gemma2_embedding": ("gemma2", lora(["embed_tokens", "o_proj"], use_dora=True)),
        "gpt2": ("gpt2", lora(["c_attn"], fan_in_fan_out=True)),
        "gpt2_all": ("gpt2", lora(["c_attn", "c_proj", "c_fc", "wte"], fan_in_fan_out=True)),
        "gpt2_dora": ("gpt2", lora(["c_attn"], fan_in_fan_out=True, use_dora=True)),
        "gpt2_vera": ("gpt2", vera(["c_attn", "c_fc"], fan_in_fan_out=True)),
        "embedding_bf16": ("llama", lora(["embed_tokens"])),
        "head_tied_bf16": ("llama_tied", lora(["lm_head"])),
        "save_head_bf16": ("qwen2", lora(["q_proj"], modules_to_save=["lm_head"])),
        "embeddings_kept": ("llama_tied", lora(["q_proj"])),
        "tied_together": ("llama_tied", lora(["embed_tokens"], ensure_weight_tying=True)),
        "nothing_tied": ("llama", lora(["q_proj"], ensure_weight_tying=True)),
        "target_lacking": ("llama", lora(["q_proj", "query_key_value"])),
        "one_layer_saved": ("llama", lora(["q_proj"], modules_to_save=["layers.1.mlp"])),
        "bias_all": ("qwen2", lora(["o_proj", "up_proj"], bias="all")),
        "bias_lora_only": ("llama_bias", lora(ATTENTION, bias="lora_only")),
        "gpt2_bias": ("gpt2", lora(["c_attn"], fan_in_fan_out=True, bias="all")),
        "vera_only": ("qwen2", vera(["q_proj", "v_proj"], bias="vera_only")),
        "tokens": ("llama", lora(["q_proj"], trainable_token_indices=[5, 3, 9])),
        "tokens_tied": ("llama_tied", lora(["q_proj"], trainable_token_indices=[5, 3, 9])),
        "tokens_apart": (
            "llama_tied",
            lora(["q_proj"], trainable_token_indices={"embed_tokens": [4, 7], "lm_head": [7]}),
        ),
        "resized": (
            "llama",
            lora(
                ["q_proj"],
                trainable_token_indices={"embed_tokens": [96, 98], "lm_head": [98]},
            ),
        ),
    }


def is_narrow(name: str) -> bool:
    """Whether the adapter is stored in bfloat16, as one that was trained over a base in bfloat16 is."""
    return name.endswith("_bf16")


def base(name: str, tokens: int = 0) -> PreTrainedModel:
    """The base, its vocabulary made larger by so many tokens."""
    model = AutoModelForCausalLM.from_pretrained(
        HERE / "models" / name, attn_implementation="eager", dtype="float32"
    ).eval()
    if tokens:
        torch.manual_seed(0)
        model.resize_token_embeddings(model.config.vocab_size + tokens)
    return model


@torch.no_grad()
def randomise(model: PeftModel, seed: int) -> None:
    """Move every trainable tensor: matrices and vectors of the adapter, modules saved whole."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if "magnitude" in name:
            parameter *= 1 + 0.2 * noise
        elif "lora_embedding" in name:
            parameter.copy_(0.4 * noise)
        elif "lora_" in name:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        else:
            parameter += 0.3 * noise


def tidy(folder: Path, name: str) -> None:
    """Name the base by a path relative to the adapter's folder; sort what PEFT keeps in sets."""
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config["base_model_name_or_path"] = f"../../models/{name}"
    for key in ("target_modules", "modules_to_save"):
        config[key] = sorted(config[key]) if isinstance(config.get(key), list) else config.get(key)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def write(name: str, base_name: str, config: PeftConfig, seed: int) -> None:
    folder = FOLDER / name
    more = 3 if name == "resized" else 0
    model = get_peft_model(base(base_name, more), config)
    randomise(model, seed)
    model = model.to(torch.bfloat16) if is_narrow(name) else model
    kept = {"save_embedding_layers": True} if name == "embeddings_kept" else {}
    model.save_pretrained(folder, **kept)
    (folder / "README.md").unlink()
    tidy(folder, base_name)
    adapted = PeftModel.from_pretrained(base(base_name, more), folder).eval()
    plain = base(base_name, more)
    ids = np.random.default_rng(seed).integers(3, plain.config.vocab_size, (2, 8))
    logits = adapted(input_ids=torch.from_numpy(ids)).logits
    before = plain(input_ids=torch.from_numpy(ids)).logits
    trained = model.eval()(input_ids=torch.from_numpy(ids)).logits
    assert is_narrow(name) or torch.equal(logits, trained), name
    change = (logits - before).abs().max() / before.abs().max()
    assert change > 0.05, f"{name}: the adapter hardly changes the logits ({change:.3f})"
    np.savez_compressed(
        folder / "expected.npz", input_ids=ids.astype(np.int32), logits=logits.numpy()
    )
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name}: {size / 1024:.0f} KiB, logits change by {change:.2f} of the largest")


def main() -> None:
    disable_progress_bar()
    warnings.simplefilter("ignore")
    wanted = set(sys.argv[1:])
    for seed, (name, (base_name, config)) in enumerate(configurations().items()):
        if not wanted or name in wanted:
            shutil.rmtree(FOLDER / name, ignore_errors=True)
            write(name, base_name, config, seed)


if __name__ == "__main__":
    main()
