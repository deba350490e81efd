"""llama.cpp's files of each family, read by llama.cpp, by transformers and by `jaxft import`: gguf_families.md.

    python experiments/gguf_families.py [CASE ...]

takes some minutes; with CASE its rows are printed, and no table is written. Of the tiny models of
tests/golden/gguf_families.json, in float32: the largest deviation from transformers' logits for the folder, relative to
the largest, of llama.cpp for what its own converter made of it (as that file says), of transformers' own reading of the
file, and of the folder that `jaxft import` makes of it. The file is `jaxft export`'s, whose tensors are the converter's
byte for byte (tests/formats/test_gguf_families.py). Needs the extra `reference`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "golden"))
from family_folders import GGUF, write_folder, write_tokenizer  # noqa: E402

from jaxft.formats import load  # noqa: E402
from jaxft.formats.gguf.header import read_header  # noqa: E402
from jaxft.formats.gguf.reading import import_gguf  # noqa: E402
from jaxft.formats.gguf.writing import export_gguf  # noqa: E402

TABLE = Path(__file__).with_suffix(".md")
NOTES = """
A dash: llama.cpp has windows for exaone4 of 64 layers alone, so that it has no model of that file; transformers does
not read the architecture from GGUF, and of qwen3 it does not read the heads' size. Where it deviates it leaves out what
the file says: the biases of llama, rotary scaling (qwen2, gemma3, phi3), windows and soft caps (gemma2), the parallel
block of stablelm. llama.cpp's gelu is a table of 16 bits.

Not read: gemma4 and gemma3n, whose layers differ in shape; the norms of each head of stablelm's 12B; whatever has
experts; a window in files of the architecture llama. Each is refused by name.
"""


def said(folder: Path, tokens: np.ndarray, **options: Any) -> np.ndarray:
    """transformers' logits."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **options
    ).eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens), use_cache=False).logits.numpy()


def row(name: str, case: dict[str, Any], place: Path) -> str:
    """The table's row of a case."""
    folder = write_folder(case, place / "folder")
    write_tokenizer(folder)
    tokens = np.random.Generator(np.random.PCG64(0)).integers(3, 384, (2, 24))
    expected = said(folder, tokens)
    file = export_gguf(folder, place / "a.gguf", kind="f32")
    model, params = load(import_gguf(file, place / "imported"))
    found = model.apply({"params": params}, tokens.astype(np.int32))

    def deviation(logits: Any) -> str:
        largest = np.abs(np.asarray(logits) - expected).max() / np.abs(expected).max()
        return f"{largest:.0e}" if largest else "0"

    try:
        theirs = deviation(said(place, tokens, gguf_file=file.name))
    except (ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        print(f"{name}: transformers: {str(error).splitlines()[0][:200]}", file=sys.stderr)
        theirs = "-"
    llama = "-" if case["llama"] is None else f"{case['llama']:.0e}"
    architecture = read_header(file).metadata["general.architecture"]
    return f"| {name} | {architecture} | {llama} | {theirs} | {deviation(found)} |"


def main() -> None:
    """Makes the rows and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE")
    given = parser.parse_args()
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()
    every = json.loads(GGUF.read_text())
    versions = ", ".join(
        f"{package} {importlib.metadata.version(package)}" for package in ("transformers", "gguf")
    )
    lines = [
        "# llama.cpp's files of each family",
        "",
        f"Made by `experiments/gguf_families.py`, which says what the columns are, with {versions}.",
        "",
        "| case | architecture | llama.cpp | transformers | jaxft |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for name in given.cases or every:
        with tempfile.TemporaryDirectory() as place:
            lines.append(row(name, every[name], Path(place)))
        jax.clear_caches()
        print(lines[-1], flush=True)
    if not given.cases:
        TABLE.write_text("\n".join(lines) + "\n" + NOTES)


if __name__ == "__main__":
    main()
