"""What PEFT's `add_weighted_adapter` makes of adapters of adapters/: combined.npz.

By case: `CASE/MODULE/a` (in, rank) and `CASE/MODULE/b` (rank, out), float32, which PEFT takes times its scale, and
`CASE/MODULE/keep/N`, the booleans that its random pruning drew in order, packed, of which combined.json has the
shapes. That file also has each case's adapters, weights and options, and PEFT's scale of the result where it is not 1.

    python tests/golden/make_combined.py
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
TWO, RANKS = ["head", "rslora"], ["patterns", "embedding"]
HALF = {"density": 0.5}
CASES: dict[str, tuple[list[str], list[float], dict[str, Any]]] = {
    "linear": (TWO, [0.7, -0.4], {}),
    "cat": (TWO, [0.7, -0.4], {}),
    "svd": (TWO, [0.7, -0.4], {}),
    "ties": (TWO, [0.7, 0.4], HALF),
    "ties_negative": (TWO, [0.7, -0.4], {"density": 0.3}),
    "ties_frequency": (["head", "rslora", "embedding"], [1.0, 0.5, 2.0], {**HALF, "majority": "frequency"}),
    "ties_svd": (TWO, [0.7, -0.4], HALF),
    "dare_linear": (TWO, [0.7, -0.4], HALF),
    "dare_linear_svd": (TWO, [0.7, -0.4], HALF),
    "dare_ties": (TWO, [0.7, -0.4], HALF),
    "dare_ties_svd": (TWO, [0.7, -0.4], HALF),
    "magnitude_prune": (TWO, [0.7, -0.4], HALF),
    "magnitude_prune_svd": (TWO, [0.7, -0.4], {"density": 0.4, "rank": 3}),
    "cat_ranks": (RANKS, [1.0, 0.5], {}),
    "svd_ranks": (RANKS, [1.0, 0.5], {"rank": 3}),
    "rslora_first": (TWO[::-1], [1.0, 1.0], {}),
}  # fmt: skip
WAYS = {"rslora_first": "linear"}


def way_of(case: str) -> str:
    return WAYS.get(
        case, case.removesuffix("_negative").removesuffix("_frequency").removesuffix("_ranks")
    )


def combine(case: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The case's arrays, and what combined.json says of it."""
    adapters, weights, options = CASES[case]
    base = AutoModelForCausalLM.from_pretrained(HERE / "models/llama", dtype="float32")
    model = PeftModel.from_pretrained(base, HERE / "adapters" / adapters[0], adapter_name="0")
    for number, name in enumerate(adapters[1:], start=1):
        model.load_adapter(HERE / "adapters" / name, adapter_name=str(number))
    drawn: list[np.ndarray] = []
    bernoulli = torch.bernoulli

    def draw(rates: torch.Tensor) -> torch.Tensor:
        kept = bernoulli(rates)
        drawn.append(kept.bool().numpy())
        return kept

    torch.manual_seed(0)
    renamed = {"majority": "majority_sign_method", "rank": "svd_rank"}
    with mock.patch.object(torch, "bernoulli", draw):
        model.add_weighted_adapter(
            [str(number) for number in range(len(adapters))],
            weights,
            "one",
            combination_type=way_of(case),
            **{renamed.get(key, key): value for key, value in options.items()},
        )
    about = {"adapters": adapters, "weights": weights, "combine": way_of(case), **options}
    return arrays_of(case, model, drawn, about), about


def arrays_of(
    case: str, model: PeftModel, drawn: list[np.ndarray], about: dict[str, Any]
) -> dict[str, np.ndarray]:
    made: dict[str, np.ndarray] = {}
    scales = set()
    for name, module in model.named_modules():
        own = getattr(module, "lora_A", {}), getattr(module, "lora_embedding_A", {})
        if not any("one" in one for one in own):
            continue
        name = name.removeprefix("base_model.model.")
        if "one" in own[0]:
            a, b = module.lora_A["one"].weight, module.lora_B["one"].weight
        else:
            a, b = module.lora_embedding_A["one"], module.lora_embedding_B["one"]
        made[f"{case}/{name}/a"], made[f"{case}/{name}/b"] = (
            part.detach().numpy().T for part in (a, b)
        )
        scales.add(module.scaling["one"])
        if "dare" in about["combine"]:
            having = sum(str(n) in own[0] for n in range(len(about["adapters"])))
            count = having if about["combine"].endswith("svd") else 2 * having
            masks, drawn[:] = drawn[:count], drawn[count:]
            for number, mask in enumerate(masks):
                made[f"{case}/{name}/keep/{number}"] = np.packbits(mask.T)
    assert not drawn, case
    about["scale"] = scales.pop()
    assert not scales, case
    return made


def main() -> None:
    warnings.simplefilter("ignore")
    arrays: dict[str, np.ndarray] = {}
    told = {}
    for case in CASES:
        made, told[case] = combine(case)
        arrays |= made
    np.savez_compressed(HERE / "combined.npz", **arrays)
    (HERE / "combined.json").write_text(json.dumps(told, indent=1) + "\n")
    print(f"{len(arrays)} arrays, {(HERE / 'combined.npz').stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
