"""Shapes of several families on sixteen v5e, by the compiler: whether norms and windows leave the fast paths.

    python experiments/pods/families.py [SHAPE ...] [--table]

What `jaxft plan` says of LoRA on all projections, `remat=full` or, where the shape's name says so, `remat=outputs`, the
weights divided among all devices. The
efficiency is its MFU: the products of the step without recomputation, at the device's peak, as a share of the step's
estimated time; beside it stands the share of all products, those done again too. Those of attention are counted for all
pairs of tokens, whatever the window. Both stand beside those of a llama with as many rows: of the same sizes, where it
is planned (`llama as ...`), else of 8B or 70B. Each shape is planned in a process of its own and stands in
families.json as soon as it is made; a second start goes on with those that are missing. `--table` writes families.md
from what is there. Needs the extra `tpu`, and no TPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from jaxft.planning.topology import CHIPS

HERE = Path(__file__).parent
RECORD, TABLE = HERE / "families.json", HERE / "families.md"
NOTES = """
Efficiency changes with a model's sizes and its rows more than with its family: beside a llama of its own sizes qwen3
32B loses 2 % to the norms of its queries and keys.

Under `remat=full` gemma3 12B makes again what llama does not: the last product of a layer's feed-forward, which the
norm behind it reads in the backward pass too. By the compiler's figures that is 5.7 % of its step. `remat=outputs`
keeps it, and what attention gives: there it has 0.92 of llama's efficiency. The rest are norms (four of a layer, those
of queries and keys) and copies around the attention of heads of 256, whose backward kernel takes the keys in four parts
where heads of 128 take two; 0.8 % is a copy of the head's 262,208 rows, whose own products take 3.7 %. The large
products run at 96 % of the peak in both. (To take what stands around the kernels out of the choice between windows
gained nothing.)

Windows and soft caps take the attention kernel that llama takes: it is made for each window of the layers, one of which
is chosen as the program runs. It is not taken, and attention goes by blocks of plain products, where a head's features
are no multiple of 64 (80 of stablelm 3B, 96 of phi3 mini), where the length is no multiple of 128, and behind shared
prompts. Its time is counted as that of full causal attention, whatever the window.
"""
TOPOLOGY, DEVICES = "v5e:4x4", 16
KEPT = (
    "flops",
    "seconds_per_step",
    "tokens_per_second",
    "mfu",
    "peak_bytes",
    "fits",
    "compile_seconds",
)
KEEPING = ", keeping outputs"  # remat=outputs, where others have remat=full
KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size",
)  # fmt: skip
LLAMA = (4096, 14336, 32, 32, 8, 128, 128256)
GEMMA = (3840, 15360, 48, 16, 8, 256, 262208)
QWEN = (5120, 25600, 64, 64, 8, 128, 151936)
# {shape: (model_type, the numbers of KEYS, further settings)}, as the models' own config.json have them.
SHAPES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "llama 3.1 8B": ("llama", LLAMA, {}),
    "qwen3 8B": ("qwen3", (4096, 12288, 36, 32, 8, 128, 151936), {}),
    "mistral 7B": ("mistral", (4096, 14336, 32, 32, 8, 128, 32768), {"sliding_window": None}),
    "gemma3 12B": ("gemma3_text", GEMMA, {"sliding_window": 1024}),
    f"llama 3.1 8B{KEEPING}": ("llama", LLAMA, {}),
    f"gemma3 12B{KEEPING}": ("gemma3_text", GEMMA, {"sliding_window": 1024}),
    "llama as gemma3 12B": ("llama", GEMMA, {}),
    "llama 3.1 8B, long": ("llama", LLAMA, {}),
    "mistral 7B, long, window": (
        "mistral",
        (4096, 14336, 32, 32, 8, 128, 32000),
        {"sliding_window": 4096},
    ),
    "gemma3 12B, long": ("gemma3_text", GEMMA, {"sliding_window": 1024}),
    "llama 3.1 70B": ("llama", (8192, 28672, 80, 64, 8, 128, 128256), {}),
    "qwen3 32B": ("qwen3", QWEN, {}),
    "llama as qwen3 32B": ("llama", QWEN, {}),
    "mistral 24B": ("mistral", (5120, 32768, 40, 32, 8, 128, 131072), {"sliding_window": None}),
    "gemma3 27B": (
        "gemma3_text",
        (5376, 21504, 62, 32, 16, 128, 262208),
        {"sliding_window": 1024, "query_pre_attn_scalar": 168},
    ),
    "llama as gemma3 27B": ("llama", (5376, 21504, 62, 32, 16, 128, 262208), {}),
}  # fmt: skip


def rows_of(name: str) -> tuple[int, int]:
    """(rows of a device, their length)."""
    if name.endswith(("long", "window")):
        return 1, 8192
    return (1 if _before(name) == "llama 3.1 70B" else 2), 2048


def remat_of(name: str) -> str:
    """What the backward pass computes again: all, but where the shape's name says what it keeps."""
    return "outputs" if name.endswith(KEEPING) else "full"


def beside(name: str) -> str:
    """The shape of llama that another is compared with, of as many rows as long."""
    own, kept = f"llama as {name}", KEEPING if name.endswith(KEEPING) else ""
    return name if name.startswith("llama") else own if own in SHAPES else _before(name) + kept


def _before(name: str) -> str:
    """The last of llama's own shapes up to this one, which computes all again."""
    names = list(SHAPES)
    names = names[: names.index(name) + 1]
    return [one for one in names if one.startswith("llama 3.1") and not one.endswith(KEEPING)][-1]


def planned(name: str) -> dict[str, Any]:
    """What `jaxft plan` says of a shape."""
    kind, numbers, more = SHAPES[name]
    rows, length = rows_of(name)
    architecture = {"gemma3_text": "Gemma3ForCausalLM"}.get(kind, f"{kind.capitalize()}ForCausalLM")
    raw = {
        **dict(zip(KEYS, numbers, strict=True)),
        "model_type": kind,
        "architectures": [architecture],
        "max_position_embeddings": 32768,
        "tie_word_embeddings": kind == "gemma3_text",
        **more,
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(raw))
        recipe = HERE.parents[1] / "configs" / "sft.py"
        command = [
            sys.executable, "-m", "jaxft", "plan", "--config", f"{recipe}:lora", "--topology", TOPOLOGY, "--json",
            f"--config.model={folder}", f"--config.batch_size={rows * DEVICES}", f"--config.data.max_length={length}",
            f"--config.remat={remat_of(name)}", "--config.mesh.data=1", f"--config.mesh.fsdp={DEVICES}",
            "--config.steps=1000", "--config.dtype=bfloat16", "--config.param_dtype=bfloat16",
        ]  # fmt: skip
        made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        sys.exit(f"{name}: {made.stderr.strip().splitlines()[-1]}")
    found = json.loads(made.stdout)
    versions = {package: importlib.metadata.version(package) for package in ("jax", "libtpu")}
    return {key: found[key] for key in KEPT} | versions


def all_products(row: dict[str, Any]) -> float:
    """As the MFU, with the products that are done again."""
    return row["flops"] / (row["seconds_per_step"] * CHIPS["v5e"].flops)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """families.md."""
    versions = {f"jax {row['jax']}, libtpu {row['libtpu']}" for row in rows.values()}
    lines = [
        "# Families on a slice of sixteen v5e",
        "",
        f"Made by `experiments/pods/families.py`, which says what was planned, with {'; '.join(sorted(versions))}.",
        "",
        "| shape | rows a device | MFU | of llama's | all products | of llama's | memory a device, GiB | step, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        count, length = rows_of(name)
        llama = rows.get(beside(name)) or rows.get(_before(name))
        figures = []
        for efficiency in (lambda row: row["mfu"], all_products):
            figures.append(f"{efficiency(row):.1%}")
            figures.append(f"{efficiency(row) / efficiency(llama):.2f}" if llama else "")
        lines.append(
            f"| {name} | {count} x {length:,} | {' | '.join(figures)} |"
            f" {row['peak_bytes'] / 2**30:.2f} | {row['seconds_per_step']:.2f} |"
        )
    return "\n".join(lines) + "\n" + NOTES


def main() -> None:
    """Plans the shapes that are missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shapes", nargs="*", metavar="SHAPE")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    rows = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for name in () if given.table else given.shapes or SHAPES:
        if name not in rows:
            rows[name] = planned(name)
            RECORD.write_text(json.dumps(rows, indent=1) + "\n")
            print(name, rows[name], flush=True)
    TABLE.write_text(table({name: rows[name] for name in SHAPES if name in rows}))


if __name__ == "__main__":
    main()
