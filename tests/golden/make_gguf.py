"""Tiny random GGUF files as llama.cpp's converter writes them, and what transformers says about them: gguf/.

    NAME.gguf           a model with its tokenizer
    NAME.npz            input_ids (2, 12); logits, of transformers: of the model that the file was made from where
                        the file is in float32, else of its own reading of the file (AutoModelForCausalLM, gguf_file)
    tokens.json         texts, and {NAME: their ids} by transformers' own reading of the file (AutoTokenizer, gguf_file)

The files are written here by the package `gguf` and by what llama.cpp's converter does: rows of q and k in pairs
(llama), norms with one added (gemma), kernels turned over (gpt2), rotary factors as a tensor (llama 3.1).

    python tests/golden/make_gguf.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from make_models import SMALL, logits_of, randomise
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.utils.logging import disable_progress_bar

FOLDER = Path(__file__).parent / "gguf"
TEXTS = (
    "the cat sat on the mat",
    "  two  spaces\nand 1234 digits",
    "<|im_start|>user\nthe<|im_end|>",
    "it's THE end, isn't it?",
    "",
    " a",
)
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
GEMMA = {
    **SMALL, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4, "tie_word_embeddings": True,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL, rope_parameters=PLAIN),
    "llama3": LlamaConfig(**SMALL, rope_parameters=LLAMA3, head_dim=16, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL, rope_parameters=PLAIN),
    "qwen3": Qwen3Config(**SMALL, rope_parameters=PLAIN, head_dim=16, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**GEMMA, rope_parameters=PLAIN),
    "gemma3": Gemma3TextConfig(
        **{**GEMMA, "num_hidden_layers": 7},
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": PLAIN,
        },
    ),
    "gpt2": GPT2Config(
        vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2,
        dtype="float32",
    ),
}  # fmt: skip
ARCHITECTURES = {"llama3": "llama"}
# How the tensors of one file are packed; others are in float32. A row of 40 numbers is no whole number of blocks.
PACKED = {
    "llama": {
        "attn_q": Kind.Q4_0, "attn_k": Kind.Q4_1, "attn_v": Kind.Q5_0, "attn_output": Kind.Q5_1,
        "ffn_gate": Kind.Q8_0, "ffn_up": Kind.Q4_0, "ffn_down": Kind.F16, "token_embd": Kind.Q8_0, "output": Kind.F16,
    },
    "qwen2": {
        "attn_q": Kind.BF16, "attn_k": Kind.F16, "ffn_down": Kind.BF16, "token_embd": Kind.F16,
    },
}  # fmt: skip
PRE = {"llama3": "llama-bpe", "qwen2": "qwen2", "qwen3": "qwen2", "gpt2": "gpt-2"}
SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
WORDS = ("th", "the", "at", "ca", "cat", "12", "sp", "is")


def tokens_of(blank: str, newline: str) -> tuple[list[str], list[str]]:
    """(96 tokens, merges): specials, letters of ASCII, words with and without a blank before them."""
    letters = [
        *"abcdefghijklmnopqrstuvwxyz",
        *"THEACDIS",
        *"0123456789",
        *"'.,?!-|<>_",
        blank,
        newline,
    ]
    words = [*WORDS, f"{blank}t", f"{blank}the", f"{blank}a", f"{blank}{blank}"]
    merges = [
        "t h", "th e", "a t", "c a", "ca t", "1 2", "s p", "i s",
        f"{blank} t", f"{blank} the", f"{blank} a", f"{blank} {blank}",
    ]  # fmt: skip
    tokens = [*SPECIAL, *letters, *words]
    return [*tokens, *(f"[PAD{i}]" for i in range(len(tokens), 96))], merges


def add_tokenizer(writer: gguf.GGUFWriter, name: str) -> None:
    """The vocabulary as llama.cpp's converter writes it."""
    of_bytes = name in PRE
    tokens, merges = tokens_of("Ġ" if of_bytes else "▁", "Ċ" if of_bytes else "<0x0A>")
    kinds = [3 if token in SPECIAL else 5 if token.startswith("[PAD") else 1 for token in tokens]
    writer.add_tokenizer_model("gpt2" if of_bytes else "llama")
    if of_bytes:
        writer.add_tokenizer_pre(PRE[name])
        writer.add_token_merges(merges)
        writer.add_add_bos_token(name == "llama3")
    else:
        kinds[0] = 2
        if name.startswith("gemma"):
            tokens = ["  " if token == "▁▁" else token for token in tokens]
        kinds = [
            6 if token == "<0x0A>" else kind for token, kind in zip(tokens, kinds, strict=True)
        ]
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([-float(i) for i in range(len(tokens))])
        writer.add_add_space_prefix(not name.startswith("gemma"))
        writer.add_add_bos_token(True)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for key, index in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 0)):
        getattr(writer, f"add_{key}_token_id")(index)
    writer.add_chat_template(
        "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    )


def add_settings(writer: gguf.GGUFWriter, name: str, config: PretrainedConfig) -> None:
    """The keys as llama.cpp's converter writes them."""
    writer.add_name(f"tiny {name}")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if name == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    if name == "gemma3":
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_freq_base(rope["rope_theta"])
    if name.startswith("llama"):
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(config.head_dim)
    if name in ("llama3", "qwen3", "gemma2", "gemma3"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if name.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if name == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def rotary_factors(config: PretrainedConfig) -> np.ndarray:
    """llama.cpp's factors, computed as its converter does."""
    rope, factors = config.rope_parameters, []
    length = rope["original_max_position_embeddings"]
    low, high = length / rope["low_freq_factor"], length / rope["high_freq_factor"]
    for power in range(0, config.head_dim, 2):
        wave = 2 * np.pi * rope["rope_theta"] ** (power / config.head_dim)
        if wave < high:
            factors.append(1.0)
        elif wave > low:
            factors.append(rope["factor"])
        else:
            smooth = (length / wave - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.asarray(factors, np.float32)


def converted(name: str, tensor: str, array: np.ndarray, config: PretrainedConfig) -> np.ndarray:
    """What llama.cpp's converter makes of a tensor's values."""
    if name.startswith("llama") and ("q_proj" in tensor or "k_proj" in tensor):
        heads = config.num_attention_heads if "q_proj" in tensor else config.num_key_value_heads
        halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
        return halves.swapaxes(1, 2).reshape(array.shape)
    if name.startswith("gemma") and tensor.endswith("norm.weight"):
        return array + 1
    if name == "gpt2" and tensor.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return array.T
    return array


def write(name: str, config: PretrainedConfig, seed: int) -> torch.nn.Module:
    """Writes a file; returns the model that it was made from."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(model, seed)
    architecture = ARCHITECTURES.get(name, name)
    writer = gguf.GGUFWriter(FOLDER / f"{name}.gguf", architecture)
    add_settings(writer, name, config)
    add_tokenizer(writer, name)
    kind = next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    if name == "llama3":
        writer.add_tensor("rope_freqs.weight", rotary_factors(config))
    for tensor, value in model.state_dict().items():
        if tensor == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, end = tensor.rsplit(".", 1)
        stored = f"{names.get_name(module)}.{end}"
        array = np.ascontiguousarray(converted(name, tensor, value.numpy(), config))
        part = stored.removesuffix(".weight").rsplit(".", 1)[-1]
        packed = PACKED.get(name, {}).get(part, Kind.F32) if stored.endswith("weight") else Kind.F32
        writer.add_tensor(stored, gguf.quantize(array, packed), raw_dtype=packed)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    return model


def main() -> None:
    disable_progress_bar()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    ids = np.random.default_rng(0).integers(3, 72, (2, 12))
    tokens = {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        model = write(name, config, seed)
        if name in PACKED:
            model = AutoModelForCausalLM.from_pretrained(
                FOLDER, gguf_file=f"{name}.gguf", dtype=torch.float32, attn_implementation="eager"
            ).eval()
        found = logits_of(model, ids, np.ones_like(ids))
        np.savez_compressed(
            FOLDER / f"{name}.npz", **{k: found[k] for k in ("input_ids", "logits")}
        )
        tokenizer = AutoTokenizer.from_pretrained(FOLDER, gguf_file=f"{name}.gguf")
        tokens[name] = [tokenizer(text).input_ids for text in TEXTS]
        print(name, (FOLDER / f"{name}.gguf").stat().st_size // 1024, "KiB")
    written = {"texts": TEXTS, **tokens}
    (FOLDER / "tokens.json").write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
