"""Host memory at the peak of a quantized load, over a folder of random weights that this script writes.

    python experiments/quantized_loading.py [--shape 1B] [--schemes nf4,int4,int8] [--folder DIR] [--record]

The folder has shards in bfloat16, as models are published. Each load is a process of its own, whose peak resident
memory is the kernel's (VmHWM): the interpreter, JAX and the file's pages that are mapped at that moment are in it.
It must stay below the size of the quantized tree plus 2 GB. GB are 10^9 bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GB = 1e9
ALLOWED = 2 * GB
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "vocabulary": 256, "hidden": 64, "intermediate": 128, "layers": 2,
        "heads": 4, "key_heads": 2, "head_dim": 16, "max_length": 64,
    },
    "1B": {
        "vocabulary": 128256, "hidden": 2048, "intermediate": 8192, "layers": 16,
        "heads": 32, "key_heads": 8, "head_dim": 64, "max_length": 8192,
    },
    "8B": {
        "vocabulary": 128256, "hidden": 4096, "intermediate": 14336, "layers": 32,
        "heads": 32, "key_heads": 8, "head_dim": 128, "max_length": 8192,
    },
}  # fmt: skip
# The tensors of 8B, of which what is held beside the tree consists, in fewer layers.
SHAPES["8B of 4 layers"] = SHAPES["8B"] | {"layers": 4}


def write_random(folder: Path, shape: dict[str, int], shard_bytes: int = 2_000_000_000) -> int:
    """A Hugging Face folder of random weights, written tensor by tensor: how many parameters it has."""
    import math

    import jax
    import ml_dtypes
    import numpy as np

    from jaxft.formats.config_file import config_json
    from jaxft.formats.huggingface import names_of
    from jaxft.formats.safetensors import Lazy, write_folder, write_json
    from jaxft.models import Config
    from jaxft.models.families import tensors_of
    from jaxft.models.transformer import initial_params
    from jaxft.tree import flatten_with_paths

    config = Config(family="llama", tied=False, query_scale=shape["head_dim"] ** -0.5, **shape)
    abstract = jax.eval_shape(lambda: initial_params(config, jax.random.key(0)))
    kind = np.dtype(ml_dtypes.bfloat16)
    # Drawn once and repeated: what loading takes does not hang on the values.
    drawn = (0.02 * np.random.default_rng(0).standard_normal(2**22 + 1)).astype(kind)

    def lazy(size: tuple[int, ...]) -> Lazy:
        return Lazy(size, kind, lambda: np.resize(drawn, size))

    tensors = {}
    for path, leaf in flatten_with_paths(abstract):
        tensor = tensors_of(config)[path]
        size = tuple(leaf.shape[1:] if path.startswith("layers/") else leaf.shape)
        for name in names_of(tensor, config, path):
            tensors[name] = lazy(size[::-1] if tensor.transposed else size)
    write_folder(folder, tensors, {}, shard_bytes)
    write_json(folder / "config.json", config_json(config, "bfloat16"))
    return sum(math.prod(tensor.shape) for tensor in tensors.values())


def peak_bytes() -> int:
    """The most memory that this process has had resident."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("the kernel does not tell VmHWM")


def load_once(folder: str, scheme: str) -> dict[str, Any]:
    """Loads the folder and tells what it took."""
    import jax

    import jaxft
    from jaxft.tree import size_bytes

    before, began = peak_bytes(), time.perf_counter()
    _, params = jaxft.load(folder, dtype="bfloat16", quantize=scheme)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - began
    return {
        "scheme": scheme,
        "tree": size_bytes(params),
        "before": before,
        "peak": peak_bytes(),
        "seconds": round(seconds, 1),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = [
        "# Host memory of a quantized load",
        "",
        "Made by `experiments/quantized_loading.py` from random parameters in Llama shapes, bfloat16 on disk in "
        "shards; embedding, head and norms stay bfloat16. Peak resident memory of the whole process, on the CPU. "
        "Seconds are those of a busy machine of two cores.",
        "",
        "| shape | quantize | tree | peak | peak - tree | of that, before the load | must be below | seconds | |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        above = row["peak"] - row["tree"]
        said = "holds" if above < ALLOWED else "MISSED"
        lines.append(
            f"| {row['shape']}, {row['parameters'] / 1e9:.2f} B | {row['scheme']} | {row['tree'] / GB:.2f} GB "
            f"| {row['peak'] / GB:.2f} GB | {above / GB:.2f} GB | {row['before'] / GB:.2f} GB "
            f"| {ALLOWED / GB:.2f} GB | {row['seconds']} | {said} |"
        )
    return "\n".join(lines) + "\n"


def measure(folder: Path, name: str, schemes: list[str]) -> list[dict[str, Any]]:
    """Writes the folder and loads it once a scheme, in a process each."""
    parameters = write_random(folder, SHAPES[name])
    rows = []
    for scheme in schemes:
        words = [sys.executable, __file__, "--load", str(folder), "--schemes", scheme]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append({"shape": name, "parameters": parameters, **found})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def record(rows: list[dict[str, Any]]) -> None:
    """Puts the rows among those that stand beside this script, and writes all as a table."""
    file = Path(__file__).with_suffix(".json")
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    every = {(row["shape"], row["scheme"]): row for row in [*before, *rows]}
    kept = list(every.values())
    file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    Path(__file__).with_suffix(".md").write_text(table(kept), encoding="utf-8")


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="1B", choices=SHAPES)
    parser.add_argument("--schemes", default="none,nf4,int4,int8", help="what to quantize to")
    parser.add_argument("--folder", default=None, help="where to write; a temporary folder")
    parser.add_argument("--load", default="", help=argparse.SUPPRESS)
    parser.add_argument(
        "--record", action="store_true", help="put it into the table beside this script"
    )
    arguments = parser.parse_args()
    schemes = arguments.schemes.split(",")
    if arguments.load:
        print(json.dumps(load_once(arguments.load, schemes[0])))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rows = measure(Path(folder), arguments.shape, schemes)
    print(table(rows))
    if arguments.record:
        record(rows)


if __name__ == "__main__":
    main()
