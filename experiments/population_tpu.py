"""What K LoRA members over Llama 3.1's 8B need together on a slice of TPUs, beside one run, by the TPU compiler.

    python experiments/population_tpu.py [--members 1 2] [--rows 16] [--topology v5e:4x4] [--record]

Each is compiled in a process of its own, from shapes alone (libtpu, no TPU): LoRA of rank 16 on all projections,
bfloat16, `remat=full`, so many packed rows of 2,048 tokens a member and update, the base sharded over all chips. The
seconds are the compiler's estimate, as `jaxft plan` tells them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STEPS = 100


def measure(members: int, rows: int, topology: str) -> dict[str, Any]:
    """Memory and estimated seconds of an update of so many runs, in this process."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_platforms", "cpu")
    sys.path.insert(0, str(HERE / "pods"))
    folder = importlib.import_module("scale").folder_of("8b")

    from jaxft.configuration import load_config
    from jaxft.kernels.compiler_options import compiler_options
    from jaxft.planning.topology import tpu_devices
    from jaxft.training.program import make_program, own_of
    from jaxft.training.sharding import laid_out, shardings
    from jaxft.training.stacked import Shared, common_standing
    from jaxft.training.standing import Standing

    planning = importlib.import_module("jaxft.planning.plan")
    target = tpu_devices(topology)
    settings = {
        "model": folder, "dtype": "bfloat16", "param_dtype": "bfloat16", "data.packing": True, "data.max_length": 2048,
        "batch_size": rows, "remat": "full", "mesh.data": 1, "mesh.fsdp": -1, "steps": STEPS,
    }  # fmt: skip
    config = load_config(str(HERE.parent / "configs" / "sft.py:lora"), settings)
    config, mesh, model = planning._settled(config, target)

    def stacked(tree: Any) -> Any:
        big = lambda x: jax.ShapeDtypeStruct((members, *x.shape), x.dtype)  # noqa: E731
        tree = jax.tree.map(big, tree)
        return laid_out(tree, shardings(tree, mesh))

    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        traced = planning._trace(config, model, mesh)
        if members == 1:
            placed = jax.tree.map(lambda leaf: leaf.sharding, traced.state)
            jitted = jax.jit(traced.update, donate_argnums=0, out_shardings=(placed, None))
            own: tuple[Any, ...] = (traced.state, traced.drawn)
            lowered = jitted.lower(*traced.arguments)
        else:
            method = planning.abstract_params(config, model, mesh)[0]
            trainable, reference = traced.state.trainable, traced.reference
            program = make_program(config, model, method, trainable, reference, STEPS)
            standing = Standing(traced.state, traced.frozen, ())
            like = common_standing([standing], method, program.initial)
            alike = (config, model, method, reference, False, traced.base, like, STEPS, mesh, ())
            own = (stacked(like.state), stacked(traced.drawn))
            numbers = jax.eval_shape(
                lambda: jax.tree.map(lambda x: jnp.stack([x] * members), own_of(config, STEPS))
            )
            batches = [traced.batch] * members
            update: Any = Shared(*alike).update()
            lowered = update.lower(*own, traced.base, batches, numbers)
        held = sum(planning._bytes(tree) for tree in (*own, traced.base))
        options = compiler_options(mesh)
        peak, temporary, _, compiled = planning._compiled(lowered, held, target, options)
        flops = planning._flops(traced, mesh) * members
    seconds = planning._seconds(target, compiled, flops, config.dtype) if compiled else None
    return {
        "members": members,
        "peak": peak,
        "arguments": held,
        "temporary": temporary,
        "seconds": seconds,
        "exchanged": sum(compiled.exchanged.values()) if compiled else None,
    }


def table(found: list[dict[str, Any]], topology: str, rows: int) -> str:
    """The page."""
    lines = [
        "| members | fits | peak, GiB | arguments, GiB | temporaries, GiB | update, s | of K alone | exchanged, GiB |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    alone = next((one["seconds"] for one in found if one["members"] == 1), None)
    for one in found:
        sizes = " | ".join(
            f"{one[name] / 2**30:.2f}" for name in ("peak", "arguments", "temporary")
        )
        told = "no | " + sizes + " | | |"
        if one["seconds"]:
            ratio = f"{one['seconds'] / (alone * one['members']):.2f}" if alone else ""
            told = (
                f"yes | {sizes} | {one['seconds']:.3f} | {ratio} | {one['exchanged'] / 2**30:.1f}"
            )
        lines.append(f"| {one['members']} | {told} |")
    said = " ".join((__doc__ or "").split("\n\n")[2].split())
    tail = f"{rows} rows a member, {topology}, figures of one chip; `python experiments/population_tpu.py --record`."
    return (
        f"# Runs trained together, on a slice of TPUs\n\n{said}\n\n"
        + "\n".join(lines)
        + f"\n\n{tail}\n"
    )


def main() -> None:
    """Measures, prints the page and, asked to, writes it beside this script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--record", action="store_true", help="write population_tpu.md")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        print(json.dumps(measure(given.one, given.rows, given.topology)))
        return
    found = []
    for members in given.members:
        words = [sys.executable, __file__, "--one", str(members)]
        words += ["--rows", str(given.rows), "--topology", given.topology]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    page = table(found, given.topology, given.rows)
    print(page)
    if given.record:
        (HERE / "population_tpu.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
