"""The frozen products of `speed.py`'s step alone, by XLA and by PyTorch: what bounds the step on a CPU.

    python experiments/speed_limit.py --reference-python PATH [--rounds 5] [--record]

Of each kernel `x W` and `dy W^T`, and the head's two: no adapter, attention, norm, loss or optimizer. XLA scans over
the layers in one program, as the decoder does; PyTorch has every layer's kernel too. Both take turns, each in a process
of its own that waits. `--record` writes speed_limit.md, with what speed.json holds of whole steps beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from speed import BATCH, GOALS, LENGTH, PEFT, VOCABULARY, Update, Worker, answer

HERE = Path(__file__).resolve().parent
HIDDEN, WIDE, NARROW, LAYERS = 576, 1536, 192, 30
KERNELS = (
    (HIDDEN, HIDDEN), (HIDDEN, NARROW), (HIDDEN, NARROW), (HIDDEN, HIDDEN),
    (HIDDEN, WIDE), (HIDDEN, WIDE), (WIDE, HIDDEN),
)  # fmt: skip
CHUNKS = 4  # into which the head's product is cut, as in the loss
TOKENS = BATCH * LENGTH
FLOPS = (
    4 * TOKENS * (LAYERS * sum(rows * columns for rows, columns in KERNELS) + HIDDEN * VOCABULARY)
)


def by_xla() -> Callable[[], None]:
    """All products in one program, whose scan carries a sum that needs each of them."""
    import jax
    import jax.numpy as jnp

    keys = iter(jax.random.split(jax.random.key(0), 64))
    kernels = [jax.random.normal(next(keys), (LAYERS, *shape)) for shape in KERNELS]
    inputs = {
        size: jax.random.normal(next(keys), (TOKENS, size)) for size in (HIDDEN, NARROW, WIDE)
    }
    head = jax.random.normal(next(keys), (VOCABULARY, HIDDEN))

    def both(x: Any, dy: Any, kernel: Any) -> Any:
        # One number of each result: the products are made whole, and nothing else is.
        return (
            jax.lax.optimization_barrier(x @ kernel)[0, 0]
            + jax.lax.optimization_barrier(dy @ kernel.T)[0, 0]
        )

    @jax.jit
    def products(kernels: Any, head: Any, inputs: Any) -> Any:
        def layer(total: Any, one: Any) -> Any:
            for kernel in one:
                rows, columns = kernel.shape
                total = total + both(inputs[rows], inputs[columns], kernel)
            return total, None

        def chunk(total: Any, x: Any) -> Any:
            logits = jax.lax.optimization_barrier(x @ head.T)
            return total + jax.lax.optimization_barrier(logits @ head)[0, 0], None

        total, _ = jax.lax.scan(layer, jnp.zeros(()), kernels)
        return jax.lax.scan(chunk, total, inputs[HIDDEN].reshape(CHUNKS, -1, HIDDEN))[0]

    return lambda: products(kernels, head, inputs).block_until_ready()


def by_torch() -> Callable[[], None]:
    """The same products one after the other."""
    import torch

    kernels = [[torch.randn(columns, rows) for rows, columns in KERNELS] for _ in range(LAYERS)]
    inputs = {size: torch.randn(TOKENS, size) for size in (HIDDEN, NARROW, WIDE)}
    head = torch.randn(VOCABULARY, HIDDEN)

    def products() -> None:
        with torch.no_grad():
            for layer in kernels:
                for kernel in layer:
                    columns, rows = kernel.shape
                    torch.nn.functional.linear(inputs[rows], kernel)
                    inputs[columns] @ kernel
            torch.nn.functional.linear(inputs[HIDDEN], head) @ head

    return products


def work(name: str) -> None:
    """A worker: answers "go 1" with what one pass took, as those of speed.py."""

    def load() -> Update:
        products = {"xla": by_xla, "torch": by_torch}[name]()

        def update() -> float:
            products()
            return 0.0

        return update

    answer(name, load)


def measure(pythons: dict[str, str], rounds: int) -> dict[str, float]:
    """{library: the median of its seconds}, in turns, the first two passes left out."""
    workers = [Worker(name, python, __file__) for name, python in pythons.items()]
    seconds: dict[str, list[float]] = {worker.name: [] for worker in workers}
    for _ in range(rounds + 2):
        for worker in workers:
            seconds[worker.name].append(worker.go(1)["seconds"])
    for worker in workers:
        worker.end()
    return {name: statistics.median(taken[2:]) for name, taken in seconds.items()}


def report(seconds: dict[str, float]) -> list[str]:
    """The products beside the whole steps that speed.json holds."""
    record = json.loads((HERE / "speed.json").read_text())
    whole = {
        name: statistics.median(record[column]["seconds"])
        for name, column in (("xla", "lora"), ("torch", PEFT))
    }
    lines = [
        "| | frozen products alone | GFLOP/s | whole step (speed.json) | the rest |",
        "| --- " + "| ---: " * 4 + "|",
    ]
    for name, title in (("xla", "XLA, jaxft lora"), ("torch", "PyTorch, PEFT lora")):
        alone, step = seconds[name], whole[name]
        speed = FLOPS / alone / 1e9
        lines.append(
            f"| {title} | {alone:.2f} s | {speed:.0f} | {step:.2f} s | {step - alone:.2f} s |"
        )
    goal = whole["torch"] / GOALS["tokens_per_second"]
    left, theirs = goal - seconds["xla"], whole["torch"] - seconds["torch"]
    return [
        *lines,
        "",
        f"- The goal of {GOALS['tokens_per_second']} x PEFT is a step of {goal:.2f} s: it leaves {left:.2f} s for all"
        f" but these products, where PEFT takes {theirs:.2f} s.",
    ]  # fmt: skip


def main() -> None:
    """Measures and prints; with --record writes speed_limit.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference-python", help="a Python with torch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="write speed_limit.md")
    parser.add_argument("--worker", choices=("xla", "torch"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments.worker)
    python = arguments.reference_python or str(HERE.parent / ".venv-reference" / "bin" / "python")
    lines = report(measure({"xla": sys.executable, "torch": python}, arguments.rounds))
    print("\n".join(lines))
    if arguments.record:
        about = "Made by `experiments/speed_limit.py`: the frozen products of `speed.py`'s step."
        title = f"# What matrix products allow\n\n{about}\n\n"
        (HERE / "speed_limit.md").write_text(title + "\n".join(lines) + "\n", encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
