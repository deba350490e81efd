"""What bitsandbytes (0.50.2, on the CPU) makes of a few weights: quantized.npz.

For each weight NAME, float32 (out, in), with blocks of zeros and of middles between codes, and each SCHEME:

    NAME_SCHEME_codes, _absmax, _dense              blocks of 64
    NAME_SCHEME_dq_absmax, _nested, _mean, _dense   the same with double quantization

The widths avoid those that are a multiple of 16 and not of the block: there its CPU kernel dequantizes wrongly.

    python tests/weights/golden/make_quantized.py
"""

from __future__ import annotations

from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import torch

SHAPES = {
    "even": (96, 256),
    "ties": (40, 192),
    "flat": (7, 40),
    "odd": (5, 33),
    "halves": (16, 704),
}


def weight(name: str) -> torch.Tensor:
    """Normal rows of different sizes, a block of zeros, and the middles between codes."""
    rows, columns = SHAPES[name]
    made = torch.randn(rows, columns) * torch.rand(rows, 1) * 0.1
    made[0, : min(64, columns)] = 0.0
    if name == "ties":
        table = bnb.get_4bit_type("nf4", device="cpu")
        made[1, :15] = table[1:] + table[:-1]
        made[1, 15] = 2.0
        made[2, :64] = 1.0
    return made


def main() -> None:
    torch.manual_seed(0)
    found = {"dynamic": bnb.create_dynamic_map().numpy()}
    for name in SHAPES:
        made = weight(name)
        found[name] = made.numpy()
        for scheme in ("nf4", "fp4"):
            for double in (False, True):
                codes, state = bnb.quantize_4bit(
                    made, blocksize=64, quant_type=scheme, compress_statistics=double
                )
                key = f"{name}_{scheme}_dq" if double else f"{name}_{scheme}"
                found[f"{key}_absmax"] = state.absmax.numpy()
                found[f"{key}_dense"] = bnb.dequantize_4bit(codes, state).numpy()
                if double:
                    found[f"{key}_nested"] = state.state2.absmax.numpy()
                    found[f"{key}_mean"] = state.offset.numpy()
                else:
                    found[f"{key}_codes"] = codes.numpy()
    np.savez_compressed(Path(__file__).with_name("quantized.npz"), **found)


if __name__ == "__main__":
    main()
