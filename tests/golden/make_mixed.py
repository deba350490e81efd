"""What PEFT says to a batch whose rows have different adapters (`adapter_names`): adapters/mixed.npz.

adapter_names (rows,), input_ids (rows, length) int32, no padding, and logits (rows, length, vocabulary) float32 of the
base models/llama with these folders of adapters/ side by side. "__base__" is PEFT's name for no adapter. It mixes
adapters of LoRA alone; what it says to the others one by one stands in their own folders.

    python tests/golden/make_adapters.py && python tests/golden/make_mixed.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
ADAPTERS = HERE / "adapters"
ROWS = ("lora", "__base__", "patterns", "rslora", "layers", "lora", "head", "embedding")


@torch.no_grad()
def main() -> None:
    base = AutoModelForCausalLM.from_pretrained(
        HERE / "models" / "llama", attn_implementation="eager", dtype="float32"
    )
    names = list(dict.fromkeys(name for name in ROWS if name != "__base__"))
    model = PeftModel.from_pretrained(base, ADAPTERS / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(ADAPTERS / name, adapter_name=name)
    model.eval()
    ids = np.random.default_rng(0).integers(3, base.config.vocab_size, (len(ROWS), 8))
    logits = model(input_ids=torch.from_numpy(ids), adapter_names=list(ROWS)).logits
    np.savez_compressed(
        ADAPTERS / "mixed.npz",
        adapter_names=np.asarray(ROWS),
        input_ids=ids.astype(np.int32),
        logits=logits.numpy(),
    )


if __name__ == "__main__":
    main()
