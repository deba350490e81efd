"""How many bytes 1, 10 and 1,000 versions of one base take by method, and what storing them narrower costs.

    python experiments/storage.py --data ../shared/data/e2e [--updates 40] [--heldout 60]

Every method trains on E2E with the embedded base as in experiments/methods.py; its adapter is then written again by
`jaxft merge --dtype` in float32, bfloat16, float16 and int8, and each is read and asked for its loss on the same
held-out rows. Bytes are those of the files of tensors. Written beside this script: storage.json, storage.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import methods

HERE = Path(__file__)
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "lora, rank 16": ("lora", {}),
    "lora, rank 4": ("lora", {"method.rank": 4}),
    "dora, rank 16": ("dora", {}),
    "vera, rank 256": ("vera", {}),
}
DTYPES = ("float32", "bfloat16", "float16", "int8")
VERSIONS = (1, 10, 1000)
Row = dict[str, Any]


def loss_of(adapter: Path | None, rows: Path, model: Any = "tiny") -> float:
    """Nats a token of the held-out completions."""
    import jaxft
    from jaxft.assets import model_folder

    module, params = jaxft.load(model)
    if adapter is not None:
        params = jaxft.load_adapter(params, adapter)
    tokenizer = model_folder(model)
    found = jaxft.evaluate(module, params, str(rows), ("loss",), tokenizer=tokenizer, batch_size=16)
    return float(found.metrics["loss"].value)


def tensor_bytes(folder: Path) -> int:
    """Bytes of a folder's tensors."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def measured(
    name: str, folder: Path, files: dict[str, Path], overrides: dict[str, Any]
) -> list[Row]:
    """A method's rows: as the run left it, and stored in each dtype."""
    from jaxft.formats.storing import store_folder

    method, own = RUNS[name]
    overrides = {
        **overrides,
        **own,
        "data.train": str(files["train"]),
        "data.eval": str(files["heldout"]),
        "optimizer.learning_rate": methods.RATES[method],
    }
    methods.run(method, overrides, folder)
    whole = folder / "model"
    if whole.is_dir():
        loss = loss_of(None, files["heldout"], whole)
        return [{"name": name, "dtype": "float32", "bytes": tensor_bytes(whole), "loss": loss}]
    rows: list[Row] = []
    for dtype in ("", *DTYPES):
        stored = folder / (dtype or "as it was")
        moved = store_folder(folder / "adapter", stored, dtype) if dtype else 0.0
        at = stored if dtype else folder / "adapter"
        loss = loss_of(at, files["heldout"])
        rows.append(
            {"name": name, "dtype": dtype, "bytes": tensor_bytes(at), "loss": loss, "moved": moved}
        )
    return rows


def table(rows: Iterable[Row], base: int) -> str:
    """The rows as Markdown."""
    lines = [
        "| method | stored | bytes a version | 1 version | 10 | 1,000 | held-out loss | change | moved |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    first: dict[str, float] = {}
    for row in rows:
        before = first.setdefault(row["name"], row["loss"])
        shared = 0 if "moved" not in row else base
        totals = " | ".join(f"{(shared + n * row['bytes']) / 1e6:,.1f} MB" for n in VERSIONS)
        change = f"{row['loss'] - before:+.5f}" if row["dtype"] and "moved" in row else ""
        moved = f"{row['moved']:.1e}" if row.get("moved") else ""
        stored = row["dtype"] or "as the run left it"
        lines.append(
            f"| {row['name']} | {stored} | {row['bytes']:,} | {totals} | {row['loss']:.4f} | {change} | {moved} |"
        )
    return "\n".join(lines) + "\n"


def page(found: Row) -> str:
    """storage.md."""
    rows = found["rows"]
    own = {row["name"]: row["bytes"] for row in rows if not row["dtype"]}
    same = [
        row
        for row in rows
        if row["dtype"] in ("float32", "int8") and row["bytes"] == own.get(row["name"])
    ]
    again = [row for row in rows if row["dtype"] == "int8" and not row.get("moved")]
    shown = [row for row in rows if row not in same and row not in again]
    return f"""# What versions of one base take

Made by `experiments/storage.py`: {found["updates"]} updates on E2E with the embedded base, each method at the rate of
[`methods.py`](methods.py), and loss in nats a token of held-out completions, {found["loss_before"]:.3f} before
training. Full tuning stores a model a version; the others store the base ({found["base_bytes"] / 1e6:.1f} MB) once,
and an adapter a version. Each adapter was written again by `jaxft merge --adapter DIR --output DIR --dtype DTYPE`;
"moved" is how far its numbers moved, relative to their size, and "change" what that does to the loss.

{table(shown, found["base_bytes"])}
VeRA as the run leaves it has its two projections in every folder, as PEFT writes it; its seed draws them again, so
that a version needs its vectors alone. int8 has a scale for each rank and keeps vectors in float32: of VeRA it saves
nothing. A run of so few updates says what storing costs, not which method is better; for that see
[`methods.md`](methods.md).
"""


def main() -> None:
    """Trains, stores, measures and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="the folder of E2E's valid.txt and test.txt"
    )
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--heldout", type=int, default=60)
    options = parser.parse_args()
    from jaxft.assets import model_folder

    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        files = methods.write_data(options.data, Path(temporary), options.heldout)
        overrides = {"steps": options.updates, "eval_every": options.updates}
        before = loss_of(None, files["heldout"])
        for number, name in enumerate(RUNS):
            rows += measured(name, Path(temporary) / str(number), files, overrides)
            print(table(rows, tensor_bytes(model_folder("tiny"))), flush=True)
    base = tensor_bytes(model_folder("tiny"))
    found = {"base_bytes": base, "loss_before": before, "updates": options.updates, "rows": rows}
    HERE.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    HERE.with_suffix(".md").write_text(page(found))


if __name__ == "__main__":
    main()
