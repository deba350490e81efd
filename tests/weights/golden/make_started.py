"""Where PEFT (0.21.2) lets LoRA begin by PiSSA and LoftQ, and bitsandbytes' codes under it: started.npz.

For one weight, float32 (out, in), in blocks of 64, alpha = rank so that the scale is 1 (PEFT's LoftQ leaves it out):

    weight
    pissa_change, pissa_rest             s B A and W - s B A (out, in)
    pissa_scaled_change                  the same under a scale of 2
    loftq_T_base, loftq_T_change         the dequantized nf4 base and B A after T = 1, 3 iterations

PEFT's LoftQ asks for an accelerator by name; here the same code is run with the CPU's.

    python tests/weights/golden/make_started.py
"""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import loftq_utils

RANK = 6


def pissa(weight: torch.Tensor, alpha: float) -> dict[str, np.ndarray]:
    model = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    model[0].weight.data = weight.clone()
    config = LoraConfig(r=RANK, lora_alpha=alpha, target_modules=["0"], init_lora_weights="pissa")
    layer = get_peft_model(model, config).base_model.model[0]
    change = layer.get_delta_weight("default").detach().numpy()
    return {"change": change, "rest": layer.base_layer.weight.detach().numpy()}


def loftq(weight: torch.Tensor, iterations: int) -> dict[str, np.ndarray]:
    source = inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', '"cpu"')
    scope = dict(vars(loftq_utils))
    exec(source, scope)
    base, a, b = scope["loftq_init"](weight, num_bits=4, reduced_rank=RANK, num_iter=iterations)
    return {"base": base.numpy(), "change": (b @ a).numpy()}


def main() -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 128) * torch.logspace(0, -1, 48)[:, None] * 0.1
    found = {"weight": weight.numpy()}
    found |= {f"pissa_{name}": value for name, value in pissa(weight, RANK).items()}
    found["pissa_scaled_change"] = pissa(weight, 2 * RANK)["change"]
    for iterations in (1, 3):
        made = loftq(weight, iterations)
        found |= {f"loftq_{iterations}_{name}": value for name, value in made.items()}
    np.savez_compressed(Path(__file__).with_name("started.npz"), **found)


if __name__ == "__main__":
    main()
