"""Speed, memory and time to the first step beside PEFT: SmolLM-135M's shape, LoRA, 2 x 512 tokens.

    python experiments/speed.py [--reference-python PATH] [--rounds 5] [--steps 2] [--record]
    python experiments/speed.py --depth        compile time of 4 and 32 layers

Every column is a process of its own that holds its model and waits. They take turns, round after
round, so that all see the same machine: ratios hold, absolute figures are those of the day. Run it on
an idle machine: torch's threads wait for each other and lose far more than XLA's to other work.
All start from the same random weights (float32), the LoRA columns from the same adapter, which jaxft
writes and PEFT loads; the losses of the measured steps are printed and must agree. The qlora columns
quantize that model to nf4 with double quantization, ours and bitsandbytes'. PEFT runs
transformers' llama with SDPA in an environment that the script makes (`.venv-reference`), unless
`--reference-python` names one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ("torch==2.13.0", "transformers==5.23", "peft==0.21.2", "bitsandbytes==0.50.2")
JAXFT_COLUMNS = ("lora", "dora", "lora_fa", "qlora")
PEFT, PEFT_QLORA = "peft lora", "peft qlora"
BATCH, LENGTH, VOCABULARY, RANK, BATCHES = 2, 512, 49152, 16, 4
LEARNING_RATE, CLIP_NORM = 2e-4, 1.0
GOALS = {"tokens_per_second": 1.2, "peak_bytes": 0.6, "first_step_seconds": 10.0, "dora": 0.85}
QLORA_GOALS = {"lora": 0.6, "peft": 2.0}
DEPTHS, DEPTH_GOAL = (4, 32), 1.2
LOSS_TOLERANCE = 1e-3

Update = Callable[[], float]


def shape_of(layers: int = 30) -> Any:
    """The decoder's shape: SmolLM-135M's, with as many layers as asked."""
    from jaxft.models import Config

    sizes = {"vocabulary": VOCABULARY, "hidden": 576, "intermediate": 1536, "layers": layers}
    heads = {"heads": 9, "key_heads": 3, "head_dim": 64, "query_scale": 64**-0.5}
    return Config(family="llama", max_length=2048, tied=True, **sizes, **heads)


def tokens_of(number: int) -> Any:
    """The tokens of a batch, (batch, length) int32; the same few come round again."""
    import numpy as np

    draw = np.random.RandomState(number % BATCHES)
    return draw.randint(0, VOCABULARY, (BATCH, LENGTH)).astype(np.int32)


def prepare(folder: Path) -> None:
    """Writes the random model as a Hugging Face folder, a fresh LoRA adapter as a PEFT folder."""
    import jax

    import jaxft
    from jaxft.models import Transformer
    from jaxft.models.transformer import initial_params

    params = jax.jit(lambda key: initial_params(shape_of(), key))(jax.random.key(0))
    jaxft.save(Transformer(shape_of()), params, folder / "model")
    adapted = jaxft.adapt(params, jaxft.methods.lora(rank=RANK), jax.random.key(1))
    jaxft.save_adapter(adapted, folder / "adapter")


def jaxft_step(config: Any, trainable: Any, method: Any) -> tuple[Any, Any]:
    """The library's step, jitted, and its first state (abstract where the tree is)."""
    import functools

    import jax

    from configs.sft import optimizer
    from jaxft.objectives import sft
    from jaxft.training.optimizer import make_optimizer, schedule
    from jaxft.training.step import initial_state, make_train_step

    settings = optimizer(LEARNING_RATE)
    settings.schedule, settings.clip_norm = "constant", CLIP_NORM
    update = make_optimizer(settings, method, trainable, steps=1000)
    loss = functools.partial(sft, config)
    step = make_train_step(loss, update, schedule(settings, 1000), seed=0)
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(trainable))
    start = functools.partial(initial_state, optimizer=update)
    state = jax.eval_shape(start, trainable) if abstract else start(trainable)
    return jax.jit(step, donate_argnums=0), state


def batch_of(tokens: Any) -> dict[str, Any]:
    """A batch of full rows: every token is a target but the first of its row."""
    import numpy as np

    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1))
    ones = np.ones((BATCH, LENGTH))
    return {
        "tokens": tokens,
        "segments": ones.astype(np.int32),
        "positions": positions,
        "weights": ones.astype(np.float32),
    }


def jaxft_worker(name: str, folder: Path) -> Update:
    """One update of jaxft's, as a function that gives the loss before it."""
    import jax

    import jaxft

    model, params = jaxft.load(folder / "model", quantize="nf4" if name == "qlora" else "none")
    method = getattr(jaxft.methods, "lora" if name == "qlora" else name)(rank=RANK)
    if name == "dora":
        params = jaxft.adapt(params, method, jax.random.key(1))
    else:
        params = jaxft.load_adapter(params, folder / "adapter")
    trainable, frozen = jaxft.partition(params, method)
    del params
    step, state = jaxft_step(model.config, trainable, method)
    # Committed to its device, as what the step returns is: else the second call compiles again.
    state = jax.device_put(state, jax.devices()[0])
    made = 0

    def update() -> float:
        nonlocal state, made
        state, metrics = step(state, frozen, batch_of(tokens_of(made)))
        made += 1
        return float(metrics["loss"])

    return update


def peft_worker(name: str, folder: Path) -> Update:
    """The same update by PEFT: transformers with SDPA, the fused AdamW that its Trainer takes."""
    import torch
    import transformers
    from peft import PeftModel

    codes = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    settings = {"quantization_config": codes} if name == PEFT_QLORA else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="sdpa", **settings
    )
    model.config.use_cache = False
    model = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True).train()
    trained = [leaf for leaf in model.parameters() if leaf.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    made = 0

    def update() -> float:
        nonlocal made
        tokens = torch.from_numpy(tokens_of(made)).long()
        made += 1
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return update


def peak_bytes() -> int:
    """The most memory that this process ever held resident."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def work(name: str, folder: Path) -> None:
    """A worker: says that its model is loaded, then answers "go N" with what N updates took."""
    worker = jaxft_worker if name in JAXFT_COLUMNS else peft_worker
    answer(name, lambda: worker(name, folder))


def answer(name: str, load: Callable[[], Update]) -> None:
    """Makes the update, says so, and answers each "go N" with what N of it took: on stdout, which has nothing else."""
    answers, sys.stdout = sys.stdout, sys.stderr
    update = load()
    print(json.dumps({"ready": name}), file=answers, flush=True)
    for line in sys.stdin:
        start, busy = time.perf_counter(), time.process_time()
        losses = [update() for _ in range(int(line.split()[1]))]
        took = {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - busy,
            "losses": losses,
            "peak_bytes": peak_bytes(),
        }
        print(json.dumps(took), file=answers, flush=True)


class Worker:
    """A column's process, loaded and waiting."""

    def __init__(self, name: str, python: str, script: str, *words: str) -> None:
        command = [python, str(Path(script).resolve()), "--worker", name, *words]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise SystemExit(f"the worker {self.name} ended: exit code {self.process.wait()}")
        return json.loads(line)

    def go(self, steps: int) -> dict[str, Any]:
        """So many updates, measured by the worker."""
        self.process.stdin.write(f"go {steps}\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        return self._answer()

    def end(self) -> None:
        """Ends the process."""
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """{column: its figures}: the first update of each alone, then rounds in turn."""
    results: dict[str, dict[str, Any]] = {}
    workers = []
    references = (PEFT, PEFT_QLORA) if "qlora" in arguments.columns else (PEFT,)
    for name in (*arguments.columns, *references):
        python = sys.executable if name in JAXFT_COLUMNS else arguments.reference_python
        workers.append(Worker(name, str(python), __file__, "--folder", str(folder)))
        first = workers[-1].go(1)
        results[name] = {"first_step_seconds": first["seconds"], "losses": first["losses"]}
        results[name] |= {"seconds": [], "cpu_seconds": []}
        print(f"{name}: first step {first['seconds']:.1f} s", file=sys.stderr)
    for number in range(arguments.rounds):
        # every other round backwards: whoever comes after whom, comes before it as well
        for worker in workers if number % 2 == 0 else reversed(workers):
            answer = worker.go(arguments.steps)
            column = results[worker.name]
            column["seconds"].append(answer["seconds"] / arguments.steps)
            column["cpu_seconds"].append(answer["cpu_seconds"] / arguments.steps)
            column["losses"] += answer["losses"]
            column["peak_bytes"] = answer["peak_bytes"]
        taken = (f"{name} {column['seconds'][-1]:.2f} s" for name, column in results.items())
        print(f"round {number + 1}, a step: {', '.join(taken)}", file=sys.stderr)
    for worker in workers:
        worker.end()
    return results


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """The figures as a Markdown table; a ratio of speeds is the median of those of the rounds."""
    reference = results[PEFT]
    lines = ["| | tokens/s | x PEFT | first step | peak memory | x PEFT | loss, first and last |"]
    lines.append("| --- " + "| ---: " * 6 + "|")
    for name, column in results.items():
        speed = BATCH * LENGTH / statistics.median(column["seconds"])
        shown = f"jaxft {name}" if name in JAXFT_COLUMNS else name
        memory, losses = column["peak_bytes"], column["losses"]
        lines.append(
            f"| {shown} | {speed:.0f} | {faster(column, reference):.2f} "
            f"| {column['first_step_seconds']:.1f} s | {memory / 1e9:.2f} GB "
            f"| {memory / reference['peak_bytes']:.2f} | {losses[0]:.4f}, {losses[-1]:.4f} |"
        )
    return lines


def faster(column: dict[str, Any], other: dict[str, Any]) -> float:
    """How many times as fast as the other a column is: the median over the rounds."""
    pairs = zip(column["seconds"], other["seconds"], strict=True)
    return statistics.median(theirs / own for own, theirs in pairs)


def apart(column: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of two columns' losses."""
    pairs = zip(column["losses"], other["losses"], strict=True)
    return max(abs(one - two) for one, two in pairs)


def verdicts(results: dict[str, dict[str, Any]]) -> list[str]:
    """Each goal with what was measured."""
    lora, reference = results["lora"], results[PEFT]
    memory = lora["peak_bytes"] / reference["peak_bytes"]
    checks = [
        ("tokens/s, x PEFT", faster(lora, reference), ">=", GOALS["tokens_per_second"]),
        ("peak memory, x PEFT", memory, "<=", GOALS["peak_bytes"]),
        ("first step, seconds", lora["first_step_seconds"], "<=", GOALS["first_step_seconds"]),
        (
            f"losses of {len(lora['losses'])} steps apart",
            apart(lora, reference),
            "<=",
            LOSS_TOLERANCE,
        ),
    ]
    if "dora" in results:
        checks.insert(3, ("dora, x lora", faster(results["dora"], lora), ">=", GOALS["dora"]))
    if "qlora" in results:
        ours, theirs = results["qlora"], results[PEFT_QLORA]
        checks += [
            ("qlora, x lora", faster(ours, lora), ">=", QLORA_GOALS["lora"]),
            ("qlora, x PEFT with bitsandbytes", faster(ours, theirs), ">=", QLORA_GOALS["peft"]),
            ("qlora's losses apart", apart(ours, theirs), "<=", LOSS_TOLERANCE),
        ]
    return [
        f"- {'reached' if (value >= goal if sign == '>=' else value <= goal) else 'MISSED'}: "
        f"{name}: {value:.2g} (goal {sign} {goal:g})"
        for name, value, sign, goal in checks
    ]


def compile_seconds(layers: int) -> tuple[float, float]:
    """Seconds to trace and to compile LoRA's step, of the shapes alone."""
    import jax

    import jaxft
    from jaxft.models.transformer import initial_params

    config, method = shape_of(layers), jaxft.methods.lora(rank=RANK)
    params = jax.eval_shape(
        lambda key: jaxft.adapt(initial_params(config, key), method, key), jax.random.key(0)
    )
    jax.clear_caches()
    trainable, frozen = jaxft.partition(params, method)
    step, state = jaxft_step(config, trainable, method)
    start = time.perf_counter()
    lowered = step.lower(state, frozen, batch_of(tokens_of(0)))
    traced = time.perf_counter()
    lowered.compile()
    return traced - start, time.perf_counter() - traced


def depth(rounds: int) -> list[str]:
    """Time to trace and compile at both depths: the least of the rounds, as noise only adds."""
    times = {layers: [] for layers in DEPTHS}  # type: dict[int, list[tuple[float, float]]]
    compile_seconds(1)  # the first ever also starts the compiler
    for _ in range(rounds):
        for layers in DEPTHS:
            times[layers].append(compile_seconds(layers))
    lines = ["| layers | trace | compile | both |", "| ---: | ---: | ---: | ---: |"]
    totals = []
    for layers, taken in times.items():
        trace, compilation = min(taken, key=sum)
        totals.append(trace + compilation)
        lines.append(f"| {layers} | {trace:.2f} s | {compilation:.2f} s | {totals[-1]:.2f} s |")
    ratio = totals[1] / totals[0]
    said = "reached" if ratio <= DEPTH_GOAL else "MISSED"
    return [
        *lines,
        "",
        f"- {said}: {DEPTHS[1]} layers, x {DEPTHS[0]}: {ratio:.2f} (goal <= {DEPTH_GOAL})",
    ]


def reference_python() -> Path:
    """The Python of an environment with the reference's packages, made once."""
    folder = ROOT / ".venv-reference"
    python, made = folder / "bin" / "python", folder / ".made"
    if not made.exists() or made.read_text(encoding="ascii") != " ".join(REFERENCE):
        print(f"making {folder.name} with {', '.join(REFERENCE)}", file=sys.stderr)
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REFERENCE], check=True)
        made.write_text(" ".join(REFERENCE), encoding="ascii")
    return python


def compare(arguments: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """Runs all columns; the report's lines, and the figures behind them."""
    arguments.reference_python = arguments.reference_python or reference_python()
    with tempfile.TemporaryDirectory() as name:
        # in a process of its own, as all that holds a model: this one only keeps time
        command = [sys.executable, __file__, "--prepare", "--folder", name]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        subprocess.run(command, check=True, env=environment)
        results = measure(arguments, Path(name))
    return [*table(results), "", *verdicts(results)], results


def record(lines: list[str], results: dict[str, Any]) -> None:
    """Writes the report and its figures beside this script."""
    title = [
        "# Speed and memory beside PEFT",
        "",
        f"`python experiments/speed.py`, {os.cpu_count()} CPU cores.",
        "",
    ]
    target = Path(__file__).with_suffix(".md")
    target.write_text("\n".join([*title, *lines]) + "\n", encoding="utf-8")
    target.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Measures, prints, and with --record writes speed.md and speed.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference-python", type=Path, help="a Python with torch and PEFT")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each column")
    parser.add_argument("--steps", type=int, default=2, help="updates in a turn")
    parser.add_argument("--columns", nargs="+", default=list(JAXFT_COLUMNS), choices=JAXFT_COLUMNS)
    parser.add_argument("--depth", action="store_true", help="compile time against depth, alone")
    parser.add_argument("--record", action="store_true", help="write speed.md and speed.json")
    parser.add_argument(
        "--tpu", action="store_true", help="qlora x lora by the TPU compiler, alone"
    )
    parser.add_argument(
        "--worker", choices=(*JAXFT_COLUMNS, PEFT, PEFT_QLORA), help=argparse.SUPPRESS
    )
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments.worker, arguments.folder)
    if arguments.prepare:
        return prepare(arguments.folder)
    if arguments.depth:
        print("\n".join(depth(arguments.rounds)))
        return None
    lines, results = compare(arguments)
    print("\n".join(lines))
    if arguments.record:
        record(lines, results)
    return None


if __name__ == "__main__":
    main()
