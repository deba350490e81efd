"""Losses of preferences: pure functions of the log-probabilities of completions.

A loss takes two `Pair`s, log pi and log pi_ref of the chosen and the rejected completions, (pairs,) each, and gives a
loss a pair. The papers' quantities are

    r(y) = log pi(y | x) - log pi_ref(y | x)        delta = r(chosen) - r(rejected)        reward(y) = beta r(y)

Two changes of r serve the losses that are functions of r alone (`scores`): an f-divergence other than the reverse KL,
and the mean over a completion's tokens instead of the sum. Names are those of TRL 1.16 where it has them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Losses = Float[Array, " pairs"]
log_sigmoid = jax.nn.log_sigmoid
sigmoid = jax.nn.sigmoid


class Pair(NamedTuple):
    """Something of the chosen and of the rejected completions, (pairs,) each."""

    chosen: Float[Array, " pairs"]
    rejected: Float[Array, " pairs"]


def minus(left: Pair, right: Pair) -> Pair:
    """r: the one less the other."""
    return Pair(left.chosen - right.chosen, left.rejected - right.rejected)


def difference(policy: Pair, reference: Pair) -> Losses:
    """delta = r(chosen) - r(rejected)."""
    ratio = minus(policy, reference)
    return ratio.chosen - ratio.rejected


def scores(
    policy: Pair, reference: Pair, lengths: Pair | None, f_divergence: str, alpha: float
) -> Pair:
    """f'(pi / pi_ref) of each completion, divided by its tokens where `lengths` are given.

    f-DPO (arXiv 2309.16240, table 1, up to constants): with u = pi / pi_ref, that is r = log u,

        reverse_kl  log u          forward_kl  1 - 1/u
        js          log(2u / (1 + u))          alpha  (u^(alpha - 1) - 1) / (alpha - 1)
    """

    def derivative(r: Losses) -> Losses:
        if f_divergence == "forward_kl":
            return 1.0 - jnp.exp(-r)
        if f_divergence == "js":
            return math.log(2.0) + log_sigmoid(r)
        if f_divergence == "alpha" and abs(alpha - 1.0) >= 1e-6:
            return (jnp.exp(jnp.minimum((alpha - 1.0) * r, 80.0)) - 1.0) / (alpha - 1.0)
        return r

    chosen, rejected = map(derivative, minus(policy, reference))
    if lengths is None:
        return Pair(chosen, rejected)
    return Pair(chosen / lengths.chosen, rejected / lengths.rejected)


def dpo(policy: Pair, reference: Pair, *, beta: float) -> Losses:
    """-log sigmoid(beta delta): DPO (arXiv 2305.18290, equation 7), TRL's `sigmoid`."""
    return -log_sigmoid(beta * difference(policy, reference))


def smoothed(logits: Losses, label_smoothing: float) -> Losses:
    """-(1 - e) log sigmoid(z) - e log sigmoid(-z): the label is wrong with probability e."""
    right, wrong = log_sigmoid(logits), log_sigmoid(-logits)
    return -(1.0 - label_smoothing) * right - label_smoothing * wrong


def cdpo(policy: Pair, reference: Pair, *, beta: float, label_smoothing: float) -> Losses:
    """-(1 - e) log sigmoid(beta delta) - e log sigmoid(-beta delta): conservative DPO.

    Mitchell, "A note on DPO with noisy preferences" (2023), equation 3.
    """
    return smoothed(beta * difference(policy, reference), label_smoothing)


def robust(policy: Pair, reference: Pair, *, beta: float, label_smoothing: float) -> Losses:
    """(-(1 - e) log sigmoid(beta delta) + e log sigmoid(-beta delta)) / (1 - 2 e).

    Robust DPO (arXiv 2403.00409, equation 12): unbiased where labels are flipped with probability e < 1/2.
    """
    logits, rate = beta * difference(policy, reference), label_smoothing
    unbiased = -(1.0 - rate) * log_sigmoid(logits) + rate * log_sigmoid(-logits)
    return unbiased / (1.0 - 2.0 * rate)


def ipo(policy: Pair, reference: Pair, *, beta: float) -> Losses:
    """(delta - 1 / (2 beta))^2: IPO (arXiv 2310.12036, equation 17), whose tau is beta.

    The paper sums log-probabilities; TRL takes means, which is `length_normalize`.
    """
    return jnp.square(difference(policy, reference) - 1.0 / (2.0 * beta))


def hinge(policy: Pair, reference: Pair, *, beta: float) -> Losses:
    """max(0, 1 - beta delta): SLiC's (arXiv 2305.10425) with RSO's normalisation (arXiv 2309.06657, section 3.3)."""
    return jax.nn.relu(1.0 - beta * difference(policy, reference))


def exo_pair(policy: Pair, reference: Pair, *, beta: float, label_smoothing: float) -> Losses:
    """KL(p || q), p = (sigmoid(beta delta), sigmoid(-beta delta)), q = (1 - e, e).

    EXO with two completions (arXiv 2402.00856, equation 16); e must be above 0.
    """
    logits, rate = beta * difference(policy, reference), label_smoothing
    chosen = sigmoid(logits) * (log_sigmoid(logits) - math.log1p(-rate))
    return chosen + sigmoid(-logits) * (log_sigmoid(-logits) - math.log(rate))


def nca_pair(policy: Pair, reference: Pair, *, beta: float) -> Losses:
    """-log sigmoid(R_w) - (log sigmoid(-R_w) + log sigmoid(-R_l)) / 2, R = beta r.

    NCA with two completions, rewards 1 and 0 (arXiv 2402.05369, section 4 and algorithm in appendix B).
    """
    chosen, rejected = (beta * ratio for ratio in minus(policy, reference))
    return -log_sigmoid(chosen) - 0.5 * (log_sigmoid(-chosen) + log_sigmoid(-rejected))


def bco_pair(policy: Pair, reference: Pair, *, beta: float) -> Losses:
    """-log sigmoid(R_w) - log sigmoid(-R_l), R = beta r: BCO (arXiv 2404.04656, equation 8).

    As in TRL 1.16 without the paper's moving reward shift.
    """
    chosen, rejected = (beta * ratio for ratio in minus(policy, reference))
    return -log_sigmoid(chosen) - log_sigmoid(-rejected)


def sppo_hard(policy: Pair, reference: Pair, *, beta: float) -> Losses:
    """(r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2: SPPO (arXiv 2405.00675, equation 4.7), P 1 and 0."""
    chosen, rejected = minus(policy, reference)
    return jnp.square(chosen - 0.5 / beta) + jnp.square(rejected + 0.5 / beta)


def ascending(values: Losses, present: Losses) -> Losses:
    """Sorted, with what is not present behind all that is."""
    return jnp.sort(jnp.where(present > 0, values, jnp.inf))


def sorted_logits(
    left: Losses, right: Losses, present: Losses, beta: float
) -> tuple[Losses, Losses]:
    """beta (sorted left - sorted right), and which entries hold it: as many of the first as are present."""
    held = jnp.arange(present.shape[0]) < jnp.sum(present > 0)
    left, right = (jnp.where(held, ascending(x, present), 0.0) for x in (left, right))
    return beta * (left - right), held.astype(left.dtype)


def aot(
    policy: Pair, reference: Pair, *, present: Losses, beta: float, label_smoothing: float
) -> Losses:
    """`smoothed` of beta (sort(log pi_w - log pi_l) - sort(log pi_ref,w - log pi_ref,l)).

    AOT on pairs (arXiv 2406.05882, equation 9): the one distribution of margins is to dominate the other. The loss at
    entry i is that of the i-th quantile and not of pair i; `present` tells pairs from entries that hold none.
    """
    left, right = policy.chosen - policy.rejected, reference.chosen - reference.rejected
    logits, held = sorted_logits(left, right, present, beta)
    return smoothed(logits, label_smoothing) * held


def aot_unpaired(
    policy: Pair, reference: Pair, *, present: Losses, beta: float, label_smoothing: float
) -> Losses:
    """`smoothed` of beta (sort(r_w) - sort(r_l)): AOT unpaired (arXiv 2406.05882, equation 8)."""
    chosen, rejected = minus(policy, reference)
    logits, held = sorted_logits(chosen, rejected, present, beta)
    return smoothed(logits, label_smoothing) * held


def apo_zero(policy: Pair, reference: Pair, *, beta: float) -> Losses:
    """1 - sigmoid(R_w) + sigmoid(R_l), R = beta r: APO (arXiv 2408.06266, equation 7)."""
    chosen, rejected = (beta * ratio for ratio in minus(policy, reference))
    return 1.0 - sigmoid(chosen) + sigmoid(rejected)


def apo_down(policy: Pair, reference: Pair, *, beta: float) -> Losses:
    """sigmoid(R_w) + 1 - sigmoid(R_w - R_l), R = beta r: APO (arXiv 2408.06266, equation 8)."""
    chosen, rejected = (beta * ratio for ratio in minus(policy, reference))
    return sigmoid(chosen) + 1.0 - sigmoid(chosen - rejected)


def discopop(policy: Pair, reference: Pair, *, beta: float, tau: float) -> Losses:
    """(1 - m) (-log sigmoid(z)) + m exp(-z), z = beta delta, m = sigmoid(z / tau).

    DiscoPOP's log-ratio modulated loss (arXiv 2406.08414, equation 5).
    """
    logits = beta * difference(policy, reference)
    modulation = sigmoid(logits / tau)
    return -(1.0 - modulation) * log_sigmoid(logits) + modulation * jnp.exp(-logits)


def simpo(policy: Pair, reference: Pair, *, beta: float, gamma: float, label_smoothing: float) -> Losses:  # fmt: skip
    """`smoothed` of beta (log pi_w / |w| - log pi_l / |l|) - gamma: SimPO (arXiv 2405.14734, equation 6).

    The means over tokens come in, and a reference of 0.
    """
    return smoothed(beta * difference(policy, reference) - gamma, label_smoothing)


def cpo(policy: Pair, reference: Pair, *, beta: float, label_smoothing: float) -> Losses:
    """`smoothed` of beta (log pi_w - log pi_l): CPO's preference term (arXiv 2401.08417, equation 4).

    A reference of 0 comes in; the paper's second term is `sft_weight` 1.
    """
    return smoothed(beta * difference(policy, reference), label_smoothing)


def orpo(policy: Pair, reference: Pair, *, beta: float) -> Losses:
    """-beta log sigmoid(log odds(w) - log odds(l)), odds = p / (1 - p): ORPO (arXiv 2403.07691, equations 4 and 7).

    p is the mean probability a token: the means over tokens come in, and a reference of 0. The paper's
    first term, the likelihood of the prompt and the chosen completion, is added with weight 1.
    """
    del reference
    log_odds = Pair(*(mean - log1mexp(mean) for mean in policy))
    return -beta * log_sigmoid(log_odds.chosen - log_odds.rejected)


def log1mexp(x: Losses) -> Losses:
    """log(1 - exp(x)) for x < 0 without cancellation, and finite for x = 0.

    Maechler, "Accurately computing log(1 - exp(-|a|))" (2012).
    """
    x = jnp.minimum(x, -1e-7)
    near = x > -math.log(2.0)
    small = jnp.log(-jnp.expm1(jnp.where(near, x, -1.0)))
    return jnp.where(near, small, jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))


def kto(
    policy: Pair,
    reference: Pair,
    *,
    labels: Losses,
    present: Losses,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Losses:
    """w_D (1 - sigmoid(beta (r - z))) or w_U (1 - sigmoid(beta (z - r))): KTO (arXiv 2402.01306, equation 8).

    `chosen` is the completion that a label judges (1 where it is desirable), `rejected` the completion of another
    prompt, from which z = max(0, mean r) estimates the KL to the reference without a gradient. `present` is 1
    where there is an example.
    """
    ratio = minus(policy, reference).chosen
    logits = beta * (ratio - kto_baseline(policy, reference, present))
    good, bad = 1.0 - sigmoid(logits), 1.0 - sigmoid(-logits)
    return jnp.where(labels > 0, desirable_weight * good, undesirable_weight * bad)


def kto_baseline(policy: Pair, reference: Pair, present: Losses) -> Float[Array, ""]:
    """z of KTO: the mean log ratio of mismatched completions, at least 0, a constant to the gradient."""
    ratio = minus(policy, reference).rejected
    mean = jnp.sum(ratio * present) / jnp.maximum(jnp.sum(present), 1.0)
    return jax.lax.stop_gradient(jnp.maximum(mean, 0.0))
