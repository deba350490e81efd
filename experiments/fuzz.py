"""Throws damaged and hostile input at everything that jaxft reads, and counts what it does not stand.

    python experiments/fuzz.py --count 3000 --output experiments

Every input is made from a seed, by breaking a sound file (bytes flipped, cut, repeated; JSON values exchanged for
others of every kind) or from a grammar (templates, command lines). jaxft has to read it or to refuse it with one
UserError. A finding is: another exception, a message of more than a line or of 2000 letters, more than a second
of processor time, 256 MB more memory, a file written outside of the folder
of the run, a process started that is not the sandboxed one, a connection, a pickle.

`--count` inputs of each kind are tried; `fuzz.md` gets a table of inputs and findings. A finding is printed with
its kind and number: `--only KIND --first NUMBER --count 1` tries it again.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import gc
import random
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from fuzz_inputs import KINDS, Inputs

from jaxft.errors import UserError

SECONDS = 1.0
MEGABYTES = 256
PATIENCE = 20.0  # seconds that may pass while a busy machine does other things


@dataclasses.dataclass
class Result:
    """What became of the inputs of a kind: read, refused, and the findings, one line each."""

    read: int = 0
    refused: int = 0
    slowest: float = 0.0
    findings: list[str] = dataclasses.field(default_factory=list)


class Watch:
    """Notes what an input must not do: an audit hook, on while `watching`."""

    def __init__(self, home: Path) -> None:
        self.home = home.resolve()
        self.watching = False
        self.seen: list[str] = []
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.watching:
            return
        if event == "open":
            path, mode, _ = arguments
            if isinstance(path, str | bytes) and set(str(mode or "r")) & set("wax+"):
                self._inside(event, path)
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.rename", "os.link", "os.symlink"):
            self._inside(event, arguments[0])
        elif event == "subprocess.Popen":
            if "jaxft.runtime.sandbox.worker" not in arguments[1]:
                self.seen.append(f"started {arguments[1]}")
        elif event in ("os.system", "os.exec", "socket.connect", "pickle.find_class"):
            self.seen.append(f"{event} {arguments}")

    def _inside(self, event: str, path: Any) -> None:
        real = Path(path.decode() if isinstance(path, bytes) else path).resolve()
        programs = jax.config.jax_compilation_cache_dir  # where who runs this has JAX keep them
        if programs and real.is_relative_to(Path(programs).resolve()):
            return
        if not real.is_relative_to(self.home):
            self.seen.append(f"{event} outside of the run: {real}")


def peak() -> float:
    """The most megabytes that this process has had; the kernel limits its sandboxed child by itself."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1e6 if sys.platform == "darwin" else 1e3
    )


def processor_time() -> float:
    """Seconds of this process and of its ended children: a busy machine does not lengthen them."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    usages = [resource.getrusage(kind) for kind in kinds]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def fault_of(try_one: Callable[[], None], watch: Watch, result: Result) -> str:
    """Tries an input; what is wrong with how jaxft took it, or ""."""
    before, start, began = peak(), processor_time(), time.perf_counter()
    watch.seen, watch.watching, fault = [], True, ""
    try:
        try_one()
        result.read += 1
    except UserError as error:
        result.refused += 1
        text = str(error)
        if "\n" in text or not text or len(text) > 2000:
            fault = f"a message of {len(text)} letters: {text[:200]!r}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        fault = f"{type(error).__name__}: {str(error)[:200]!r}"
    finally:
        watch.watching = False
    passed = time.perf_counter() - began
    taken = min(passed, processor_time() - start)  # a child that ends now has served others too
    result.slowest = max(result.slowest, taken)
    if taken > SECONDS or passed > PATIENCE:
        fault = fault or f"{taken:.1f} s of the processor, {passed:.1f} s"
    if peak() - before > MEGABYTES:
        fault = fault or f"{peak() - before:.0f} MB"
    return fault or "; ".join(watch.seen)


def fuzz(
    kind: str, inputs: Inputs, count: int, watch: Watch, seed: int = 0, first: int = 0
) -> Result:
    """Tries `count` inputs of a kind; each is made from the seed, the kind and its number alone."""
    result = Result()
    for number in range(first, first + count):
        draw = random.Random(f"{seed} {kind} {number}")
        try_one = KINDS[kind](inputs, draw)
        if fault := fault_of(try_one, watch, result):
            result.findings.append(f"{kind} {number}: {fault}")
    gc.collect()
    return result


@contextlib.contextmanager
def prepared() -> Iterator[tuple[Inputs, Watch]]:
    """The sound files in a temporary folder, and the watch over it; all code paths compiled once."""
    jax.config.update("jax_platforms", "cpu")
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        inputs = Inputs.made(Path(name))
        watch = Watch(Path(name))
        for kind in KINDS:  # imports and the first trace take their second here
            with contextlib.suppress(UserError):
                KINDS[kind](inputs, random.Random(0))()
        yield inputs, watch


def table(results: dict[str, Result], seed: int) -> str:
    lines = [
        "# Hostile and damaged input",
        "",
        f"`python experiments/fuzz.py --count {max(r.read + r.refused for r in results.values())} --seed {seed}`. "
        "An input is read or refused with one line; a finding is anything else",
        f"(another exception, over {SECONDS:g} s of the processor, {MEGABYTES} MB more, a write outside of the run).",
        "",
        "| kind | inputs | read | refused | slowest, s | findings |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind, result in results.items():
        tried = result.read + result.refused + len(result.findings)
        lines.append(
            f"| {kind} | {tried} | {result.read} | {result.refused} | {result.slowest:.2f} "
            f"| {len(result.findings)} |"
        )
    total = sum(len(result.findings) for result in results.values())
    inputs = sum(result.read + result.refused for result in results.values())
    lines += ["", f"{inputs} inputs, {total} findings; the most memory {peak():.0f} MB.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=1000, help="inputs of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number to begin with")
    parser.add_argument("--only", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--output", type=Path, help="where fuzz.md is written")
    flags = parser.parse_args()
    output = flags.output.resolve() if flags.output else None
    results: dict[str, Result] = collections.defaultdict(Result)
    with prepared() as (inputs, watch):
        for kind in flags.only:
            results[kind] = fuzz(kind, inputs, flags.count, watch, flags.seed, flags.first)
            for line in results[kind].findings:
                print(line)
            print(
                f"{kind}: {results[kind].read} read, {results[kind].refused} refused, "
                f"{len(results[kind].findings)} findings",
                flush=True,
            )
    if output:
        (output / "fuzz.md").write_text(table(results, flags.seed), encoding="utf-8")
    sys.exit(any(result.findings for result in results.values()))


if __name__ == "__main__":
    main()
