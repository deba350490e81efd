"""Cross entropy without the logits of all tokens: in chunks along the length.

The chunks are cut along the length and never over flattened tokens, which on a mesh would gather
the hidden states of all devices. While the logits of a chunk are at hand its gradients are formed
too, for what is differentiated and for that alone: a frozen head costs one product for the logits
and one for the gradient of the hidden states, nothing in the backward pass but a scale, and an
evaluation costs the logits.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxft.mesh import sizes_in_force
from jaxft.weights import contract

CHUNK_ELEMENTS = 12 * 2**20  # of the logits of a chunk on a device: 48 MiB in float32
LEAST_TOKENS = 1024  # of a chunk on a mesh's device: with fewer, reading the head takes longer than its product
MOST_CHUNKS = 64


# The loss of each position and, where the setting asks for it, the entropy there.
Told = tuple[Float[Array, "batch length"], Float[Array, "batch length"] | None]


class _Setting(NamedTuple):
    """What is static: the head's structure, the loss's form, the positions per chunk."""

    structure: Any
    softcap: float | None
    label_smoothing: float
    chunk: int
    parts: int  # among how many devices the length is divided
    entropies: bool = False  # whether the entropy of each position is computed too


def cross_entropy_reference(
    hidden: Float[Array, "batch length hidden"],
    head: Any,
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    *,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`cross_entropy` with all logits at once."""
    logits = contract(hidden, head).astype(jnp.float32)
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    log_probabilities = jax.nn.log_softmax(logits)
    target = jnp.take_along_axis(log_probabilities, targets[:, :, None], axis=-1)[:, :, 0]
    smooth = log_probabilities.mean(axis=-1)
    losses = -((1.0 - label_smoothing) * target + label_smoothing * smooth)
    return jnp.sum(losses * weights), jnp.sum(weights)


def cross_entropy(
    hidden: Float[Array, "batch length hidden"],
    head: Any,
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    *,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    chunk: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The weighted sum of -log p(target) in float32, and the sum of the weights.

    Args:
      hidden: the states that the head reads.
      head: a weight (hidden, vocabulary); its leaves may be trained or frozen, in part too.
      targets: the token to predict at each position.
      weights: of each position in the sum; 0 leaves it out.
      softcap: bounds the logits, softcap tanh(logits / softcap) (gemma 2).
      label_smoothing: the share of the target's probability spread evenly over the vocabulary.
      chunk: positions per chunk; by default as many as keep a chunk's logits near 48 MiB.

    The gradient of the head accumulates in float32. There is no second derivative.
    """
    leaves, setting = _prepare(hidden, head, softcap, label_smoothing, chunk)
    return _loss_sum(setting, hidden, leaves, targets, weights), jnp.sum(weights)


def token_log_probabilities(
    hidden: Float[Array, "batch length hidden"],
    head: Any,
    targets: Int[Array, "batch length"],
    *,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Float[Array, "batch length"]:
    """The log p(target) of every position in float32, in chunks; arguments are `cross_entropy`'s."""
    leaves, setting = _prepare(hidden, head, softcap, 0.0, chunk)
    losses, _ = _token_losses(setting, hidden, leaves, targets)
    return -losses


def log_probabilities_and_entropies(
    hidden: Float[Array, "batch length hidden"],
    head: Any,
    targets: Int[Array, "batch length"],
    *,
    softcap: float | None = None,
    chunk: int | None = None,
) -> tuple[Float[Array, "batch length"], Float[Array, "batch length"]]:
    """`token_log_probabilities`, and the entropy of the distribution of each token, in nats, float32.

    The entropies are logsumexp(z) - sum_v p(v) z(v) of the same logits z, constants to the gradient.
    """
    leaves, setting = _prepare(hidden, head, softcap, 0.0, chunk)
    losses, entropies = _token_losses(setting._replace(entropies=True), hidden, leaves, targets)
    assert entropies is not None
    return -losses, jax.lax.stop_gradient(entropies)


def collision_log_probabilities(
    hidden: Float[Array, "batch length hidden"],
    head: Any,
    *,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Float[Array, "batch length"]:
    """log sum_v p(v)^2 at every position in float32, in chunks and without a gradient: how sure the model is there.

    That is logsumexp(2 z) - 2 logsumexp(z) for the logits z; arguments are `cross_entropy`'s.
    """
    hidden, head = jax.lax.stop_gradient((hidden, head))
    leaves, setting = _prepare(hidden, head, softcap, 0.0, chunk)
    whole = jax.tree.unflatten(setting.structure, leaves)

    def step(carry: None, states: Array) -> tuple[None, Array]:
        logits = contract(states, whole).astype(jnp.float32)
        logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        twice, once = (jax.nn.logsumexp(factor * logits, axis=-1) for factor in (2.0, 1.0))
        return carry, twice - 2.0 * once

    _, pieces = jax.lax.scan(step, None, _cut(hidden, setting.chunk, setting.parts))
    return _join(pieces, hidden.shape[1], setting.parts)


def target_scores(
    hidden: Float[Array, "batch length hidden"],
    head: Any,
    targets: Int[Array, "batch length"],
    *,
    softcap: float | None = None,
    chunk: int | None = None,
) -> tuple[Float[Array, "batch length"], Bool[Array, "batch length"]]:
    """The log p(target) of every position in float32, and whether the target is the likeliest token there.

    In chunks and without a gradient; arguments are `cross_entropy`'s.
    """
    hidden, head = jax.lax.stop_gradient((hidden, head))
    leaves, setting = _prepare(hidden, head, softcap, 0.0, chunk)
    whole = jax.tree.unflatten(setting.structure, leaves)

    def step(carry: None, piece: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
        states, wanted = piece
        logits = contract(states, whole).astype(jnp.float32)
        logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        target = jnp.take_along_axis(logits, wanted[:, :, None], axis=-1, mode="clip")[:, :, 0]
        hit = jnp.argmax(logits, axis=-1).astype(wanted.dtype) == wanted
        return carry, (target - jax.nn.logsumexp(logits, axis=-1), hit)

    cut = functools.partial(_cut, chunk=setting.chunk, parts=setting.parts)
    _, pieces = jax.lax.scan(step, None, (cut(hidden), cut(targets)))
    log_p, hits = (_join(piece, hidden.shape[1], setting.parts) for piece in pieces)
    return log_p, hits


def chunk_length(
    batch: int, length: int, vocabulary: int, devices: int = 1, tensor: int = 1
) -> int:
    """Positions per chunk: its logits near 48 MiB on each device, and no more than 64 chunks.

    On a mesh of `devices`, of which `tensor` divide the vocabulary and the others the tokens, a chunk has at least
    `LEAST_TOKENS` on each of them.

    >>> chunk_length(2, 512, 49152), chunk_length(2, 16, 100), chunk_length(256, 2048, 131072)
    (128, 16, 32)
    >>> chunk_length(256, 2048, 131072, devices=128)
    512
    """
    most = max(1, CHUNK_ELEMENTS * devices // (batch * vocabulary))
    if devices > 1:
        most = max(most, LEAST_TOKENS * devices // (tensor * batch))
    chunks = min(-(-length // most), MOST_CHUNKS)
    return -(-length // chunks)


def _prepare(
    hidden: Array,
    head: Any,
    softcap: float | None,
    label_smoothing: float,
    chunk: int | None,
) -> tuple[list[Array], _Setting]:
    leaves, structure = jax.tree.flatten(head)
    if chunk is None:
        batch, length, _ = hidden.shape
        mesh = sizes_in_force()
        chunk = chunk_length(
            batch, length, head.shape[-1], math.prod(mesh.values()), mesh["tensor"]
        )
    return leaves, _Setting(structure, softcap, label_smoothing, chunk, sizes_in_force()["context"])


def _scan(
    setting: _Setting,
    hidden: Array,
    leaves: list[Array],
    targets: Array,
    weights: Array,
    form_hidden: bool,
    trained: tuple[int, ...],
) -> tuple[Told, Array | None, list[Array | None]]:
    """The losses and entropies of all positions, and the gradients of sum(weights * losses).

    Returns the losses (batch, length) and the entropies (batch, length), None if the setting does not ask for them; the
    hidden states' gradient if `form_hidden`, else None; and a list with an entry for each leaf of the head: its
    gradient, summed in float32, at the indices `trained`, else None.
    """

    def product(states: Array, picked: list[Array]) -> Array:
        whole = list(leaves)
        for index, leaf in zip(trained, picked, strict=True):
            whole[index] = leaf
        return contract(states, jax.tree.unflatten(setting.structure, whole))

    def step(sums: list[Array], piece: tuple[Array, Array, Array]) -> tuple[list[Array], Any]:
        states, targets, weights = piece
        picked = [leaves[index] for index in trained]
        if form_hidden:
            logits, transpose = jax.vjp(product, states, picked)
        else:
            logits, transpose = jax.vjp(functools.partial(product, states), picked)
        told, d_logits = _losses(setting, logits, targets, weights)
        if not (form_hidden or trained):
            return sums, (told, None)
        *d_states, d_picked = transpose(d_logits.astype(logits.dtype))
        sums = [
            total + part.astype(jnp.float32) for total, part in zip(sums, d_picked, strict=True)
        ]
        return sums, (told, d_states[0] if form_hidden else None)

    zeros = [jnp.zeros(leaves[index].shape, jnp.float32) for index in trained]
    pieces = jax.tree.map(
        lambda x: _cut(x, setting.chunk, setting.parts), (hidden, targets, weights)
    )
    sums, (told, d_hidden) = jax.lax.scan(step, zeros, pieces)
    d_leaves: list[Array | None] = [None] * len(leaves)
    for index, total in zip(trained, sums, strict=True):
        d_leaves[index] = total.astype(leaves[index].dtype)
    whole = functools.partial(_join, length=hidden.shape[1], parts=setting.parts)
    return jax.tree.map(whole, told), whole(d_hidden) if form_hidden else None, d_leaves


def _losses(
    setting: _Setting, logits: Array, targets: Array, weights: Array
) -> tuple[Told, Float[Array, "batch length vocabulary"]]:
    """The losses and entropies of a chunk's positions, and the derivative of sum(weights * losses) by the logits."""
    softcap, smooth, vocabulary = setting.softcap, setting.label_smoothing, logits.shape[-1]
    if softcap is not None:
        tanh = jnp.tanh(logits.astype(jnp.float32) / softcap)
        logits = softcap * tanh
    # The largest is looked for in the logits' own dtype: a TPU else writes all of them in float32, and reads those.
    highest = logits.max(axis=-1, keepdims=True).astype(jnp.float32)
    away = logits.astype(jnp.float32) - highest
    powers = jnp.exp(away)
    total = powers.sum(axis=-1, keepdims=True)
    target = jnp.take_along_axis(logits, targets[:, :, None], axis=-1, mode="clip")
    losses = (highest + jnp.log(total) - (1.0 - smooth) * target.astype(jnp.float32))[:, :, 0]
    entropies = None
    if setting.entropies:
        expected = jnp.sum(powers * away, axis=-1, keepdims=True) / total
        entropies = (jnp.log(total) - expected)[:, :, 0]
    if smooth:
        losses = losses - smooth * logits.astype(jnp.float32).mean(axis=-1)
    weights = weights[:, :, None]
    hit = targets[:, :, None] == jnp.arange(vocabulary, dtype=targets.dtype)[None, None, :]
    derivative = powers * (weights / total) - weights * (smooth / vocabulary)
    derivative = derivative - jnp.where(hit, weights * (1.0 - smooth), 0.0)
    derivative = derivative if softcap is None else derivative * (1.0 - jnp.square(tanh))
    return (losses, entropies), derivative


def _scaled(gradient: Array | None, cotangent: Array) -> Array | None:
    """The gradient times what comes from above, in its own dtype."""
    if gradient is None:
        return None
    return (gradient.astype(jnp.float32) * cotangent).astype(gradient.dtype)


def _cut(x: Array, chunk: int, parts: int) -> Array:
    """(batch, length, ...) -> (chunks, batch, chunk, ...); the last is filled up with zeros.

    Of each of the `parts` into which devices divide the length, every chunk takes an equal share: so all devices
    work at every chunk, and none sends its positions to another.
    """
    batch, here = x.shape[0], x.shape[1] // parts
    share = -(-chunk // parts)
    chunks = -(-here // share)
    x = x.reshape(batch, parts, here, *x.shape[2:])
    widths = [(0, 0), (0, 0), (0, chunks * share - here)] + [(0, 0)] * (x.ndim - 3)
    x = jnp.pad(x, widths).reshape(batch, parts, chunks, share, *x.shape[3:])
    return jnp.moveaxis(x, 2, 0).reshape(chunks, batch, parts * share, *x.shape[4:])


def _join(x: Array, length: int, parts: int) -> Array:
    """(chunks, batch, chunk, ...) -> (batch, length, ...)."""
    chunks, batch, chunk = x.shape[:3]
    x = jnp.moveaxis(x.reshape(chunks, batch, parts, chunk // parts, *x.shape[3:]), 0, 2)
    x = x.reshape(batch, parts, -1, *x.shape[4:])[:, :, : length // parts]
    return x.reshape(batch, length, *x.shape[3:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss_sum(
    setting: _Setting, hidden: Array, leaves: list[Array], targets: Array, weights: Array
) -> Float[Array, ""]:
    (losses, _), _, _ = _scan(setting, hidden, leaves, targets, weights, False, ())
    return jnp.sum(losses * weights)


def _loss_sum_forward(
    setting: _Setting, hidden: Any, leaves: Any, targets: Any, weights: Any
) -> Any:
    trained = tuple(index for index, leaf in enumerate(leaves) if leaf.perturbed)
    values = [leaf.value for leaf in leaves]
    (losses, _), d_hidden, d_leaves = _scan(
        setting, hidden.value, values, targets.value, weights.value, hidden.perturbed, trained
    )
    return jnp.sum(losses * weights.value), (losses, d_hidden, d_leaves)


def _loss_sum_backward(setting: _Setting, kept: Any, cotangent: Any) -> Any:
    losses, d_hidden, d_leaves = kept
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return None, [None] * len(d_leaves), None, None
    d_leaves = [_scaled(gradient, cotangent) for gradient in d_leaves]
    return _scaled(d_hidden, cotangent), d_leaves, None, losses * cotangent


_loss_sum.defvjp(_loss_sum_forward, _loss_sum_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_losses(setting: _Setting, hidden: Array, leaves: list[Array], targets: Array) -> Told:
    return _scan(setting, hidden, leaves, targets, jnp.ones(targets.shape), False, ())[0]


def _token_losses_forward(setting: _Setting, hidden: Any, leaves: Any, targets: Any) -> Any:
    """With a frozen head a position's loss moves its own hidden state alone: its gradient is formed
    now and weighed later. With a trained one the weights are needed first: all is done again.
    """
    trained = {index: leaf.value for index, leaf in enumerate(leaves) if leaf.perturbed}
    frozen = {index: leaf.value for index, leaf in enumerate(leaves) if not leaf.perturbed}
    values = [leaf.value for leaf in leaves]
    ones = jnp.ones(targets.value.shape)
    form = hidden.perturbed and not trained
    told, d_hidden, _ = _scan(setting, hidden.value, values, targets.value, ones, form, ())
    again = (hidden.value, targets.value, trained, frozen) if trained else None
    return told, (d_hidden, again, [None] * len(leaves))


def _token_losses_backward(setting: _Setting, kept: Any, cotangents: Any) -> Any:
    (d_hidden, again, d_leaves), (cotangent, _) = kept, cotangents
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return None, d_leaves, None
    if again is not None:
        hidden, targets, trained, frozen = again
        values = [leaf for _, leaf in sorted((trained | frozen).items())]
        _, d_hidden, d_leaves = _scan(
            setting._replace(entropies=False),
            hidden,
            values,
            targets,
            cotangent,
            True,
            tuple(sorted(trained)),
        )
        return d_hidden, d_leaves, None
    return _scaled(d_hidden, cotangent[:, :, None]), d_leaves, None


_token_losses.defvjp(_token_losses_forward, _token_losses_backward, symbolic_zeros=True)
