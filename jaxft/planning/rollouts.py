"""What the sampler of a run that learns from rewards needs, beside the step."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jaxft.inference.decoding import LEAST_LENGTH, bucket
from jaxft.inference.rollouts import Prompts, run_slots, slots_of
from jaxft.mesh import BATCH
from jaxft.models import Config
from jaxft.models.transformer import empty_cache
from jaxft.objectives.objective import objective_of
from jaxft.objectives.reading import max_length_of
from jaxft.tree import PyTree


class Sampling(NamedTuple):
    """Per device.

    Attributes:
        lowered: the program that samples a batch of rollouts, not compiled yet.
        cache_bytes: keys and values of the prompts, each once, and of the completions that are continued at a time.
    """

    lowered: Any
    cache_bytes: int


def sampling(config: ConfigDict, model: Config, params: PyTree, mesh: Mesh) -> Sampling | None:
    """The sampler of the longest prompts and completions, from shapes; None for an objective that samples nothing.

    Args:
        config: of the run.
        model: the decoder's shape.
        params: the whole tree as shapes, laid out on the mesh.
        mesh: in force.
    """
    if not objective_of(config).samples:
        return None
    rollout, parts = config.rollout, math.prod(mesh.shape[axis] for axis in BATCH)
    count = -(-config.batch_size // rollout.parts)
    count += -count % parts
    length = bucket(max(max_length_of(config, model) - rollout.max_new_tokens, 1), LEAST_LENGTH)
    here = NamedSharding(mesh, PartitionSpec())

    def shape(*sizes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=here)

    asked = Prompts(
        tokens=shape(count, length),
        segments=shape(count, length),
        streams=shape(count, dtype=jnp.uint32),
        numbers=shape(count, rollout.group),
        first=shape(count),
        limits=shape(count),
        temperature=shape(count, dtype=jnp.float32),
        top_k=shape(count),
        top_p=shape(count, dtype=jnp.float32),
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    width = slots_of(count * rollout.group, rollout.slots, parts)
    lowered = run_slots.lower(
        model, params, asked, key, shape(1), room=rollout.max_new_tokens, slots=width
    )
    prompts = jax.eval_shape(lambda: empty_cache(model, count, length))
    own = jax.eval_shape(lambda: empty_cache(model, width, max(rollout.max_new_tokens - 1, 1)))
    leaves = jax.tree.leaves([[cache["key"], cache["value"]] for cache in (prompts, own)])
    heads = mesh.shape["tensor"]
    held = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    return Sampling(lowered, held // (parts * heads))
