"""Memory of a DPO step beside an SFT step of the same tokens, an 8B llama on a TPU topology, by the compiler.

    python experiments/dpo_memory.py [--topology v5e:4x4] [--layers 32]

No weight is made and no TPU is needed: the steps are compiled for the topology from shapes alone (needs `libtpu`). Rows
hold 2,048 tokens, bf16, LoRA of rank 16 on all projections, weights divided among all devices (fsdp).
"""

from __future__ import annotations

import argparse
import functools
import os
from typing import Any

os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

LENGTH, ROWS, SLOTS, RANK = 2048, 16, 8, 16


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


def batch_of(mesh: Any) -> dict[str, Any]:
    """A batch of packed pairs, abstract; SFT reads the part of it that it knows."""
    import jax
    import jax.numpy as jnp

    from jaxft.training.sharding import batch_sharding

    dtypes = {"weights": jnp.float32} | dict.fromkeys(
        ("tokens", "segments", "positions", "branches", "pairs"), jnp.int32
    )
    shapes = {name: ((ROWS, LENGTH), dtype) for name, dtype in dtypes.items()}
    shapes |= dict.fromkeys(("present", "labels"), ((ROWS, SLOTS), jnp.float32))
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
        for name, (shape, dtype) in shapes.items()
    }


def laid_out(tree: Any, mesh: Any) -> Any:
    """The abstract tree with the shardings of a run."""
    import jax

    from jaxft.training.sharding import shardings

    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings(tree, mesh),
    )


def compiled(kind: str, config: Any, mesh: Any) -> Any:
    """The step of "sft", "dpo", or "dpo, precomputed", compiled."""
    import jax
    import jax.numpy as jnp

    import jaxft
    from jaxft.models.transformer import initial_params
    from jaxft.objectives import objective_of
    from jaxft.training.optimizer import make_optimizer, schedule
    from jaxft.training.reference import left_out
    from jaxft.training.step import initial_state, make_train_step
    from jaxft.tree import filled

    recipe = jaxft.load_config(f"configs/{kind.split(',')[0]}.py:lora")
    method = jaxft.methods.lora(rank=RANK)
    params = jax.eval_shape(
        lambda key: jaxft.adapt(initial_params(config, key, jnp.bfloat16), method, key),
        jax.random.key(0),
    )
    trainable, frozen = jaxft.partition(laid_out(params, mesh), method)
    optimizer = make_optimizer(recipe.optimizer, method, trainable, 100)
    refers = kind == "dpo"
    more = {"beside": lambda rest, held: (filled(left_out(rest), held),)} if refers else {}
    loss = functools.partial(objective_of(recipe.objective), config)
    step = make_train_step(loss, optimizer, schedule(recipe.optimizer, 100), seed=0, **more)
    state = laid_out(jax.eval_shape(lambda tree: initial_state(tree, optimizer), trainable), mesh)
    batch = batch_of(mesh)
    if kind == "dpo, precomputed":
        shape = (*batch["present"].shape, 2)
        batch["reference"] = jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=batch["present"].sharding
        )
    held = (left_out(trainable),) if refers else ()
    with jax.set_mesh(mesh):
        return jax.jit(step, donate_argnums=0).lower(state, frozen, batch, *held).compile()


def main() -> None:
    """Compiles and prints a table."""
    import jax
    from jax.experimental import topologies

    from jaxft.configuration import load_config
    from jaxft.training.sharding import make_mesh

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--remat", default="full")
    parser.add_argument("--steps", nargs="+", default=["sft", "dpo", "dpo, precomputed"])
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=arguments.topology).devices
    sizes = load_config("configs/sft.py:lora", {"mesh.data": 1, "mesh.fsdp": -1}).mesh
    mesh = make_mesh(sizes, devices)
    config = shape_of(arguments.layers, arguments.remat)
    print(
        f"{arguments.topology}, {arguments.layers} layers, {ROWS} rows of {LENGTH} tokens, remat {arguments.remat}"
    )
    print(
        "| step | arguments | temporary | together, MiB | x the first |\n| --- | ---: | ---: | ---: | ---: |",
        flush=True,
    )
    whole: dict[str, float] = {}
    for kind in arguments.steps:
        memory = compiled(kind, config, mesh).memory_analysis()
        held, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        added = memory.output_size_in_bytes - memory.alias_size_in_bytes
        whole[kind] = held + temporary + added
        cells = [f"{size / 2**20:,.0f}" for size in (held, temporary, whole[kind])]
        ratio = whole[kind] / next(iter(whole.values()))
        print(f"| {kind} | {' | '.join(cells)} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()
