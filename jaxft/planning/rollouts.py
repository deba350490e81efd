"""The programs of a run that learns from rewards beside its step: the sampler, the scorer, the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jaxft.inference.exact import parts_to_score, run_score
from jaxft.inference.rollouts import Prompts, Rollouts, as_compiled, prompts_of
from jaxft.inference.slots import run_slots
from jaxft.mesh import BATCH
from jaxft.models import Config
from jaxft.models.transformer import empty_cache
from jaxft.objectives.objective import objective_of
from jaxft.objectives.reading import max_length_of
from jaxft.training.policy import reference_program, rows_to_score
from jaxft.training.reference import Reference
from jaxft.tree import PyTree

MADE_LATER = ("advantages", "off_policy", "reference")  # of a batch, after the reference was asked


class Sampling(NamedTuple):
    """Programs as they are lowered, not compiled yet.

    Attributes:
        sampler: draws a batch of rollouts, or a part of it.
        scorer: reads them as training does.
        reference: gives the frozen policy's log-probabilities of a batch; None where it is not asked.
        cache_bytes: keys and values of the sampler on a device: of each prompt once, and of the completions that are
            continued at a time.
    """

    sampler: Any
    scorer: Any
    reference: Any
    cache_bytes: int


def sampling(
    config: ConfigDict,
    model: Config,
    params: PyTree,
    frozen: PyTree,
    batch: Mapping[str, Any],
    reference: Reference,
    mesh: Mesh,
) -> Sampling | None:
    """The programs for the longest prompts and completions, from shapes; None for an objective that samples nothing.

    They are lowered from the arguments that a run gives them, made here of prompts of ones.

    Args:
        config: of the run.
        model: the decoder's shape.
        params: the whole tree as shapes, laid out on the mesh.
        frozen: what does not train of it.
        batch: of the step, as shapes.
        reference: of the run, of shapes.
        mesh: in force.
    """
    if not objective_of(config).samples:
        return None
    rollout = config.rollout
    new, length = rollout.max_new_tokens, max_length_of(config, model)
    prompts = _longest(-(-config.batch_size // rollout.parts), rollout.group, length - new, new)
    key = jax.eval_shape(lambda: jax.random.key(0))
    here = NamedSharding(mesh, PartitionSpec())
    asked, slots = as_compiled(prompts, rollout.slots)
    ends = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=here)
    sampler = run_slots.lower(model, params, _shapes(asked, here), key, ends, room=new, slots=slots)
    rows = rows_to_score(config)
    some = Prompts(*(x[:rows] for x in prompts))
    laid, part = parts_to_score(some, _full(some, new), rows)[0]
    arguments = (_shapes(laid, here), _shapes(part, here), key)
    scorer = run_score.lower(model, params, *arguments, room=new)
    asks, lowered = reference_program(config, reference), None
    if asks is not None:
        known = {name: x for name, x in batch.items() if name not in MADE_LATER}
        lowered = asks.lower(frozen, known, *reference.held)  # type: ignore[attr-defined]
    return Sampling(sampler, scorer, lowered, _cache_bytes(model, asked, slots, new, mesh))


def _longest(count: int, group: int, length: int, new: int) -> Prompts:
    ones = np.ones((count, max(length, 1)), np.int32)
    return prompts_of(ones, ones, group=group, limits=new)


def _full(prompts: Prompts, new: int) -> Rollouts:
    """Completions that are as long as they may be."""
    count = prompts.numbers.size
    tokens, numbers = np.zeros((count, new), np.int32), np.zeros((count, new), np.float32)
    each = np.zeros(count, np.int32)
    return Rollouts(tokens, each + new, numbers, numbers, each > 0, each, np.zeros(2, np.int32))


def _shapes(tree: PyTree, sharding: NamedSharding) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _cache_bytes(model: Config, asked: Prompts, slots: int, new: int, mesh: Mesh) -> int:
    """Of a device: the batch's axes divide rows, `tensor` divides heads."""
    sizes: Sequence[tuple[int, ...]] = (asked.tokens.shape, (slots, max(new - 1, 1)))
    caches = [jax.eval_shape(lambda size=size: empty_cache(model, *size)) for size in sizes]
    leaves = jax.tree.leaves([[cache["key"], cache["value"]] for cache in caches])
    held = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    return held // math.prod(mesh.shape[axis] for axis in (*BATCH, "tensor"))
