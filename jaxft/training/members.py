"""The members of a population: each a run with a folder of its own, read and begun by the loop's own parts."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxft.adaptation import partition
from jaxft.configuration.keys import assign, conform, flatten
from jaxft.configuration.populations import NUMBERS
from jaxft.data.feed import Fed, Feed
from jaxft.errors import UserError
from jaxft.formats.manifest import Damaged, check_manifest
from jaxft.models import Transformer
from jaxft.objectives.objective import objective_of
from jaxft.objectives.reading import updates_of
from jaxft.runs.checkpoint import steps_in
from jaxft.runs.extension import past_of
from jaxft.runs.folder import check_folder, written
from jaxft.runs.lock import lock_of
from jaxft.runs.metrics import Progress, read_metrics, say
from jaxft.runs.publish import Logs, logs_of
from jaxft.runs.signals import Stop
from jaxft.runtime import storage
from jaxft.training import loop as loops
from jaxft.training.feed import Data, prepare_data, warning_lines
from jaxft.training.program import Own, make_program, own_of
from jaxft.training.reference import Reference, make_reference
from jaxft.training.setup import adapt_base, prepare_base
from jaxft.training.stacked import Shared, base_of_all, common_standing
from jaxft.training.standing import Standing
from jaxft.tree import PyTree
from jaxft.weights import padded

MEMBERS, ENDED = "members", "ended.json"


class Named(Progress):
    """What a member says, under its name; the population has the bar."""

    def __init__(self, name: str, progress: Progress) -> None:
        self._name, self._progress = name, progress

    @contextlib.contextmanager
    def apart(self, line: str) -> Iterator[None]:
        """Keeps the time of what is done beside updates out of the time that is left; says nothing."""
        del line
        with self._progress.pause():
            yield

    def update(self, step: int, numbers: Mapping[str, float]) -> None:
        """Nothing: the population tells."""

    def say(self, line: str) -> None:
        """A line above the bar."""
        self._progress.say(f"{self._name}: {line}")

    def close(self) -> None:
        """Nothing: the bar is the population's."""


class InStep:
    """One feed for several members that ask for the same batches one after the other."""

    def __init__(self, feed: Feed) -> None:
        self.feed, self._number = feed, -1
        self._last: Fed | None = None

    def at(self, number: int) -> Fed:
        """The batch of that number: the last one again, or the next."""
        if self._last is None or number != self._number:
            self._last, self._number = self.feed.next(None), number
        return self._last

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state; all members go on from the same."""
        self._last = None
        self.feed.restore(state)


class OneOf:
    """A member's part of an `InStep`."""

    def __init__(self, common: InStep) -> None:
        self._common, self._number = common, 0

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        return self._common.feed.steps_per_epoch

    def next(self, state: Any) -> Fed:
        """The next batch."""
        del state
        self._number += 1
        return self._common.at(self._number)

    def once(self, state: Any) -> Iterator[Fed]:
        """All batches, of batches that end."""
        return self._common.feed.once(state)

    def state(self) -> dict[str, Any]:
        """That of the feed."""
        return self._common.feed.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """As that of the feed."""
        self._common.restore(state)


@dataclasses.dataclass
class Member:
    """One of the runs.

    Attributes:
        name: of it.
        config: of a run of its own.
        workdir: RUN/members/NAME.
        parts: what the run is made of; None where it ended before.
        own: its numbers, as data.
        like: its arrays' shapes; the frozen base and what is held are the arrays.
        loop: with its log, its checkpoints and its feed; None once it has ended.
        logs: where it writes.
        ended: after how many updates it ended; None while it goes on.
    """

    name: str
    config: ConfigDict
    workdir: Path
    parts: loops.Parts | None
    own: Own
    like: Standing | None = None
    loop: loops.Loop | None = None
    logs: Logs | None = None
    ended: int | None = None

    def end(self, step: int, error: str = "") -> None:
        """Writes the last checkpoint, the adapter and the curves, and notes that it has ended."""
        loop, parts, logs = self.loop, self.parts, self.logs
        assert loop is not None, "it has not ended"
        assert parts is not None, "it was read"
        assert logs is not None, "they are open"
        loop.save()
        loop.saves.wait()
        loops.finish_run(self.config, parts, loop, logs)
        self.ended, self.loop, self.parts, self.like = step, None, None, None
        told = {"step": step, "error": error} if error else {"step": step}
        with written(self.workdir):
            storage.write_text(self.workdir / ENDED, json.dumps(told) + "\n")
        loop.record.close()
        loop.saves.close()

    def close(self) -> None:
        """Lets go of its folder, where it has not ended."""
        if self.loop is not None:
            self.loop.record.close()
            self.loop.saves.close()

    def values(self) -> dict[int, float]:
        """The number by which the best is chosen, of each evaluation by its step."""
        if self.loop is not None:
            return dict(self.loop.record.metrics.values)
        best, first = objective_of(self.config).best.name, dict[int, float]()
        for line in read_metrics(self.workdir / "metrics.jsonl"):
            if line["split"] == "eval":
                first.setdefault(line["step"], line[best])
        return first

    def result(self) -> dict[str, Any]:
        """What RUN/population.json says of it."""
        metrics: dict[str, float] = {}
        for line in read_metrics(self.workdir / "metrics.jsonl"):
            before = f"{line['split']}_{line['set']}_" if "set" in line else f"{line['split']}_"
            numbers = {
                key: value for key, value in line.items() if key not in ("step", "split", "set")
            }
            metrics |= {before + key: value for key, value in numbers.items()}
        told = json.loads((self.workdir / ENDED).read_text())
        return {
            "name": self.name,
            "folder": str(self.workdir),
            "steps": told["step"],
            "metrics": metrics,
        } | ({"error": told["error"]} if "error" in told else {})


@dataclasses.dataclass
class Members:
    """All of them, and what they have in common.

    Attributes:
        each: by name, in order.
        shared: what they have in common.
        steps: updates of each.
        step: from which those that have not ended go on.
        progress: the bar.
    """

    each: dict[str, Member]
    shared: Shared
    steps: int
    step: int
    progress: Progress

    def rows_at(self, step: int) -> tuple[str, ...]:
        """The rows of the stack at a step: of those that have ended, until half of the rows are free.

        It depends on when members ended alone, so that a run that goes on computes by the same programs.
        """
        rows = tuple(self.each)
        ends = {
            name: member.ended for name, member in self.each.items() if member.ended is not None
        }
        for end in sorted({end for end in ends.values() if end <= step}):
            left = tuple(name for name in rows if name not in ends or ends[name] > end)
            rows = left if 0 < 2 * len(left) <= len(rows) else rows
        return rows


@contextlib.contextmanager
def opened_members(
    configs: Mapping[str, ConfigDict],
    workdir: Path,
    mesh: Mesh,
    stop: Stop,
    begin: Callable[[], None],
) -> Iterator[Members]:
    """The members, read, with their folders made or taken up. Nothing is written before all of them are read.

    Args:
        configs: {name: configuration of a run of its own}.
        workdir: RUN.
        mesh: of the devices.
        stop: whether a signal asked to stop.
        begin: makes RUN, or takes it up.
    """
    folders = {name: workdir / MEMBERS / name for name in configs}
    configs = {name: _kept(config) for name, config in configs.items()}
    for name, config in configs.items():
        check_folder(config, folders[name])
    ends = {name: _ended(folder) for name, folder in folders.items()}
    going = [name for name in configs if ends[name] is None] or list(configs)[:1]
    made = _prepared({name: configs[name] for name in going}, mesh)
    steps = _common_steps({name: configs[name] for name in going}, made)
    begin()
    standings = {name: _begin_standing(configs[name], made[name], steps) for name in going}
    shared = _shared(configs, made, standings, steps, mesh)
    at = _common_step([folders[name] for name in going if ends[name] is None])
    progress = Progress(at, steps)
    sums = jax.jit(_program(configs[going[0]], made[going[0]], steps).eval_sums)
    each: dict[str, Member] = {}
    with contextlib.ExitStack() as stack:
        for name, config in configs.items():
            member = Member(
                name,
                config,
                folders[name],
                made.get(name),
                own_of(config, steps, NUMBERS),
                ended=ends[name],
            )
            each[name] = member
            if ends[name] is None:
                _open(member, standings[name], sums, at, progress, stop, stack)
        yield Members(each, shared, steps, at, progress)


def _open(
    member: Member,
    standing: Standing,
    sums: Callable[..., Any],
    at: int,
    progress: Progress,
    stop: Stop,
    stack: contextlib.ExitStack,
) -> None:
    """Begins a member's run, or takes it up."""
    lock = lock_of(member.workdir)
    stack.enter_context(lock)
    past, parts = past_of(member.workdir), member.parts
    assert parts is not None
    logs = member.logs = stack.enter_context(logs_of(member.workdir, lock.check))
    member.loop = loops.begin_run(
        member.config,
        member.workdir,
        parts,
        logs,
        lock,
        past,
        stop,
        compiled=(_none, sums, standing),
        at=at,
        progress=Named(member.name, progress),
    )
    stack.callback(member.close)
    member.like = standing._replace(
        state=jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), standing.state
        )
    )
    member.parts = parts._replace(trees=(None, None))
    for line in (
        [] if at else warning_lines(member.config, parts.data, parts.model.config.vocabulary)
    ):
        member.loop.record.say(line)


def _none(*_: Any) -> Any:
    raise AssertionError("a member's updates are the population's")


def _kept(config: ConfigDict) -> ConfigDict:
    """The configuration with at least two checkpoints kept: of the last two, one is whole in all folders."""
    if config.checkpoint.keep > 1:
        return config
    config = conform(config, "configuration")
    assign(config, "checkpoint.keep", 2)
    return config


def _ended(folder: Path) -> int | None:
    """After how many updates a member ended; None where it goes on."""
    file = folder / ENDED
    return int(json.loads(file.read_text())["step"]) if file.exists() else None


def _common_step(folders: list[Path]) -> int:
    """The last step of which each of these runs has a whole checkpoint; 0 where there is none."""
    steps: set[int] | None = None
    for folder in folders:
        checkpoints = folder / "checkpoints"
        found = steps_in(checkpoints) if checkpoints.exists() else []
        steps = set(found) if steps is None else steps & set(found)
    for step in sorted(steps or (), reverse=True):
        try:
            for folder in folders:
                check_manifest(folder / "checkpoints" / str(step), required=True)
        except Damaged as error:
            say(f"{error}; the checkpoints before it are used")
        else:
            return step
    return 0


def _prepared(configs: Mapping[str, ConfigDict], mesh: Mesh) -> dict[str, loops.Parts]:
    """What each run is made of: the base and equal data are read once."""
    first = next(iter(configs.values()))
    model, base = prepare_base(first, mesh)
    made: dict[str, loops.Parts] = {}
    read: dict[Any, tuple[Data, InStep]] = {}
    reference: Reference | None = None
    for name, config in configs.items():
        try:
            params, method = adapt_base(config, model, base, mesh)
        except UserError as error:
            raise UserError(f"config.population: member {name}: {error}") from error
        trees = partition(params, method)
        reference = _reference(config, model, trees[0], mesh, reference)
        of_data = {key: value for key, value in flatten(config).items() if key.startswith("data.")}
        key = (config.seed, repr(of_data))
        if key not in read:
            data = prepare_data(config, model.config, mesh)
            read[key] = data, InStep(data.train)
        data, common = read[key]
        own = dataclasses.replace(data, train=OneOf(common))
        made[name] = loops.Parts(mesh, model, method, trees, reference, own)
    return made


def _reference(
    config: ConfigDict, model: Transformer, trainable: PyTree, mesh: Mesh, before: Reference | None
) -> Reference:
    """The objective's reference; a folder's is read once."""
    if objective_of(config).reference is not None and config.objective.precompute:
        raise UserError("config.population: members have no config.objective.precompute")
    if before is not None and not _own_reference(config):
        return before
    return make_reference(config, model.config, trainable, mesh)


def _own_reference(config: ConfigDict) -> bool:
    """Whether what is held for a reference is each run's own."""
    return objective_of(config).reference is not None and config.objective.reference == "start"


def _common_steps(configs: Mapping[str, ConfigDict], made: Mapping[str, loops.Parts]) -> int:
    """The updates of each run. Raises UserError where they differ."""
    steps = {
        name: updates_of(config, made[name].data.train.steps_per_epoch)
        for name, config in configs.items()
    }
    (first, count), *others = steps.items()
    for name, other in others:
        if other != count:
            raise UserError(
                f"config.population: {first} has {count} updates and {name} {other}, by its data: give config.steps, "
                "which is common to all"
            )
    return count


def _program(config: ConfigDict, parts: loops.Parts, steps: int) -> Any:
    return make_program(
        config, parts.model.config, parts.method, parts.trees[0], parts.reference, steps
    )


def _begin_standing(config: ConfigDict, parts: loops.Parts, steps: int) -> Standing:
    """What a run stands on before its first update."""
    trainable, frozen = parts.trees
    state = _program(config, parts, steps).initial(trainable)
    return Standing(state, frozen, parts.reference.held)


def _shared(
    configs: Mapping[str, ConfigDict],
    made: Mapping[str, loops.Parts],
    standings: Mapping[str, Standing],
    steps: int,
    mesh: Mesh,
) -> Shared:
    name, first = next(iter(made.items()))
    config = configs[name]
    initial = functools.partial(_initial, config, first, steps)
    like = common_standing(list(standings.values()), first.method, initial)
    numbers = tuple(
        key for key in NUMBERS if len({one.optimizer[key] for one in configs.values()}) > 1
    )
    return Shared(
        config=config,
        model=first.model.config,
        method=first.method,
        reference=first.reference,
        own_reference=_own_reference(config),
        base=padded(base_of_all(standings[name]), base_of_all(like)),
        like=like,
        steps=steps,
        mesh=mesh,
        numbers=numbers,
    )


def _initial(config: ConfigDict, parts: loops.Parts, steps: int, trainable: PyTree) -> Any:
    """The state before the first update, of a trainable tree of other sizes."""
    program = make_program(
        config, parts.model.config, parts.method, trainable, parts.reference, steps
    )
    return program.initial(trainable)
