"""Every method on E2E with the embedded base: held-out loss curves in one plot, and a table.

    python experiments/methods.py --data ../shared/data/e2e

`--data` holds valid.txt, whose rows train, and test.txt, of which some rows spread over it are held
out (the records of the two files are disjoint). All methods see the same batches in the same order, as often,
under the same schedule, at their default settings; each has a learning rate of its own, which `--sweep`
compares with a third and three times of it, on the last rows of valid.txt, which never train.
Written beside this script: methods.json, methods.png, methods.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import e2e

TUNING_ROWS = 200  # the last of valid.txt: they choose the rates, and do not train
# Large, because the base is small and far from the task. A sweep of 40 updates, on an earlier checkpoint of the base,
# was made for lora (5e-3 was best), lora_fa (3e-2, the highest tried) and vera (0.15, the highest tried), of which the
# last two are taken lower for a longer run. The others are set from lora's by their scale, and were not swept.
RATES = {
    "full": 1e-3,
    "lora": 5e-3,
    "rslora": 2e-3,
    "lora_plus": 1e-3,
    "lora_fa": 2e-2,
    "lora_fa_v2": 2e-2,
    "vera": 1e-1,
    "dora": 5e-3,
    "delta_lora": 2e-3,
}
FACTORS = (1 / 3, 1.0, 3.0)
SETTINGS: Mapping[str, Any] = {
    "data.max_length": 224,  # holds the longest example: nothing is cut
    "data.packing": True,
    "batch_size": 8,  # packed rows, about 16 examples
    "eval_batch_size": 16,
    "samples.count": 0,
    "checkpoint.every": 0,
    "optimizer.schedule": "cosine",
}
WARMUP = 10  # a run of n updates warms up for n / WARMUP
# Okabe and Ito's colours, one a family of methods; the line tells its members apart.
STYLES = {
    "full": ("#000000", "-"),
    "lora": ("#0072B2", "-"),
    "rslora": ("#0072B2", "--"),
    "lora_plus": ("#0072B2", ":"),
    "lora_fa": ("#E69F00", "-"),
    "lora_fa_v2": ("#E69F00", "--"),
    "vera": ("#009E73", "-"),
    "dora": ("#D55E00", "-"),
    "delta_lora": ("#CC79A7", "-"),
}
OTHER_STYLE = ("#777777", "-.")

Row = dict[str, Any]


def write_data(source: Path, target: Path, held_out: int) -> dict[str, Path]:
    """Converts E2E to three JSONL files: train, tuning (both of valid.txt), and heldout (of test.txt)."""
    valid = list(e2e.convert(_lines(source / "valid.txt"), "valid.txt"))
    test = list(e2e.convert(_lines(source / "test.txt"), "test.txt"))
    tuning = min(TUNING_ROWS, len(valid) // 4)
    taken = min(held_out, len(test))
    parts = {
        "train": valid[:-tuning],
        "tuning": valid[-tuning:],
        "heldout": [test[index * len(test) // taken] for index in range(taken)],
    }
    for name, rows in parts.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (target / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return {name: target / f"{name}.jsonl" for name in parts}


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise SystemExit(
            f"{path}: no such file; --data takes the folder of E2E's valid.txt and test.txt"
        )
    return path.read_text(encoding="utf-8").splitlines()


def run(method: str, overrides: Mapping[str, Any], workdir: Path) -> Row:
    """Trains by one method and measures it.

    Args:
        method: its name in `jaxft.methods.METHODS`.
        overrides: keys of the configuration beside `SETTINGS`.
        workdir: the run's folder.
    """
    import jaxft
    from jaxft.runs.metrics import read_metrics

    config = jaxft.load_config(f"configs/sft.py:{method}", {**SETTINGS, **overrides})
    began = time.perf_counter()
    result = jaxft.train(config, workdir)
    seconds = time.perf_counter() - began
    lines = read_metrics(workdir / "metrics.jsonl")
    evaluations = [line for line in lines if line["split"] == "eval"]
    updates = [
        line["tokens"] / line["tokens_per_second"] for line in lines if line not in evaluations
    ]
    return {
        "method": method,
        "learning_rate": config.optimizer.learning_rate,
        **_parameters(config),
        "steps": [line["step"] for line in evaluations],
        "losses": [line["loss"] for line in evaluations],
        "output_bytes": _size(result.output.glob("*.safetensors")),
        "checkpoint_bytes": _size((workdir / "checkpoints").rglob("*")),
        "update_seconds": round(sorted(updates)[len(updates) // 10], 4),
        "seconds": round(seconds, 1),
    }


def _parameters(config: Any) -> dict[str, int]:
    """How many parameters the run trains, and how many the base has."""
    import jax

    import jaxft
    from jaxft.training.setup import method_of
    from jaxft.tree import count

    method = method_of(config)
    _, base = jaxft.load(config.model)
    trainable, _ = jaxft.partition(jaxft.adapt(base, method, jax.random.key(0)), method)
    return {"trained": count(trainable), "base": count(base)}


def _size(files: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in files if path.is_file())


def table(rows: Iterable[Row]) -> str:
    """The rows as Markdown, the lowest loss first."""
    lines = [
        "| method | trained parameters | of the base | held-out loss | learning rate "
        "| adapter or model, bytes | checkpoint, bytes | ms an update | seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in sorted(rows, key=lambda row: row["losses"][-1]):
        lines.append(
            f"| `{row['method']}` | {row['trained']:,} | {100 * row['trained'] / row['base']:.3g} % "
            f"| {row['losses'][-1]:.3f} | {row['learning_rate']:.2g} | {row['output_bytes']:,} "
            f"| {row['checkpoint_bytes']:,} | {1000 * row['update_seconds']:.0f} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def sweep_table(rows: Iterable[Row]) -> str:
    """The sweep as Markdown: a method's held-out losses at its three rates."""
    lines = [
        "| method | rate / 3 | loss | rate | loss | rate x 3 | loss |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    by_method: dict[str, list[Row]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    for method, found in by_method.items():
        cells = [f"{row['learning_rate']:.2g} | {row['losses'][-1]:.3f}" for row in found]
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(results: Mapping[str, Any]) -> str:
    """methods.md."""
    rows, sweep = results.get("rows", []), results.get("sweep", [])
    parts = ["# Every method on E2E, with the embedded base"]
    if rows:
        parts += [
            f"Made by `experiments/methods.py`: {results['updates']} updates of {SETTINGS['batch_size']} rows of "
            f"{SETTINGS['data.max_length']} tokens packed with E2E's training examples, the same in all runs; "
            f"loss in nats per token of the completions of {results['heldout']} held-out examples, "
            f"{rows[0]['losses'][0]:.3f} before training. Settings are the defaults of `configs/sft.py` (rank "
            "16, VeRA 256; all projections). A checkpoint also holds the optimizer's state. Times are those of 2 "
            "cores on which other work ran: of an update the time that nine in ten exceed, and the "
            "seconds of the whole call, with compilation and evaluations.",
            table(rows),
            "![Held-out loss of every method over the updates](methods.png)",
        ]
    if sweep:
        parts += [
            f"The learning rates, compared over {results['sweep_updates']} updates by the loss on "
            "examples that neither train nor stand in the table above (`--sweep`):",
            sweep_table(sweep),
        ]
    return "\n\n".join(parts) + "\n"


def draw(rows: Iterable[Row], path: Path) -> None:
    """All curves in one plot, the legend in the order of the last losses."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure = Figure(figsize=(8.5, 4.8), layout="constrained")
    axes = figure.subplots()
    for row in sorted(rows, key=lambda row: -row["losses"][-1]):
        color, line = STYLES.get(row["method"], OTHER_STYLE)
        label = f"{row['method']}  {row['losses'][-1]:.2f}  ({_short(row['trained'])} trained)"
        axes.plot(row["steps"], row["losses"], line, color=color, linewidth=1.8, label=label)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in (0.5, 0.7, 1, 1.5, 2, 2.5, 3, 4, 5, 6) if low < tick < high])
    axes.set_xlabel("updates")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.set_title("E2E on the embedded base of 3.5 million parameters", fontsize=11)
    axes.margins(x=0.01)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper right", handlelength=3)
    figure.savefig(path, dpi=150)


def _short(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number / 1e3:.0f} k"


def write(results: Mapping[str, Any], folder: Path) -> None:
    """methods.json, methods.md and, if there are curves, methods.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "methods.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / "methods.md").write_text(page(results), encoding="utf-8")
    if results.get("rows"):
        draw(results["rows"], folder / "methods.png")


def read(folder: Path) -> dict[str, Any]:
    """What methods.json holds, or nothing."""
    path = folder / "methods.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def measure(arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    """Runs what is asked for, and writes the results after each run.

    Rows of other methods stay, if they took as many updates.
    """
    key, updates = ("sweep", "sweep_updates") if arguments.sweep else ("rows", "updates")
    kept = results.get(key, []) if results.get(updates) == arguments.steps else []
    results[key] = [row for row in kept if row["method"] not in arguments.methods]
    results |= {updates: arguments.steps, "heldout": arguments.heldout}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_data(arguments.data, folder, arguments.heldout)
        common = {
            "model": arguments.model,
            "data.train": str(files["train"]),
            "data.eval": str(files["tuning" if arguments.sweep else "heldout"]),
            "steps": arguments.steps,
            "eval_every": 0 if arguments.sweep else arguments.eval_every,
            "optimizer.warmup_steps": arguments.steps // WARMUP,
        }
        for method in arguments.methods:
            for factor in FACTORS if arguments.sweep else (1.0,):
                rate = RATES[method] * factor
                print(f"\n{method}, learning rate {rate:.2g}", flush=True)
                overrides = common | {"optimizer.learning_rate": rate}
                row = run(method, overrides, folder / f"{method}-{factor:.2g}")
                results[key].append(row)
                write(results, arguments.output)


def main() -> None:
    """Reads the arguments; trains, or draws what was trained."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data/e2e"))
    parser.add_argument("--model", default="tiny", help="a Hugging Face folder; default: tiny")
    parser.add_argument("--methods", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--steps", type=int, default=200, help="updates by each method")
    parser.add_argument("--eval-every", type=int, default=20, help="updates between evaluations")
    parser.add_argument("--heldout", type=int, default=150, help="held-out examples")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, metavar="FOLDER")
    parser.add_argument("--sweep", action="store_true", help="compare learning rates instead")
    parser.add_argument("--plot-only", action="store_true", help="draw methods.json again")
    arguments = parser.parse_args()
    results = read(arguments.output)
    if arguments.plot_only:
        write(results, arguments.output)
    else:
        measure(arguments, results)
    print(f"\n{page(results)}\n{arguments.output / 'methods.png'}")


if __name__ == "__main__":
    main()
