"""The one loop: whatever the objective and the method, `train` runs it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxft import processes
from jaxft.adaptation import merge, partition
from jaxft.assets import model_folder
from jaxft.configuration import validate
from jaxft.formats import save, save_adapter
from jaxft.inference import generate
from jaxft.inference.evaluate import held_out
from jaxft.methods import Method
from jaxft.models import Transformer
from jaxft.training.checkpoint import Checkpoints, split_base
from jaxft.training.folder import Samples, check_folder, open_folder, replaced
from jaxft.training.metrics import Metrics, Progress, reporters
from jaxft.training.optimizer import make_optimizer, schedule
from jaxft.training.plots import plot_run
from jaxft.training.prepare import (
    Data,
    loss_of,
    prepare_data,
    prepare_model,
    prompt_and_reference,
    updates_of,
)
from jaxft.training.sharding import make_mesh, place_batch, shardings
from jaxft.training.step import State, initial_state, make_train_step
from jaxft.tree import PyTree, combine, count


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        workdir: the run's folder.
        steps: updates made in all.
        metrics: the last training and held-out numbers, as `train_loss`, `eval_loss`, ...
        output: RUN/adapter, or RUN/model after full tuning.
        plot: RUN/plots/loss.png.
    """

    workdir: Path
    steps: int
    metrics: dict[str, float]
    output: Path
    plot: Path


def train(config: ConfigDict, workdir: str | Path) -> Result:
    """Fine-tunes as `config` says and writes the run's folder; on a folder that exists, goes on.

    Args:
        config: as `configs/sft.py:get_config` makes it.
        workdir: RUN. After a run that was cut short it holds a checkpoint, from which this call goes on,
            and on a CPU the metrics are bit for bit those of a run that never stopped.

    Raises:
        UserError: a mistake in the configuration, the model, the data or the folder.
    """
    validate(config)
    workdir = Path(workdir)
    check_folder(config, workdir)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        model, params, method = prepare_model(config, mesh)
        data = prepare_data(config, model.config, mesh)
        processes.wait("checked")
        with processes.logs_of(workdir) as logs:
            return _Run(config, workdir, logs, mesh, method, model, data, params).run()


class _Run:
    """A run under way: the state on the devices and the files it writes."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        logs: Path,
        mesh: Mesh,
        method: Method,
        model: Transformer,
        data: Data,
        params: PyTree,
    ) -> None:
        self.config, self.workdir, self.logs, self.method = config, workdir, logs, method
        self.mesh, self.model, self.data = mesh, model, data
        self.steps = updates_of(config, data.train.steps_per_epoch)
        trainable, self.frozen = partition(params, method)
        rate = schedule(config.optimizer, self.steps)
        optimizer = make_optimizer(config.optimizer, method, trainable, self.steps)
        loss = loss_of(config, model.config)
        step = make_train_step(loss, optimizer, rate, seed=config.seed, parts=config.grad_accum)
        self.eval_sums = jax.jit(lambda tuned, rest, batch: loss(combine(tuned, rest), batch))
        state = jax.eval_shape(lambda tree: initial_state(tree, optimizer), trainable)
        places = shardings(state, mesh)
        self.train_step = jax.jit(step, donate_argnums=0, out_shardings=(places, None))
        initial = jax.jit(lambda tree: initial_state(tree, optimizer), out_shardings=places)
        self.state: State = initial(trainable)
        if processes.first():
            open_folder(config, workdir)
        processes.wait("opened")
        self.checkpoints = Checkpoints(
            workdir / "checkpoints",
            keep=config.checkpoint.keep,
            asynchronous=config.checkpoint.asynchronous,
        )
        self.step = self._restore()
        services = reporters(
            config.report_to if processes.first() else (), workdir, config.to_dict()
        )
        self.metrics = Metrics(logs / "metrics.jsonl", self.step, services)
        self.samples = Samples(logs / "samples.jsonl", self.metrics.evaluated)
        self.progress = Progress(self.step, self.steps, quiet=not processes.first())
        self.last: dict[str, float] = {}

    def run(self) -> Result:
        """All updates that are left, then the last checkpoint, the export and the plot."""
        self._say_start()
        try:
            self._loop()
            self._save()
            self.checkpoints.wait()
            output = self._export()
            plot = plot_run(self.logs)
        finally:
            self.progress.close()
            self.metrics.close()
            self.checkpoints.close()
        return Result(self.workdir, self.step, self.last, output, plot)

    def _loop(self) -> None:
        self._evaluate_if_due()
        pending: tuple[int, dict[str, jax.Array], int] | None = None
        clock = time.perf_counter()
        while self.step < self.steps:
            self._events()
            batch = next(self.data.train)
            placed = place_batch(batch, self.config.batch_size, self.mesh)
            self.state, numbers = self.train_step(self.state, self.frozen, placed)
            self.step += 1
            # Metrics are read a step late, so that the device never waits for the host.
            if pending is not None:
                clock = self._log(*pending, clock)
            pending = (self.step, numbers, int(np.count_nonzero(batch["segments"])))
            if self._due(self.config.eval_every) or self._due(self.config.checkpoint.every):
                clock = self._log(*pending, clock)
                pending = None
                if self._due(self.config.checkpoint.every):
                    self._save()
                self._evaluate_if_due()
                clock = time.perf_counter()
        if pending is not None:
            self._log(*pending, clock)

    def _due(self, every: int) -> bool:
        return self.step == self.steps or (every > 0 and self.step % every == 0)

    def _events(self) -> None:
        """The method's transforms of the tree that are to happen before this update."""
        for step, transform in self.method.events:
            if step == self.step:
                params = transform(combine(self.state.trainable, self.frozen))
                trainable, self.frozen = partition(params, self.method)
                self.state = self.state._replace(trainable=trainable)

    def _log(self, step: int, numbers: Mapping[str, jax.Array], tokens: int, clock: float) -> float:
        """Writes the numbers of a past update; returns the time at which they were there."""
        read = {name: float(value) for name, value in jax.device_get(dict(numbers)).items()}
        now = time.perf_counter()
        line = {
            "loss": read["loss"],
            "learning_rate": read["learning_rate"],
            "grad_norm": read["grad_norm"],
            "tokens": tokens,
            "trained_tokens": int(read["tokens"]),
            "tokens_per_second": round(tokens / max(now - clock, 1e-9), 1),
        }
        if step % self.config.log_every == 0 or step == self.steps:
            self.metrics.write("train", step, line)
        self.last |= {f"train_{name}": value for name, value in line.items()}
        self.progress.update(step, line)
        return now

    def _evaluate_if_due(self) -> None:
        """The held-out loss and samples, unless they were taken at this step before."""
        if self.data.held_out is None or self.step in self.metrics.evaluated:
            return
        if not (self.step == 0 or self._due(self.config.eval_every)):
            return
        numbers = held_out(self.eval_sums, self.state.trainable, self.frozen, self._held_out())
        self.samples.write(self.step, self._answers())
        self.metrics.write("eval", self.step, numbers)
        self.metrics.evaluated.add(self.step)
        self.last |= {f"eval_{name}": value for name, value in numbers.items()}
        self.progress.say(f"step {self.step}: held-out loss {numbers['loss']:.4f}")

    def _held_out(self) -> Iterator[Any]:
        batches = self.data.held_out
        assert batches is not None
        for index in range(len(batches)):
            yield place_batch(batches[index], self.config.eval_batch_size, self.mesh)

    def _answers(self) -> list[dict[str, Any]]:
        """What the model says to the held-out prompts, beside what stands in the data."""
        if not self.data.prompts:
            return []
        prompts, references = zip(*map(prompt_and_reference, self.data.prompts), strict=True)
        answers = generate(
            self.model,
            self._params(),
            list(prompts),
            tokenizer=self.data.tokenizer,
            max_new_tokens=self.config.samples.max_new_tokens,
        )
        rows = zip(prompts, answers, references, strict=True)
        return [
            {"prompt": prompt, "completion": answer, "reference": reference}
            for prompt, answer, reference in rows
        ]

    def _params(self) -> PyTree:
        return combine(self.state.trainable, self.frozen)

    def _save(self) -> None:
        """A checkpoint of the state, the drawn frozen leaves and the data iterator."""
        drawn, _ = split_base(self._params(), self.frozen)
        self.checkpoints.save(self.step, (self.state, drawn), self.data.train.state())

    def _restore(self) -> int:
        """Takes up the last checkpoint; returns its step, or 0."""
        step = self.checkpoints.latest
        if step is None:
            return 0
        drawn, base = split_base(self._params(), self.frozen)
        (self.state, drawn), data = self.checkpoints.restore(step, (self.state, drawn))
        self.frozen = combine_holes(drawn, base)
        self.data.train.restore(data)
        return step

    def _export(self) -> Path:
        """RUN/adapter in PEFT's format, or RUN/model where the method has no adapter."""
        params, like = self._params(), model_folder(self.config.model)
        name = "adapter" if self.method.weight else "model"
        with replaced(self.logs / name) as folder:
            if self.method.weight:
                save_adapter(params, folder, method=self.method, base=like)
            else:
                save(self.model, merge(params), folder, like=like)
        processes.wait("exported")
        return self.logs / name

    def _say_start(self) -> None:
        for line in self.data.lines:
            self.progress.say(line)
        trained, whole = count(self.state.trainable), count(self._params())
        self.progress.say(
            f"{self.method.name}: {trained:,} of {whole:,} parameters train ({100 * trained / whole:.3g} %); "
            f"{self.steps} updates of {self.config.batch_size} sequences on {self.mesh.size} "
            f"{jax.devices()[0].platform} device{'s' * (self.mesh.size > 1)}"
        )
        if self.step:
            self.progress.say(f"going on from the checkpoint of step {self.step}")


def combine_holes(*trees: PyTree) -> PyTree:
    """Like `combine`, for trees that have holes in common."""
    return jax.tree.map(
        lambda *leaves: next((leaf for leaf in leaves if leaf is not None), None),
        *trees,
        is_leaf=lambda leaf: leaf is None,
    )
