"""The error that Qwix (0.1.8) and torchao (0.18.0) leave in int4 and int8: integers.json, a library's part at a time.

For each kernel NAME (`kernel` makes it), the mean squared error under "LIBRARY MAPPING bits group", groups along the
input axis; a group of 0 is a whole column. Run it with each of the two libraries at hand:

    python tests/weights/golden/make_integers.py qwix
    python tests/weights/golden/make_integers.py torchao
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

TARGET = Path(__file__).parent / "integers.json"
NAMES = ("normal", "heavy", "shifted")
ROWS, COLUMNS = 256, 48


def kernel(name: str) -> np.ndarray:
    """float32 (in, out): normal numbers, numbers with large outliers, or numbers that are not centred."""
    draw = np.random.RandomState(NAMES.index(name))
    x = draw.standard_t(3, (ROWS, COLUMNS)) if name == "heavy" else draw.randn(ROWS, COLUMNS)
    return (0.05 * (x + 1.5 if name == "shifted" else x)).astype(np.float32)


def qwix(x: np.ndarray, bits: int, group: int) -> Iterator[tuple[str, np.ndarray]]:
    import jax.numpy as jnp
    from qwix import dequantize, quantize

    for mapping, method in (("symmetric", "absmax"), ("asymmetric", "minmax")):
        codes = quantize(
            jnp.asarray(x), jnp.int4 if bits == 4 else jnp.int8, channelwise_axes=(1,),
            tiled_axes={0: group}, calibration_method=method,
        )  # fmt: skip
        yield mapping, np.asarray(dequantize(codes))


def torchao(x: np.ndarray, bits: int, group: int) -> Iterator[tuple[str, np.ndarray]]:
    import torch
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    weight, block = torch.from_numpy(np.ascontiguousarray(x.T)), (1, group)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for mapping in MappingType:
        scale, zero = choose_qparams_affine(weight, mapping, block, torch.int8, low, high)
        codes = quantize_affine(weight, block, scale, zero, torch.int8, low, high)
        dense = dequantize_affine(codes, block, scale, zero, torch.int8, low, high)
        yield mapping.name.lower(), dense.numpy().T


def main() -> None:
    """Replaces the library's entries in integers.json."""
    library = sys.argv[1]
    found = json.loads(TARGET.read_text(encoding="ascii")) if TARGET.exists() else {}
    for name in NAMES:
        x = kernel(name)
        kept = {key: value for key, value in found.get(name, {}).items() if library not in key}
        for bits in (4, 8):
            for group in (32, 64, 128, 0):
                for mapping, dense in globals()[library](x, bits, group or ROWS):
                    error = np.mean(np.square(dense.astype(np.float64) - x))
                    kept[f"{library} {mapping} {bits} {group}"] = float(f"{error:.7g}")
        found[name] = dict(sorted(kept.items()))
    TARGET.write_text(json.dumps(found, indent=1) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
