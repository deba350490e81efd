"""Flips a bit or cuts off a file at random places of what a run wrote: none is restored silently wrong.

    python experiments/corruption.py --places 1000

A run of LoRA writes checkpoints and an adapter, one of full tuning a model. A place is a file of theirs (by chance, or
weighed by bytes) and a bit to flip or a length to cut it to. Then the folder is read as jaxft reads it, and what comes
out is compared with what was written, bit for bit. For the measure of it the same damages are read again without the
manifest, by Orbax and safetensors' layout alone. Written: corruption.json, corruption.md.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxft
from jaxft.configuration import load_config
from jaxft.errors import UserError
from jaxft.formats import adapter_config, huggingface
from jaxft.runs import checkpoint
from jaxft.training import loop

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "trl"
SETTINGS = {
    "model": str(GOLDEN / "model"),
    "data.train": str(GOLDEN / "data.jsonl"),
    "data.max_length": 128,
    "data.packing": True,
    "batch_size": 4,
    "steps": 3,
    "checkpoint.every": 1,
    "checkpoint.keep": 3,
    "mesh.data": 1,
}
LAST = SETTINGS["steps"]
Read = Callable[[Path], Any]


def main() -> None:
    """Reads the flags and writes the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--places", type=int, default=1000, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, metavar="DIR")
    flags = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = corrupt(flags.places, random.Random(flags.seed), Path(folder))
    found |= {"seed": flags.seed, "seconds": round(time.perf_counter() - began)}
    flags.output.mkdir(parents=True, exist_ok=True)
    (flags.output / "corruption.json").write_text(json.dumps(found, indent=2) + "\n")
    (flags.output / "corruption.md").write_text(report(found))
    print(report(found))
    if any(counts.get("silently wrong") for counts in found["with"].values()):
        raise SystemExit(1)


def corrupt(places: int, draw: random.Random, folder: Path) -> dict[str, Any]:
    """{"with": {kind of folder: {what came of it: count}}, "without": the same without the manifest}."""
    whole, like = write(folder)
    readers: dict[str, Read] = {
        "checkpoint": lambda path: read_checkpoint(path, like),
        "adapter": read_adapter,
        "model": lambda path: leaves(jaxft.load(path)[1]),
    }
    expected = {kind: readers[kind](path) for kind, path in whole.items()}
    counts = {
        way: {kind: collections.Counter[str]() for kind in readers} for way in ("with", "without")
    }
    for _ in range(places):
        kind = draw.choice(list(readers))
        harmed = folder / "harmed"
        shutil.copytree(whole[kind], harmed)
        name, how = damage(harmed, kind, draw)
        for way in ("with", "without"):
            with contextlib.ExitStack() as stack:
                if way == "without":
                    stack.enter_context(blindly())
                outcome = judge(readers[kind], harmed, expected[kind])
            counts[way][kind][outcome] += 1
            if way == "with" and outcome == "silently wrong":
                print(f"silently wrong: {kind}, {name}, {how}")
        shutil.rmtree(harmed)
    return {way: {k: dict(c) for k, c in kinds.items()} for way, kinds in counts.items()} | {
        "places": places
    }


def write(folder: Path) -> tuple[dict[str, Path], Any]:
    """{kind: a folder of it}, and a tree like the checkpoint's."""
    kept: list[Any] = []
    take = loop.Loop.save

    def saving(run: Any) -> None:
        kept[:] = [run.saved()]
        take(run)

    loop.Loop.save = saving
    loop.train(load_config("configs/sft.py:lora", SETTINGS), folder / "lora")
    like = kept[0]
    loop.Loop.save = take
    loop.train(load_config("configs/sft.py:full", SETTINGS), folder / "full")
    return {
        "checkpoint": folder / "lora" / "checkpoints",
        "adapter": folder / "lora" / "adapter",
        "model": folder / "full" / "model",
    }, like


def damage(folder: Path, kind: str, draw: random.Random) -> tuple[str, str]:
    """Harms a file: (its name, how). Of a run's checkpoints it is one of the last."""
    inside = folder / str(LAST) if kind == "checkpoint" else folder
    files = [p for p in sorted(inside.rglob("*")) if p.is_file() and p.stat().st_size]
    sizes = [path.stat().st_size for path in files]
    file = draw.choice([draw.choice(files), draw.choices(files, sizes)[0]])
    content = bytearray(file.read_bytes())
    place = draw.randrange(len(content))
    if draw.random() < 0.7:
        bit = draw.randrange(8)
        content[place] ^= 1 << bit
        how = f"bit {bit} of byte {place} flipped"
    else:
        del content[place:]
        how = f"cut to {place} bytes"
    file.write_bytes(content)
    return file.relative_to(folder).as_posix(), how


def judge(read: Read, folder: Path, expected: Any) -> str:
    """What came of reading: refused, the same as was written, the one before it (named), or silently wrong."""
    try:
        found = read(folder)
    except UserError:
        return "refused"
    except Exception:
        return "another error"
    if isinstance(found, str):
        return found
    same = found.keys() == expected.keys() and all(
        found[path].tobytes() == leaf.tobytes() for path, leaf in expected.items()
    )
    return "unharmed" if same else "silently wrong"


def read_checkpoint(folder: Path, like: Any) -> Any:
    """The last checkpoint's leaves, or that the one before it was used and the last was named."""
    said: list[str] = []
    checkpoints = checkpoint.Checkpoints(folder, keep=3)
    try:
        step = checkpoints.newest(said.append)
        if step == LAST:
            data = {"data": np.asarray(json.dumps(checkpoints.data(step), sort_keys=True))}
            return leaves(checkpoints.restore(step, like)) | data
        named = len(said) == 1 and f"/{LAST}: damaged" in said[0]
        return "the one before it, and said so" if step == LAST - 1 and named else "silently wrong"
    finally:
        checkpoints.close()


def read_adapter(folder: Path) -> Any:
    """The tree's leaves with the adapter in it."""
    _, params = jaxft.load(GOLDEN / "model")
    return leaves(jaxft.load_adapter(params, folder))


def leaves(tree: Any) -> dict[str, np.ndarray]:
    """{path: array}."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


@contextlib.contextmanager
def blindly() -> Any:
    """Within it no manifest is looked at."""
    homes = (checkpoint, adapter_config, huggingface)
    before = [module.check_manifest for module in homes]
    for module in homes:
        module.check_manifest = lambda folder, required=False: {}  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module, function in zip(homes, before, strict=True):
            module.check_manifest = function  # type: ignore[attr-defined]


def report(found: dict[str, Any]) -> str:
    """The results as a page."""
    outcomes = ["refused", "the one before it, and said so", "unharmed", "another error"]
    outcomes.append("silently wrong")
    rows = [
        f"| {kind} | {way} | "
        + " | ".join(str(counts.get(outcome, 0)) for outcome in outcomes)
        + " |"
        for kind in found["with"]
        for way, counts in (("with", found["with"][kind]), ("without", found["without"][kind]))
    ]
    return f"""\
# A flipped bit, a file cut off

`python experiments/corruption.py --places {found["places"]} --seed {found["seed"]}`: {found["places"]} places, \
{found["seconds"]} s. Each folder was read by jaxft, and once more with its manifest left unread.

| folder | manifest | {" | ".join(outcomes)} |
| --- | --- | {" | ".join(["---"] * len(outcomes))} |
{chr(10).join(rows)}

"Unharmed" is what was damaged where nothing is computed with: the model card, or white space and the note of the base
in the manifest.
"""


if __name__ == "__main__":
    main()
