"""Training curves of TRL's SFTTrainer on tiny models of other families: family_curves.json.

Of each family, by its name: the model and the adapter as `family_folders.py` draws them from their tensors' names,
and a curve as in trl/curves.json over the data and with the tokenizer of `make_trl.py`, ten updates of it. Every norm
is off its trivial value, and the sliding layers see far less than a row.

    python tests/golden/make_family_curves.py       (after make_trl.py)
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from family_folders import CURVES, write_adapter, write_folder, write_tokenizer
from make_families import WINDOW, architecture, described
from make_trl import (
    ALPHA,
    FOLDER,
    LOGGED,
    PROJECTIONS,
    RANK,
    SETTINGS,
    VOCABULARY,
    Counting,
    log_of,
    quiet,
    rows_of,
)
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, PreTrainedModel
from trl import SFTConfig

STEPS = 10
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "sliding_window": WINDOW,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {
        "model_type": "qwen3",
        **SMALL,
        "num_hidden_layers": 2,
        "use_sliding_window": True,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        **SMALL,
        "num_hidden_layers": 3,
        "query_pre_attn_scalar": 20,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
        },
    },
}


def adapter_of(base: PreTrainedModel) -> dict[str, Any]:
    """adapter_config.json of LoRA on all projections, and its tensors' names and shapes."""
    with tempfile.TemporaryDirectory() as folder:
        config = LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=PROJECTIONS, task_type="CAUSAL_LM"
        )
        model = get_peft_model(base, config)
        model.save_pretrained(folder)
        stored = json.loads((Path(folder) / "adapter_config.json").read_text())
        shapes = {
            f"{name.removesuffix('.default.weight')}.weight": [0, *parameter.shape]
            for name, parameter in sorted(model.named_parameters())
            if parameter.requires_grad
        }
    stored["target_modules"] = sorted(stored["target_modules"])
    return {"config": stored | {"base_model_name_or_path": "../model"}, "tensors": shapes}


def curve(name: str, output: Path) -> dict[str, Any]:
    """Train from the folders as the tests draw them, and read the log."""
    case = described(FAMILIES[name], found=False)

    def base() -> PreTrainedModel:
        model, problems = architecture(FAMILIES[name]).from_pretrained(
            write_folder(case, output / "model"),
            attn_implementation="eager",
            dtype="float32",
            output_loading_info=True,
        )
        assert not any(problems.values()), (name, problems)
        return model

    case["adapter"] = adapter_of(base())
    write_tokenizer(output / "model")
    settings = SETTINGS | {"max_steps": STEPS}
    trainer = Counting(
        model=PeftModel.from_pretrained(
            base(), write_adapter(case["adapter"], output / "adapter"), is_trainable=True
        ),
        args=SFTConfig(output_dir=str(output / "run"), **LOGGED, **settings),
        train_dataset=rows_of(FOLDER / "data.jsonl", str(output)),
        processing_class=AutoTokenizer.from_pretrained(output / "model"),
    )
    trainer.train()
    log = log_of(trainer)
    return case | {
        "data": "data.jsonl",
        "settings": settings,
        "losses": [line["loss"] for line in log],
        "learning_rates": [line["learning_rate"] for line in log],
        "grad_norms": [line["grad_norm"] for line in log],
        "tokens": trainer.trained,
    }


def main() -> None:
    quiet()
    lines = []
    for name in FAMILIES:
        with tempfile.TemporaryDirectory() as output:
            found = curve(name, Path(output))
        assert len(found["losses"]) == STEPS
        print(f"{name}: loss {found['losses'][0]:.4f} -> {found['losses'][-1]:.4f}")
        lines.append(f"{json.dumps(name)}: {json.dumps(found)}")
    CURVES.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
