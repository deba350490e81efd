"""The one loop: whatever the objective and the method, `train` runs it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxft.adaptation import partition
from jaxft.configuration import validate
from jaxft.data.feed import Fed, Feed
from jaxft.errors import UserError, counted
from jaxft.formats.manifest import Damaged
from jaxft.kernels.compiler_options import compiler_options
from jaxft.methods import Method
from jaxft.models import Transformer
from jaxft.objectives.objective import objective_of
from jaxft.objectives.reading import updates_of
from jaxft.runs.dating import dated
from jaxft.runs.evaluation import Evaluation, samples, scores
from jaxft.runs.export import export
from jaxft.runs.extension import Past, extend, past_of
from jaxft.runs.folder import check_folder, open_folder, tidy
from jaxft.runs.identity import identity
from jaxft.runs.lock import Claim, Lock, lock_of
from jaxft.runs.messages import device_line, next_commands, skipped, trained_line, updates_line
from jaxft.runs.metrics import Progress, say
from jaxft.runs.pinned import pinned
from jaxft.runs.plots import plot_averages, plot_run
from jaxft.runs.publish import Logs, logs_of
from jaxft.runs.record import Record
from jaxft.runs.report import read_run, write_run_page
from jaxft.runs.result import Result
from jaxft.runs.saves import Saves
from jaxft.runs.signals import Interrupted, Stop, stoppable
from jaxft.runs.summary import write_summary
from jaxft.runtime import processes, storage
from jaxft.runtime.stalls import fetch
from jaxft.training.feed import Data, prepare_data, warning_lines
from jaxft.training.memory import needed, require_room
from jaxft.training.optimizer import schedule
from jaxft.training.precision import with_runs_dtypes
from jaxft.training.precompute import computed_beforehand
from jaxft.training.program import OnOwn, make_program, own_of
from jaxft.training.reference import Reference, make_reference
from jaxft.training.setup import prepare_model
from jaxft.training.sharding import make_mesh, shardings
from jaxft.training.standing import Standing
from jaxft.tree import PyTree, count, size_bytes
from jaxft.weights import count_parameters


def train(config: ConfigDict, workdir: str | Path) -> Result:
    """Fine-tunes as `config` says and writes the run's folder; on a folder that exists, goes on.

    Args:
        config: as `configs/sft.py:get_config` makes it.
        workdir: RUN. After a run that was cut short it holds a checkpoint, from which this call goes on,
            and on a CPU the metrics are bit for bit those of a run that never stopped. With other `steps` or
            `epochs` than before the run is extended.

    Raises:
        UserError: a mistake in the configuration, the model, the data or the folder.
    """
    validate(config)
    workdir = storage.place(workdir)
    config = with_runs_dtypes(dated(pinned(config, workdir), workdir), workdir)
    check_folder(config, workdir)
    past = past_of(workdir)
    lock = lock_of(workdir)
    with stoppable() as stop, lock:
        mesh = make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            parts = _prepared(config, workdir, mesh)
            if (workdir / "config.json").exists():
                lock.take()  # before its logs are read
            processes.wait("checked")
            with logs_of(workdir, lock.check) as logs:
                loop = begin_run(config, workdir, parts, logs, lock, past, stop)
                _say_start(config, parts, loop)
                try:
                    stop.deferred = True
                    _trained(loop, stop)
                    output, base, plot = finish_run(config, parts, loop, logs)
                    loop.saves.local.discard()
                    stop.check()
                finally:
                    loop.record.close()
                    loop.saves.close()
                _say_end(config, parts, loop, output, base)
                plot = workdir / plot.relative_to(logs.folder)
                cost = loop.waited, count(loop.standing.state.trainable), loop.peak
                return Result(workdir, loop.step, loop.record.last, output, plot, *cost)


class Parts(NamedTuple):
    """What a run is made of, read and checked before anything is written.

    Attributes:
        mesh: of the devices.
        model: the module.
        method: what adapts it.
        trees: (trainable, frozen), on the devices.
        reference: of the objective.
        data: the feeds.
    """

    mesh: Mesh
    model: Transformer
    method: Method
    trees: tuple[PyTree, PyTree]
    reference: Reference
    data: Data


Compiled = tuple[Callable[..., Any], Callable[..., Any], Standing]


class Pending(NamedTuple):
    """An update whose numbers are not read yet."""

    step: int
    numbers: dict[str, jax.Array]
    fed: Fed


@dataclasses.dataclass
class Loop:
    """Updates: while the device works on one, the host reads the numbers of the one before.

    Attributes:
        standing: on the devices.
        step, steps: updates dispatched, and of the whole run.
        feed: gives batches.
        update: jitted (state, frozen, batch, *held) -> (state, numbers).
        evaluate: measures what stands on the devices.
        reference, method: may change that between updates.
        record, saves: what is told, and the states to go on from.
        config: of the run, for its intervals.
        mesh: of the devices.
        check: raises where the run is to stop at a step.
        pending: the last update, until its numbers are read.
        shapes: of the batches for which the step is compiled.
        peak: bytes of the largest step that is compiled.
        waited: seconds that updates waited for their batches.
        began: when, by the clock of `time.perf_counter`.
    """

    standing: Standing
    step: int
    steps: int
    feed: Feed
    update: Callable[..., Any]
    evaluate: Evaluation
    reference: Reference
    method: Method
    record: Record
    saves: Saves
    config: ConfigDict
    mesh: Mesh
    check: Callable[[int], None]
    pending: Pending | None = None
    shapes: set[tuple[int, ...]] = dataclasses.field(default_factory=set)
    peak: int = 0
    waited: float = 0.0
    began: float = dataclasses.field(default_factory=time.perf_counter)

    def run(self) -> None:
        """Makes the updates that are left, and what is due between them."""
        self.evaluate_if_due()
        while self.step < self.steps and not self.record.exhausted:
            self.check(self.step)
            self.standing = self.standing.transformed(self.method, self.step)
            fed = self.next_batch()
            numbers = self.dispatch(fed)
            self.read()
            self.pending = Pending(self.step, numbers, fed)
            saving = self.config.checkpoint.every
            if any(map(self.due, (saving, self.config.eval_every, self.saves.local.every))):
                self.read()
                if self.due(saving):
                    self.save()
                self.evaluate_if_due()
                self.save_local()
                self.record.go_on()

    def due(self, every: int) -> bool:
        """Whether what happens every so many updates, and at the end, happens now."""
        return self.step == self.steps or (every > 0 and self.step % every == 0)

    def next_batch(self) -> Fed:
        """The feed's next batch; how long it takes is counted."""
        asked = time.perf_counter()
        fed = self.feed.next(self.standing)
        self.waited += time.perf_counter() - asked
        return fed

    def dispatch(self, fed: Fed) -> dict[str, jax.Array]:
        """Gives the device the next update; its numbers are there when it is done."""
        (state, frozen, held), shape = self.standing, fed.arrays["tokens"].shape
        known = shape in self.shapes
        if not known:
            self.read()
            self.shapes.add(shape)
        rows, length = counted(shape[0], "row"), counted(shape[1], "token")
        saying = f"compiling the step for {rows} of {length}"
        with contextlib.nullcontext() if known else self.record.apart(saying):
            if not known:
                self.weigh(state, frozen, fed.arrays, *held)
            state, numbers = self.update(state, frozen, fed.arrays, *held)
        self.step += 1
        held = self.reference.moved(self.step, held, state.trainable)
        self.standing = Standing(state, frozen, held)
        if not known:
            self.record.go_on()
        return numbers

    def weigh(self, *arguments: Any) -> None:
        """Compiles the step for these arguments, and says what memory it needs where none before needed more.

        Raises UserError where the device has less.
        """
        need = needed(self.update, arguments, self.mesh)
        if need.peak > self.peak:
            self.peak = need.peak
            self.record.say(str(need))
            require_room(need, self.config, self.mesh, self.record.say)

    def read(self) -> None:
        """Tells the numbers of the last update, if that has not been done.

        A checkpoint that was begun before that update is whole first: what a killed run has told is then
        never further than one interval from where the next start goes on. The device is two updates
        ahead meanwhile.
        """
        if self.pending is None:
            return
        self.saves.wait()
        (step, numbers, fed), self.pending = self.pending, None
        read = {name: float(value) for name, value in fetch(numbers).items()}
        self.record.updated(step, read, fed)
        if read["bad"]:
            text, bad = skipped(step, read, fed.origins()), int(read["bad"])
            if bad >= self.config.optimizer.max_bad_steps:
                times = f"{counted(bad, 'such step')} in a row"
                raise UserError(f"{self.saves.workdir}: {text}; {times}: {self.saves.left()}")
            self.record.say(text)

    def evaluate_if_due(self) -> None:
        """The held-out numbers and samples, unless they were taken at this step before."""
        if not self.evaluate.sets or self.record.has_evaluated(self.step):
            return
        if not (self.step == 0 or self.due(self.config.eval_every)):
            return
        self.measure()
        if self.record.exhausted:
            self.record.say_exhausted(self.step)

    def measure(self) -> None:
        """The held-out numbers and samples of what stands now, and its checkpoint if it is the best so far."""
        with self.record.apart(f"evaluating at step {self.step}"):
            measured = self.evaluate(self.standing)
        self.record.evaluated(self.step, measured)
        if self.record.best == self.step:
            self.save()

    def saved(self) -> PyTree:
        """What a checkpoint holds."""
        return self.standing.saved(moves=self.reference.moves)

    def save(self) -> None:
        """Begins a checkpoint. What the run has told until then is there before it."""
        self.record.publish()
        best = self.record.best
        protect = () if best is None else (best,)
        self.saves.save(self.step, self.saved(), self.feed.state(), protect)

    def save_local(self) -> None:
        """The same on this host's disk, if it is due and RUN does not get it."""
        if self.due(self.saves.local.every) and self.saves.checkpoints.current != self.step:
            self.record.publish()
            self.saves.save_local(self.step, self.saved(), self.feed.state())


def _prepared(config: ConfigDict, workdir: Path, mesh: Mesh) -> Parts:
    """Everything that a run reads. (The reference's log-probabilities, where they are asked for, are written.)"""
    model, params, method = prepare_model(config, mesh)
    trees = partition(params, method)
    reference = make_reference(config, model.config, trees[0], mesh)
    complete, reference = computed_beforehand(config, workdir, mesh, reference, trees[1])
    data = prepare_data(config, model.config, mesh, complete, reference)
    return Parts(mesh, model, method, trees, reference, data)


def begin_run(
    config: ConfigDict,
    workdir: Path,
    parts: Parts,
    logs: Logs,
    lock: Lock | Claim,
    past: Past,
    stop: Stop,
    *,
    compiled: Compiled | None = None,
    at: int | None = None,
    progress: Progress | None = None,
) -> Loop:
    """The loop with a new folder, or where the run in the folder stands.

    Of runs that train together is given: `compiled`, the step `at` which they go on, and who shows their `progress`.
    """
    data, reference = parts.data, parts.reference
    epoch = data.train.steps_per_epoch
    steps = updates_of(config, epoch)
    update, sums, standing = compiled or _compiled(config, parts, steps)
    saves, step = _opened(config, workdir, parts.mesh, lock), 0
    found = saves.newest(standing.saved(moves=reference.moves), say, at)
    if found is not None:
        step, tree, state = found
        standing = standing.restored(tree)
        data.train.restore(state)
    changes = extend(config, past, workdir, step, epoch, schedule, say)
    best = objective_of(config).best
    record = Record(config, logs, step, steps, tuple(data.held_out), best, changes, progress)
    answered = functools.partial(
        samples,
        parts.model,
        rows=data.prompts,
        tokenizer=data.tokenizer,
        max_new_tokens=config.samples.max_new_tokens,
    )
    scored = functools.partial(
        scores,
        parts.model,
        items=data.items,
        names=config.eval_metrics,
        tokenizer=data.tokenizer,
        max_new_tokens=config.samples.max_new_tokens,
        batch_size=config.eval_batch_size,
    )

    return Loop(
        standing=standing,
        step=step,
        steps=steps,
        feed=data.train,
        update=update,
        evaluate=Evaluation(sums, data.held_out, answered, scored, stop.check),
        reference=reference,
        method=parts.method,
        record=record,
        saves=saves,
        config=config,
        mesh=parts.mesh,
        check=functools.partial(_check, stop),
    )


def _check(stop: Stop, step: int) -> None:
    stop.check()
    if processes.preempted(step):
        raise Interrupted


def _compiled(config: ConfigDict, parts: Parts, steps: int) -> Compiled:
    """The step and the evaluation's sums, compiled when they are called; and what stands before the first update."""
    trainable, frozen = parts.trees
    program = make_program(
        config, parts.model.config, parts.method, trainable, parts.reference, steps
    )
    placed = shardings(jax.eval_shape(program.initial, trainable), parts.mesh)
    jitted = jax.jit(
        program.update,
        donate_argnums=0,
        out_shardings=(placed, None),
        compiler_options=compiler_options(parts.mesh),
    )
    state = jax.jit(program.initial, out_shardings=placed)(trainable)
    update = OnOwn(jitted, own_of(config, steps))
    return update, jax.jit(program.eval_sums), Standing(state, frozen, parts.reference.held)


def _opened(config: ConfigDict, workdir: Path, mesh: Mesh, lock: Lock | Claim) -> Saves:
    """The folder, made or taken up. Nothing has been written before."""
    stands_on = identity(config, mesh)
    if processes.first():
        open_folder(config, workdir)
        lock.take()
        check_folder(config, workdir)  # another process may have made it meanwhile
        tidy(workdir)
    processes.wait("opened")
    return Saves(config.checkpoint, workdir, stands_on, lock.check)


def _trained(loop: Loop, stop: Stop) -> None:
    """All updates; then, or where a signal asked to stop, a checkpoint.

    Raises Interrupted where a signal did.
    """
    interrupted = None
    try:
        loop.run()
    except Interrupted as error:
        interrupted = error
    loop.read()
    loop.save()
    loop.saves.wait()
    processes.wait("saved")
    if interrupted or stop.signal:
        loop.record.say(
            f"stopped after step {loop.step}, whose checkpoint is written; "
            "the same command goes on from there"
        )
        raise interrupted or Interrupted


def finish_run(config: ConfigDict, parts: Parts, loop: Loop, logs: Logs) -> tuple[Path, str, Path]:
    """What a run leaves at its end: its output, the name of its base, and the file of its first curve."""
    output, base = _exported(config, parts, loop, logs)
    plot = _plotted(config, logs)
    _summed_up(config, loop.saves.workdir, parts, loop, logs)
    return output, base, plot


def _exported(config: ConfigDict, parts: Parts, loop: Loop, logs: Logs) -> tuple[Path, str]:
    """RUN/adapter in PEFT's format, or RUN/model where the method has no adapter; and the base's name."""
    best, workdir, standing = loop.record.best, loop.saves.workdir, loop.standing
    metric = objective_of(config).best
    if best is not None and best != loop.step:
        try:
            standing = standing.restored(loop.saves.checkpoints.restore(best, loop.saved()))
            most = "highest" if metric.better == "higher" else "lowest"
            loop.record.say(f"exporting step {best}, whose held-out {metric.name} is the {most}")
        except Damaged as error:
            loop.record.say(f"{error}; the last step is exported, not the best")
    tuned, data = (parts.model, standing.params, parts.method), parts.data
    folders = logs.folder, workdir
    name, base = export(config, *tuned, data.tokenizer, *folders, chats=data.chats)
    logs.publish()
    processes.wait("exported")
    return workdir / name, base


def _plotted(config: ConfigDict, logs: Logs) -> Path:
    """The curves of the loss and of what else the objective reports; the file of the first."""
    loss, *others = objective_of(config).metrics
    plot = plot_run(logs.folder, loss.per)
    plot_averages(logs.folder, [*(metric.name for metric in others), *config.eval_metrics])
    return plot


def _summed_up(config: ConfigDict, workdir: Path, parts: Parts, loop: Loop, logs: Logs) -> None:
    """RUN/summary.json, and RUN/report.html of all that the run has told."""
    standing, device = loop.standing, parts.mesh.devices.flat[0]
    facts = {
        "steps": loop.step,
        "parameters": count_parameters(standing.params),
        "trained_parameters": count(standing.state.trainable),
        "weights_bytes": size_bytes(standing.params),
        "peak_bytes": loop.peak or None,
        "device": device.platform if device.platform == "cpu" else device.device_kind,
        "devices": parts.mesh.size,
    }
    write_summary(logs.folder, facts, workdir)
    write_run_page(logs.folder, read_run(workdir, logs.folder, config))


def _say_start(config: ConfigDict, parts: Parts, loop: Loop) -> None:
    """What trains, on what, and what its owner should know of the data."""
    trained, whole = count(loop.standing.state.trainable), count_parameters(loop.standing.params)
    line = trained_line(parts.method.name, trained, whole)
    counts = objective_of(config).examples.counts
    updates = updates_line(loop.steps, config.batch_size, counts, parts.mesh)
    device = device_line(parts.mesh, config.dtype, config.param_dtype)
    lines = [device, *parts.data.lines, f"{line}; {updates}", parts.reference.line]
    if loop.step:
        lines.append(f"going on from the checkpoint of step {loop.step}")
    else:
        lines += warning_lines(config, parts.data, parts.model.config.vocabulary)
    for line in filter(None, lines):
        loop.record.say(line)


def _say_end(config: ConfigDict, parts: Parts, loop: Loop, output: Path, base: str) -> None:
    """What was done, and what to do with it."""
    seconds = time.perf_counter() - loop.began
    trained, whole = count(loop.standing.state.trainable), count_parameters(loop.standing.params)
    updates = counted(loop.step, "update")
    loop.record.say(f"done: {updates} of {trained:,} of {whole:,} parameters in {seconds:.1f} s")
    for line in next_commands(config, base, output, parts.data.chats):
        loop.record.say(line)
