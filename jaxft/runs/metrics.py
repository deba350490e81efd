"""What a run reports: metrics.jsonl and a progress bar."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxft.runs.folder import written
from jaxft.runs.reporters import Reporter
from jaxft.runtime import storage
from jaxft.runtime.processes import first

OF_THE_STEP = ("loss", "learning_rate", "grad_norm", "tokens", "bad")  # whatever the objective
PLAIN_SECONDS = 10.0  # between two progress lines where there is no terminal


class Metrics:
    """RUN/metrics.jsonl, a line a step and a line for each set of an evaluation, passed on to the reporters.

    A number that is not finite is written as null, for JSON has no other way.

    Args:
        path: the file; lines after `step`, evaluations that lack a set, and what a crash left of a line are cut
            off, so that a run that goes on has each step once.
        step: how many updates have been made.
        services: further reporters.
        sets: names of the held-out sets; "" where there is a single one, which needs no name.
        best: the number by which the best evaluation is chosen.

    Attributes:
        values: {step: that number} of the evaluations that are whole, on the first set.
    """

    def __init__(
        self,
        path: Path,
        step: int,
        services: list[Reporter],
        sets: Sequence[str] = ("",),
        best: str = "loss",
    ) -> None:
        self._path, self._services, self._best = path, services, best
        lines = [line for line in read_metrics(path) if line["step"] <= step]
        held_out = [line for line in lines if line["split"] == "eval"]
        counts = collections.Counter(line["step"] for line in held_out)
        whole = {at for at, number in counts.items() if number == len(sets)}
        kept = [line for line in lines if line["split"] != "eval" or line["step"] in whole]
        with written(path):
            storage.write_text(path, "".join(map(_json_line, kept)))
            self._file = path.open("a", encoding="utf-8")
        self.values: dict[int, float] = {}
        for line in held_out:
            if line["step"] in whole:
                self.values.setdefault(line["step"], line.get(best, math.nan))

    def write(self, split: str, step: int, numbers: Mapping[str, float]) -> None:
        """Appends {"step", numbers ..., "split"}."""
        self._append([{"step": step, **numbers, "split": split}])
        self._report(split, step, numbers)

    def write_evaluation(self, step: int, results: Mapping[str, Mapping[str, float]]) -> None:
        """Appends {"step", numbers ..., "set", "split": "eval"} for each set by name, all at once."""
        names = {name: {"set": name} if name else {} for name in results}
        self._append(
            [
                {"step": step, **numbers, **names[name], "split": "eval"}
                for name, numbers in results.items()
            ]
        )
        self.values[step] = next(iter(results.values())).get(self._best, math.nan)
        for name, numbers in results.items():
            self._report(f"eval/{name}" if name else "eval", step, numbers)

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        with written(self._path):
            self._file.write("".join(map(_json_line, lines)))
            self._file.flush()

    def _report(self, split: str, step: int, numbers: Mapping[str, float]) -> None:
        for service in self._services:
            service.report(split, step, numbers)

    def close(self) -> None:
        """Closes the file and the reporters."""
        with contextlib.suppress(OSError):  # what could not be written was told when it was
            self._file.close()
        for service in self._services:
            service.close()


def _json_line(line: Mapping[str, Any]) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in line.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl, null as nan; a line cut short by a crash is left out."""
    lines = []
    if path.exists():
        for text in path.read_bytes().decode("utf-8", "replace").split("\n"):
            with contextlib.suppress(json.JSONDecodeError):
                line = json.loads(text)
                if isinstance(line, dict) and {"step", "split"} <= line.keys():
                    lines.append({k: math.nan if v is None else v for k, v in line.items()})
    return lines


def say(line: str) -> None:
    """A line on stderr, said by one process."""
    if first():
        print(line, file=sys.stderr, flush=True)


class Progress:
    """A bar on stderr with loss, tokens a second and the time left; plain lines where it is no terminal.

    Args:
        step, steps: updates made and to make.
        best: the number that is shown beside the loss.
    """

    def __init__(self, step: int, steps: int, best: str = "loss") -> None:
        self._best = best
        self._terminal = sys.stderr.isatty() and first()
        self._bar = tqdm(initial=step, total=steps, unit="step", disable=not self._terminal)
        self._step, self._steps = step, steps
        self._first_step, self._start = step, time.monotonic()
        self._said = 0.0

    @contextlib.contextmanager
    def apart(self, line: str) -> Iterator[None]:
        """Says what is done beside updates, and keeps its time out of the time that is left."""
        self.say(line)
        with self.pause():
            yield

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Keeps the time of what is done beside updates out of the time that is left."""
        began = time.monotonic()
        yield
        self._start += time.monotonic() - began
        self._bar.unpause()

    def update(self, step: int, numbers: Mapping[str, float]) -> None:
        """Shows the numbers of an update."""
        text = f"loss {numbers['loss']:.4f}, {numbers['tokens_per_second']:.0f} tokens/s"
        if self._best != "loss" and self._best in numbers:
            text = f"{self._best} {numbers[self._best]:.3f}, {text}"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(step - self._step)
        self._step = step
        now = time.monotonic()
        if not self._terminal and (now - self._said > PLAIN_SECONDS or step == self._steps):
            self._said = now
            left = (now - self._start) / max(step - self._first_step, 1) * (self._steps - step)
            self.say(f"step {step}/{self._steps}: {text}, {left:.0f} s left")

    def say(self, line: str) -> None:
        """A line above the bar."""
        if self._terminal:
            self._bar.write(line, file=sys.stderr)
        else:
            say(line)

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.close()


def numbers_of(read: Mapping[str, float], tokens: int, seconds: float) -> dict[str, float]:
    """What metrics.jsonl says of an update.

    Args:
        read: what the step returned.
        tokens: in its batch.
        seconds: that it took.
    """
    return {
        "loss": read["loss"],
        "learning_rate": read["learning_rate"],
        "grad_norm": read["grad_norm"],
        "tokens": tokens,
        "trained_tokens": int(read["tokens"]),
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
    } | further(read)


def further(numbers: Mapping[str, float]) -> dict[str, float]:
    """The averages that an objective reports beside its loss; what was never counted (NaN) is left out."""
    named = {name: value for name, value in numbers.items() if name not in OF_THE_STEP}
    return {name: value for name, value in named.items() if not math.isnan(value)}
