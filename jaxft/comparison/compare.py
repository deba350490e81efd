"""`jaxft.compare`: every lever on the same rows, and the verdict."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxft.comparison.asking import ask, plainly
from jaxft.comparison.budget import (
    FEWEST_STEPS,
    ROOM,
    Clock,
    LeftOut,
    Speed,
    lever_seconds,
    meanwhile,
    planned,
    runs_seconds,
)
from jaxft.comparison.facts import changed_facts
from jaxft.comparison.given import NAMED, Given, read_given
from jaxft.comparison.ledger import Ledger
from jaxft.comparison.levers import Lever, chosen_levers, middle_of
from jaxft.comparison.measuring import Bench, Measured
from jaxft.comparison.progress import Progress, told_seconds
from jaxft.comparison.result import NAME, judged, whole_object, write_result
from jaxft.comparison.tuning import Wanted, tune
from jaxft.comparison.verdict import Scored
from jaxft.configuration.comparing import check_comparison, load_comparison, seconds_of
from jaxft.configuration.load import difference, to_json
from jaxft.errors import UserError, counted
from jaxft.evaluation.asking import with_grades
from jaxft.evaluation.items import Item
from jaxft.runs.lock import Lock
from jaxft.runs.messages import shortened
from jaxft.runs.report import PAGE, write_report
from jaxft.runs.signals import stoppable
from jaxft.runtime.storage import local

EARLY = 120.0  # seconds after which it says what is ruled out by then
PROBE = 5  # updates of the runs that measure the speed
FREE = ("budget", "price_per_hour")  # keys that may change when a comparison goes on


@dataclasses.dataclass
class Comparison:
    """A comparison under way.

    Attributes:
        given: what every lever gets.
        bench: where levers are measured.
        clock: the time.
        levers: those to measure, the simplest first.
        left: of the others, why not.
        speed: of the runs, as measured; None before.
        steps: updates of a whole run; 0 before they are planned.
        measured: what is done.
        base: the loss on the texts aside before any tuning; None before that is known.
    """

    given: Given
    bench: Bench
    clock: Clock
    levers: list[Lever]
    left: dict[str, str]
    speed: Speed | None = None
    steps: int = 0
    measured: list[Measured] = dataclasses.field(default_factory=list)
    base: Scored | None = None


def compare(
    config: ConfigDict, workdir: str | Path, *, began: float | None = None
) -> dict[str, Any]:
    """Measures the levers that the data allow, and says which fits.

    Args:
        config: as `configs/compare.py:get_config` makes it; `jaxft.load_config("configs/compare.py", {...})`.
        workdir: RUN. On one that was cut short it goes on, and of one that is done it gives the same again.
        began: `time.perf_counter()` from which on the budget is spent; None: now.

    Returns:
        What RUN/comparison.json holds (its fields: `jaxft.comparison`).

    Raises:
        UserError: a mistake in the configuration, too few rows for a verdict, a budget that no lever fits into, or a
            grader that tells nothing apart.
    """
    began = time.perf_counter() if began is None else began
    check_comparison(config)
    folder = local(workdir, "a comparison")
    _check_folder(config, folder)
    done = _done(folder)
    if done is not None:
        return done
    folder.mkdir(parents=True, exist_ok=True)
    with stoppable(), Lock(folder) as lock, compiled_once(folder / "compiled"):
        lock.take()
        (folder / "config.json").write_text(to_json(config), encoding="utf-8")
        progress = Progress(folder / "log.txt")
        try:
            return _compared(config, folder, progress, began)
        finally:
            progress.close()


def _compared(config: ConfigDict, folder: Path, progress: Progress, began: float) -> dict[str, Any]:
    if config.topology:
        from jaxft.planning.topology import tpu_devices

        tpu_devices(config.topology)  # there is such a one, and its compiler
    ledger = Ledger(folder / "ledger.jsonl")
    clock = Clock(seconds_of(config.budget), ledger.seconds, began)
    with progress.piece("reading the rows", 1.0):
        given = read_given(config, folder)
    if given.overlap:
        first = shortened(given.overlap, NAMED * 40)
        progress.say(
            f"{counted(len(given.overlap), 'test row')} that stand in the training rows too are left out: {first}"
        )
    levers, left = chosen_levers(config, given.has)
    for name, why in left.items():
        if not config.levers:
            progress.say(f"left out: {name}: {why}")
    bench = Bench(given, ledger, progress, clock)
    state = Comparison(given, bench, clock, levers, left)
    due = EARLY - clock.spent if clock.before < EARLY else None  # an earlier start has said it
    with meanwhile(due, lambda: _say_early(state)):
        return _finished(state)


def _finished(state: Comparison) -> dict[str, Any]:
    """Every lever after the other, and what RUN/comparison.json then holds."""
    _begin(state)
    state.bench.facts = changed_facts(state.given)
    tuned = [lever for lever in state.levers if lever.recipe]
    others = [lever for lever in state.levers if not lever.recipe]
    for lever in others[:1]:
        _measure(state, lever)
    if tuned:
        state.clock.kept = _least(state, tuned)
    for lever in others[1:]:
        _measure(state, lever)
    state.clock.kept = 0.0
    if kept := _kept(state, tuned):
        _plan(state, kept)
    for lever in _kept(state, tuned):
        _measure(state, lever)
        jax.clear_caches()
    if not state.measured:
        why = "; ".join(f"{name}: {reason}" for name, reason in state.left.items())
        raise UserError(
            f"config.budget {state.given.config.budget}: not even one lever fits: {why}"
        )
    result = _write(state, done=True)
    _write_repeat(state)
    return result


def _begin(state: Comparison) -> None:
    """The speed of answers, whether the budget has room for one lever, and whether the graders tell anything apart."""
    given, bench = state.given, state.bench
    few = [*given.tuning, *given.train][: given.config.eval_batch_size]

    def make() -> dict[str, Any]:
        found = ask(given, *bench.model(), few, plainly(given, {}, 0))
        check_graders(given, few, found.records)
        began = time.perf_counter()
        ask(given, *bench.model(), few, plainly(given, {}, 0))  # all is compiled by now
        return {"each": (time.perf_counter() - began) / len(few)}

    try:
        piece = bench.take("prompt: speed", "the model, asked for the first time", 0.0, make)
        test = piece["each"] * len(given.test)
        state.clock.admit(test)
    except LeftOut:
        raise UserError(
            f"config.budget {given.config.budget}: not even one lever fits: "
            f"{told_seconds(state.clock.spent)} are spent before a test row is asked, of "
            f"{counted(len(given.test), 'row')}; give {told_seconds(4 * state.clock.spent)} at least"
        ) from None
    state.speed = Speed(0.0, 0.0, 0.0, test)
    bench.seconds = lambda lever, steps, count: _piece_seconds(state, lever, steps, count)


def check_graders(given: Given, items: Sequence[Item], records: list[dict[str, Any]]) -> None:
    """Raises UserError for a first grader that gives one value to all: to answers, to what is right, and to nothing."""
    if not given.graders:
        return
    grader = given.graders[0]
    answers = [(item, record["answer"] or "") for item, record in zip(items, records, strict=True)]
    answers += [(item, item.references[0]) for item in items if item.references]
    answers += [(item, "") for item in items[:1]]
    graded = with_grades(
        [dataclasses.replace(item, answer=answer) for item, answer in answers], [grader]
    )
    values = {item.grades[grader.name] for item in graded if grader.name in item.grades}
    if not values:
        raise UserError(
            f"config.graders: grader {grader.name!r} can judge no answer: "
            + graded[0].unscored[f"grader/{grader.name}"]
        )
    if len(values) == 1 and len(items) > 1:
        raise UserError(
            f"config.graders: grader {grader.name!r} gives {values.pop():g} to all of "
            f"{counted(len(answers), 'answer')}, to the model's, to those in the rows and to an empty one: "
            "it tells nothing apart"
        )


def _kept(state: Comparison, levers: Sequence[Lever]) -> list[Lever]:
    """Those that are not left out."""
    return [lever for lever in levers if lever.name not in state.left]


def _wanted(config: ConfigDict, given: Given) -> int:
    """Updates of a whole run, if there is room."""
    epoch = -(-sum(len(item.rows) for item in given.train) // config.batch_size)
    return config.steps or max(round(config.epochs * epoch), 1)


def _least(state: Comparison, tuned: list[Lever]) -> float:
    """Measures how fast updates are, and returns the seconds that the shortest tuning of one lever takes.

    The caller keeps so much of the budget, so that levers without tuning do not use it up. 0: the budget has less.
    """
    config, wanted = state.given.config, _wanted(state.given.config, state.given)
    try:
        state.base = state.bench.untouched_base()
    except LeftOut as why:
        for lever in tuned:
            _leave_out(state, lever, str(why))
        return 0.0
    for lever in tuned:  # for one that runs
        try:
            state.speed = _speed(state, lever, min(PROBE, wanted))
            break
        except LeftOut as why:
            _leave_out(state, lever, str(why))
    else:
        return 0.0
    if state.clock.budget is None:
        return 0.0
    least = lever_seconds(lever, min(FEWEST_STEPS, wanted), state.speed, config) / ROOM
    return least if least < state.clock.left else 0.0


def _plan(state: Comparison, tuned: list[Lever]) -> None:
    """Settles how many updates a whole run has."""
    given, config, bench = state.given, state.given.config, state.bench
    wanted = _wanted(config, given)

    def settle() -> dict[str, Any]:
        assert state.speed is not None
        steps, out = planned(tuned, wanted, state.speed, config, state.clock.left)
        return {"steps": steps, "out": dict(out)}

    plan = bench.ledger.take("plan", settle)
    state.steps = plan["steps"]
    for lever in [lever for lever in tuned if lever.name in plan["out"]]:
        _leave_out(state, lever, plan["out"][lever.name])
    kept, speed = _kept(state, tuned), state.speed
    if not kept or speed is None:
        return
    rows = f"{counted(state.steps, 'update')} of {config.batch_size} rows a run"
    less = f" ({wanted:,} were wanted; the budget has no room for them)" * (state.steps < wanted)
    bench.progress.say(f"each lever gets {rows}{less}")
    bench.progress.expect(sum(lever_seconds(lever, state.steps, speed, config) for lever in kept))
    _write_repeat(state)


def _speed(state: Comparison, lever: Lever, steps: int) -> Speed:
    """The speed of a lever's runs: of as many as a search begins with, and of the same once their program is there.

    Without a budget nothing depends on it, and it is a guess.
    """
    assert state.speed is not None
    if state.clock.budget is None:
        return state.speed._replace(step=0.5, start=4.0, compiled=8.0)
    state.bench.base = None  # one model in memory
    count, pieces = state.given.config.search.rates if lever.together else 1, []
    middle = middle_of(lever, state.given.width) / 4  # none of the search's own
    for place in range(2):
        rates = [middle * (1 + place + 2 * one) for one in range(count)]
        wanted = [Wanted(rate, 0) for rate in rates]
        piece = state.bench.take(
            f"{lever.name}: speed {place}",
            f"{lever.name}: how fast an update is",
            20.0,
            lambda wanted=wanted: {  # type: ignore[misc]
                "runs": tune(state.given, lever, wanted, steps, keep=False)
            },
        )
        if piece["runs"][0]["value"] is None:
            raise LeftOut(f"its first run failed: {piece['runs'][0]['why']}")
        pieces.append(piece)
    cold, warm = (piece["seconds"] for piece in pieces)
    step = min(run["step_seconds"] for piece in pieces for run in piece["runs"])
    start = max(warm - count * steps * step, 0.0)
    test = state.speed.test + start / 4  # a measurement of what was tuned reads the model too
    return Speed(step / lever.work, start, max(cold - warm, 0.0), test)


def _piece_seconds(state: Comparison, lever: Lever, steps: int, count: int) -> float:
    assert state.speed is not None
    if not count:
        return state.speed.test
    return runs_seconds(lever, steps, count, state.speed) + state.speed.compiled


def _measure(state: Comparison, lever: Lever) -> None:
    """One lever; what is known then is written."""
    try:
        state.measured.append(state.bench.measure(lever, state.steps))
    except LeftOut as why:
        _leave_out(state, lever, str(why))
        return
    _write(state, done=False)


def _leave_out(state: Comparison, lever: Lever, why: str) -> None:
    state.left[lever.name] = why
    state.bench.progress.say(f"left out: {lever.name}: {why}")


def _say_early(state: Comparison) -> None:
    """What is ruled out by now."""
    measured = list(state.measured)  # the comparison goes on meanwhile
    done = f"{len(measured)} of {counted(len(state.levers), 'lever')} measured"
    beaten = []
    if len(measured) > 1:
        told = judged(measured, state.given)
        stands = told.chosen or measured[0].lever.name
        names = [one.lever.name for one in measured]
        beaten = names[: names.index(stands)]
    out = f"ruled out: {', '.join(beaten)} ({stands} is better beyond its interval)" if beaten else (
        "nothing is ruled out yet"
    )  # fmt: skip
    state.bench.progress.say(f"after {told_seconds(state.clock.spent)}, {done}: {out}")


def _write(state: Comparison, *, done: bool) -> dict[str, Any]:
    about = {
        "device": _device(),
        "done": done,
        "steps": state.steps,
        "budget": state.clock.budget,
        "seconds": round(state.clock.spent, 1),
    }
    out = [lever.name for lever in state.levers if lever.name in state.left]
    result = whole_object(state.given, state.measured, state.left, state.base, about, out)
    folder = state.given.folder
    write_result(folder, result)
    write_report(folder / PAGE, [folder], force=True)
    return result


def _write_repeat(state: Comparison) -> None:
    """RUN/repeat.json: the same without a clock, which gives the same figures again."""
    config = ConfigDict(state.given.config.to_dict(), convert_dict=False)
    kept = [lever.name for lever in state.levers if lever.name not in state.left]
    flat = json.loads(to_json(config)) | {"levers": kept, "budget": "0"}
    if state.steps:
        flat["steps"] = state.steps
    text = json.dumps(flat, indent=2, ensure_ascii=False) + "\n"
    (state.given.folder / "repeat.json").write_text(text, encoding="utf-8")


def _device() -> str:
    devices = jax.devices()
    kind = getattr(devices[0], "device_kind", devices[0].platform)
    return counted(len(devices), f"{kind} device")


def _done(folder: Path) -> dict[str, Any] | None:
    """What a comparison that is done has written."""
    file = folder / NAME
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found if found["done"] else None


def _check_folder(config: ConfigDict, folder: Path) -> None:
    """Raises UserError where the folder is of another comparison, or of something else."""
    file = folder / "config.json"
    if not file.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(
                f"{folder}: is no comparison's folder, and not empty; take another --workdir"
            )
        return
    if (folder / "metrics.jsonl").exists():
        raise UserError(f"{folder}: is the folder of a run of jaxft train; take another --workdir")
    old = load_comparison(str(file))
    changed = [line for line in difference(old, config) if line.split(":")[0] not in FREE]
    if changed:
        raise UserError(
            f"{folder}: another comparison stands there ({'; '.join(changed)}); take another --workdir"
        )


@contextlib.contextmanager
def compiled_once(folder: Path) -> Iterator[None]:
    """Many runs compile the same programs: they are kept in a folder, unless JAX is told to keep them elsewhere."""
    settings: Mapping[str, Any] = {
        "jax_compilation_cache_dir": getattr(jax.config, "jax_compilation_cache_dir", None)
        or str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
