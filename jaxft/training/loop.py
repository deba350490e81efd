"""The one loop: whatever the objective and the method, `train` runs it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxft.adaptation import partition
from jaxft.configuration import validate
from jaxft.data.feed import Fed, Feed
from jaxft.errors import UserError, counted
from jaxft.formats.manifest import Damaged
from jaxft.inference.evaluate import held_out
from jaxft.kernels.compiler_options import compiler_options
from jaxft.methods import Method
from jaxft.models import Transformer
from jaxft.objectives.reading import updates_of
from jaxft.runs.checkpoint import Checkpoints, split_base
from jaxft.runs.dating import dated
from jaxft.runs.folder import Samples, check_folder, open_folder, tidy
from jaxft.runs.host_checkpoint import Local, local_of, newest_of
from jaxft.runs.identity import check_identity, identity
from jaxft.runs.lock import Claim, Lock, lock_of
from jaxft.runs.messages import device_line, next_commands, skipped, trained_line, updates_line
from jaxft.runs.metrics import Metrics, Progress, numbers_of, say
from jaxft.runs.plots import plot_averages, plot_run
from jaxft.runs.publish import Logs, logs_of
from jaxft.runs.reporters import reporters
from jaxft.runs.result import Result
from jaxft.runs.signals import Interrupted, Stop, stoppable
from jaxft.runtime import processes, storage
from jaxft.runtime.stalls import fetch
from jaxft.training.evaluation import answers, best_step, is_exhausted
from jaxft.training.export import export
from jaxft.training.extension import Past, extend, past_of, patience_since
from jaxft.training.feed import Data, prepare_data, warning_lines
from jaxft.training.precision import with_runs_dtypes
from jaxft.training.precompute import computed_beforehand
from jaxft.training.program import make_program
from jaxft.training.reference import Reference, make_reference
from jaxft.training.setup import prepare_model
from jaxft.training.sharding import make_mesh, shardings
from jaxft.training.step import Standing, State
from jaxft.tree import PyTree, combine, count, filled
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
    config = with_runs_dtypes(dated(config, workdir), workdir)
    check_folder(config, workdir)
    past = past_of(workdir)
    lock = lock_of(workdir)
    with stoppable() as stop, lock:
        mesh = make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            model, params, method = prepare_model(config, mesh)
            trees = partition(params, method)
            reference = make_reference(config, model.config, trees[0], mesh)
            complete, reference = computed_beforehand(config, workdir, mesh, reference, trees[1])
            data = prepare_data(config, model.config, mesh, complete)
            if (workdir / "config.json").exists():
                lock.take()  # before its logs are read
            processes.wait("checked")
            with logs_of(workdir, lock.check) as logs:
                run = _Run(
                    config, workdir, logs, mesh, method, model, data, params, reference, stop
                )
                run.open(lock, past)
                return run.run()


class _Run:
    """A run under way: the state on the devices and the files it writes."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        logs: Logs,
        mesh: Mesh,
        method: Method,
        model: Transformer,
        data: Data,
        params: PyTree,
        reference: Reference,
        stop: Stop,
    ) -> None:
        self.config, self.workdir, self.method = config, workdir, method
        self.logs, self.publish = logs.folder, logs.publish
        self.reference, self.held = reference, reference.held
        self.mesh, self.model, self.data, self.stop = mesh, model, data, stop
        self.steps = updates_of(config, data.train.steps_per_epoch)
        trainable, self.frozen = partition(params, method)
        program = make_program(config, model.config, method, trainable, reference, self.steps)
        placed = shardings(jax.eval_shape(program.initial, trainable), mesh)
        self.train_step = jax.jit(
            program.step,
            donate_argnums=0,
            out_shardings=(placed, None),
            compiler_options=compiler_options(mesh),
        )
        self.eval_sums = jax.jit(program.eval_sums)
        self.state: State = jax.jit(program.initial, out_shardings=placed)(trainable)
        self.identity = identity(config, mesh)
        self.last: dict[str, float] = {}
        self.data_wait = 0.0
        self.pending: tuple[int, dict[str, jax.Array], Fed] | None = None
        self.shapes: set[tuple[int, ...]] = set()
        self.clock = self.began = time.perf_counter()

    def open(self, lock: Lock | Claim, past: Past) -> None:
        """Makes the folder, or takes up what stands there. Nothing has been written before."""
        config, workdir = self.config, self.workdir
        if processes.first():
            open_folder(config, workdir)
            lock.take()
            check_folder(config, workdir)  # another process may have made it meanwhile
            tidy(workdir)
        processes.wait("opened")
        self.checkpoints = Checkpoints(
            workdir / "checkpoints",
            keep=config.checkpoint.keep,
            asynchronous=config.checkpoint.asynchronous,
            may=lock.check,
        )
        self.local = local_of(config.checkpoint, workdir)
        self.step = self._restore()
        epoch = self.data.train.steps_per_epoch
        changes = extend(config, past, workdir, self.step, epoch, say)
        names = config.report_to if processes.first() else ()
        services = reporters(names, self.logs, config.to_dict())
        sets = tuple(self.data.held_out) or ("",)
        self.metrics = Metrics(self.logs / "metrics.jsonl", self.step, services, sets)
        self.since = patience_since(changes, self.metrics.losses, config.patience, say)
        self.samples = Samples(self.logs / "samples.jsonl", self.metrics.losses)
        self.progress = Progress(self.step, self.steps)

    def run(self) -> Result:
        """All updates that are left, then the last checkpoint, the export and the plot."""
        self._say_start()
        try:
            self.stop.deferred = True
            self._train()
            output = self._export()
            plot = self.workdir / plot_run(self.logs).relative_to(self.logs)
            plot_averages(self.logs)
            self.local.discard()
            self.stop.check()
        finally:
            self.progress.close()
            self.metrics.close()
            self.checkpoints.close()
            self.local.close()
        self._say_end(output)
        return Result(self.workdir, self.step, self.last, output, plot, self.data_wait)

    def _train(self) -> None:
        """The loop; then, or where a signal asked to stop, a checkpoint."""
        interrupted = None
        try:
            self._loop()
        except Interrupted as error:
            interrupted = error
        self._log()
        self._save()
        self.checkpoints.wait()
        processes.wait("saved")
        if interrupted or self.stop.signal:
            self.progress.say(
                f"stopped after step {self.step}, whose checkpoint is written; "
                "the same command goes on from there"
            )
            raise interrupted or Interrupted

    def _loop(self) -> None:
        self._evaluate_if_due()
        while self.step < self.steps and not self._exhausted():
            self.stop.check()
            if processes.preempted(self.step):
                raise Interrupted
            self._events()
            asked = time.perf_counter()
            fed = self.data.train.next(self._standing())
            self.data_wait += time.perf_counter() - asked
            self._update(fed)
            saved = self.config.checkpoint.every
            if any(map(self._due, (saved, self.config.eval_every, self.local.every))):
                self._log()
                if self._due(saved):
                    self._save()
                self._evaluate_if_due()
                self._save_local()
                self.clock = time.perf_counter()

    def _update(self, fed: Fed) -> None:
        """One step; the numbers of the one before are read now, so that the device never waits for the host."""
        shape = fed.arrays["tokens"].shape
        known = shape in self.shapes
        if not known:
            self._log()
            self.shapes.add(shape)
        saying = (
            f"compiling the step for {counted(shape[0], 'row')} of {counted(shape[1], 'token')}"
        )
        with contextlib.nullcontext() if known else self.progress.apart(saying):
            self.state, numbers = self.train_step(self.state, self.frozen, fed.arrays, *self.held)
        self.step += 1
        self.held = self.reference.moved(self.step, self.held, self.state.trainable)
        self._log()
        if not known:
            self.clock = time.perf_counter()
        self.pending = (self.step, numbers, fed)

    def _due(self, every: int) -> bool:
        return self.step == self.steps or (every > 0 and self.step % every == 0)

    def _events(self) -> None:
        """The method's transforms of the tree that are to happen before this update."""
        for step, transform in self.method.events:
            if step == self.step:
                params = transform(combine(self.state.trainable, self.frozen))
                trainable, self.frozen = partition(params, self.method)
                self.state = self.state._replace(trainable=trainable)

    def _log(self) -> None:
        """Writes the numbers of the last update, if that has not been done.

        A checkpoint that was begun before that update is whole first: what a killed run has told is then
        never further than one interval from where the next start goes on. The device is two updates
        ahead meanwhile.
        """
        if self.pending is None:
            return
        self.checkpoints.wait()
        self.local.wait()
        (step, numbers, fed), self.pending = self.pending, None
        read = {name: float(value) for name, value in fetch(numbers).items()}
        now = time.perf_counter()
        line = numbers_of(read, fed.tokens(), now - self.clock)
        self.clock = now
        if step % self.config.log_every == 0 or step == self.steps:
            self.metrics.write("train", step, line)
            self.publish(at_once=False)
        self.last |= {f"train_{name}": value for name, value in line.items()}
        self.progress.update(step, line)
        if read["bad"]:
            self._bad(step, int(read["bad"]), line, fed)

    def _bad(self, step: int, bad: int, line: Mapping[str, float], fed: Fed) -> None:
        """Tells of a step that was skipped; after `max_bad_steps` in a row the run is over."""
        text = skipped(step, line, fed.origins())
        if bad >= self.config.optimizer.max_bad_steps:
            self.checkpoints.wait()
            last = self.checkpoints.latest
            stays = "no checkpoint was written yet" if last is None else f"checkpoint {last} stays"
            raise UserError(
                f"{self.workdir}: {text}; {counted(bad, 'such step')} in a row: {stays}"
            )
        self.progress.say(text)

    def _exhausted(self) -> bool:
        """Whether the held-out loss has not fallen for `config.patience` evaluations."""
        return is_exhausted(self.metrics.losses, self.config.patience, self.since)

    def _evaluate_if_due(self) -> None:
        """The held-out losses and samples, unless they were taken at this step before."""
        if not self.data.held_out or self.step in self.metrics.losses:
            return
        if not (self.step == 0 or self._due(self.config.eval_every)):
            return
        with self.progress.apart(f"evaluating at step {self.step}"):
            trees = (self.state.trainable, self.frozen)
            results = {
                name: held_out(self.eval_sums, *trees, self._held_out(feed), *self.held)
                for name, feed in self.data.held_out.items()
            }
            rows = answers(self.config, self.model, self._params(), self.data)
            self.samples.write(self.step, rows)
        self.metrics.write_evaluation(self.step, results)
        for name, numbers in results.items():
            prefix = f"eval_{name}_" if name else "eval_"
            self.last |= {prefix + key: value for key, value in numbers.items()}
            of = f" of {name}" if name else ""
            self.progress.say(f"step {self.step}: held-out loss{of} {numbers['loss']:.4f}")
        if self.config.checkpoint.best and self._best() == self.step:
            self._save()
        if self._exhausted():
            self.progress.say(
                f"the held-out loss has not fallen for {counted(self.config.patience, 'evaluation')}: "
                f"stopping after step {self.step}"
            )

    def _held_out(self, feed: Feed) -> Iterator[Any]:
        for fed in feed.once(self._standing()):
            self.stop.check()
            yield fed.arrays
        self.stop.check()

    def _standing(self) -> Standing:
        return Standing(self.state, self.frozen, self.held)

    def _params(self) -> PyTree:
        return combine(self.state.trainable, self.frozen)

    def _best(self) -> int | None:
        """The step whose checkpoint is kept as the best, or None."""
        return best_step(self.metrics.losses) if self.config.checkpoint.best else None

    def _save(self) -> None:
        """A checkpoint of the state, the drawn frozen leaves, the data iterator and what the run stands on."""
        self.publish()
        best = self._best()
        protect = () if best is None else (best,)
        self.checkpoints.save(self.step, self._kept(), self._beside(), protect)

    def _save_local(self) -> None:
        """The same on this host's disk, if it is due and RUN does not get it. What it has told is there before."""
        if self._due(self.local.every) and self.checkpoints.current != self.step:
            self.publish()
            self.local.save(self.step, self._kept(), self._beside())

    def _kept(self) -> PyTree:
        drawn, _ = split_base(self._params(), self.frozen)
        return (self.state, drawn, *self.reference.kept(self.held))

    def _beside(self) -> dict[str, Any]:
        return {"iterator": self.data.train.state(), "run": self.identity}

    def _restore(self) -> int:
        """Takes up the last whole checkpoint, of RUN or of the hosts' disks; returns its step, or 0."""
        step, source = newest_of(self.checkpoints, self.local, self._kept(), say)
        if step is None:
            return 0
        beside = source.data(step)
        check_identity(beside["run"], self.identity, self.workdir, say)
        self._take_up(step, source)
        self.data.train.restore(beside["iterator"])
        return step

    def _take_up(self, step: int, source: Checkpoints | Local) -> None:
        _, base = split_base(self._params(), self.frozen)
        self.state, drawn, *kept = source.restore(step, self._kept())
        self.held = tuple(kept) or self.held
        self.frozen = filled(drawn, base)

    def _export(self) -> Path:
        """RUN/adapter in PEFT's format, or RUN/model where the method has no adapter."""
        best = self._best()
        if best is not None and best != self.step:
            try:
                self._take_up(best, self.checkpoints)
                self.progress.say(f"exporting step {best}, whose held-out loss is the lowest")
            except Damaged as error:
                self.progress.say(f"{error}; the last step is exported, not the best")
        name, self.base = export(
            self.config, self.model, self._params(), self.method, self.data, self.logs, self.workdir
        )
        self.publish()
        processes.wait("exported")
        return self.workdir / name

    def _say_start(self) -> None:
        trained, whole = count(self.state.trainable), count_parameters(self._params())
        line = trained_line(self.method.name, trained, whole)
        updates = updates_line(self.steps, self.config.batch_size, self.mesh)
        device = device_line(self.mesh, self.config.dtype, self.config.param_dtype)
        lines = [device, *self.data.lines, f"{line}; {updates}", self.reference.line]
        if self.step:
            lines.append(f"going on from the checkpoint of step {self.step}")
        else:
            lines += warning_lines(self.config, self.data, self.model.config.vocabulary)
        for line in filter(None, lines):
            self.progress.say(line)

    def _say_end(self, output: Path) -> None:
        """What was done, and what to do with it."""
        seconds = time.perf_counter() - self.began
        trained, whole = count(self.state.trainable), count_parameters(self._params())
        self.progress.say(
            f"done: {counted(self.step, 'update')} of {trained:,} of {whole:,} parameters in {seconds:.1f} s"
        )
        for line in next_commands(self.config, self.base, output, self.data.chats):
            self.progress.say(line)
