"""Runs that train together: one program, one base in memory, one reading of it an update.

Each member is a run of its own, with its own folder RUN/members/NAME, data, log, checkpoints and adapter, driven by the
loop's own parts. What they have in common is the update: the members' arrays lie in a stack, and `vmap` of the step
over it makes one update of each. Members that end leave the stack once half of it is free.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxft.configuration import validate
from jaxft.configuration.populations import members_of
from jaxft.data.feed import Fed
from jaxft.errors import UserError, counted, nearest
from jaxft.objectives.objective import objective_of
from jaxft.runs.dating import dated
from jaxft.runs.folder import check_folder, open_folder, written
from jaxft.runs.lock import lock_of
from jaxft.runs.messages import device_line
from jaxft.runs.pinned import pinned
from jaxft.runs.result import Result
from jaxft.runs.signals import Interrupted, Stop, stoppable
from jaxft.runtime import processes, storage
from jaxft.runtime.stalls import fetch
from jaxft.training.loop import Pending
from jaxft.training.members import Members, opened_members
from jaxft.training.memory import needed, require_room
from jaxft.training.precision import with_runs_dtypes
from jaxft.training.sharding import make_mesh
from jaxft.training.stacked import Stack, same_length
from jaxft.tree import count, size_bytes

SUMMARY = "population.json"


def train_population(config: ConfigDict, workdir: str | Path) -> Result:
    """Trains all members of `config.population` to their end and writes RUN/members and RUN/population.json.

    On a folder that exists it goes on: on a CPU bit for bit as if it had never stopped. What comes back is the result
    of the best member, under the name RUN.
    """
    with population(config, workdir) as runs:
        runs.advance(runs.steps)
        return runs.finish()


@contextlib.contextmanager
def population(config: ConfigDict, workdir: str | Path) -> Iterator[Population]:
    """Opens the runs of `config.population`, to be trained as far as one likes, and to go on with some of them.

        with population(config, "RUN") as runs:
            losses = runs.advance(100)                      # {name: held-out number after 100 updates}
            runs.keep(sorted(losses, key=losses.get)[:4])   # the others end: their adapters are written
            losses = runs.advance(400)
            result = runs.finish()

    A process that was killed does the same calls again: what is done already is read from RUN. Learning rates follow
    `config.steps` or `config.epochs`, however far one goes.

    Args:
        config: of the runs, with `population`.
        workdir: RUN.

    Raises:
        UserError: what a single run refuses, members that differ in what must be common, and several processes.
    """
    validate(config)
    if processes.several():
        raise UserError(
            "config.population: members train together in one process, and this run has several"
        )
    if objective_of(config).samples:
        raise UserError(
            f"config.population: objective {config.objective.name} learns from what each member says, and members "
            "train together on data"
        )
    if config.checkpoint.local:
        raise UserError(
            "config.population: members have no config.checkpoint.local; take checkpoint.every"
        )
    workdir = storage.place(workdir)
    config = with_runs_dtypes(dated(pinned(config, workdir), workdir), workdir)
    check_folder(config, workdir)
    configs = members_of(config)
    if not configs:
        raise UserError("config.population is empty: it takes a list of mappings, or a grid")
    lock = lock_of(workdir)
    with stoppable() as stop, lock, jax.set_mesh(make_mesh(config.mesh)):
        mesh = make_mesh(config.mesh)
        with opened_members(
            configs, workdir, mesh, stop, lambda: _begin(config, workdir, lock)
        ) as members:
            runs = Population(config, workdir, members, stop)
            try:
                stop.deferred = True
                yield runs
            except Interrupted:
                runs.leave()
                raise
            finally:
                runs.close()


def _begin(config: ConfigDict, workdir: Path, lock: Any) -> None:
    open_folder(config, workdir)
    lock.take()
    check_folder(config, workdir)


@dataclasses.dataclass
class Waiting:
    """An update whose numbers are not read yet.

    Attributes:
        step: of the update.
        numbers: of each row of the stack.
        fed: the batch of each member.
        rows: the names of the stack's rows.
    """

    step: int
    numbers: dict[str, jax.Array]
    fed: Mapping[str, Fed]
    rows: tuple[str, ...]


class Population:
    """Runs that train together; made by `population`.

    Attributes:
        names: of all members, in order.
        steps: updates of each.
        step: updates made by those that have not ended.
    """

    def __init__(self, config: ConfigDict, workdir: Path, members: Members, stop: Stop) -> None:
        self._config, self._workdir, self._members, self._stop = config, workdir, members, stop
        self.names, self.steps, self.step = tuple(members.each), members.steps, members.step
        self._rows: tuple[str, ...] = ()
        self._stack: Stack | None = None
        self._update: Callable[..., Any] | None = None
        self._waiting: Waiting | None = None
        self._shapes: set[Any] = set()
        self._peak = 0
        self._progress = members.progress
        self._began = time.perf_counter()
        self._say_start()

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the members that have not ended."""
        return tuple(name for name, member in self._members.each.items() if member.loop is not None)

    @property
    def trained(self) -> int:
        """Trained parameters of a member, of the largest one."""
        return count(self._members.shared.like.state.trainable)

    @property
    def peak_of_one(self) -> int:
        """About what bytes an update of one member takes alone: its share of all, beside the base.

        0 where this process made no update.
        """
        base = size_bytes(self._members.shared.base)
        return base + (self._peak - base) // len(self.names) if self._peak else 0

    def advance(self, step: int) -> dict[str, float]:
        """Trains until `step` updates are made, and measures there.

        Returns:
            The held-out number by which the best is chosen, at that step, of each member that came so far; {} without
            `config.data.eval`. Those that end before, by `config.patience`, are not among them.
        """
        step = min(step, self.steps)
        if self.step == 0:
            self._evaluate()
        self._end_exhausted()
        while self.active and self.step < step:
            self._one_update()
            last = self.step == step
            every = (self._config.checkpoint.every, self._config.eval_every)
            if last or any(number > 0 and self.step % number == 0 for number in every):
                self._read()
                if last or self._due(self._config.checkpoint.every):
                    self._save()
                if last or self._due(self._config.eval_every):
                    self._evaluate()
                for name in self.active:
                    self._loop(name).record.go_on()
        values = {name: member.values() for name, member in self._members.each.items()}
        return {name: found[step] for name, found in values.items() if step in found}

    def keep(self, names: Collection[str]) -> None:
        """Ends all other members: their checkpoint and adapter are written, and they take no more memory.

        Raises UserError for a name that there is not.
        """
        for name in names:
            if name not in self.names:
                raise UserError(f"the population has no member {name!r}{nearest(name, self.names)}")
        for name in self.active:
            if name not in names:
                self._end(name)
        self._progress.say(f"{counted(len(self.active), 'member')} go on: {', '.join(self.active)}")

    def finish(self) -> Result:
        """Ends all members and writes RUN/population.json: of each its name, folder, updates and last numbers."""
        for name in self.active:
            self._end(name)
        metric = objective_of(self._config).best
        results = {name: member.result() for name, member in self._members.each.items()}
        sign = -1.0 if metric.better == "higher" else 1.0

        def rank(name: str) -> float:
            numbers = results[name]["metrics"]
            return sign * numbers.get(
                f"eval_{metric.name}", numbers.get(f"train_{metric.name}", float("inf"))
            )

        order = sorted(results, key=rank)
        text = json.dumps([results[name] for name in order], indent=2, ensure_ascii=False) + "\n"
        with written(self._workdir):
            storage.write_text(self._workdir / SUMMARY, text)
        for name in order:
            numbers, made = results[name]["metrics"], counted(results[name]["steps"], "update")
            losses = [
                f"{key} {value:.4f}" for key, value in numbers.items() if key.endswith("_loss")
            ]
            self._progress.say(f"{name}: {made}; {', '.join(losses)}")
        self._progress.say(
            f"done: {counted(len(order), 'member')} in {time.perf_counter() - self._began:.1f} s"
        )
        best = results[order[0]]
        folder = self._workdir / "members"
        plot = folder / order[0] / "plots" / "loss.png"
        told = best["steps"], best["metrics"], folder, plot
        return Result(self._workdir, *told, data_wait=0.0, trained=self.trained, peak=self._peak)

    def leave(self) -> None:
        """A checkpoint of every member, where a signal asked to stop."""
        if self._stack is not None:
            self._read()
            self._save()
            for name in self.active:
                self._loop(name).saves.wait()
        self._progress.say(
            f"stopped after step {self.step}, whose checkpoints are written; the same command goes on from there"
        )

    def close(self) -> None:
        """Closes the progress line."""
        self._progress.close()

    def _loop(self, name: str) -> Any:
        loop = self._members.each[name].loop
        assert loop is not None, "it has not ended"
        return loop

    def _due(self, every: int) -> bool:
        return self.step == self.steps or (every > 0 and self.step % every == 0)

    def _one_update(self) -> None:
        self._stop.check()
        self._arrange()
        shared = self._members.shared
        assert self._stack is not None
        self._stack = shared.transformed(self._stack, self.step)
        fed = {name: self._loop(name).feed.next(None) for name in self.active}
        numbers = self._dispatch(fed)
        self._read()
        self._waiting = Waiting(self.step, numbers, fed, self._rows)

    def _arrange(self) -> None:
        """Puts into the stack what belongs there at this step."""
        rows = self._members.rows_at(self.step)
        if rows == self._rows:
            return
        standings = {name: self._standing(name) for name in rows if name in self.active}
        spare = next(
            iter(standings.values())
        )  # in the row of a member that has ended, to which nobody looks
        owns = [self._members.each[name].own for name in rows]
        self._stack = None
        together = [standings.get(name, spare) for name in rows]
        self._stack, self._rows = self._members.shared.stack(together, owns), rows
        for name in self.active:
            self._loop(name).standing = None

    def _standing(self, name: str) -> Any:
        """A member's arrays, of its own sizes."""
        member, loop = self._members.each[name], self._loop(name)
        if loop.standing is not None:
            return loop.standing
        assert self._stack is not None
        assert member.like is not None, "it has not ended"
        return self._members.shared.one(self._stack, self._rows.index(name), member.like)

    def _dispatch(self, fed: Mapping[str, Fed]) -> dict[str, jax.Array]:
        shared, stack, spare = self._members.shared, self._stack, next(iter(fed.values()))
        assert stack is not None
        batches = same_length([fed.get(name, spare).arrays for name in self._rows])
        if self._update is None:
            self._update = shared.update()
        arguments = (stack.state, stack.drawn, shared.base, batches, stack.own, *stack.held)
        shape = (len(self._rows), *batches[0]["tokens"].shape)
        if shape not in self._shapes:
            self._read()
            self._shapes.add(shape)
            self._weigh(arguments, shape)
        state, numbers = self._update(*arguments)
        self.step += 1
        self._stack = shared.moved(stack._replace(state=state), self.step)
        for name in self.active:
            self._loop(name).step = self.step
        return numbers

    def _weigh(self, arguments: tuple[Any, ...], shape: tuple[int, ...]) -> None:
        """Compiles the update for these arguments, and says what memory it needs."""
        count, rows, length = shape
        each = f"{counted(rows, 'row')} of {counted(length, 'token')}"
        assert self._update is not None
        with self._progress.apart(
            f"compiling the update of {counted(count, 'member')}, each {each}"
        ):
            need = needed(self._update, arguments, self._members.shared.mesh)
        if need.peak > self._peak:
            self._peak = need.peak
            self._progress.say(str(need))
            require_room(need, self._config, self._members.shared.mesh, self._progress.say)
        for name in self.active:
            self._loop(name).record.go_on()

    def _read(self) -> None:
        """Tells each member's numbers of the last update, if that has not been done."""
        if self._waiting is None:
            return
        waiting, self._waiting = self._waiting, None
        numbers = fetch(waiting.numbers)
        for name in self.active:
            row = waiting.rows.index(name)
            loop = self._loop(name)
            own = {key: value[row] for key, value in numbers.items()}
            loop.pending = Pending(waiting.step, own, waiting.fed[name])
            try:
                loop.read()
            except UserError as error:
                self._progress.say(f"{name}: {error}")
                self._end(name, str(error))
        shown = {"loss": float(numbers["loss"].mean())}
        rates = [self._loop(name).record.last["train_tokens_per_second"] for name in self.active]
        self._progress.update(waiting.step, shown | {"tokens_per_second": sum(rates)})

    def _save(self) -> None:
        """A checkpoint of every member: all have those of the same steps."""
        for name in self.active:
            self._loop(
                name
            ).saves.wait()  # a step is whole in all folders before one of them lets go of an older
        for name in self.active:
            self._with_standing(name, lambda loop: loop.save())

    def _evaluate(self) -> None:
        """The members' held-out numbers; a checkpoint of all where it is the best of one."""
        for name in self.active:
            self._loop(name).saves.wait()
        for name in self.active:
            self._with_standing(name, _measure)
        if any(self._loop(name).saves.checkpoints.current == self.step for name in self.active):
            self._save()
        self._end_exhausted()

    def _end_exhausted(self) -> None:
        """Ends the members whose held-out number has not got better for `config.patience` evaluations."""
        for name in self.active:
            record = self._loop(name).record
            if record.exhausted and self.step < self.steps:
                record.say_exhausted(self.step)
                self._end(name)

    def _with_standing(self, name: str, function: Callable[[Any], Any]) -> None:
        loop = self._loop(name)
        kept, loop.standing = loop.standing, self._standing(name)
        try:
            function(loop)
        finally:
            loop.standing = kept

    def _end(self, name: str, error: str = "") -> None:
        """A member's last checkpoint and its adapter."""
        self._read()
        member, loop = self._members.each[name], self._loop(name)
        loop.standing = self._standing(name)
        member.end(self.step, error)

    def _say_start(self) -> None:
        config, shared = self._config, self._members.shared
        own = size_bytes(shared.like.state) + size_bytes(shared.like.held)
        lines = [
            device_line(shared.mesh, config.dtype, config.param_dtype),
            f"{counted(len(self.names), 'member')} over one base: {', '.join(self.names)}; "
            f"{counted(self.steps, 'update')} of {counted(config.batch_size, 'sequence')} each; "
            f"{own:,} bytes of trained numbers and their optimizer's a member, {size_bytes(shared.base):,} of the base",
        ]
        if self.step:
            lines.append(f"going on from the checkpoints of step {self.step}")
        for line in lines:
            self._progress.say(line)


def _measure(loop: Any) -> None:
    """The loop's evaluation, unless it was taken at this step before."""
    if loop.evaluate.sets and not loop.record.has_evaluated(loop.step):
        loop.measure()
