"""The functions that a run compiles, for `train` from its arrays and for `plan` from their shapes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from jaxft.methods import Method
from jaxft.models import Config
from jaxft.objectives import objective_of
from jaxft.training.optimizer import make_optimizer, schedule
from jaxft.training.reference import Reference, of_the_step
from jaxft.training.step import Loss, State, initial_state, make_eval_sums, make_train_step
from jaxft.tree import PyTree

SPAN = 1024  # updates


class Own(NamedTuple):
    """What a run of several has of its own as data, so that one program serves all of them.

    Attributes:
        key: of dropout.
        rates: (updates or more,) the learning rate of each.
        optimizer: numbers of `config.optimizer` by their keys.
    """

    key: jax.Array
    rates: jax.Array
    optimizer: dict[str, jax.Array]


def own_of(config: ConfigDict, steps: int, numbers: Sequence[str] = ()) -> Own:
    """A run's own numbers as data.

    `rates` has a multiple of `SPAN` entries, more than the run uses: runs of different lengths share one program.

    Args:
        config: of the run.
        steps: its updates.
        numbers: keys of `config.optimizer` that are data too.
    """
    updates = jnp.arange(-(-steps // SPAN) * SPAN, dtype=jnp.int32)
    rates = jax.vmap(schedule(config.optimizer, steps))(updates)
    optimizer = {key: jnp.float32(config.optimizer[key]) for key in numbers}
    return Own(jax.random.key(config.seed), rates.astype(jnp.float32), optimizer)


@dataclasses.dataclass(frozen=True)
class OnOwn:
    """A jitted `Program.update` as (state, frozen, batch, *held) -> (state, metrics), on a run's own numbers."""

    jitted: Any
    own: Own

    def __call__(self, state: State, frozen: PyTree, batch: Any, *held: PyTree) -> Any:
        return self.jitted(state, frozen, batch, self.own, *held)

    def lower(self, state: State, frozen: PyTree, batch: Any, *held: PyTree) -> Any:
        """As of what is jitted."""
        return self.jitted.lower(state, frozen, batch, self.own, *held)


@dataclasses.dataclass(frozen=True)
class Program:
    """Pure functions, to be jitted.

    Attributes:
        initial: trainable -> the state before the first update.
        update: (state, frozen, batch, own, *held) -> (state, metrics): one program serves runs of whatever seed,
            learning rate and length.
        eval_sums: (trainable, frozen, batch, *held) -> the loss's sums.
        loss: (params, batch, *reference's tree) -> the loss's sums.
    """

    initial: Callable[[PyTree], State]
    update: Callable[..., tuple[State, dict[str, Any]]]
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
    loss = loss_of(config, model, reference.config)
    shapes = jax.eval_shape(lambda tree: tree, trainable)

    def optimizer(settings: ConfigDict, rate: optax.Schedule) -> Any:
        return make_optimizer(settings, method, shapes, steps, rate)

    def update(state: State, frozen: PyTree, batch: Any, own: Own, *held: PyTree) -> Any:
        def rate(count: jax.Array) -> jax.Array:
            return own.rates[count]

        step = make_train_step(
            loss,
            optimizer(_with_numbers(config.optimizer, own.optimizer), rate),
            rate,
            seed=own.key,
            parts=config.grad_accum,
            prepare=row.prepare(config.objective),
            beside=beside,
        )
        return step(state, frozen, batch, *held)

    told = optimizer(config.optimizer, schedule(config.optimizer, steps))
    initial = functools.partial(initial_state, optimizer=told)
    return Program(initial, update, make_eval_sums(loss, beside), loss)


def _with_numbers(settings: ConfigDict, numbers: dict[str, jax.Array]) -> ConfigDict:
    """Settings with data in the place of some numbers."""
    return ConfigDict({**settings, **numbers}, convert_dict=False)


def loss_of(config: ConfigDict, model: Config, reference: Config) -> Loss:
    """The objective on this model: (params, batch, *reference's tree) -> (sum, what is counted beside it)."""
    row = objective_of(config)
    loss = functools.partial(row.loss(config.objective), model)
    return (
        loss
        if row.reference is None or row.ahead
        else functools.partial(loss, reference_config=reference)
    )
