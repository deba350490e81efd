"""Kernels that compressed-tensors itself packed in activation order, and what it computes of them: indexed/.

model.safetensors holds of each kernel NAME (4 and 8 bits, symmetric and not) the tensors of its "pack-quantized" form,
`NAME.weight_g_idx` among them, and expected.npz its value as the library dequantizes it, NAME (out, in) float32. The
version has to be an older one (made with 0.10.2): the present one, 0.20, knows no weight_g_idx.

    python tests/golden/make_indexed.py
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "indexed"
SIZE, SHAPE = 16, (24, 64)  # rows of a group; (out, in)
KERNELS = {
    f"{bits}bit_{'symmetric' if symmetric else 'offset'}": (bits, symmetric)
    for bits in (4, 8)
    for symmetric in (True, False)
}


def packed(bits: int, symmetric: bool, seed: int) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """(the library's tensors, its dequantized values)."""
    args = QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy="group", group_size=SIZE, actorder="group"
    )
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(SHAPE, generator=generator) + 0.3
    index = (torch.arange(SHAPE[1]) // SIZE)[torch.randperm(SHAPE[1], generator=generator)].int()
    groups = [weight[:, index == group] for group in range(SHAPE[1] // SIZE)]
    scale, zero = calculate_qparams(
        torch.stack([group.amin(1) for group in groups], 1),
        torch.stack([group.amax(1) for group in groups], 1),
        args,
    )
    made = PackedQuantizationCompressor().compress_weight(
        weight, scale, args, zero_point=zero, g_idx=index
    )
    dense = fake_quantize(weight, scale, zero, args, g_idx=index)
    return made | {"weight_scale": scale, "weight_g_idx": index}, dense.numpy()


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    expected: dict[str, np.ndarray] = {}
    for seed, (name, (bits, symmetric)) in enumerate(KERNELS.items()):
        made, expected[name] = packed(bits, symmetric, seed)
        tensors |= {f"{name}.{part}": value.contiguous() for part, value in made.items()}
    save_file(tensors, FOLDER / "model.safetensors", {"format": "pt"})
    np.savez_compressed(FOLDER / "expected.npz", **expected)


if __name__ == "__main__":
    main()
