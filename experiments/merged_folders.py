"""How much a merged or quantized folder usually differs from what it was made of: a line for each way to store it.

    python experiments/merged_folders.py MODEL ADAPTER [BESIDE]

MODEL and ADAPTER as of `jaxft merge`; ADAPTER may be `-` for none. The text is what `jaxft merge` takes for a folder
BESIDE (default: ADAPTER): the run's own, or for any other path the English text that comes with jaxft. Beside the two
measures that it prints stands the largest deviation of the logits, relative to the largest one.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxft
from jaxft.assets import model_folder
from jaxft.formats import load, load_adapter
from jaxft.formats.measure import measure
from jaxft.formats.own_text import text_for

DTYPES = ("float32", "bfloat16", "float16")
SCHEMES = {"int8": -1, "nf4": 64, "fp4": 64}  # and how many weights share a scale


def rounded(leaf: Any, dtype: str) -> Any:
    """A leaf as it is after it was stored."""
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return leaf.astype(dtype).astype(leaf.dtype) if floating else leaf


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("adapter")
    parser.add_argument("beside", nargs="?", default="")
    given = parser.parse_args()
    folder = model_folder(given.model)
    module, params = load(folder)
    text = text_for(folder, module.config, given.beside or given.adapter)
    adapted = params if given.adapter == "-" else load_adapter(params, given.adapter)
    before, merged = measure(module, adapted, text), jaxft.merge(adapted)
    print(f"{text.name}: {len(before.choices)} tokens, loss {before.loss:.4f}")
    stored = {name: jax.tree.map(lambda leaf, d=name: rounded(leaf, d), merged) for name in DTYPES}
    for name, group in SCHEMES.items():
        stored[name] = jaxft.quantize_params(merged, name, group_size=group)
    for name, tree in stored.items():
        after = measure(module, tree, text)
        change = after.loss - before.loss
        same = 100 * (after.choices == before.choices).mean()
        logits = np.abs(after.logits - before.logits).max() / np.abs(before.logits).max()
        print(f"| {name} | {change:+.4f} | {same:.2f} % | {logits:.2g} |", flush=True)


if __name__ == "__main__":
    main()
