"""Losses of policies that learn from rewards: pure functions of the log-probabilities of what they sampled.

With m the mask of sampled tokens, A the advantage of a sequence, and

    d_t = log pi(y_t) - log pi_old(y_t)            rho = exp(d), of a token or of a whole sequence

a row of `LOSSES` says which rho it has, what a token loses, and how the tokens are added up:

    grpo          2402.03300   -min(rho A, clip(rho) A)            mean over sequences of (sum m l / sum m)
    bnpo          as in TRL    the same                            sum m l / sum m of the micro-batch
    dapo          2503.14476   the same                            sum m l / sum m of the whole update
    dr_grpo       2503.20783   the same                            sum m l / (sequences x longest)
    gspo          2507.18071   with s = exp(mean_t d_t)            as grpo
    cispo         2506.13585   -stop(min(rho, cap)) A log pi       as dapo
    rloo          2402.14740   a sequence's, with exp(sum_t d_t)   mean over sequences
    reinforce_pp  2501.03262   as grpo                             as dapo
    remax         2310.10505   -A log pi                           as dapo

Their advantages are in `baselines`. Values and gradients are those of TRL 1.16 where it has the loss, but for two
things: nothing of a masked position reaches value or gradient, whatever stands there, and |d| is cut off at 80, so that
an endless ratio has no gradient rather than NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxft.errors import UserError, row_of, shown

FARTHEST = 80.0  # of log ratios; exp(80) is near the largest float32
Tokens = Float[Array, "n length"]
stop = jax.lax.stop_gradient


class Sampled(NamedTuple):
    """A micro-batch, with 0 at masked positions.

    Attributes:
        new: log pi (n, length).
        difference: d_t (n, length).
        advantages: (n, 1) or (n, length).
        mask: m (n, length).
    """

    new: Tokens
    difference: Tokens
    advantages: Float[Array, "n any"]
    mask: Bool[Array, "n length"]


class Clip(NamedTuple):
    """Where ratios are cut: below 1 - low, above 1 + high (cispo: above high itself), and beyond delta."""

    low: float
    high: float
    delta: float | None


class Sizes(NamedTuple):
    """What sums are divided by: the longest completion allowed, and the tokens of all micro-batches of an update."""

    longest: Any
    items: Any


class Parts(NamedTuple):
    """What a policy's loss is made of.

    Attributes:
        loss: the scalar.
        ratio: rho, (n, length) or (n, 1).
        advantages: (n, 1) or (n, length).
        kl: (n, length), what is added to a token's loss times beta; None without a reference.
    """

    loss: Float[Array, ""]
    ratio: Float[Array, "n any"]
    advantages: Float[Array, "n any"]
    kl: Tokens | None


# Which ratio: log rho.


def of_token(sampled: Sampled) -> Tokens:
    """log rho_t = d_t."""
    return sampled.difference


def of_mean(sampled: Sampled) -> Float[Array, "n 1"]:
    """log s = the mean of a sequence's d_t (GSPO)."""
    return _sum(sampled.difference) / _lengths(sampled.mask)


def of_whole(sampled: Sampled) -> Float[Array, "n 1"]:
    """log rho = the sum of a sequence's d_t: the ratio of the sequences' probabilities."""
    return _sum(sampled.difference)


# What a token, or a sequence, loses.


def clipped(sampled: Sampled, ratio: Array, clip: Clip) -> Array:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A); rho itself at most delta (2505.07291), where that is given."""
    inside = _cut(ratio, 1.0 - clip.low, 1.0 + clip.high)
    ratio = ratio if clip.delta is None else _cut(ratio, None, clip.delta)
    return -jnp.minimum(ratio * sampled.advantages, inside * sampled.advantages)


def weighed(sampled: Sampled, ratio: Array, clip: Clip) -> Array:
    """-stop(min(rho, high)) A log pi: no token loses its gradient."""
    return -stop(_cut(ratio, None, clip.high)) * sampled.advantages * sampled.new


def plain(sampled: Sampled, ratio: Array, clip: Clip) -> Array:
    """-A log pi: the policy gradient."""
    return -sampled.advantages * sampled.new


# How they are added up.


def over_sequences(x: Tokens, mask: Array, sizes: Sizes) -> Float[Array, ""]:
    """Mean over rows of (sum m x / sum m); a row without a token counts as one of 0."""
    return jnp.mean(_sum(x) / _lengths(mask))


def over_own_tokens(x: Tokens, mask: Array, sizes: Sizes) -> Float[Array, ""]:
    """sum m x / sum m of this micro-batch."""
    return jnp.sum(x) / jnp.maximum(_many(mask), 1.0)


def over_all_tokens(x: Tokens, mask: Array, sizes: Sizes) -> Float[Array, ""]:
    """sum m x / items."""
    items = _many(mask) if sizes.items is None else jnp.asarray(sizes.items, x.dtype)
    return jnp.sum(x) / jnp.maximum(items, 1.0)


def over_longest(x: Tokens, mask: Array, sizes: Sizes) -> Float[Array, ""]:
    """sum m x / (rows x longest)."""
    longest = mask.shape[1] if sizes.longest is None else sizes.longest
    return jnp.sum(x) / (mask.shape[0] * jnp.maximum(jnp.asarray(longest, x.dtype), 1.0))


def over_rows(x: Tokens, mask: Array, sizes: Sizes) -> Float[Array, ""]:
    """Mean over rows of sum m x."""
    return jnp.mean(_sum(x))


class Loss(NamedTuple):
    """A loss by name.

    Attributes:
        term: what a token loses.
        mean: how the tokens are added up.
        ratio: its own ratio, where `importance` does not choose.
        by_sequence: the term is one a sequence, (n, 1), and not one a token.
    """

    term: Callable[[Sampled, Array, Clip], Array]
    mean: Callable[[Tokens, Array, Sizes], Float[Array, ""]]
    ratio: Callable[[Sampled], Array] | None = None
    by_sequence: bool = False


LOSSES: dict[str, Loss] = {
    "grpo": Loss(clipped, over_sequences),
    "bnpo": Loss(clipped, over_own_tokens),
    "dapo": Loss(clipped, over_all_tokens),
    "dr_grpo": Loss(clipped, over_longest),
    "gspo": Loss(clipped, over_sequences, of_mean),
    "cispo": Loss(weighed, over_all_tokens),
    "rloo": Loss(clipped, over_rows, of_whole, by_sequence=True),
    "reinforce_pp": Loss(clipped, over_all_tokens),
    "remax": Loss(plain, over_all_tokens),
}
IMPORTANCE = {"token": of_token, "sequence": of_mean}
# d = log pi - log pi_ref -> an estimate of KL(pi || pi_ref) from a token (http://joschu.net/blog/kl-approx.html)
DIVERGENCES: dict[str, Callable[[Array], Array]] = {
    "k1": lambda d: d,
    "k2": lambda d: 0.5 * jnp.square(d),
    "k3": lambda d: jnp.exp(-d) + d - 1.0,
}


def policy_loss(
    log_probabilities: Tokens,
    old: Tokens | None,
    advantages: Any,
    mask: Any,
    *,
    reference: Tokens | None = None,
    loss: str = "dapo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    kl: str = "k3",
    kl_corrected: bool = True,
    importance: str = "token",
    longest: Any = None,
    items: Any = None,
    focus: Any = None,
) -> Float[Array, ""]:
    """The loss of one micro-batch, to be minimised; the table on top of this module says which.

    Args:
        log_probabilities: log pi (n, length) of the sampled tokens, the one argument with a gradient.
        old: log pi_old (n, length), under the policy that sampled them; None where that is this very policy (rho = 1).
        advantages: A, (n,), or (n, length) where each token has its own.
        mask: m (n, length), 0 where a token was not sampled; what stands there is not looked at.
        reference: log pi_ref (n, length); needed where beta is not 0.
        loss: a name of `LOSSES`.
        epsilon: ratios below 1 - epsilon are cut.
        epsilon_high: and above 1 + epsilon_high, by default epsilon (DAPO: 0.28); of cispo it is the cap itself.
        delta: the largest ratio where A is negative, above 1 + epsilon_high (2505.07291); None for none.
        beta: the weight of the KL to the reference, added to each token's loss.
        kl: "k1", "k2" or "k3", as of `divergence`.
        kl_corrected: times the ratio, which makes it unbiased off policy (2512.02556), as TRL 1.16 does.
        importance: "token" or "sequence", the ratio of losses that do not bring their own (gspo and rloo do).
        longest: the longest completion allowed (dr_grpo); by default `length`.
        items: the sampled tokens of all micro-batches of the update (dapo, cispo, ...); by default this one's.
        focus: (n, length), 1 at tokens whose loss counts, as `of_highest_entropy` finds; the KL is of all.

    Returns:
        A scalar in float32, or in the inputs' dtype where that is wider.

    Raises:
        UserError: shapes that do not go together, a name that is not known, beta without a reference.

    >>> half = jnp.log(jnp.full((2, 3), 0.5))
    >>> policy_loss(half, None, jnp.asarray([1.0, -1.0]), jnp.asarray([[1, 1, 1], [1, 0, 0]])).item()
    -0.5
    """
    return policy_parts(
        log_probabilities,
        old,
        advantages,
        mask,
        reference=reference,
        row=row_of(LOSSES, loss, "loss"),
        clip=Clip(epsilon, epsilon if epsilon_high is None else epsilon_high, delta),
        beta=beta,
        kl=kl,
        kl_corrected=kl_corrected,
        importance=importance,
        sizes=Sizes(_one("longest", longest), _one("items", items)),
        focus=focus,
    ).loss


def policy_parts(
    log_probabilities: Tokens,
    old: Tokens | None,
    advantages: Any,
    mask: Any,
    *,
    reference: Tokens | None,
    row: Loss,
    clip: Clip,
    beta: float,
    kl: str,
    kl_corrected: bool,
    importance: str,
    sizes: Sizes,
    focus: Any = None,
) -> Parts:
    """`policy_loss` with what it is made of, for metrics."""
    wide = _wide(log_probabilities)
    mask = jnp.asarray(mask).astype(bool)
    new = _masked("log_probabilities", log_probabilities, mask, wide)
    before = stop(new) if old is None else _masked("old", old, mask, wide)
    gains = _gains(advantages, mask, wide, row)
    sampled = Sampled(new, _near(new - before), gains, mask)
    chosen = row_of(IMPORTANCE, importance, "importance")
    ratio = jnp.exp(_near((row.ratio or chosen)(sampled)))
    term = row.term(sampled, ratio, clip)
    if not row.by_sequence:
        seen = mask if focus is None else mask & _fitting("focus", focus, mask).astype(bool)
        term = jnp.where(seen, jnp.broadcast_to(term, mask.shape), 0.0)
    value, divergences = row.mean(term, mask, sizes), None
    estimate = row_of(DIVERGENCES, kl, "kl")
    if reference is not None:
        away = _near(new - _masked("reference", reference, mask, wide))
        divergences = estimate(away) * (ratio if kl_corrected else jnp.ones_like(ratio))
        divergences = jnp.where(mask, divergences, 0.0)
        value = value + beta * row.mean(divergences, mask, sizes)
    elif isinstance(beta, jax.core.Tracer) or beta != 0.0:
        raise UserError("beta weighs the KL to a reference: reference is needed, (n, length)")
    return Parts(value, ratio, gains, divergences)


def divergence(log_probabilities: Tokens, reference: Tokens, mask: Any, kl: str = "k1") -> Tokens:
    """An estimate of KL(pi || pi_ref) at each token, 0 at masked positions.

    With d = log pi - log pi_ref: k1 = d, k2 = d^2 / 2, k3 = exp(-d) + d - 1.

    Raises:
        UserError: a name that is not known, or shapes that differ.
    """
    mask = jnp.asarray(mask).astype(bool)
    estimate = row_of(DIVERGENCES, kl, "kl")
    wide = _wide(log_probabilities)
    new = _masked("log_probabilities", log_probabilities, mask, wide)
    return jnp.where(mask, estimate(_near(new - _masked("reference", reference, mask, wide))), 0.0)


def rewards_less_kl(
    rewards: Any, old: Tokens, reference: Tokens, mask: Any, *, beta: float, kl: str = "k1"
) -> Float[Array, " n"]:
    """R = r - beta sum_t KL_t: the KL in the reward and not in the loss (RLOO, with k1, as TRL has it).

    Args:
        rewards: (n,), NaN where it cannot be judged.
        old: log pi_old (n, length), under the policy that sampled.
        reference: log pi_ref (n, length).
        mask: (n, length).
        beta: the KL's weight.
        kl: as of `divergence`.
    """
    return jnp.asarray(rewards) - beta * jnp.sum(divergence(old, reference, mask, kl), axis=1)


def of_highest_entropy(entropies: Tokens, mask: Any, share: float) -> Bool[Array, "n length"]:
    """Where the entropy is among the highest `share` of all sampled tokens (arXiv 2506.01939): a `focus`.

    The bound is the quantile 1 - share, interpolated, as torch's; what equals it is in.

    >>> of_highest_entropy(jnp.asarray([[1.0, 4.0, 2.0, 9.0]]), jnp.asarray([[1, 1, 1, 0]]), 0.5).tolist()
    [[False, True, True, False]]
    """
    mask = jnp.asarray(mask).astype(bool)
    bound = jnp.nanquantile(jnp.where(mask, entropies, jnp.nan), 1.0 - share)
    return mask & (entropies >= bound)


def without_truncated(mask: Any, ended: Any) -> Bool[Array, "n length"]:
    """The mask without the rows of completions that reached their limit before they ended (DAPO).

    Args:
        mask: (n, length).
        ended: (n,), whether a completion has its end of sequence.
    """
    return jnp.asarray(mask).astype(bool) & jnp.asarray(ended).astype(bool)[:, None]


def _sum(x: Array) -> Float[Array, "n 1"]:
    return jnp.sum(x, axis=1, keepdims=True)


def _many(mask: Array) -> Float[Array, ""]:
    return jnp.sum(mask.astype(jnp.float32))


def _one(name: str, size: Any) -> Any:
    """The size, unchanged: None, or one number that a sum is divided by.

    Raises UserError if it is an array with axes or, outside of `jax.jit`, a number below 0.
    """
    known = size is not None and not isinstance(size, jax.core.Tracer)
    if size is not None and (np.ndim(size) or (known and not size >= 0)):
        raise UserError(f"{name}: one number is expected, at least 0, not {shown(size)}")
    return size


def _lengths(mask: Array) -> Float[Array, "n 1"]:
    """Of each row, at least 1."""
    return jnp.maximum(_sum(mask.astype(jnp.float32)), 1.0)


def _cut(x: Array, low: float | None, high: float) -> Array:
    """x inside [low, high]; on a bound itself its gradient is 1, as torch's."""
    x = x if low is None else jnp.where(x < low, low, x)
    return jnp.where(x > high, high, x)


def _near(d: Array) -> Array:
    return _cut(d, -FARTHEST, FARTHEST)


def _wide(x: Any) -> Any:
    """The dtype to compute in: float32, or x's own where that is wider."""
    return jax.dtypes.canonicalize_dtype(np.promote_types(jnp.asarray(x).dtype, np.float32))


def _masked(name: str, x: Any, mask: Array, dtype: Any) -> Array:
    """x in a wide dtype, with 0 at masked positions."""
    return jnp.where(mask, _fitting(name, x, mask).astype(dtype), 0.0)


def _fitting(name: str, x: Any, mask: Array) -> Array:
    """x; UserError where it has not the mask's shape."""
    x = jnp.asarray(x)
    if mask.ndim != 2 or x.shape != mask.shape:
        raise UserError(
            f"{name} has shape {x.shape} and mask {mask.shape}: both are (n, length), of the same n and length"
        )
    return x


def _gains(advantages: Any, mask: Array, dtype: Any, row: Loss) -> Array:
    """The advantages as (n, 1) or (n, length), 0 at masked positions, without a gradient."""
    gains = stop(jnp.asarray(advantages).astype(dtype))
    if gains.shape == mask.shape[:1]:
        return gains[:, None]
    if gains.shape != mask.shape or row.by_sequence:
        also = "" if row.by_sequence else f" or {mask.shape}"
        raise UserError(
            f"advantages have shape {gains.shape}: ({mask.shape[0]},){also} is expected, as many rows as mask has"
        )
    return jnp.where(mask, gains, 0.0)
