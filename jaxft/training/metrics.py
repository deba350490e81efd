"""What a run reports: metrics.jsonl, a progress bar, and the services named in `report_to`."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from jaxft.errors import UserError

PLAIN_SECONDS = 10.0  # between two progress lines where there is no terminal


class Reporter(Protocol):
    """Where numbers go beside metrics.jsonl."""

    def report(self, split: str, step: int, numbers: Mapping[str, float]) -> None:
        """Takes one line's numbers."""

    def close(self) -> None:
        """Writes what is left."""


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, workdir: Path) -> None:
        with _needs("tensorboard"):
            from tensorboardX import SummaryWriter
        self._writer = SummaryWriter(str(workdir / "tensorboard"))

    def report(self, split: str, step: int, numbers: Mapping[str, float]) -> None:
        """Scalars `split/name`."""
        for name, value in numbers.items():
            self._writer.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


class Wandb:
    """A run at Weights & Biases with the folder's name, which goes on when the folder does."""

    def __init__(self, workdir: Path, config: Mapping[str, Any]) -> None:
        with _needs("wandb"):
            import wandb
        name = workdir.absolute().name
        self._run = wandb.init(
            project="jaxft",
            name=name,
            id=name,
            resume="allow",
            dir=str(workdir),
            config=dict(config),
        )

    def report(self, split: str, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers `split/name`."""
        self._run.log({f"{split}/{name}": value for name, value in numbers.items()}, step=step)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


@contextlib.contextmanager
def _needs(extra: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"config.report_to: {extra} is not installed: pip install 'jaxft[{extra}]'"
        ) from error


def reporters(names: tuple[str, ...], workdir: Path, config: Mapping[str, Any]) -> list[Reporter]:
    """The services that `config.report_to` names."""
    makers: dict[str, Callable[[], Reporter]] = {
        "tensorboard": lambda: TensorBoard(workdir),
        "wandb": lambda: Wandb(workdir, config),
    }
    return [makers[name]() for name in names]


class Metrics:
    """RUN/metrics.jsonl, a line a step and a line an evaluation, passed on to the reporters.

    Args:
        path: the file; lines after `step` are cut off, so that a run that goes on has each step once.
        step: how many updates have been made.
        services: further reporters.
    """

    def __init__(self, path: Path, step: int, services: list[Reporter]) -> None:
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(path)
        self._file = path.open("a")
        self._services = services
        self.evaluated = {line["step"] for line in kept if line["split"] == "eval"}

    def write(self, split: str, step: int, numbers: Mapping[str, float]) -> None:
        """Appends {"step", numbers ..., "split"}."""
        self._file.write(json.dumps({"step": step, **numbers, "split": split}) + "\n")
        self._file.flush()
        for service in self._services:
            service.report(split, step, numbers)

    def close(self) -> None:
        """Closes the file and the reporters."""
        self._file.close()
        for service in self._services:
            service.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; a line cut short by a crash is left out."""
    lines = []
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
    return lines


class Progress:
    """A bar on stderr with loss, tokens a second and the time left; plain lines where it is no terminal.

    Args:
        step, steps: updates made and to make.
        quiet: say nothing, as in all processes but the first.
    """

    def __init__(self, step: int, steps: int, quiet: bool = False) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr.isatty() and not quiet
        self._bar = tqdm(initial=step, total=steps, unit="step", disable=not self._terminal)
        self._step, self._steps = step, steps
        self._first_step, self._start = step, time.monotonic()
        self._said = 0.0

    def update(self, step: int, numbers: Mapping[str, float]) -> None:
        """Shows the numbers of an update."""
        text = f"loss {numbers['loss']:.4f}, {numbers['tokens_per_second']:.0f} tokens/s"
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
        elif not self._quiet:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.close()
