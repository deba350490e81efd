"""Perplexity of a base under each quantization, on held-out text: a table beside this script.

    python experiments/quantization.py --data FILE.jsonl [--model tiny] [--rows 64]

Every scheme sees the same rows, cut at 256 tokens and padded; perplexity is over the rows' real tokens. Bits are
those of the quantized projections, scales included.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

LENGTH = 256
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {"quantize": "none"},
    "int8, 64": {"quantize": "int8"},
    "nf4, 64": {"quantize": "nf4", "double_quant": False},
    "nf4, 64, double": {"quantize": "nf4"},
    "int4, 32": {"quantize": "int4", "group_size": 32},
    "int4, 64": {"quantize": "int4"},
    "int4, column": {
        "quantize": "int4",
        "group_size": -1,
    },  # 128 does not divide the 704 rows of tiny
    "fp4, 64": {"quantize": "fp4", "double_quant": False},
}


def batch_of(file: Path, model: str, rows: int) -> dict[str, Any]:
    """The first rows' texts as tokens, segments and the places that count."""
    import numpy as np

    from jaxft.assets import model_folder
    from jaxft.data import load_tokenizer

    tokenizer = load_tokenizer(model_folder(model), "")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:rows]]
    texts = [row.get("text") or row["prompt"] + row["completion"] for row in lines]
    tokens = np.zeros((len(texts), LENGTH), np.int32)
    segments = np.zeros_like(tokens)
    for place, text in enumerate(texts):
        ids = tokenizer.encode(text)[:LENGTH]
        tokens[place, : len(ids)], segments[place, : len(ids)] = ids, 1
    weights = segments.astype(np.float32)
    weights[:, 0] = 0.0
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (len(texts), 1))
    return {"tokens": tokens, "segments": segments, "positions": positions, "weights": weights}


def measure(model: str, batch: dict[str, Any], settings: dict[str, Any]) -> tuple[float, float]:
    """(bits a weight of the projections, perplexity)."""
    import jax

    import jaxft
    from jaxft.objectives import sft
    from jaxft.tree import count, size_bytes
    from jaxft.weights import materialize, quantized_in

    module, params = jaxft.load(model, **settings)
    total, tokens = jax.jit(lambda params, batch: sft(module.config, params, batch))(params, batch)
    found = [weight for _, weight in quantized_in(params)]
    held = sum(count(jax.eval_shape(materialize, weight)) for weight in found)
    bits = 8 * sum(map(size_bytes, found)) / held if found else 32.0
    return bits, math.exp(float(total) / float(tokens))


def main() -> None:
    """Measures every scheme and writes quantization.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rows", type=int, default=64)
    arguments = parser.parse_args()
    batch = batch_of(arguments.data, arguments.model, arguments.rows)
    lines = [
        "# Perplexity under quantization",
        "",
        f"Made by `experiments/quantization.py`: `{arguments.model}`, {arguments.rows} rows of "
        f"`{arguments.data.name}`, {int(batch['weights'].sum())} tokens. Embedding, head and norms stay as they are.",
        "",
        "| projections | bits a weight | perplexity |",
        "| --- | ---: | ---: |",
    ]
    for name, settings in SETTINGS.items():
        bits, perplexity = measure(arguments.model, batch, settings)
        lines.append(f"| {name} | {bits:.2f} | {perplexity:.3f} |")
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
