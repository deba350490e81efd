"""What a quantized base costs in time on a TPU, by the TPU compiler's estimate: a product alone, and a step.

    python experiments/qlora_tpu.py [--record] [--products]

Needs the package `libtpu` (extra `tpu`). A product of x (tokens, 4096) with an nf4 kernel (4096, 14336) stands beside
that with the same kernel in bfloat16; the step is LoRA's over four layers of an 8B shape, 1 and 4 x 2048 tokens, remat
full. A kernel written by hand (Pallas) that dequantized for nothing would be as fast as the product in bfloat16,
where the products and not the memory set the time: the ratio bounds what one could win.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOPOLOGY, ROWS, COLUMNS = "v5e:2x2", 4096, 14336
TOKENS = (512, 2048, 8192)
BATCHES = (1, 4)
GOAL, WORTH = 0.75, 1.2
SHAPE = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "max_position_embeddings": 8192,
}  # fmt: skip
STEP = {
    "dtype": "bfloat16", "param_dtype": "bfloat16", "data.max_length": 2048,
    "data.packing": True, "remat": "full", "mesh.data": 1, "steps": 10,
}  # fmt: skip


def product_seconds(tokens: int, scheme: str) -> float:
    """Seconds of one product and of its gradient to x, by the compiler's cycles."""
    import jax
    import jax.numpy as jnp

    import jaxft
    from jaxft.planning.hlo import read_program
    from jaxft.planning.topology import tpu_devices

    target = tpu_devices(TOPOLOGY)
    place = jax.sharding.SingleDeviceSharding(target.devices[0])

    def weight() -> Any:
        kernel = jnp.zeros((ROWS, COLUMNS), jnp.bfloat16)
        return kernel if scheme == "none" else jaxft.quantize(kernel, scheme)

    def both(x: jax.Array, y: jax.Array, kernel: Any) -> Any:
        out, back = jax.vjp(lambda x: jaxft.contract(x, kernel), x)
        return out, back(y)

    shapes = (
        jax.ShapeDtypeStruct((tokens, ROWS), jnp.bfloat16),
        jax.ShapeDtypeStruct((tokens, COLUMNS), jnp.bfloat16),
        jax.eval_shape(weight),
    )
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes
    )
    text = jax.jit(both).lower(*placed).compile().as_text()
    return read_program(text).cycles / target.chip.clock  # type: ignore[union-attr]


def step_seconds(rows: int, scheme: str) -> float:
    """Seconds of a step of LoRA on so many rows, as `jaxft plan` estimates them."""
    import jax

    from jaxft.configuration import load_config
    from jaxft.planning import plan
    from jaxft.planning.topology import tpu_devices

    with tempfile.TemporaryDirectory() as name, jax.numpy_dtype_promotion("standard"):
        (Path(name) / "config.json").write_text(json.dumps(SHAPE), encoding="ascii")
        settings = {"model": name, "base.quantize": scheme, "batch_size": rows, **STEP}
        config = load_config(f"{ROOT / 'configs' / 'sft.py'}:lora", settings)
        return plan(config, tpu_devices(TOPOLOGY)).seconds_per_step or float("nan")


def page(rows: list[tuple[str, float, float]]) -> str:
    """qlora_tpu.md."""
    lines = [
        "# The time of a quantized base on a TPU, by the compiler's estimate",
        "",
        f"Made by `experiments/qlora_tpu.py` for one chip of `{TOPOLOGY}`: the product of x (tokens, {ROWS}) with a "
        f"kernel ({ROWS}, {COLUMNS}) and its gradient to x; LoRA's step over four layers of an 8B shape, remat full. "
        "From 4,096 tokens a kernel is dequantized before it is multiplied, with fewer inside the product.",
        "",
        "| | bfloat16 | nf4, double | nf4 x bfloat16 | a free dequantization would win |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, dense, codes in rows:
        lines.append(
            f"| {name} | {1e3 * dense:.3f} ms | {1e3 * codes:.3f} ms | {dense / codes:.2f} | {codes / dense:.2f} x |"
        )
    for name, dense, codes in rows:
        if name.startswith("step"):
            said = "reached" if dense / codes >= GOAL else "MISSED"
            lines += ["", f"- {said}: qlora, x lora, {name}: {dense / codes:.2f} (goal >= {GOAL})"]
            worth = "below" if codes / dense < WORTH else "above"
            lines.append(
                f"- A Pallas kernel wins at most {codes / dense:.2f} x of the step: {worth} {WORTH:g} x"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compiles, prints, and with --record writes qlora_tpu.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--products", action="store_true", help="leave out the step")
    parser.add_argument("--record", action="store_true", help="write the table beside this script")
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    rows = []
    for tokens in TOKENS:
        seconds = [product_seconds(tokens, scheme) for scheme in ("none", "nf4")]
        rows.append((f"product, {tokens} tokens", *seconds))
        print(rows[-1], flush=True)
    if not arguments.products:
        for count in BATCHES:
            seconds = [step_seconds(count, scheme) for scheme in ("none", "nf4")]
            rows.append((f"step of LoRA, {count} x 2048", *seconds))
    print(page(rows))
    if arguments.record:
        Path(__file__).with_suffix(".md").write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
