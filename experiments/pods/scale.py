"""Llama's three sizes on four slices of TPU, by the compiler: memory, time and bytes moved of the training step.

    python experiments/pods/scale.py [--cells 8b/lora/v5e-256,...] [--table]

Each cell of the table is compiled in a process of its own and stands in scale.json as soon as it is made; a second
start goes on with the cells that are missing. `--table` writes scale.md from what is there. Needs the extra `tpu`, and
no TPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import resource
import subprocess
import sys
import tempfile
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
    "v5e-32": "v5e:4x8",
    "v5e-256": "v5e:16x16",
    "v5p-128": "v5p:4x4x4",
    "v6e-256": "v6e:16x16",
}
# Rows of 2,048 tokens for each device or group of devices that shares them, and what is recomputed: the first whose
# arguments and kept activations leave room, and that then fits.
CHOICES = ((4, "none"), (4, "dots"), (2, "dots"), (4, "full"), (2, "full"), (1, "full"))
# Before these, one row where v6e's large fast memory holds its activations. What is done once for a kernel, as
# dequantizing it or its columns' norms, wants many.
FEW, ONE = ("8b/lora/v6e-256", "70b/lora/v6e-256"), (1, "none")
ROOM = 0.85  # of a device's memory, for the arguments and what is kept for the backward pass
FIRST = (
    "8b/lora/v5e-256", "8b/lora/v5e-16", "70b/lora/v5p-128", "8b/lora/v5p-128", "405b/qlora/v5e-16",
    "405b/qlora/v5e-32", "70b/lora/v5e-256", "8b/qlora/v5e-256", "70b/qlora/v5e-256", "8b/dora/v5e-256",
    "8b/full/v5e-256", "405b/qlora/v5e-256", "8b/lora/v6e-256", "70b/lora/v6e-256",
)  # fmt: skip


ABOUT = (
    "the training step of `jaxft train`, rank 16 on all projections, rows of 2,048 tokens, the first of the script's"
    " choices that fits. Memory and bytes are a device's; times are estimates, the greater of the exchange over the"
    " links and of the compiler's cycles with what is exchanged while nothing else runs; the MFU counts no"
    " recomputation. The processor's seconds are of planning the choice that fits."
)

ABOUT_V6E = (
    "v6e's products are 4.7 times as fast as v5e's, but its links, and by the compiler's own estimate a pass over an"
    " array in memory, only twice: `parts.md` says where the time goes for 8B."
)


def mesh_of(name: str) -> dict[str, int]:
    """How a cell's slice is divided: four devices share each row of the largest shape, and of 70B where there are few.

    The TPU compiler gathers over all three axes of a torus by adding up padded copies, so that a slice of v5p is
    divided into four that each hold the weights.
    """
    shape, _, slice_name = name.split("/")
    tensor = 4 if shape == "405b" or (shape == "70b" and name in FEW) else 1
    data = 4 if slice_name.startswith("v5p") and tensor == 1 else 1
    return {"mesh.data": data, "mesh.fsdp": -1, "mesh.tensor": tensor}


def names() -> list[str]:
    """Every cell, those that the goals name first."""
    slices = [name for name in SLICES if name != "v5e-32"]  # for the one cell that asks for it
    every = ["/".join(cell) for cell in itertools.product(SHAPES, METHODS, slices)]
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
    """The plan of a cell, by the largest choice that fits; by the least where none does."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    from jaxft.configuration import load_config
    from jaxft.planning import plan
    from jaxft.planning.plan import kept_bytes
    from jaxft.planning.topology import tpu_devices

    shape, method, slice_name = name.split("/")
    target, mesh = tpu_devices(SLICES[slice_name]), mesh_of(name)
    folder = folder_of(shape)
    for rows, remat in (ONE, *CHOICES) if name in FEW else CHOICES:
        settings = mesh | {
            "model": folder, "dtype": "bfloat16", "param_dtype": "bfloat16", "data.max_length": LENGTH, "steps": 1000,
            "batch_size": rows * len(target.devices) // mesh["mesh.tensor"], "remat": remat,
        }  # fmt: skip
        config = load_config(str(HERE.parents[1] / "configs" / f"sft.py:{method}"), settings)
        least = (rows, remat) == CHOICES[-1]
        before = processor_seconds()
        with jax.numpy_dtype_promotion("standard"):
            kept = kept_bytes(config, target)
            if kept > (1.0 if least else ROOM) * target.chip.memory:
                cell = {"fits": False, "peak_bytes": kept}  # and more: the program is not compiled
                continue
            made = plan(config, target)
        cell = dataclasses.asdict(made)
        if made.fits:
            break
    return cell | {
        "devices": len(target.devices),
        "batch_size": config.batch_size,
        "remat": config.remat,
        "mesh": mesh,
        "processor_seconds": round(processor_seconds() - before, 1),
        **{name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
    }


def processor_seconds() -> float:
    """That this process has used so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def known() -> dict[str, Any]:
    """The cells that were made."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def record(cells: list[str]) -> None:
    """Compiles what is missing, one after the other, and keeps each at once: several may do so beside each other."""
    for name in cells:
        if name in known():
            continue
        print(name, file=sys.stderr, flush=True)
        done = subprocess.run(
            [sys.executable, __file__, "--one", name], text=True, stdout=subprocess.PIPE
        )
        if done.returncode:
            print(f"{name}: no result", file=sys.stderr, flush=True)
            continue
        cell = json.loads(done.stdout.splitlines()[-1])
        RECORD.write_text(json.dumps(known() | {name: cell}, indent=1) + "\n")


def table() -> list[str]:
    """Markdown: a row a cell, and what the goals ask."""
    cells = known()
    versions = {f"jax {cell['jax']} with libtpu {cell['libtpu']}" for cell in cells.values()}
    lines = [
        "# Llama on slices of TPU, by the compiler",
        "",
        f"Made by `experiments/pods/scale.py` ({', '.join(sorted(versions))}): {ABOUT}",
        "",
        "| model | method | slice | devices | mesh | rows | remat | base GiB | peak GiB | fits | s/step |"
        " tokens/s a device | MFU | moved GiB | processor s |",
        "|---" * 15 + "|",
    ]
    for name in sorted(cells, key=names().index):
        cell, (shape, method, slice_name) = cells[name], name.split("/")
        data, tensor = cell["mesh"]["mesh.data"], cell["mesh"]["mesh.tensor"]
        sizes = {"data": data, "fsdp": cell["devices"] // data // tensor, "tensor": tensor}
        mesh = " ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1)
        begin = f"| {shape} | {method} | {slice_name} | {cell['devices']} | {mesh} |"
        if not cell["fits"]:
            lines.append(f"{begin} | | | over {cell['peak_bytes'] / GIB:.1f} | no | | | | | |")
            continue
        lines.append(
            f"{begin} {cell['batch_size']} | {cell['remat']} | {cell['base_bytes'] / GIB:.2f} |"
            f" {cell['peak_bytes'] / GIB:.2f} | yes | {cell['seconds_per_step']:.3f} |"
            f" {cell['tokens_per_second'] / cell['devices']:,.0f} | {cell['mfu']:.0%} |"
            f" {cell['exchanged_bytes'] / GIB:.1f} | {cell['processor_seconds']:.0f} |"
        )
    return [*lines, "", *weak_scaling(cells), "", ABOUT_V6E]


def weak_scaling(cells: dict[str, Any]) -> list[str]:
    """What a chip of 16 keeps of its speed among 256 that share the weights, with as many rows for each."""
    said, cells = [], {name: cell for name, cell in cells.items() if cell["fits"]}
    for few in (name for name in names() if name.endswith("/v5e-16")):
        many = few.replace("v5e-16", "v5e-256")
        if few not in cells or many not in cells or cells[few]["remat"] != cells[many]["remat"]:
            continue
        if cells[few]["batch_size"] * 16 == cells[many]["batch_size"]:
            speeds = [
                cells[name]["tokens_per_second"] / cells[name]["devices"] for name in (few, many)
            ]
            said.append(
                f"- {few[:-7]}: a chip of 256 has {speeds[1] / speeds[0]:.0%} of the speed of one of 16."
            )
    return said


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
