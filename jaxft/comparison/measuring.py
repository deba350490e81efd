"""Measures one lever: its setting by the tuning rows, then what it scores on the test rows, seed by seed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.comparison.asking import Found, ask
from jaxft.comparison.budget import Clock, LeftOut
from jaxft.comparison.facts import Facts, known_still
from jaxft.comparison.given import Given
from jaxft.comparison.ledger import Ledger, Piece
from jaxft.comparison.levers import Lever, middle_of
from jaxft.comparison.progress import Progress
from jaxft.comparison.search import as_told, search
from jaxft.comparison.tuning import Wanted, objective_for, opened, planned_bytes, tune
from jaxft.comparison.verdict import Scored
from jaxft.configuration.comparing import bytes_of
from jaxft.errors import counted, worded
from jaxft.evaluation.asking import score
from jaxft.evaluation.comparing import rows_in
from jaxft.evaluation.evaluate import summarize
from jaxft.evaluation.metrics import METRICS, Metric
from jaxft.models import Transformer
from jaxft.tree import PyTree

LOSS = METRICS["loss"]
WHOLE = 1.0  # the part of a whole run


@dataclasses.dataclass(frozen=True)
class Measured:
    """A lever that was measured.

    Attributes:
        lever: the row.
        setting: the one that was chosen.
        searched: all that were tried, as RUN/comparison.json has them.
        search_seconds: that took.
        scored: on the test rows.
        aside: likewise the loss on texts that nothing is trained on; None where no weight changes.
        records: of the first seed's test items.
        tests, runs: the ledger's pieces, seed by seed.
        planned: bytes that an update needs for `config.topology`; None without one.
        memory: bytes that an update needs here; None where nothing is tuned, or it is not known.
        changed: what it still scores once the facts have changed, as `facts.known_still`; None without documents.
    """

    lever: Lever
    setting: Mapping[str, Any]
    searched: Sequence[dict[str, Any]]
    search_seconds: float
    scored: Scored
    aside: Scored | None
    records: Sequence[dict[str, Any]]
    tests: Sequence[Piece]
    runs: Sequence[Piece]
    planned: int | None = None
    memory: int | None = None
    changed: Mapping[str, Any] | None = None


@dataclasses.dataclass
class Bench:
    """Where levers are measured.

    Attributes:
        given: what every lever gets.
        ledger: what is done.
        progress: what is shown.
        clock: what is left of the budget.
        seconds: lever, updates, how many runs -> what a piece takes, about; of no run, a test.
        base: the model as it was, once it is read.
        facts: those that change; None without documents.
    """

    given: Given
    ledger: Ledger
    progress: Progress
    clock: Clock
    seconds: Callable[[Lever, int, int], float] = lambda *_: 0.0
    base: tuple[Transformer, PyTree] | None = None
    facts: Facts | None = None

    def take(self, name: str, what: str, seconds: float, make: Callable[[], Piece]) -> Piece:
        """A piece of work, done or found. Raises LeftOut where the budget has no room for it."""
        if name not in self.ledger.pieces:
            self.clock.admit(seconds)
        with self.progress.piece(what, seconds), self.clock.limit():
            return self.ledger.take(name, make)

    def model(self) -> tuple[Transformer, PyTree]:
        """The model as it was, read once."""
        if self.base is None:
            self.base = opened(self.given, None)
        return self.base

    def measure(self, lever: Lever, steps: int) -> Measured:
        """The lever's setting and scores.

        Raises:
            LeftOut: it needs more than there is, or all its runs failed.
        """
        if lever.recipe:
            self.base = None  # one model in memory
            return self._tuned(lever, steps)
        return self._untuned(lever)

    def _untuned(self, lever: Lever) -> Measured:
        given, tries = self.given, list(lever.tries(self.given.config))
        searched, seconds = [], 0.0
        for setting in tries if len(tries) > 1 else ():
            shown = _shown(setting)
            piece = self.take(
                f"{lever.name}: {shown} on the tuning rows",
                f"{lever.name}: {shown}",
                self.seconds(lever, 0, 0) * len(given.tuning) / len(given.test),
                lambda setting=setting: {  # type: ignore[misc]
                    "value": ask(
                        given, *self.model(), given.tuning, lever.asked(given, setting, 0)
                    ).value
                },
            )
            told = {"setting": setting, "value": piece["value"], "name": given.metric.name}
            searched.append({**told, "part": WHOLE})
            seconds += piece["seconds"]
        setting = _best(searched, given.metric) if searched else tries[0]
        seeds = range(1, given.config.seeds + 1) if lever.drawn else (0,)
        tests = [self._test(lever, setting, seed, None, timed=seed == seeds[0]) for seed in seeds]
        measured = self._measured(lever, setting, searched, seconds, tests, ())
        changed = self._once_changed(lever, setting, seeds[0], None)
        return dataclasses.replace(measured, changed=changed)

    def _tuned(self, lever: Lever, steps: int) -> Measured:
        given = self.given
        best = objective_for(lever).best
        tried, seconds = list[Piece](), list[float]()

        def heat(rates: Sequence[float], part: float) -> list[float | None]:
            updates = max(round(part * steps), 1)
            wanted = [Wanted(rate, 0) for rate in rates]
            made, took = self._runs(lever, wanted, updates, keep=False)
            tried.extend(made)
            seconds.append(took)
            return [run["value"] for run in made]

        middle = middle_of(lever, given.width)
        self._check_limits(lever, middle)
        rate, found = search(middle, given.config.search, heat, lower=best.better == "lower")
        if rate is None:
            raise LeftOut(f"every run of it failed: {tried[-1]['why']}")
        searched, setting = as_told(found, f"held-out {best.name}"), {"rate": rate}
        planned = self._planned(lever, rate, steps)
        wanted = [Wanted(rate, seed) for seed in range(1, given.config.seeds + 1)]
        (runs, _), tests = self._runs(lever, wanted, steps, keep=True), []
        for one, run in zip(wanted, runs, strict=True):
            if run["value"] is None:
                raise LeftOut(f"its run with seed {one.seed} failed: {run['why']}")
            output = given.folder / run["output"]
            tests.append(self._test(lever, setting, one.seed, output, timed=one.seed == 1))
            if one.seed > 1:
                shutil.rmtree(output, ignore_errors=True)
        measured = self._measured(lever, setting, searched, sum(seconds), tests, runs)
        memory = max(run["memory"] for run in (*tried, *runs) if "memory" in run) or None
        changed = self._once_changed(lever, setting, 1, given.folder / runs[0]["output"])
        return dataclasses.replace(measured, planned=planned, memory=memory, changed=changed)

    def _runs(
        self, lever: Lever, wanted: Sequence[Wanted], steps: int, *, keep: bool
    ) -> tuple[list[Piece], float]:
        """(what tuning runs came to, seconds of all); in one piece where they train together, in one apiece else."""
        made, seconds = [], 0.0
        for group in [wanted] if lever.together else [[one] for one in wanted]:
            piece = self.take(
                f"{lever.name}: {', '.join(one.name for one in group)}, {steps} updates",
                f"{lever.name}: {_named(group)}, {counted(steps, 'update')}",
                self.seconds(lever, steps, len(group)),
                lambda group=group: {  # type: ignore[misc]
                    "runs": tune(self.given, lever, group, steps, keep=keep)
                },
            )
            made += piece["runs"]
            seconds += piece["seconds"]
        return made, seconds

    def _planned(self, lever: Lever, rate: float, steps: int) -> int | None:
        """Bytes that an update needs for `config.topology`; None without one."""
        topology = self.given.config.topology
        if not topology:
            return None
        piece = self.take(
            f"{lever.name}: planned for {topology}",
            f"{lever.name}: compiled for {topology}",
            30.0,
            lambda: {"bytes": planned_bytes(self.given, lever, rate, steps)},
        )
        return int(piece["bytes"])

    def _check_limits(self, lever: Lever, rate: float) -> None:
        """Raises LeftOut where one update, made for that, needs more memory or leaves more bytes than it may."""
        config = self.given.config
        limits = (("memory", "memory", "tuning it needs"), ("kept", "bytes", "it keeps"))
        asked = [one for one in limits if config[one[0]]]
        if not asked:
            return
        (run,), _ = self._runs(lever, [Wanted(rate, 0)], 1, keep=False)
        if run["value"] is None:
            raise LeftOut(f"its first update failed: {run['why']}")
        for name, key, what in asked:
            limit = bytes_of(name, config[name])
            if limit is not None and run[key] > limit:
                raise LeftOut(f"{what} {_size(run[key])}, more than config.{name} {config[name]}")

    def _test(
        self,
        lever: Lever,
        setting: Mapping[str, Any],
        seed: int,
        output: Path | None,
        *,
        timed: bool,
    ) -> Piece:
        """Scores the test rows, and, if weights were tuned, the texts aside. `timed`: see `ask`."""
        given = self.given

        def make() -> Piece:
            model, params = self.model() if output is None else opened(given, output)
            way = lever.asked(given, setting, seed)
            found = ask(given, model, params, given.test, way, timed=timed)
            write_records(given.folder, lever.name, seed, found.records)
            if output is not None:
                write_records(given.folder, lever.name, seed, asides(given, model, params), "aside")
            return {"seed": seed, **told_of(found)}

        return self.take(
            f"{lever.name}: seed {seed}, tested",
            f"{lever.name}: {counted(len(given.test), 'test row')}",
            self.seconds(lever, 0, 0),
            make,
        )

    def _once_changed(
        self, lever: Lever, setting: Mapping[str, Any], seed: int, output: Path | None
    ) -> Piece | None:
        """The lever's scores after the facts have changed; None without documents, or if the budget has no room."""
        facts = self.facts
        if facts is None:
            return None

        def make() -> Piece:
            again = None
            if "documents" in lever.needs:
                given = facts.given
                model, params = self.model() if output is None else opened(given, output)
                way = lever.asked(given, setting, seed)
                again = ask(given, model, params, given.test, way).records
            return known_still(facts, read_records(self.given.folder, lever.name, seed), again)

        name = f"{lever.name}: the facts changed"
        try:
            piece = self.take(name, name, self.seconds(lever, 0, 0), make)
        except LeftOut:  # the rest of it is measured
            return None
        return {key: piece[key] for key in ("before", "value", "low", "high", "n")}

    def untouched_base(self) -> Scored:
        """The loss of the model as it was on the rows aside."""

        def make() -> Piece:
            records = asides(self.given, *self.model())
            write_records(self.given.folder, "base", 0, records, "aside")
            return {}

        self.take("base: texts aside", "texts that nothing is trained on", 5.0, make)
        return scored_in(self.given, "base", (0,), LOSS, {}, "aside")

    def _measured(
        self,
        lever: Lever,
        setting: Mapping[str, Any],
        searched: Sequence[dict[str, Any]],
        seconds: float,
        tests: Sequence[Piece],
        runs: Sequence[Piece],
    ) -> Measured:
        seeds = [piece["seed"] for piece in tests]
        scored = scored_in(self.given, lever.name, seeds, self.given.metric, {})
        aside = scored_in(self.given, lever.name, seeds, LOSS, {}, "aside") if runs else None
        records = read_records(self.given.folder, lever.name, seeds[0])
        return Measured(lever, setting, searched, seconds, scored, aside, records, tests, runs)


def told_of(found: Found) -> Piece:
    """What the ledger has of a measurement; its records stand in RUN/answers."""
    return {
        "value": found.value,
        "tokens": found.tokens,
        "request_seconds": found.seconds,
        "refused": sum(record.get("refused", False) for record in found.records),
    }


def asides(given: Given, model: Transformer, params: PyTree) -> list[dict[str, Any]]:
    """Records of the texts aside, with their loss."""
    batching = {"batch_size": given.config.eval_batch_size, "packing": False}
    items = score(
        model, params, given.aside, given.tokenizer, [LOSS], max_new_tokens=1, batching=batching
    )
    return summarize([LOSS], items).records


def _file(folder: Path, name: str, seed: int, what: str) -> Path:
    return folder / what / f"{name}.seed{seed}.jsonl"


def write_records(
    folder: Path, name: str, seed: int, records: Sequence[dict[str, Any]], what: str = "answers"
) -> None:
    """Writes what was asked, answered and scored, as `jaxft evaluate --output` does."""
    file = _file(folder, name, seed, what)
    file.parent.mkdir(exist_ok=True)
    lines = [json.dumps({"system": name, **record}, ensure_ascii=False) for record in records]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_records(folder: Path, name: str, seed: int, what: str = "answers") -> list[dict[str, Any]]:
    """What `write_records` wrote."""
    text = _file(folder, name, seed, what).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def scored_in(
    given: Given,
    name: str,
    seeds: Sequence[int],
    metric: Metric,
    costs: Mapping[str, float],
    what: str = "answers",
) -> Scored:
    """What a lever scored, from what was written of it."""
    each = [read_records(given.folder, name, seed, what) for seed in seeds]
    numbers = np.stack([rows_in(metric, records) for records in each])
    return Scored(name, numbers, [record["cluster"] for record in each[0]], costs)


def _best(searched: Sequence[dict[str, Any]], metric: Metric) -> Mapping[str, Any]:
    """The setting of the best value; the first of equals, which is the smallest."""
    known = [one for one in searched if one["value"] is not None]
    sign = -1 if metric.lower else 1
    best = max(known or searched[:1], key=lambda one: sign * (one["value"] or 0.0))
    setting: Mapping[str, Any] = best["setting"]
    return setting


def _named(group: Sequence[Wanted]) -> str:
    """What some runs are tuned with, as the bar says it."""
    rates = sorted({one.rate for one in group})
    seeds = sorted({one.seed for one in group} - {0})
    told = [f"{worded(len(rates), 'rate', 'rates')} {', '.join(f'{rate:g}' for rate in rates)}"]
    told += [f"{worded(len(seeds), 'seed', 'seeds')} {', '.join(map(str, seeds))}"] * bool(seeds)
    return ", ".join(told)


def _shown(setting: Mapping[str, Any]) -> str:
    return ", ".join(f"{value} {name}" for name, value in setting.items())


def _size(number: int) -> str:
    return f"{number / 1e6:,.1f} MB" if number < 1e9 else f"{number / 1e9:,.2f} GB"
