"""Several runs' arrays as one stack, and the step that updates all of them over one base."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxft.adaptation import partition
from jaxft.kernels.compiler_options import compiler_options
from jaxft.methods import Method
from jaxft.models import Config
from jaxft.runs.checkpoint import split_base
from jaxft.training.program import Own, make_program
from jaxft.training.reference import Reference
from jaxft.training.sharding import shardings
from jaxft.training.standing import Standing
from jaxft.training.step import State
from jaxft.tree import PyTree, combine, filled
from jaxft.weights import common_tree, cropped, padded


class Stack(NamedTuple):
    """The arrays of several runs over one base, each with the runs as its first axis.

    Attributes:
        state: what a step changes.
        drawn: what adapters have besides, which does not train.
        held: for a reference.
        own: data of each run.
    """

    state: State
    drawn: PyTree
    held: tuple[PyTree, ...]
    own: Own


@dataclasses.dataclass(frozen=True)
class Shared:
    """What all runs of a stack have in common.

    Attributes:
        config: of any of them, for what is common.
        model: the decoder's shape.
        method: of any of them.
        reference: of any of them; its `held` is each run's own where `own_reference` says so.
        own_reference: whether what is held for the reference is stacked.
        base: the frozen tree without what adapters have, once for all.
        like: a tree of shapes that holds each run's whole tree.
        steps: the updates of all runs.
        mesh: of the devices.
        numbers: keys of the optimizer in which they differ.
    """

    config: ConfigDict
    model: Config
    method: Method
    reference: Reference
    own_reference: bool
    base: PyTree
    like: Standing
    steps: int
    mesh: Mesh
    numbers: tuple[str, ...]

    def stack(self, standings: Sequence[Standing], owns: Sequence[Own]) -> Stack:
        """Several runs side by side, each padded to what holds all of them."""
        states = [padded(one.state, self.like.state) for one in standings]
        drawn = [padded(_drawn(one), _drawn(self.like)) for one in standings]
        held = [one.held for one in standings]
        if self.own_reference:
            held = [padded(one, self.like.held) for one in held]
        owns = [own._replace(optimizer={k: own.optimizer[k] for k in self.numbers}) for own in owns]
        together = _side_by_side(held) if self.own_reference else held[0]
        return self._placed(
            Stack(_side_by_side(states), _side_by_side(drawn), together, _side_by_side(owns))
        )

    def _placed(self, stack: Stack) -> Stack:
        """The stack on the mesh, each run's arrays as they would lie alone."""
        state, drawn = (
            jax.device_put(tree, shardings(tree, self.mesh)) for tree in (stack.state, stack.drawn)
        )
        return stack._replace(state=state, drawn=drawn)

    def one(self, stack: Stack, index: int, like: Standing) -> Standing:
        """The run at an index of the stack, with arrays of its own sizes.

        Args:
            stack: of all.
            index: of the run.
            like: the run's own, or its shapes; its frozen base and, where it is common, what is held are taken over.
        """
        state = cropped(stack.state, like.state, index)
        params = combine(like.state.trainable, like.frozen)
        drawn, base = split_base(params, like.frozen)
        frozen = filled(cropped(stack.drawn, drawn, index), base)
        held = cropped(stack.held, like.held, index) if self.own_reference else like.held
        return Standing(state, frozen, held)

    def transformed(self, stack: Stack, step: int) -> Stack:
        """After the method's transforms of the tree that are to happen when so many updates are made."""
        if step not in [at for at, _ in self.method.events]:
            return stack
        standing = Standing(stack.state, filled(stack.drawn, self.base), stack.held)
        after = standing.transformed(self.method, step)
        return stack._replace(state=after.state, drawn=_drawn(after))

    def moved(self, stack: Stack, step: int) -> Stack:
        """After the reference has moved, if it does so when so many updates are made."""
        held = self.reference.moved(step, stack.held, stack.state.trainable)
        return stack._replace(held=held)

    def update(self) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
        """The jitted update of all runs: (state, drawn, base, batches, own, *held) -> (state, numbers of each).

        `batches` are those of the runs one by one; they are stacked in the program. The state is donated.
        """
        trainable = self.like.state.trainable
        program = make_program(
            self.config, self.model, self.method, trainable, self.reference, self.steps
        )

        def one(
            state: State, drawn: PyTree, own: Own, batch: Any, held: Any, base: PyTree
        ) -> tuple[State, dict[str, jax.Array]]:
            return program.update(state, filled(drawn, base), batch, own, *held)

        axes = (0, 0, 0, 0, 0 if self.own_reference else None, None)

        def update(
            state: State, drawn: PyTree, base: PyTree, batches: Any, own: Own, *held: PyTree
        ) -> tuple[State, dict[str, jax.Array]]:
            batch = jax.tree.map(lambda *rows: jnp.stack(rows), *batches)
            return jax.vmap(one, in_axes=axes)(state, drawn, own, batch, held, base)

        return jax.jit(update, donate_argnums=0, compiler_options=compiler_options(self.mesh))


def _drawn(standing: Standing) -> PyTree:
    """What of the frozen tree the adapters have."""
    return split_base(standing.params, standing.frozen)[0]


def base_of_all(standing: Standing) -> PyTree:
    """The rest of the frozen tree."""
    return split_base(standing.params, standing.frozen)[1]


def _side_by_side(trees: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def common_standing(
    standings: Sequence[Standing], method: Method, initial: Callable[[PyTree], State]
) -> Standing:
    """The shapes of a run that holds each of these runs: ranks of the largest, and all their targets.

    Args:
        standings: of the runs before their first update.
        method: of any of them.
        initial: a trainable tree -> the state before the first update.
    """
    trainable, frozen = partition(common_tree([one.params for one in standings]), method)
    state = jax.eval_shape(initial, trainable)
    return Standing(state, frozen, common_tree([one.held for one in standings]))


def same_length(batches: Sequence[Mapping[str, jax.Array]]) -> list[Mapping[str, jax.Array]]:
    """Batches whose rows are all as long as the longest, with padding behind: zeros, segment 0 and weight 0."""

    def fit(name: str, array: jax.Array) -> jax.Array:
        shapes = [batch[name].shape for batch in batches]
        shape = tuple(map(max, zip(*shapes, strict=True)))
        if array.shape == shape:
            return array
        more = [(0, size - own) for size, own in zip(shape, array.shape, strict=True)]
        return jnp.pad(array, more)

    return [{name: fit(name, array) for name, array in batch.items()} for batch in batches]
