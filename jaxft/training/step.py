"""One update, as a pure function: gradients of the trainable tree alone, summed over tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxft.adaptation import bind_dropout
from jaxft.objectives import averages, counted
from jaxft.tree import PyTree, combine

Batch = Mapping[str, Any]
Loss = Callable[..., tuple[jax.Array, Any]]
Beside = Callable[..., tuple[PyTree, ...]]


def nothing_more(frozen: PyTree) -> tuple[PyTree, ...]:
    """What an objective without a reference gets beside parameters and batch."""
    del frozen
    return ()


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
    step, bad = (jnp.zeros((), jnp.int32) for _ in range(2))  # two arrays: each is donated
    return State(trainable, optimizer.init(trainable), step, bad)


def parts_of(batch: Batch, parts: int) -> Batch:
    """A batch as `parts` micro-batches, (parts, batch / parts, length).

    Part i takes the rows i, i + parts, ..., so that rows stay on the device where they are.
    """

    def split(rows: Any) -> jax.Array:
        return jnp.swapaxes(rows.reshape(-1, parts, *rows.shape[1:]), 0, 1)

    return jax.tree.map(split, batch)


def joined(parts: jax.Array) -> jax.Array:
    """What each micro-batch of `parts_of` gave, (parts, batch / parts, ...), in the batch's order: (batch, ...)."""
    return jnp.swapaxes(parts, 0, 1).reshape(-1, *parts.shape[2:])


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformationExtraArgs,
    rate: optax.Schedule,
    *,
    seed: int | jax.Array,
    parts: int = 1,
    prepare: Callable[[Batch], Batch] = dict,
    beside: Beside = nothing_more,
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
    """The training step, to be jitted with its state donated.

    Args:
        loss: (params, batch, *beside) -> (sum over tokens, number of tokens, or a `Counted`).
        optimizer: over the trainable tree; its update gets the frozen tree as `frozen`.
        rate: the learning rate of update n, for the metrics.
        seed: of dropout, whose key of update n depends on the seed and n alone; or the key that it stands for.
        parts: micro-batches, whose gradients are summed before the one update.
        prepare: what the loss wants to be noted in the whole batch before it is taken in parts.
        beside: (frozen, *held) -> what the loss gets beside parameters and batch: a reference.

    Returns:
        step(state, frozen, batch, *held) -> (state, metrics): loss (mean over what it is counted in, before the
        update), grad_norm (before clipping), learning_rate (that this update used), tokens (trained), bad (steps in
        a row, with this one, whose loss or gradient was not finite), and the averages that the loss reports. A bad
        step leaves the state as it was, but for `bad`.
    """

    def summed(trainable: PyTree, others: tuple[PyTree, ...], batch: Batch, key: jax.Array) -> Any:
        params = bind_dropout(combine(trainable, others[0]), key)
        total, more = loss(params, batch, *beside(*others))
        return total, counted(more)

    gradient = over_parts(jax.value_and_grad(summed, has_aux=True), parts)

    def step(
        state: State, frozen: PyTree, batch: Batch, *held: PyTree
    ) -> tuple[State, dict[str, jax.Array]]:
        of_run = seed if isinstance(seed, jax.Array) else jax.random.key(seed)
        key = jax.random.fold_in(of_run, state.step)
        (total, sums), grads = gradient(state.trainable, (frozen, *held), prepare(batch), key)
        count = jnp.maximum(sums.weight, 1.0)
        grads = jax.tree.map(lambda grad: grad / count.astype(grad.dtype), grads)
        updates, optimizer_state = optimizer.update(
            grads, state.optimizer, state.trainable, frozen=frozen
        )
        trainable = optax.apply_updates(state.trainable, updates)
        norm = optax.tree.norm(grads)
        after = State(trainable, optimizer_state, state.step + 1, jnp.zeros_like(state.bad))
        good = jnp.isfinite(total) & jnp.isfinite(norm)
        after = where(good, after, state._replace(bad=state.bad + 1))
        metrics = {
            "loss": total / count,
            "grad_norm": norm,
            "learning_rate": jnp.asarray(rate(state.step), jnp.float32),
            "tokens": sums.tokens,
            "bad": after.bad,
            **averages(sums.sums),
        }
        return after, metrics

    return step


def over_parts(gradient: Callable[..., Any], parts: int) -> Callable[..., Any]:
    """(trainable, others, batch, key) -> what `gradient` gives, summed over the batch's micro-batches, one by one.

    Each micro-batch has a key of its own. With one part, `gradient` itself.
    """
    if parts == 1:
        return gradient

    def accumulated(trainable: PyTree, others: PyTree, batch: Batch, key: jax.Array) -> Any:
        def one(carry: Any, scanned: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, gradient(trainable, others, *scanned)), None

        scanned = (parts_of(batch, parts), jax.random.split(key, parts))
        first = jax.tree.map(lambda part: part[0], scanned)
        shapes = jax.eval_shape(gradient, trainable, others, *first)
        start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(one, start, scanned)[0]

    return accumulated


def make_eval_sums(loss: Loss, beside: Beside) -> Callable[..., tuple[jax.Array, Any]]:
    """(trainable, frozen, batch, *held) -> the loss's sums, without dropout."""

    def sums(
        trainable: PyTree, frozen: PyTree, batch: Batch, *held: PyTree
    ) -> tuple[jax.Array, Any]:
        return loss(combine(trainable, frozen), batch, *beside(frozen, *held))

    return sums


def where(condition: jax.Array, tree: PyTree, other: PyTree) -> PyTree:
    """`jnp.where` of a scalar condition, leaf by leaf."""
    return jax.tree.map(lambda one, two: jax.lax.select(condition, one, two), tree, other)
