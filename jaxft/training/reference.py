"""The reference of an objective: made of what stands in memory already, or held beside it.

    fresh adapter            the same parameters with the adapter left out; nothing is held
    config.adapter           the frozen base under a copy of the adapter that training began from
    full tuning              a copy of what trains, on the devices or in the host's memory
    a folder                 that model
    reference_every > 0      a copy of what trains, which is moved towards the policy

The step makes the reference's tree from the frozen one, so that the base is an argument of it once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxft.assets import model_folder
from jaxft.errors import UserError
from jaxft.formats import load
from jaxft.formats.config_file import model_config
from jaxft.models import Config
from jaxft.models.transformer import initial_params
from jaxft.objectives import objective_of
from jaxft.objectives.objective import has_reference
from jaxft.training.sharding import laid_out, leaf_sharding, shardings
from jaxft.training.step import Beside, nothing_more
from jaxft.tree import PyTree, combine, count, filled
from jaxft.weights import base_of, is_weight


@dataclasses.dataclass(frozen=True)
class Reference:
    """What the step and the evaluation get for the reference.

    Attributes:
        beside: (frozen, *held) -> () or (the reference's tree,).
        held: () or (arrays that it needs besides,).
        config: the reference's shape.
        line: what the log says of it; "" without.
        every: updates between two moves of `held`, which then belongs in a checkpoint; 0: it stays.
        move: (held, trainable) -> held.
    """

    beside: Beside
    held: tuple[PyTree, ...]
    config: Config
    line: str = ""
    every: int = 0
    move: Callable[[PyTree, PyTree], PyTree] | None = None

    @property
    def moves(self) -> bool:
        """Whether it changes as training goes on, and so belongs in a checkpoint."""
        return self.every > 0

    def moved(self, step: int, held: tuple[PyTree, ...], trainable: PyTree) -> tuple[PyTree, ...]:
        """What is held after so many updates."""
        if self.move is None or step % self.every:
            return held
        return (self.move(held[0], trainable),)


def make_reference(config: ConfigDict, model: Config, trainable: PyTree, mesh: Mesh) -> Reference:
    """The reference as training begins.

    Args:
        config: the run's configuration.
        model: the policy's shape.
        trainable: what trains, as it stands before the first update; of shapes, the reference is of shapes as well.
        mesh: where a copy is laid out, as what it copies.
    """
    objective = config.objective
    if not has_reference(config):
        line = f"{objective.name}: no reference" if "reference" in objective else ""
        return Reference(nothing_more, (), model, line)
    if objective.reference != "start":
        made = _of_folder(config, model, mesh, abstract=_abstract(trainable))
    elif config.adapter or objective.reference_every or objective.reference_offload:
        held, back = _copy(trainable, mesh, offload=objective.reference_offload)
        made = Reference(lambda rest, held: (combine(back(held), rest),), (held,), model)
    else:
        held, _ = _copy(left_out(trainable), mesh)
        made = Reference(lambda rest, held: (filled(left_out(rest), held),), (held,), model)
    every = objective.reference_every
    return dataclasses.replace(
        made,
        line=f"{objective.name}: reference {objective.reference}, {count(made.held):,} numbers held for it",
        every=every,
        move=mover(objective) if every else None,
    )


def of_the_step(config: ConfigDict, reference: Reference) -> Reference:
    """What the step gets of it: nothing, where the feed asks it."""
    if not objective_of(config).ahead:
        return reference
    return dataclasses.replace(reference, beside=lambda frozen, *held: ())


def left_out(tree: PyTree) -> PyTree:
    """The tree with the base in every adapter's place; holes stay holes."""
    return jax.tree.map(base_of, tree, is_leaf=is_weight)


def mover(objective: ConfigDict) -> Callable[[PyTree, PyTree], PyTree]:
    """held, trainable -> held + mix (trainable - held): TR-DPO's soft update (arXiv 2404.09656, equation 3).

    With an adapter its parts are mixed, and not the products that they stand for: at mix 1 that is the same.
    """
    mix = objective.reference_mix

    def one(old: jax.Array, new: jax.Array) -> jax.Array:
        return (old + mix * (new - old).astype(jnp.float32)).astype(old.dtype)

    return jax.jit(lambda held, trainable: jax.tree.map(one, held, trainable), donate_argnums=0)


def _copy(
    tree: PyTree, mesh: Mesh, *, offload: bool = False
) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """A copy with arrays of its own, and what brings it to the devices again."""
    here = shardings(tree, mesh)
    away = jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), here) if offload else here
    back = functools.partial(jax.device_put, device=here) if offload else lambda held: held
    if _abstract(tree):
        return laid_out(tree, away), back
    copied = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=here)(tree)
    return jax.device_put(copied, away) if offload else copied, back


def _abstract(tree: PyTree) -> bool:
    """Whether the tree is one of shapes, or empty."""
    return all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def _of_folder(config: ConfigDict, model: Config, mesh: Mesh, *, abstract: bool) -> Reference:
    name = config.objective.reference
    folder = model_folder(name, weights=not abstract)
    other = dataclasses.replace(model_config(folder), dtype=config.dtype)
    if other.vocabulary != model.vocabulary:
        raise UserError(
            f"config.objective.reference: {name} has a vocabulary of {other.vocabulary}, "
            f"and the policy one of {model.vocabulary}"
        )
    if abstract:
        dtype = jnp.dtype(config.param_dtype)
        shapes = jax.eval_shape(lambda: initial_params(other, jax.random.key(0), dtype))
        return Reference(_given, (laid_out(shapes, shardings(shapes, mesh)),), other)
    _, params = load(
        folder,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        shardings=lambda path, shape: leaf_sharding(mesh, path, shape),
    )
    return Reference(_given, (params,), other)


def _given(rest: PyTree, held: PyTree) -> tuple[PyTree, ...]:
    """What is held is the whole reference."""
    del rest
    return (held,)
