"""What a QLoRA step needs on one TPU, as the TPU's own compiler says: no weights are made, and no TPU is needed.

    python experiments/qlora_memory.py [--record]

Needs the package `libtpu` (extra `tpu`); its version matters, so the record keeps what each has said. Each step is
that of `jaxft train`: forward, backward, AdamW on the adapters, in bfloat16 over a base in nf4 with double
quantization, adapters and their moments in float32, remat full. The peak is the compiler's: arguments, what it
allocates beside them, and the program itself. Embedding, head and norms are bfloat16, as they are where the base is
loaded so.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Before JAX is imported: a compiler without its machine.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
}
GIB, GB = 2**30, 1e9


@dataclasses.dataclass(frozen=True)
class Case:
    """A step to compile.

    Attributes:
        name: as in the table.
        sizes: of the decoder.
        rank: of LoRA on all projections.
        length: tokens of the one row.
        limit: GB that the peak must stay below.
    """

    name: str
    sizes: dict[str, int]
    rank: int
    length: int
    limit: float


LLAMA_65B = {
    "vocabulary": 32000, "hidden": 8192, "intermediate": 22016, "layers": 80,
    "heads": 64, "key_heads": 64, "head_dim": 128, "max_length": 2048,
}  # fmt: skip
LLAMA_8B = {
    "vocabulary": 128256, "hidden": 4096, "intermediate": 14336, "layers": 32,
    "heads": 32, "key_heads": 8, "head_dim": 128, "max_length": 8192,
}  # fmt: skip
CASES = (
    Case("65B, r=64, 1 x 512", LLAMA_65B, 64, 512, 48.0),
    Case("65B, r=16, 1 x 512", LLAMA_65B, 16, 512, 40.0),
    Case("8B, r=16, 1 x 2048", LLAMA_8B, 16, 2048, 9.0),
)


def abstract_params(config: Any, rank: int, scheme: str = "nf4") -> tuple[Any, Any]:
    """(method, the adapted and quantized tree's shapes): nothing is computed."""
    import jax
    import jax.numpy as jnp

    import jaxft
    from jaxft.models.transformer import initial_params

    method = jaxft.methods.lora(rank=rank)

    def make(key: Any) -> Any:
        params = initial_params(config, key, jnp.bfloat16)
        params = jaxft.quantize_params(params, scheme) if scheme != "none" else params
        return jaxft.adapt(params, method, key)

    return method, jax.eval_shape(make, jax.random.key(0))


def compile_step(case: Case, device: Any, scheme: str = "nf4") -> Any:
    """The training step, compiled for the device, which is said to have no more memory than the case's limit."""
    import jax
    import jax.numpy as jnp

    import jaxft
    from configs.sft import optimizer
    from jaxft.models import Config
    from jaxft.objectives import sft
    from jaxft.training.optimizer import make_optimizer, schedule
    from jaxft.training.step import initial_state, make_train_step

    config = Config(
        family="llama",
        dtype="bfloat16",
        remat="full",
        query_scale=case.sizes["head_dim"] ** -0.5,
        **case.sizes,
    )
    method, params = abstract_params(config, case.rank, scheme)
    trainable, frozen = jaxft.partition(params, method)
    settings = optimizer(2e-4)
    update = make_optimizer(settings, method, trainable, steps=1000)
    step = make_train_step(functools.partial(sft, config), update, schedule(settings, 1000), seed=0)
    state = jax.eval_shape(functools.partial(initial_state, optimizer=update), trainable)
    row = (1, case.length)
    batch = {
        name: jax.ShapeDtypeStruct(row, jnp.int32) for name in ("tokens", "segments", "positions")
    }
    batch["weights"] = jax.ShapeDtypeStruct(row, jnp.float32)
    place = jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        (state, frozen, batch),
    )
    options = {"xla_tpu_max_hbm_size_mib": str(int(case.limit * GB) // 2**20)}
    return jax.jit(step, donate_argnums=0).lower(*placed).compile(compiler_options=options)


def memory_of(compiled: Any) -> dict[str, int]:
    """Bytes on the device: arguments, temporaries, the program, and the peak of them all."""
    from jaxft.planning.plan import tpu_temporaries

    memory = compiled.memory_analysis()
    arguments, aliased = memory.argument_size_in_bytes, memory.alias_size_in_bytes
    outputs = memory.output_size_in_bytes - aliased
    temporaries, program = tpu_temporaries(memory), memory.generated_code_size_in_bytes
    return {
        "arguments": arguments,
        "temporaries": temporaries,
        "program": program,
        "peak": arguments + outputs + temporaries + program,
    }


def measure(case: Case, topology: str) -> dict[str, Any]:
    """The figures of a case on one chip of a topology."""
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    began = time.perf_counter()
    found: dict[str, Any] = {"case": case.name, "limit_gb": case.limit}
    try:
        found |= memory_of(compile_step(case, device))
    except RuntimeError as error:
        if "Ran out of memory" not in str(error):
            raise
        found["refused"] = str(error).split("\n")[0]
    return found | {"compile_seconds": round(time.perf_counter() - began, 1)}


def page(record: dict[str, list[dict[str, Any]]], topology: str) -> str:
    """The figures of every version of the compiler as Markdown."""
    lines = [
        "# Memory of a QLoRA step on one TPU chip, by the TPU's compiler",
        "",
        f"Made by `experiments/qlora_memory.py` for one chip of `{topology}`: nf4 with double quantization, "
        "LoRA in float32 on all projections, AdamW, bfloat16, remat full. GB are 10^9 bytes. The compiler is told that "
        "the chip has no more memory than the limit, and refuses a program that does not fit. The peak is at most what "
        "is said: of the gaps between buffers, which the compiler's analysis counts twice, it may count a part so.",
    ]
    for versions, rows in record.items():
        lines += [
            *("", f"## {versions}", ""),
            "| step | arguments | temporaries | program | peak | must be below | |",
            "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
            *(_line(row) for row in rows),
        ]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    if "refused" in row:
        return f"| {row['case']} | | | | | {row['limit_gb']:g} GB | MISSED: {row['refused']} |"
    said = "holds" if row["peak"] / GB < row["limit_gb"] else "MISSED"
    parts = [f"{row[key] / GB:.2f} GB" for key in ("arguments", "temporaries", "program")]
    peak = f"{row['peak'] / GB:.2f} GB ({row['peak'] / GIB:.2f} GiB)"
    return f"| {row['case']} | {' | '.join(parts)} | {peak} | {row['limit_gb']:g} GB | {said} |"


def main() -> None:
    """Compiles the cases and prints the table."""
    os.environ.update(ENVIRONMENT)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5p:2x2x1", help="whose first chip is compiled for")
    parser.add_argument("--record", action="store_true", help="write the table beside this script")
    arguments = parser.parse_args()
    rows = []
    for case in CASES:
        rows.append(measure(case, arguments.topology))
        print(json.dumps(rows[-1]), flush=True)
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "libtpu"))
    kept = Path(__file__).with_suffix(".json")
    known = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    print(page({versions: rows}, arguments.topology))
    if arguments.record:
        known[versions] = rows
        kept.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        text = page(known, arguments.topology)
        Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
