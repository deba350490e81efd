"""Llama's three sizes on four slices of TPU, by the compiler: memory, time and bytes moved of the training step.

    python experiments/pods/scale.py [--cells 8b/lora/v5e-256,...] [--table]

Each cell of the table is compiled in a process of its own and stands in scale.json as soon as it is made; a second
start goes on with the cells that are missing. `--table` writes scale.md from what is there. No TPU is needed, but
libtpu.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORD, TABLE = HERE / "scale.json", HERE / "scale.md"
GIB = 2**30
LENGTH = 2048
# (hidden, intermediate, layers, heads) of Llama 3 and 3.1; all have 8 key heads of 128 and 128,256 tokens.
SHAPES = {
    "8b": (4096, 14336, 32, 32),
    "70b": (8192, 28672, 80, 64),
    "405b": (16384, 53248, 126, 128),
}
METHODS = ("lora", "qlora", "dora", "full")
SLICES = {
    "v5e-16": "v5e:4x4",
    "v5e-256": "v5e:16x16",
    "v5p-128": "v5p:4x4x4",
    "v6e-256": "v6e:16x16",
}
# Rows of 2,048 tokens on a device and what is recomputed: the first that leaves room beside its parts is taken.
CHOICES = ((2, "dots"), (4, "full"), (2, "full"), (1, "full"))
ROOM = 0.85  # of a device's memory, for the arguments and what is kept for the backward pass
FIRST = (
    "8b/lora/v5e-256", "8b/lora/v5e-16", "405b/qlora/v5e-16", "70b/lora/v5e-256", "8b/qlora/v5e-256",
    "70b/qlora/v5e-256", "70b/lora/v5p-128", "8b/lora/v5p-128", "405b/qlora/v5e-256",
)  # fmt: skip


def names() -> list[str]:
    """Every cell, those that the goals name first."""
    every = ["/".join(cell) for cell in itertools.product(SHAPES, METHODS, SLICES)]
    return [*FIRST, *(name for name in every if name not in FIRST)]


def folder_of(shape: str) -> str:
    """A model folder with config.json alone."""
    hidden, intermediate, layers, heads = SHAPES[shape]
    settings = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False,
        "mlp_bias": False,
    }  # fmt: skip
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(settings))
    return str(folder)


def measure(name: str) -> dict[str, Any]:
    """The plan of a cell, by the largest choice that is expected to fit."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    from jaxft.configuration import load_config
    from jaxft.planning import plan
    from jaxft.planning.plan import kept_bytes
    from jaxft.planning.topology import tpu_devices

    shape, method, slice_name = name.split("/")
    target = tpu_devices(SLICES[slice_name])
    folder = folder_of(shape)
    for rows, remat in CHOICES:
        settings = {
            "model": folder, "dtype": "bfloat16", "param_dtype": "bfloat16", "mesh.data": 1, "mesh.fsdp": -1,
            "batch_size": rows * len(target.devices), "data.max_length": LENGTH, "remat": remat, "steps": 1000,
        }  # fmt: skip
        config = load_config(str(HERE.parents[1] / "configs" / f"sft.py:{method}"), settings)
        with jax.numpy_dtype_promotion("standard"):
            if (rows, remat) != CHOICES[-1] and kept_bytes(
                config, target
            ) > ROOM * target.chip.memory:
                continue
            start, made = time.perf_counter(), plan(config, target)
        cell = dataclasses.asdict(made)
        cell["seconds_in_all"] = round(time.perf_counter() - start, 1)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        cell["processor_seconds"] = round(usage.ru_utime + usage.ru_stime, 1)
        return cell
    raise AssertionError(name)


def record(cells: list[str]) -> None:
    """Compiles what is missing, one after the other, and keeps each at once."""
    for name in cells:
        known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        if name in known:
            continue
        print(name, file=sys.stderr, flush=True)
        done = subprocess.run(
            [sys.executable, __file__, "--one", name], text=True, stdout=subprocess.PIPE
        )
        if done.returncode:
            print(f"{name}: no result", file=sys.stderr, flush=True)
            continue
        known[name] = json.loads(done.stdout.splitlines()[-1])
        RECORD.write_text(json.dumps(known, indent=1) + "\n")


def table() -> list[str]:
    """Markdown: a row a cell."""
    lines = [
        "| model | method | slice | devices | rows a device | remat | base GiB | peak GiB | fits | s/step "
        "| tokens/s a device | MFU |"
        " moved GiB | compiled in s |",
        "|---" * 14 + "|",
    ]
    known = json.loads(RECORD.read_text())
    for name in sorted(known, key=names().index):
        cell, (shape, method, slice_name) = known[name], name.split("/")
        speed = (cell["tokens_per_second"] or 0) / cell["devices"]
        lines.append(
            f"| {shape} | {method} | {slice_name} | {cell['devices']} | {cell['batch_size'] // cell['devices']} |"
            f" {cell['remat']} | {cell['base_bytes'] / GIB:.2f} | {cell['peak_bytes'] / GIB:.2f} |"
            f" {'yes' if cell['fits'] else 'no'} | {cell['seconds_per_step'] or 0:.3f} | {speed:,.0f} |"
            f" {cell['mfu'] or 0:.0%} | {cell['exchanged_bytes'] / GIB:.1f} | {cell['compile_seconds']:.0f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cells", default="")
    parser.add_argument("--one", default="")
    parser.add_argument("--table", action="store_true")
    flags = parser.parse_args()
    if flags.one:
        print(json.dumps(measure(flags.one)))
    elif flags.table:
        TABLE.write_text("\n".join(table()) + "\n")
    else:
        record(flags.cells.split(",") if flags.cells else names())


if __name__ == "__main__":
    main()
