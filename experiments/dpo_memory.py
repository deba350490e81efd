"""Memory of a DPO step beside an SFT step of the same tokens, an 8B llama on a TPU topology, by the compiler.

    python experiments/dpo_memory.py [--topology v5e:4x4] [--layers 32] [--record]

No weight is made and no TPU is needed: the steps are compiled for the topology from shapes alone (needs `libtpu`). Rows
hold 2,048 tokens, bf16, LoRA of rank 16 on all projections, weights divided among all devices (fsdp).
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

LENGTH, ROWS, RANK, GOAL = 2048, 16, 16, 1.1


def shape_of(layers: int, remat: str) -> Any:
    """Llama 3's 8B."""
    from jaxft.models import Config

    sizes = {"vocabulary": 128256, "hidden": 4096, "intermediate": 14336, "layers": layers}
    heads = {"heads": 32, "key_heads": 8, "head_dim": 128, "query_scale": 128**-0.5}
    return Config(
        family="llama",
        max_length=8192,
        rope_theta=5e5,
        dtype="bfloat16",
        remat=remat,
        **sizes,
        **heads,
    )


def compiled(kind: str, model: Any, mesh: Any) -> Any:
    """The step of "sft", "dpo", or "dpo, precomputed", compiled for batches of the same tokens."""
    import jax
    import jax.numpy as jnp

    import jaxft
    from jaxft.models.transformer import initial_params
    from jaxft.objectives import objective_of
    from jaxft.training.precompute import beforehand, without
    from jaxft.training.program import make_program, own_of
    from jaxft.training.reference import make_reference
    from jaxft.training.sharding import batch_sharding, laid_out, shardings

    name, *known = kind.split(", ")
    settings = {"batch_size": ROWS, "data.packing": True}
    if known:
        settings["objective.precompute"] = True
    config = jaxft.load_config(f"configs/{name}.py:lora", settings)
    method = jaxft.methods.lora(rank=RANK)

    def fresh() -> Any:
        key = jax.random.key(0)
        return jaxft.adapt(initial_params(model, key, jnp.bfloat16), method, key)

    shapes = jax.eval_shape(fresh)
    params = laid_out(shapes, shardings(shapes, mesh))
    with jax.set_mesh(mesh):
        trainable, frozen = jaxft.partition(params, method)
        reference = make_reference(config, model, trainable, mesh)
        if beforehand(config):
            reference = without(reference)
        program = make_program(config, model, method, trainable, reference, 100)
        state = jax.eval_shape(program.initial, trainable)
        state = laid_out(state, shardings(state, mesh))
        shapes = objective_of(config).examples.shapes
        batch = shapes(config, LENGTH if name == "sft" else LENGTH // 2)
        batch = laid_out(batch, dict.fromkeys(batch, batch_sharding(mesh)))
        own = jax.eval_shape(functools.partial(own_of, config, 100))
        update = jax.jit(program.update, donate_argnums=0)
        return update.lower(state, frozen, batch, own, *reference.held).compile()


def table(arguments: argparse.Namespace) -> list[str]:
    """A line a step, as Markdown."""
    import jax
    from jax.experimental import topologies

    from jaxft.configuration import load_config
    from jaxft.training.sharding import make_mesh

    jax.config.update("jax_platforms", "cpu")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=arguments.topology).devices
    sizes = load_config("configs/sft.py:lora", {"mesh.data": 1, "mesh.fsdp": -1}).mesh
    mesh = make_mesh(sizes, devices)
    model = shape_of(arguments.layers, arguments.remat)
    lines = [
        f"{arguments.topology}, {arguments.layers} layers, {ROWS} rows of {LENGTH} tokens, LoRA of rank {RANK}, "
        f"bfloat16, remat {arguments.remat}; MiB of one device.",
        "",
        "| step | arguments | temporary | peak | x the first |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    whole: dict[str, float] = {}
    for kind in arguments.steps:
        print(f"compiling {kind}", file=sys.stderr)
        memory = compiled(kind, model, mesh).memory_analysis()
        held, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        added = memory.output_size_in_bytes - memory.alias_size_in_bytes
        whole[kind] = held + temporary + added
        cells = [f"{size / 2**20:,.0f}" for size in (held, temporary, whole[kind])]
        ratio = whole[kind] / next(iter(whole.values()))
        lines.append(f"| {kind} | {' | '.join(cells)} | {ratio:.3f} |")
        print(lines[-1], file=sys.stderr)
    if {"sft", "dpo"} <= whole.keys():
        ratio = whole["dpo"] / whole["sft"]
        said = "reached" if ratio <= GOAL else "MISSED"
        lines += ["", f"- {said}: peak of dpo, x sft: {ratio:.3f} (goal <= {GOAL})"]
    return lines


def main() -> None:
    """Compiles, prints a table, and with --record writes dpo_memory.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--remat", default="full")
    parser.add_argument("--steps", nargs="+", default=["sft", "dpo", "dpo, precomputed"])
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    lines = table(arguments)
    print("\n".join(lines))
    if arguments.record:
        made = "Made by `experiments/dpo_memory.py`; no TPU was needed. A row holds packed sequences, or pairs."
        title = [
            "# Memory of a DPO step beside an SFT step of the same tokens, by the TPU's compiler",
            "",
            made,
            "",
        ]
        target = Path(__file__).with_suffix(".md")
        target.write_text("\n".join([*title, *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
