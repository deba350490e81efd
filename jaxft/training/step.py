"""One update, as a pure function: gradients of the trainable tree alone, summed over tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxft.adaptation import bind_dropout
from jaxft.tree import PyTree, combine

Batch = Mapping[str, Any]
Loss = Callable[[PyTree, Batch], tuple[jax.Array, jax.Array]]


class State(NamedTuple):
    """What a step changes: the trainable tree, the optimizer's state over it, the number of updates made,
    and how many steps in a row made none, because their loss or gradient was not finite.
    """

    trainable: PyTree
    optimizer: PyTree
    step: jax.Array
    bad: jax.Array


def initial_state(trainable: PyTree, optimizer: optax.GradientTransformation) -> State:
    """The state before the first update."""
    zero = jnp.zeros((), jnp.int32)
    return State(trainable, optimizer.init(trainable), zero, zero)


def parts_of(batch: Batch, parts: int) -> Batch:
    """A batch as `parts` micro-batches, (parts, batch / parts, length).

    Part i takes the rows i, i + parts, ..., so that rows stay on the device where they are.
    """

    def split(rows: Any) -> jax.Array:
        return jnp.swapaxes(rows.reshape(-1, parts, *rows.shape[1:]), 0, 1)

    return jax.tree.map(split, batch)


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformationExtraArgs,
    rate: optax.Schedule,
    *,
    seed: int,
    parts: int = 1,
) -> Callable[[State, PyTree, Batch], tuple[State, dict[str, jax.Array]]]:
    """The training step, to be jitted with its state donated.

    Args:
        loss: (params, batch) -> (sum over tokens, number of tokens).
        optimizer: over the trainable tree; its update gets the frozen tree as `frozen`.
        rate: the learning rate of update n, for the metrics.
        seed: of dropout, whose key of update n depends on the seed and n alone.
        parts: micro-batches, whose gradients are summed before the one update.

    Returns:
        step(state, frozen, batch) -> (state, metrics): loss (mean over the trained tokens, before the update),
        grad_norm (before clipping), learning_rate (that this update used), tokens (trained), bad (steps in a row,
        with this one, whose loss or gradient was not finite). Such a step leaves the state as it was, but for `bad`.
    """

    def summed(trainable: PyTree, frozen: PyTree, batch: Batch, key: jax.Array) -> Any:
        return loss(bind_dropout(combine(trainable, frozen), key), batch)

    gradient = jax.value_and_grad(summed, has_aux=True)

    def step(state: State, frozen: PyTree, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def one(carry: Any, scanned: Any) -> tuple[Any, None]:
            part, part_key = scanned
            (total, tokens), grads = gradient(state.trainable, frozen, part, part_key)
            return jax.tree.map(jnp.add, carry, (total, tokens, grads)), None

        if parts == 1:
            (total, tokens), grads = gradient(state.trainable, frozen, batch, key)
        else:
            zeros = jax.tree.map(jnp.zeros_like, state.trainable)
            start = (jnp.zeros(()), jnp.zeros(()), zeros)
            scanned = (parts_of(batch, parts), jax.random.split(key, parts))
            (total, tokens, grads), _ = jax.lax.scan(one, start, scanned)
        count = jnp.maximum(tokens, 1.0)
        grads = jax.tree.map(lambda grad: grad / count.astype(grad.dtype), grads)
        updates, optimizer_state = optimizer.update(
            grads, state.optimizer, state.trainable, frozen=frozen
        )
        trainable = optax.apply_updates(state.trainable, updates)
        norm = optax.tree.norm(grads)
        after = State(trainable, optimizer_state, state.step + 1, jnp.zeros_like(state.bad))
        after = where(
            jnp.isfinite(total) & jnp.isfinite(norm), after, state._replace(bad=state.bad + 1)
        )
        metrics = {
            "loss": total / count,
            "grad_norm": norm,
            "learning_rate": jnp.asarray(rate(state.step), jnp.float32),
            "tokens": tokens,
            "bad": after.bad,
        }
        return after, metrics

    return step


def where(condition: jax.Array, tree: PyTree, other: PyTree) -> PyTree:
    """`jnp.where` of a scalar condition, leaf by leaf."""
    return jax.tree.map(lambda one, two: jax.lax.select(condition, one, two), tree, other)
