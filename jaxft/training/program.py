"""The functions that a run compiles, for `train` from its arrays and for `plan` from their shapes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from jaxft.methods import Method
from jaxft.models import Config
from jaxft.objectives import objective_of
from jaxft.training.optimizer import make_optimizer, schedule
from jaxft.training.reference import Reference, of_the_step
from jaxft.training.step import Loss, State, initial_state, make_eval_sums, make_train_step
from jaxft.tree import PyTree


@dataclasses.dataclass(frozen=True)
class Program:
    """Pure functions, to be jitted.

    Attributes:
        initial: trainable -> the state before the first update.
        step: (state, frozen, batch, *held) -> (state, metrics).
        eval_sums: (trainable, frozen, batch, *held) -> the loss's sums.
        loss: (params, batch, *reference's tree) -> the loss's sums.
    """

    initial: Callable[[PyTree], State]
    step: Callable[..., tuple[State, dict[str, Any]]]
    eval_sums: Callable[..., tuple[Any, Any]]
    loss: Loss


def make_program(
    config: ConfigDict,
    model: Config,
    method: Method,
    trainable: PyTree,
    reference: Reference,
    steps: int,
) -> Program:
    """The program of a configuration.

    Args:
        config: of the run.
        model: the decoder's shape.
        method: what is adapted, and how it is optimized.
        trainable: the trainable tree, abstract or not.
        reference: of a preference loss.
        steps: the run's updates.
    """
    row, beside = objective_of(config), of_the_step(config, reference).beside
    optimizer = make_optimizer(config.optimizer, method, trainable, steps)
    loss = loss_of(config, model, reference.config)
    step = make_train_step(
        loss,
        optimizer,
        schedule(config.optimizer, steps),
        seed=config.seed,
        parts=config.grad_accum,
        prepare=row.prepare(config.objective),
        beside=beside,
    )
    initial = functools.partial(initial_state, optimizer=optimizer)
    return Program(initial, step, make_eval_sums(loss, beside), loss)


def loss_of(config: ConfigDict, model: Config, reference: Config) -> Loss:
    """The objective on this model: (params, batch, *reference's tree) -> (sum, what is counted beside it)."""
    row = objective_of(config)
    loss = functools.partial(row.loss(config.objective), model)
    return (
        loss
        if row.reference is None or row.ahead
        else functools.partial(loss, reference_config=reference)
    )
