"""What quantizing a base costs, and what is left of it after tuning: a table and a plot beside this script.

    python experiments/quantization.py [--data ../shared/data] [--rows 1319] [--updates 300]

Every scheme sees the same held-out rows (GSM8K's test set, of the kind that the embedded base was trained on), cut at
256 tokens. Beside the perplexity stand two paired measures against the float32 base on the same tokens: the mean
difference of the loss, and the Kullback-Leibler divergence of the quantized model's next token from the float32
model's, which no choice of text can turn negative. Standard errors count a row's tokens as one draw, for they
depend on each other. Bits are those of the quantized projections, scales included.

Then LoRA over the float32 base and over two quantized ones learns E2E, from the same batches at the same rate.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import methods

LENGTH, BATCH = 256, 16
NARROW_DOWN = 176  # 128 does not divide the 704 rows of the embedded base's down_proj
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "float32": {},
    "int8, 64": {"scheme": "int8"},
    "nf4, 64": {"scheme": "nf4", "double_quant": False},
    "nf4, 64, double": {"scheme": "nf4"},
    "int4, 32": {"scheme": "int4", "group_size": 32},
    "int4, 64": {"scheme": "int4"},
    "int4, 128": {"scheme": "int4", "group_size": 128},
    "fp4, 64": {"scheme": "fp4", "double_quant": False},
}
TUNED: Mapping[str, Mapping[str, Any]] = {
    "float32": {},
    "nf4, 64, double": {"base.quantize": "nf4"},
    "int4, 64": {"base.quantize": "int4"},
}

Row = dict[str, Any]


def batches_of(file: Path, model: str, rows: int) -> list[dict[str, Any]]:
    """The rows' texts as tokens and segments, some rows a batch."""
    import numpy as np
    import pretrain_tiny

    from jaxft.assets import model_folder
    from jaxft.data import load_tokenizer

    tokenizer = load_tokenizer(model_folder(model), "")
    texts = pretrain_tiny.read_texts(file)[:rows]
    tokens = np.zeros((len(texts), LENGTH), np.int32)
    segments = np.zeros_like(tokens)
    for place, text in enumerate(texts):
        ids = tokenizer.encode(text)[:LENGTH]
        tokens[place, : len(ids)], segments[place, : len(ids)] = ids, 1
    starts = range(0, len(texts), BATCH)
    return [
        {"tokens": tokens[at : at + BATCH], "segments": segments[at : at + BATCH]} for at in starts
    ]


def quantized(params: Any, settings: Mapping[str, Any]) -> Any:
    """The base under a scheme; groups that do not divide down_proj's rows are replaced by `NARROW_DOWN`."""
    import jaxft

    if not settings:
        return params
    if settings.get("group_size") != 128:
        return jaxft.quantize_params(params, **settings)
    others = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")
    params = jaxft.quantize_params(params, **settings, targets=others)
    settings = {**settings, "group_size": NARROW_DOWN, "targets": ("down_proj",)}
    return jaxft.quantize_params(params, **settings)


def row_sums(model: Any) -> Any:
    """(base, trees, batch) -> each row's tokens, and for each tree its loss, the base's, and the divergence, summed."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def sums(base: Any, trees: list[Any], batch: Any) -> Any:
        tokens, segments = batch["tokens"], batch["segments"]
        real = (segments[:, 1:] > 0).astype(jnp.float32)

        def log_probabilities(params: Any) -> jax.Array:
            return jax.nn.log_softmax(model.apply({"params": params}, tokens, segments)[:, :-1])

        def summed(values: jax.Array) -> jax.Array:
            return jnp.sum(values * real, axis=1)

        def loss(predicted: jax.Array) -> jax.Array:
            target = jnp.take_along_axis(predicted, tokens[:, 1:, None], axis=-1)
            return summed(-target[:, :, 0])

        theirs, found = log_probabilities(base), []
        for params in trees:
            ours = log_probabilities(params)
            divergence = jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)
            found.append((loss(ours), loss(theirs), summed(divergence)))
        return jnp.sum(real, axis=1), found

    return sums


def mean_and_error(sums: Any, tokens: Any) -> tuple[float, float]:
    """The mean over tokens of what is summed by rows, and its standard error with rows as the draws."""
    import numpy as np

    mean = float(np.sum(sums) / np.sum(tokens))
    residuals = np.asarray(sums, np.float64) - mean * np.asarray(tokens, np.float64)
    return mean, float(np.sqrt(np.sum(residuals**2)) / np.sum(tokens))


def measure(model: str, file: Path, rows: int) -> tuple[list[Row], dict[str, float]]:
    """The figures of every scheme, and nf4 against int4 at the same bits: the paired differences."""
    import jax
    import numpy as np

    import jaxft
    from jaxft.tree import count, size_bytes
    from jaxft.weights import materialize, quantized_in

    module, base = jaxft.load(model)
    sums = row_sums(module)
    trees = [quantized(base, settings) for settings in SETTINGS.values()]
    parts = [sums(base, trees, batch) for batch in batches_of(file, model, rows)]
    tokens = np.concatenate([np.asarray(part[0], np.float64) for part in parts])
    found: list[Row] = []
    by_row: dict[str, Any] = {}
    for number, (name, params) in enumerate(zip(SETTINGS, trees, strict=True)):
        ours, theirs, divergence = (
            np.concatenate([np.asarray(part[1][number][place], np.float64) for part in parts])
            for place in range(3)
        )
        codes = [weight for _, weight in quantized_in(params)]
        entries = sum(count(jax.eval_shape(materialize, weight)) for weight in codes)
        bits = 8 * sum(map(size_bytes, codes)) / entries if codes else 32.0
        loss = mean_and_error(ours - theirs, tokens)
        kl = mean_and_error(divergence, tokens)
        found.append(
            {
                "projections": name,
                "bits": bits,
                "tokens": int(tokens.sum()),
                "perplexity": math.exp(ours.sum() / tokens.sum()),
                "loss_difference": loss[0],
                "loss_error": loss[1],
                "divergence": kl[0],
                "divergence_error": kl[1],
            }
        )
        by_row[name] = (tokens, ours, divergence)
        print(json.dumps(found[-1]), flush=True)
    return found, against(by_row, "nf4, 64", "int4, 64")


def against(by_row: Mapping[str, Any], one: str, other: str) -> dict[str, float]:
    """What one scheme loses less than the other on the same tokens (negative: less), in both measures."""
    tokens, ours, divergence = by_row[one]
    _, theirs, other_divergence = by_row[other]
    loss = mean_and_error(ours - theirs, tokens)
    kl = mean_and_error(divergence - other_divergence, tokens)
    return {"loss": loss[0], "loss_error": loss[1], "divergence": kl[0], "divergence_error": kl[1]}


def tune(model: str, data: Path, updates: int, held_out: int) -> list[Row]:
    """The held-out loss on E2E before and after LoRA over each of the bases."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = methods.write_data(data, folder, held_out)
        common = {
            "model": model,
            "data.train": str(files["train"]),
            "data.eval": str(files["heldout"]),
            "steps": updates,
            "eval_every": updates,
            "optimizer.warmup_steps": updates // methods.WARMUP,
            "optimizer.learning_rate": methods.RATES["lora"],
        }
        for base, settings in TUNED.items():
            workdir = folder / base.replace(", ", "-")
            losses = methods.run("lora", {**common, **settings}, workdir)["losses"]
            rows.append({"projections": base, "before": losses[0], "after": losses[-1]})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def page(results: Mapping[str, Any]) -> str:
    """quantization.md."""
    rows, tuned, pair = results["rows"], results["tuned"], results["nf4_against_int4"]
    lines = [
        "# What quantizing a base costs",
        "",
        f"Made by `experiments/quantization.py`: `{results['model']}`, {results['texts']} rows of GSM8K's test set, "
        f"{rows[0]['tokens']:,} tokens. Embedding, head and norms stay as they are. Differences and divergences are "
        "from the float32 base on the same tokens, in 1/1000 nats a token, with standard errors (rows are the draws). "
        f"Under `int4, 128`, down_proj has groups of {NARROW_DOWN}.",
        "",
        "| projections | bits a weight | perplexity | loss, difference | KL divergence |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['projections']} | {row['bits']:.2f} | {row['perplexity']:.3f} "
            f"| {1e3 * row['loss_difference']:+.2f} ± {1e3 * row['loss_error']:.2f} "
            f"| {1e3 * row['divergence']:.3f} ± {1e3 * row['divergence_error']:.3f} |"
        )
    lines += [
        "",
        f"NF4 less int4 at the same {rows[2]['bits']:.2f} bits, on the same tokens: loss {1e3 * pair['loss']:+.2f} ± "
        f"{1e3 * pair['loss_error']:.2f}, divergence {1e3 * pair['divergence']:+.3f} ± "
        f"{1e3 * pair['divergence_error']:.3f} (1/1000 nats).",
        "",
        "![KL divergence and loss against bits](quantization.png)",
        "",
        f"LoRA on E2E after {results['updates']} updates, {results['heldout']} held-out examples, the same batches "
        "and rate; nats a token:",
        "",
        "| base | before | after | against LoRA over float32 |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in tuned:
        change = 100 * (row["after"] / tuned[0]["after"] - 1)
        lines.append(
            f"| {row['projections']} | {row['before']:.4f} | {row['after']:.4f} | {change:+.2f} % |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: list[Row], path: Path) -> None:
    """Divergence (logarithmic) and loss difference over the bits of a weight."""
    from matplotlib.figure import Figure

    colors = {"int8": "#009E73", "nf4": "#0072B2", "int4": "#E69F00", "fp4": "#D55E00"}
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = ("KL divergence from float32", "loss above float32's")
    for axes, key, title in zip(panels, ("divergence", "loss"), titles, strict=True):
        values = "divergence" if key == "divergence" else "loss_difference"
        for row in rows[1:]:
            color = colors[row["projections"].split(",")[0]]
            y, error = 1e3 * row[values], 2e3 * row[f"{key}_error"]
            axes.errorbar(row["bits"], y, error, fmt="o", color=color, capsize=3)
            axes.annotate(
                row["projections"], (row["bits"], y), (5, 4), textcoords="offset points", fontsize=8
            )
        axes.set_xscale("log", base=2)
        axes.set_xlim(4, 10.5)
        axes.set_xticks([4, 5, 6, 8], ["4", "5", "6", "8"])
        axes.set_xlabel("bits a weight of the projections")
        axes.set_ylabel("1/1000 nats a token, ± 2 standard errors")
        axes.set_title(title, fontsize=11)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yscale("log")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measures every scheme, tunes over some, and writes quantization.json, .md and .png."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="gsm8k and e2e")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rows", type=int, default=1319)
    parser.add_argument("--tune-only", action="store_true", help="keep the schemes' figures")
    parser.add_argument("--updates", type=int, default=300, help="of LoRA on E2E")
    parser.add_argument("--heldout", type=int, default=400, help="examples of E2E")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, metavar="FOLDER")
    arguments = parser.parse_args()
    target = arguments.output / "quantization.json"
    if arguments.tune_only:
        kept = json.loads(target.read_text(encoding="utf-8"))
        rows, pair, arguments.rows = kept["rows"], kept["nf4_against_int4"], kept["texts"]
    else:
        file = arguments.data / "gsm8k" / "test.jsonl"
        rows, pair = measure(arguments.model, file, arguments.rows)
    tuned = tune(arguments.model, arguments.data / "e2e", arguments.updates, arguments.heldout)
    results = {
        "model": arguments.model, "texts": arguments.rows, "updates": arguments.updates,
        "heldout": arguments.heldout, "rows": rows, "nf4_against_int4": pair, "tuned": tuned,
    }  # fmt: skip
    target.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    target.with_suffix(".md").write_text(page(results), encoding="utf-8")
    draw(rows, target.with_suffix(".png"))
    print(page(results))


if __name__ == "__main__":
    main()
