"""What a run tells while it is under way: its logs, the bar and the services; and what they say of the best step."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

from ml_collections import ConfigDict

from jaxft.data.feed import Fed
from jaxft.errors import counted
from jaxft.objectives.objective import Metric
from jaxft.runs.best import best_step, is_exhausted
from jaxft.runs.evaluation import Measured
from jaxft.runs.extension import patience_since
from jaxft.runs.folder import Journal, Samples
from jaxft.runs.metrics import Metrics, Progress, numbers_of, say
from jaxft.runs.publish import Logs
from jaxft.runs.reporters import reporters
from jaxft.runtime import processes


class Record:
    """RUN/metrics.jsonl, samples.jsonl and rollouts.jsonl, a bar, and the services of `config.report_to`.

    Args:
        config: of the run.
        logs: where they are written.
        step, steps: updates made and to make.
        sets: names of the held-out sets.
        best: the metric by which the best step is chosen, on the first set.
        changes: the steps at which the run's length changed.
        progress: what shows how far it is; None: a bar of its own.

    Attributes:
        metrics: the numbers so far.
        last: the last training and held-out numbers, as `train_loss`, `eval_loss`, ...
    """

    def __init__(
        self,
        config: ConfigDict,
        logs: Logs,
        step: int,
        steps: int,
        sets: Sequence[str],
        best: Metric,
        changes: Sequence[int],
        progress: Progress | None = None,
    ) -> None:
        self._config, self._steps, self._best, self.publish = config, steps, best, logs.publish
        names = config.report_to if processes.first() else ()
        services = reporters(names, logs.folder, config.to_dict())
        file = logs.folder / "metrics.jsonl"
        self.metrics = Metrics(file, step, services, tuple(sets) or ("",), best.name)
        self._since = patience_since(
            changes, self.metrics.values, config.patience, say, best.better
        )
        self._samples = Samples(logs.folder / "samples.jsonl", self.metrics.values)
        self._rollouts = Journal(logs.folder / "rollouts.jsonl", step)
        self._progress = progress or Progress(step, steps, best.name)
        self.last: dict[str, float] = {}
        self._clock = time.perf_counter()

    def say(self, line: str) -> None:
        """A line above the bar."""
        self._progress.say(line)

    def apart(self, line: str) -> AbstractContextManager[None]:
        """Says what is done beside updates, whose time is none of theirs."""
        return self._progress.apart(line)

    def go_on(self) -> None:
        """Updates begin or go on now: what was done since the last one is none of their time."""
        self._clock = time.perf_counter()

    def updated(self, step: int, read: Mapping[str, float], fed: Fed) -> None:
        """Tells of an update, of which the step returned these numbers."""
        now = time.perf_counter()
        line = numbers_of(read, fed.tokens(), now - self._clock) | fed.numbers
        self._clock = now
        self._rollouts.write(step, fed.journal)
        if step % self._config.log_every == 0 or step == self._steps:
            self.metrics.write("train", step, line)
            self.publish(at_once=False)
        self.last |= {f"train_{name}": value for name, value in line.items()}
        self._progress.update(step, line)
        for text in fed.lines:
            self.say(f"warning: step {step}: {text}")

    def evaluated(self, step: int, measured: Measured) -> None:
        """Tells of an evaluation."""
        self._samples.write(step, measured.samples)
        self.metrics.write_evaluation(step, measured.numbers)
        for name, numbers in measured.numbers.items():
            prefix = f"eval_{name}_" if name else "eval_"
            self.last |= {prefix + key: value for key, value in numbers.items()}
            of = f" of {name}" if name else ""
            value = numbers.get(self._best.name, math.nan)  # nan: nothing could be judged
            self.say(f"step {step}: held-out {self._best.name}{of} {value:.4f}")

    def has_evaluated(self, step: int) -> bool:
        """Whether the evaluation at a step is told, by this process or one before."""
        return step in self.metrics.values

    @property
    def best(self) -> int | None:
        """The step whose checkpoint stays as the best; None where `config.checkpoint.best` asks for none."""
        if not self._config.checkpoint.best:
            return None
        return best_step(self.metrics.values, self._best.better)

    @property
    def exhausted(self) -> bool:
        """Whether the best metric has not got better for `config.patience` evaluations."""
        return is_exhausted(
            self.metrics.values, self._config.patience, self._since, self._best.better
        )

    def say_exhausted(self, step: int) -> None:
        """Why the run stops before its end."""
        verb = "risen" if self._best.better == "higher" else "fallen"
        evaluations = counted(self._config.patience, "evaluation")
        self.say(
            f"the held-out {self._best.name} has not {verb} for {evaluations}: stopping after step {step}"
        )

    def close(self) -> None:
        """Closes logs, services and bar."""
        self._progress.close()
        self.metrics.close()
