"""What stands on the devices as a run goes on, and which of it a checkpoint holds."""

from __future__ import annotations

from typing import NamedTuple

from jaxft.adaptation import partition
from jaxft.methods import Method
from jaxft.runs.checkpoint import split_base
from jaxft.training.step import State
from jaxft.tree import PyTree, combine, filled


class Standing(NamedTuple):
    """The arrays of a run.

    Attributes:
        state: what a step changes.
        frozen: the rest of the parameters.
        held: for a reference.
    """

    state: State
    frozen: PyTree
    held: tuple[PyTree, ...] = ()

    @property
    def params(self) -> PyTree:
        """The whole tree."""
        return combine(self.state.trainable, self.frozen)

    def saved(self, *, moves: bool) -> tuple[PyTree, ...]:
        """What a checkpoint holds: the state, the drawn frozen leaves and, where it `moves`, the reference."""
        drawn, _ = split_base(self.params, self.frozen)
        return (self.state, drawn, *(self.held if moves else ()))

    def restored(self, saved: tuple[PyTree, ...]) -> Standing:
        """With what a checkpoint held in the place of its own."""
        state, drawn, *held = saved
        _, base = split_base(self.params, self.frozen)
        return Standing(state, filled(drawn, base), tuple(held) or self.held)

    def transformed(self, method: Method, step: int) -> Standing:
        """After the method's transforms of the tree that are to happen when so many updates are made."""
        standing = self
        for at, transform in method.events:
            if at == step:
                trainable, frozen = partition(transform(standing.params), method)
                state = standing.state._replace(trainable=trainable)
                standing = Standing(state, frozen, standing.held)
        return standing
