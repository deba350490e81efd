"""The folders of families.json: weights drawn by the tensors' names, so that the repository holds no weights.

families.json says of each case {"config": config.json, "tensors": {name: [the value before, *shape]}}, and
families.npz holds `tokens` (2, 24) and for each case the logits (2, 24, vocabulary) that transformers gives.
`make_families.py` writes both; `make_family_curves.py` writes family_curves.json, whose cases have an adapter besides,
and `make_gguf_families.py` gguf_families.json, whose cases say how llama.cpp writes them.
This file needs NumPy and safetensors alone: the tests use it too.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent
TABLE, LOGITS = HERE / "families.json", HERE / "families.npz"
GGUF = HERE / "gguf_families.json"
CURVES, TOKENIZER = HERE / "family_curves.json", HERE / "trl/model"
LEFT = 5  # places of padding on the left, in the padded row
FIRST = 14  # tokens of the first sequence, in the packed row


def drawn(name: str, before: float, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor in float32, of multiples of a power of two that float16 and bfloat16 hold exactly.

    The stream of PCG64 is the same in every NumPy. Norms, biases and scalars move by at most a quarter from the
    `before` that they are initialised to; kernels and embeddings have a size that tells.
    """
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape) or 1)
    uniform = (np.asarray(raw >> np.uint64(57), np.float32).reshape(shape) - 63.5) / 64
    if len(shape) < 2:
        return (before + uniform * np.float32(0.25)).astype(np.float32)
    size = 2.0 ** round(math.log2(2.2 / math.sqrt(math.prod(shape[1:]))))
    return uniform * np.float32(size)


def cases() -> dict[str, dict[str, Any]]:
    """{name: {"config": ..., "tensors": ...}}."""
    return json.loads(TABLE.read_text())


def write_folder(case: dict[str, Any], folder: Path) -> Path:
    """Writes config.json and model.safetensors of a case; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(case["config"], indent=2) + "\n")
    tensors = {
        name: drawn(name, before, tuple(shape))
        for name, (before, *shape) in case["tensors"].items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_adapter(case: dict[str, Any], folder: Path) -> Path:
    """Writes adapter_config.json and adapter_model.safetensors as training begins, lora_B zero; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(case["config"], indent=2) + "\n")
    tensors = {
        name: np.float32("lora_A" in name) * drawn(name, before, tuple(shape))
        for name, (before, *shape) in case["tensors"].items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def write_tokenizer(folder: Path) -> None:
    """Copies the tokenizer of `make_trl.py` into a model's folder."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder / name)


def rows(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """The batch of a test: both sequences whole, the second padded on the left, and both packed into one row.

    Args:
        tokens: (2, length).

    Returns:
        tokens, segments (0 where there is padding), positions, and for each place the row and place of `tokens`
        that stands there, `of` (4, length, 2), all with 4 rows.
    """
    length = tokens.shape[1]
    place = np.arange(length)
    left = np.maximum(place - LEFT, 0)
    packed = np.where(place < FIRST, place, place - FIRST)
    row = np.stack([0 * place, 0 * place + 1, 0 * place + 1, np.where(place < FIRST, 0, 1)])
    positions = np.stack([place, place, left, packed])
    segments = np.ones_like(positions)
    segments[2, :LEFT] = 0
    segments[3] = 1 + (place >= FIRST)
    of = np.stack([row, positions], axis=-1)
    return {
        "tokens": tokens[row, positions].astype(np.int32),
        "segments": segments.astype(np.int32),
        "positions": positions.astype(np.int32),
        "of": of,
    }


def deviation(logits: np.ndarray, expected: np.ndarray, batch: dict[str, np.ndarray]) -> float:
    """The largest difference where there is no padding, relative to the largest expected logit.

    Args:
        logits: (4, length, vocabulary) for the rows of `rows`, or for the first of them.
        expected: (2, length, vocabulary) for the two sequences.
        batch: of `rows`.
    """
    of, seen = batch["of"][: len(logits)], batch["segments"][: len(logits)] > 0
    wanted = expected[of[..., 0], of[..., 1]]
    return float(np.abs(logits - wanted)[seen].max() / np.abs(expected).max())
