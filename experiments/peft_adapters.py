"""PEFT adapters as people make them: every option that tells which modules are adapted, and what is saved beside them.

    python experiments/peft_adapters.py [CASE ...]

needs the extra `reference`. PEFT makes each adapter over a tiny random model of tests/golden/families.json, every
tensor of it random, and saves it. Then:

    read     the deviation of jaxft's logits from those of `PeftModel.from_pretrained`, relative to the largest one
    again    the same after jaxft has written what it read, and PEFT loaded that

or the line by which jaxft refuses it. Without CASE the table is written to peft_adapters.md beside this file.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.errors import UserError
from jaxft.formats import load, load_adapter, save_adapter

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "tests/golden"
TOLERANCE = 1e-4
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
NEW = (3, 17, 39)  # tokens whose rows train
WIDER = 45  # tokens of a vocabulary of 40 that was resized

# {case: (family, options of LoraConfig, or of VeraConfig under "vera", other things that happen before saving)}.
Case = tuple[str, dict[str, Any], dict[str, Any]]


def case(family: str, more: dict[str, Any] | None = None, **options: Any) -> Case:
    return family, options, more or {}


def after(**more: Any) -> dict[str, Any]:
    return more


TOKENS: dict[str, Case] = {
    "tokens": case("llama", target_modules=["q_proj"], trainable_token_indices=list(NEW)),
    "tokens, tied": case("qwen3", target_modules=["q_proj"], trainable_token_indices=list(NEW)),
    "tokens of both": case(
        "llama",
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": list(NEW), "lm_head": [1, 2]},
    ),
    "tokens of the head": case(
        "llama", target_modules=["q_proj"], trainable_token_indices={"lm_head": [1, 2]}
    ),
    "tokens of both, tied": case(
        "qwen3",
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": list(NEW), "lm_head": list(NEW)},
    ),
    "tokens that differ, tied": case(
        "qwen3",
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": list(NEW), "lm_head": [1]},
    ),
    "tokens, gemma3": case(
        "gemma3_text", target_modules=["q_proj"], trainable_token_indices=list(NEW)
    ),
    "tokens, gemma4": case(
        "gemma4_text", target_modules=["q_proj"], trainable_token_indices=list(NEW)
    ),
    "tokens, gpt2": case(
        "gpt2", target_modules=["c_attn"], fan_in_fan_out=True, trainable_token_indices=[2, 3]
    ),
    "tokens and DoRA": case(
        "qwen3", target_modules=["q_proj"], use_dora=True, trainable_token_indices=list(NEW)
    ),
    "tokens and the head's adapter": case(
        "llama", target_modules=["q_proj", "lm_head"], trainable_token_indices=list(NEW)
    ),
    "tokens and the head's adapter, tied": case(
        "qwen3", target_modules=["q_proj", "lm_head"], trainable_token_indices=list(NEW)
    ),
    "tokens and the head saved": case(
        "llama",
        target_modules=["q_proj"],
        modules_to_save=["lm_head"],
        trainable_token_indices=list(NEW),
    ),
    "tokens and the embedding's adapter": case(
        "llama", target_modules=["q_proj", "embed_tokens"], trainable_token_indices=list(NEW)
    ),
    "tokens, resized": case(
        "llama",
        after(resize=WIDER),
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": [40, 44], "lm_head": [40, 44]},
    ),
    "tokens, resized, tied": case(
        "qwen3",
        after(resize=WIDER),
        target_modules=["q_proj"],
        trainable_token_indices=[40, 41, 42, 43, 44],
    ),
    "tokens, ties not wanted": case(
        "qwen3",
        target_modules=["q_proj"],
        trainable_token_indices=list(NEW),
        ensure_weight_tying=True,
    ),
}
RESIZED: dict[str, Case] = {
    "resized, kept": case(
        "llama", after(resize=WIDER, save_embedding_layers=True), target_modules=["q_proj"]
    ),
    "resized, kept, tied": case(
        "qwen3", after(resize=WIDER, save_embedding_layers=True), target_modules=["q_proj"]
    ),
    "resized, saved": case(
        "llama",
        after(resize=WIDER),
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
    ),
    "resized, saved, tied": case(
        "qwen3", after(resize=WIDER), target_modules=["q_proj"], modules_to_save=["embed_tokens"]
    ),
    "resized, saved, tied together": case(
        "qwen3",
        after(resize=WIDER),
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    ),
    "resized, adapted": case(
        "llama", after(resize=WIDER), target_modules=["q_proj", "embed_tokens", "lm_head"]
    ),
    "resized, adapted, tied": case(
        "qwen3", after(resize=WIDER), target_modules=["q_proj", "embed_tokens"]
    ),
    "made smaller": case(
        "llama", after(resize=36, save_embedding_layers=True), target_modules=["q_proj"]
    ),
}
MODULES: dict[str, Case] = {
    "endings": case("llama", target_modules=["q_proj", "mlp.down_proj", "layers.1.mlp.up_proj"]),
    "expression": case("qwen3", target_modules=r".*layers\.[13]\.(self_attn|mlp)\.(q|up)_proj"),
    "expression of endings": case("gemma3_text", target_modules=r".*(q_proj|v_proj)$"),
    "all-linear": case("mistral", target_modules="all-linear"),
    "all-linear, gpt2": case("gpt2", target_modules="all-linear", fan_in_fan_out=True),
    "all-linear, fused": case("phi3", target_modules="all-linear"),
    "all-linear, excluded": case(
        "olmo2", target_modules="all-linear", exclude_modules=["down_proj", "layers.0.mlp.up_proj"]
    ),
    "all-linear, gemma4": case("gemma4_text", target_modules="all-linear"),
    "no targets": case("llama"),
    "no targets, phi3": case("phi3"),
    "no targets, gemma3": case("gemma3_text"),
    "no targets, gpt2": case("gpt2"),
    "excluded": case("granite", target_modules=ATTENTION, exclude_modules=["k_proj"]),
    "excluded by expression": case(
        "granite", target_modules=ATTENTION, exclude_modules=r".*layers\.[02]\..*"
    ),
    "a head that is excluded": case(
        "llama", target_modules=["q_proj", "lm_head"], exclude_modules=["lm_head"]
    ),
    "layers": case("olmo3", target_modules=["q_proj"], layers_to_transform=[1, 3]),
    "one layer": case("olmo3", target_modules=["q_proj", "o_proj"], layers_to_transform=2),
    "layers by pattern": case(
        "cohere2", target_modules=["q_proj"], layers_to_transform=[0], layers_pattern=["layers"]
    ),
    "layers by pattern, gpt2": case(
        "gpt2",
        target_modules=["c_attn", "c_fc"],
        layers_to_transform=[1],
        layers_pattern="h",
        fan_in_fan_out=True,
    ),
    "fused qkv": case("phi3", target_modules=["qkv_proj"]),
    "fused gate and up": case("phi3", target_modules=["gate_up_proj", "down_proj"], use_dora=True),
    "fused, glm4": case("glm4", target_modules=["q_proj", "gate_up_proj"], use_rslora=True),
    "gemma3 with vision": case(
        "gemma3", target_modules=r".*language_model.*\.(?:[qkvo]|gate|up|down)_proj"
    ),
    "gemma3's text alone": case("gemma3_text", target_modules=ATTENTION),
    "patterns": case(
        "stablelm",
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"q_proj": 2, r".*\.3\.mlp\.down_proj": 5},
        alpha_pattern={"^model.layers.0.*": 1},
    ),
    "rank-stabilized DoRA": case(
        "smollm3", target_modules=["q_proj", "v_proj"], use_dora=True, use_rslora=True
    ),
    "pissa, converted": case("llama", target_modules=["q_proj"], init_lora_weights="gaussian"),
    "orthogonal": case("llama", target_modules=["q_proj"], init_lora_weights="orthogonal", r=4),
    "vera": case("starcoder2", after(vera=True), target_modules=["q_proj", "v_proj", "c_fc"]),
    "vera, drawn": case(
        "seed_oss", after(vera=True), target_modules=ATTENTION, save_projection=False
    ),
}
SAVED: dict[str, Case] = {
    "norms saved": case(
        "gemma2", target_modules=["q_proj"], modules_to_save=["norm", "pre_feedforward_layernorm"]
    ),
    "q and k norms saved": case(
        "qwen3", target_modules=["q_proj"], modules_to_save=["q_norm", "k_norm"]
    ),
    "a kernel saved": case("exaone4", target_modules=["q_proj"], modules_to_save=["o_proj"]),
    "a layer saved": case("nemotron", target_modules=["q_proj"], modules_to_save=["layers.2.mlp"]),
    "a fused kernel saved": case(
        "phi3", target_modules=["qkv_proj"], modules_to_save=["gate_up_proj"]
    ),
    "head saved": case("llama", target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "embedding saved": case("llama", target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "both saved, tied": case(
        "qwen3", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    ),
    "head saved, tied": case("qwen3", target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "embedding of layers saved": case(
        "gemma4_text", target_modules=["q_proj"], modules_to_save=["embed_tokens_per_layer"]
    ),
    "bias all": case("qwen2", target_modules=["q_proj", "o_proj"], bias="all"),
    "bias all, layer norms": case("starcoder2", target_modules=["q_proj"], bias="all"),
    "bias all, nemotron": case("nemotron", target_modules=["q_proj"], bias="all"),
    "bias lora_only": case("starcoder2", target_modules=["q_proj", "c_fc"], bias="lora_only"),
    "bias vera_only": case(
        "qwen2", after(vera=True), target_modules=["q_proj", "v_proj"], bias="vera_only"
    ),
    "bias all, none there": case("mistral", target_modules=["q_proj"], bias="all"),
    "lora_bias": case("qwen2", target_modules=["q_proj", "v_proj"], lora_bias=True),
    "lora_bias, none there": case("llama", target_modules=["o_proj", "down_proj"], lora_bias=True),
    "lora_bias, gpt2": case("gpt2", target_modules=["c_attn"], fan_in_fan_out=True, lora_bias=True),
}
KEYS: dict[str, Case] = {
    "unknown keys that are off": case(
        "llama",
        after(keys={"use_something_new": False, "new_config": None, "newer": {}, "newest": []}),
        target_modules=["q_proj"],
    ),
    "an unknown key that is on": case(
        "llama", after(keys={"use_something_new": True}), target_modules=["q_proj"]
    ),
    "an unknown number": case("llama", after(keys={"new_factor": 0.5}), target_modules=["q_proj"]),
    "aLoRA": case("llama", target_modules=["q_proj"], alora_invocation_tokens=[1, 2]),
    "layers that repeat": case(
        "llama", target_modules=["q_proj"], layer_replication=[[0, 3], [1, 4]]
    ),
    "parameters": case("llama", target_modules=[], target_parameters=["self_attn.q_proj.weight"]),
}
CASES = TOKENS | RESIZED | MODULES | SAVED | KEYS


def transformers_model(folder: Path, resize: int) -> Any:
    """transformers' model of a folder in float32, its vocabulary resized if a size is given."""
    import torch
    import transformers

    raw = json.loads((folder / "config.json").read_text())
    kind = getattr(transformers, raw["architectures"][0])
    model = kind.from_pretrained(folder, attn_implementation="eager", dtype="float32").eval()
    if resize:
        torch.manual_seed(1)
        model.resize_token_embeddings(resize)
    return model


def randomised(model: Any) -> None:
    """Every tensor that trains moved; and rows that a resized vocabulary has more."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                if "lora_" in name and "magnitude" not in name and parameter.ndim > 1:
                    parameter.copy_(0.7 * noise / parameter.shape[-1] ** 0.5)
                else:
                    parameter += 0.3 * noise


def make(source: Path, options: dict[str, Any], more: dict[str, Any], folder: Path) -> None:
    """PEFT's adapter in a folder."""
    from peft import LoraConfig, VeraConfig, get_peft_model

    kind = VeraConfig if more.get("vera") else LoraConfig
    sizes = {"r": 5} if kind is VeraConfig else {"r": 3, "lora_alpha": 5}
    config = kind(**{"task_type": "CAUSAL_LM", **sizes, **options})
    model = get_peft_model(transformers_model(source, more.get("resize", 0)), config)
    randomised(model)
    kept = more.get("save_embedding_layers", "auto")
    model.save_pretrained(folder, save_embedding_layers=kept)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | more.get("keys", {})))


def asked(model: Any, tokens: np.ndarray) -> np.ndarray:
    """A model's logits."""
    import torch

    with torch.no_grad():
        return model(
            input_ids=torch.from_numpy(tokens.astype(np.int64)), use_cache=False
        ).logits.numpy()


def relative(found: Any, expected: np.ndarray) -> float:
    """The largest difference relative to the largest expected number; infinite where the shapes differ."""
    if np.shape(found) != expected.shape:
        return float("inf")
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


def measure(
    one: Case, cases: Any, write_folder: Callable[..., Path], folder: Path
) -> dict[str, Any]:
    """{"read": deviation, "again": deviation}, or {"refused": the line}, or {"peft": why PEFT does not load it}."""
    from peft import PeftModel

    family, options, more = one
    source = write_folder(cases[family], folder / "source")
    resize = more.get("resize", 0)
    try:
        make(source, options, more, folder / "adapter")
        peft = PeftModel.from_pretrained(
            transformers_model(source, resize), str(folder / "adapter")
        )
    except Exception as error:  # whatever PEFT raises is its answer
        return {"peft": f"{type(error).__name__}: {error}".splitlines()[0]}
    tokens = np.random.default_rng(0).integers(3, resize or 40, (2, 16))
    tokens[0, : len(NEW)] = [token % (resize or 40) for token in NEW]
    if resize > 40:
        tokens[1, :5] = range(40, 45)
    expected = asked(peft.eval(), tokens)
    plain = asked(transformers_model(source, resize).eval(), tokens)
    if relative(plain, expected) < 10 * TOLERANCE and not options.get("alora_invocation_tokens"):
        raise AssertionError("the adapter changes nothing")
    try:
        model, params = load(source)
        params = load_adapter(params, folder / "adapter")
        found = {"read": relative(model.apply({"params": params}, tokens), expected)}
        save_adapter(params, folder / "written")
    except UserError as error:
        return {"refused": str(error).replace(str(folder), "").lstrip("/")}
    again = PeftModel.from_pretrained(transformers_model(source, resize), str(folder / "written"))
    found["again"] = relative(asked(again.eval(), tokens), expected)
    return found


def shown(found: dict[str, Any]) -> str:
    """A row's last cells."""
    if "read" in found:
        return " | ".join("0" if not found[x] else f"{found[x]:.0e}" for x in ("read", "again"))
    what, why = next(iter(found.items()))
    why = why.replace("|", "\\|")
    return f"{'PEFT does not load it' if what == 'peft' else 'refused'}: {why} | "


def main() -> None:
    """Measures the cases and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE")
    given = parser.parse_args()
    sys.path.insert(0, str(GOLDEN))
    golden = importlib.import_module("family_folders")
    import peft
    import transformers

    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    families, rows, wrong = golden.cases(), [], []
    for name in given.cases or CASES:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(CASES[name], families, golden.write_folder, Path(folder))
        print(f"{name}: {shown(found)}", flush=True)
        rows.append(f"| {name} | {CASES[name][0]} | {shown(found)} |")
        wrong += [name] if max(found.get("read", 0), found.get("again", 0)) > TOLERANCE else []
    if not given.cases:
        versions = f"transformers {transformers.__version__} and peft {peft.__version__}"
        made = "Made by `experiments/peft_adapters.py`, which says what the columns are, with"
        head = f"# PEFT's adapters\n\n{made} {versions}.\n"
        columns = "| case | family | read | again |\n| --- | --- | --- | --- |"
        (HERE / "peft_adapters.md").write_text("\n".join([head, columns, *rows]) + "\n")
    if wrong:
        sys.exit(f"above {TOLERANCE}: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
