"""kill -9 at random moments: each start goes on, and the end is bit for bit that of a run nobody disturbed.

    python experiments/soak.py --kills 200

A run over a small base is killed, started again, killed again, ..., until it is whole; then the next run begins. A
kill is aimed at a phase (the start, a step, a save's copy, the commit in its thread, an evaluation, the export),
at a random entry into it and a random time after that, or at a random change of a file in the run's folder. Checked
at each start: it goes on from the last checkpoint that is whole, and how many updates were lost. Checked at each
end: metrics (each step once), samples and the exported adapter. Written: soak.json, soak.md.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxft.configuration import load_config
from jaxft.runs import checkpoint, evaluation, metrics, saves
from jaxft.training import loop

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "trl"
EVERY = 4
SETTINGS = {
    "model": str(GOLDEN / "model"),
    "data.train": str(GOLDEN / "data.jsonl"),
    "data.eval": str(GOLDEN / "data.jsonl"),
    "data.max_length": 128,
    "data.packing": True,  # one shape, one program
    "method.dropout": 0.1,
    "batch_size": 4,
    "eval_batch_size": 8,
    "steps": 20,
    "eval_every": 6,
    "checkpoint.every": EVERY,
    "checkpoint.best": True,
    "samples.count": 1,
    "samples.max_new_tokens": 4,
    "mesh.data": 1,
}
# The phases: where a function is entered, and its name there.
PHASES: dict[str, tuple[Any, str]] = {
    "start": (loop, "begin_run"),
    "step": (loop.Loop, "dispatch"),
    "save": (checkpoint.Checkpoints, "save"),
    "commit": (checkpoint.Checkpoints, "_commit"),
    "evaluation": (evaluation, "held_out"),
    "samples": (loop, "samples"),
    "export": (loop, "_exported"),
    "plot": (loop, "plot_run"),
}
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
Entries = dict[str, list[float]]  # seconds of each entry into a phase


def main() -> None:
    """Reads the flags and writes the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, metavar="DIR")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(flags.kills, random.Random(flags.seed), Path(folder))
    found["seed"] = flags.seed
    flags.output.mkdir(parents=True, exist_ok=True)
    (flags.output / "soak.json").write_text(json.dumps(found, indent=2) + "\n")
    (flags.output / "soak.md").write_text(report(found))
    print(report(found))


def soak(kills: int, draw: random.Random, folder: Path) -> dict[str, Any]:
    """Kills so often, and says what was found; an AssertionError where a promise is broken."""
    began = time.perf_counter()
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
    spent: Entries = {}
    for name in ("compiling", "whole"):
        assert start(folder / name, cache, spent) == (0, None), "an undisturbed run failed"
    expected, changes = ending(folder / "whole"), int(spent.pop("changes")[0])
    hit: collections.Counter[str] = collections.Counter()
    lost: list[int] = []
    runs = 0
    while hit.total() < kills:
        workdir, place = folder / f"run{runs}", ""
        while True:
            aim = draw_aim(draw, spent, changes) if hit.total() < kills else None
            before = last_whole(workdir)
            reached = max((line["step"] for line in read(workdir)), default=0)
            code, resumed = start(workdir, cache, aim=aim)
            if resumed is not None:  # the start got as far as that
                assert resumed == before, f"{place}: went on from {resumed}, not {before}"
                lost.append(reached - before)
                assert lost[-1] <= EVERY, f"{place}: {lost[-1]} updates lost"
            if code == 0:
                break
            assert code == -signal.SIGKILL, f"{place}: exit code {code}"
            place = aim[0] if aim else ""
            hit[place] += 1
        assert ending(workdir) == expected, f"{workdir}: not what an undisturbed run wrote"
        shutil.rmtree(workdir)
        runs += 1
    return {
        "kills": hit.total(),
        "where": dict(sorted(hit.items())),
        "runs": runs,
        "checkpoint_every": EVERY,
        "updates_lost_at_most": max(lost),
        "starts": len(lost),
        "seconds": round(time.perf_counter() - began),
    }


def draw_aim(draw: random.Random, spent: Entries, changes: int) -> tuple[str, int, float]:
    """(phase, which entry into it, seconds after it), or ("file", which change of a file, 0)."""
    phase = draw.choice([*spent, "file", "file"])
    if phase == "file":
        return "file", draw.randrange(changes), 0.0
    entry = draw.randrange(len(spent[phase]))
    return phase, entry, draw.random() * spent[phase][entry]


def start(
    workdir: Path,
    cache: str,
    spent: Entries | None = None,
    aim: tuple[str, int, float] | None = None,
) -> tuple[int, int | None]:
    """One `jaxft.train` in a process of its own: (its exit code, the step it went on from if it got so far).

    Args:
        workdir: the run's folder.
        cache: where compiled programs are kept.
        spent: is filled with the seconds of each entry into each phase, and the changes of files.
        aim: when to kill.
    """
    told = mmap.mmap(-1, 1 << 16)
    sys.stdout.flush()
    child = os.fork()  # before any device is asked for, so that nothing but this module is shared
    if child == 0:
        code = 1
        try:
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), 2)
            code = in_child(workdir, cache, told, aim)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    text = told[:].rstrip(b"\0").decode()
    said = json.loads(text) if text else {}
    if spent is not None:
        spent.clear()
        spent.update(said["spent"], changes=[said["changes"]])
    return os.waitstatus_to_exitcode(status), said.get("resumed")


def in_child(workdir: Path, cache: str, told: mmap.mmap, aim: tuple[str, int, float] | None) -> int:
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    said: dict[str, Any] = {"spent": collections.defaultdict(list), "changes": 0}
    watch_files(str(workdir), said, aim)
    for phase, (owner, name) in PHASES.items():
        watch(phase, owner, name, said, aim)
    taken_up = saves.Saves.newest

    def restoring(*arguments: Any) -> Any:
        found = taken_up(*arguments)
        tell(told, {"resumed": found[0] if found else 0})
        return found

    saves.Saves.newest = restoring
    loop.train(load_config("configs/sft.py:lora", SETTINGS), workdir)
    if aim is None:
        tell(told, said)
    return 0


def tell(told: mmap.mmap, said: Any) -> None:
    told[:] = json.dumps(said).encode().ljust(len(told), b"\0")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def watch(
    phase: str, owner: Any, name: str, said: dict[str, Any], aim: tuple[str, int, float] | None
) -> None:
    """Times each entry into a phase, and kills where that is the aim."""
    function: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(function)
    def watched(*arguments: Any, **named: Any) -> Any:
        entries = said["spent"][phase]
        number = len(entries)
        entries.append(0.0)
        if aim is not None and aim[:2] == (phase, number):
            threading.Timer(aim[2], kill).start()
        began = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            entries[number] = time.perf_counter() - began

    setattr(owner, name, watched)


def watch_files(workdir: str, said: dict[str, Any], aim: tuple[str, int, float] | None) -> None:
    """Counts the changes of files below the folder, and kills before the one that is the aim."""

    def hook(event: str, arguments: Any) -> None:
        writes = (
            event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax")
        )
        if (writes or event in CHANGES) and str(arguments[0]).startswith(workdir):
            if aim is not None and aim[:2] == ("file", said["changes"]):
                kill()
            said["changes"] += 1

    sys.addaudithook(hook)


def last_whole(workdir: Path) -> int:
    """The last checkpoint whose manifest holds, or 0, by this script's own reading of it."""
    whole = [0]
    for path in (workdir / "checkpoints").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            files = json.loads((path / "manifest.json").read_text())["files"]
            if path.name.isdecimal() and all(
                hashlib.sha256((path / name).read_bytes()).hexdigest() == digest
                for name, digest in files.items()
            ):
                whole.append(int(path.name))
    return max(whole)


def read(workdir: Path) -> list[dict[str, Any]]:
    return metrics.read_metrics(workdir / "metrics.jsonl")


def ending(workdir: Path) -> dict[str, Any]:
    """What has to be the same: metrics without the clock's, samples, and the adapter's bytes."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    trained = [line["step"] for line in lines if line["split"] == "train"]
    assert trained == list(range(1, SETTINGS["steps"] + 1)), f"{workdir}: steps {trained}"
    left = {path.name for path in workdir.iterdir()}
    return {
        "metrics": [line | {"tokens_per_second": 0} for line in lines],
        "samples": (workdir / "samples.jsonl").read_text(),
        "adapter": dict(digests(workdir / "adapter")),
        "folder": sorted(left),
    }


def digests(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.iterdir()):
        yield path.name, hashlib.sha256(path.read_bytes()).hexdigest()


def report(found: dict[str, Any]) -> str:
    """The results as a page."""
    where = "\n".join(f"| {place} | {number} |" for place, number in found["where"].items())
    return f"""\
# kill -9 at random moments

`python experiments/soak.py --kills {found["kills"]} --seed {found["seed"]}`: {found["kills"]} kills over \
{found["runs"]} runs of {SETTINGS["steps"]} updates with a checkpoint every {EVERY}, in {found["seconds"]} s. Every \
start went on from the last whole checkpoint, and every run ended with the metrics, samples and adapter of an \
undisturbed one, bit for bit.

| killed in | times |
| --- | --- |
{where}

Of the updates that were told in metrics.jsonl at most {found["updates_lost_at_most"]} were made again, the interval \
being {EVERY}, in {found["starts"]} starts.
"""


if __name__ == "__main__":
    main()
