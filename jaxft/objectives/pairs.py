"""The preference objective on a batch of pairs: log-probabilities of completions, their loss, and its metrics.

A pair stands in a row as one segment, its prompt once: the prompt's tokens but the last are branch 0, and each
completion, behind a copy of the prompt's last token, is a branch of its own, 1 the chosen and 2 the rejected. So a
position predicts the next one of its branch, and every token is computed once.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.models import Config, head_of, hidden_states
from jaxft.objectives import preference as losses
from jaxft.objectives.cross_entropy import collision_log_probabilities, token_log_probabilities
from jaxft.objectives.preference import Pair
from jaxft.objectives.sums import Counted, Sums

Batch = Mapping[str, Any]
Params = Mapping[str, Any]
CHOSEN, REJECTED = 1, 2  # the branches
OWN = ("present", "labels")  # arguments of a loss that the batch gives and not the configuration


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss by name.

    Attributes:
        function: of (policy, reference), in `preference.py`.
        free: it has no reference.
        means: it takes means over a completion's tokens and not sums.
        of_difference: it is a function of delta alone, which an f-divergence may replace.
        sorts: it is a function of all pairs, and what it gives are losses of quantiles.
        likelihood: the weight of a likelihood term that is part of it, over prompt and chosen completion.
        judged: an example is one completion with a label, and not a pair.
        smooths: its label smoothing must be above 0.
    """

    function: Callable[..., losses.Losses]
    free: bool = False
    means: bool = False
    of_difference: bool = False
    sorts: bool = False
    likelihood: float = 0.0
    judged: bool = False
    smooths: bool = False

    @property
    def takes(self) -> tuple[str, ...]:
        """The settings that it takes."""
        names = tuple(inspect.signature(self.function).parameters)[2:]
        return tuple(name for name in names if name not in OWN)


LOSSES: dict[str, Loss] = {
    "dpo": Loss(losses.dpo, of_difference=True),
    "ipo": Loss(losses.ipo, of_difference=True),
    "hinge": Loss(losses.hinge, of_difference=True),
    "robust": Loss(losses.robust, of_difference=True),
    "cdpo": Loss(losses.cdpo, of_difference=True),
    "exo_pair": Loss(losses.exo_pair, of_difference=True, smooths=True),
    "nca_pair": Loss(losses.nca_pair),
    "bco_pair": Loss(losses.bco_pair),
    "sppo_hard": Loss(losses.sppo_hard),
    "aot": Loss(losses.aot, sorts=True),
    "aot_unpaired": Loss(losses.aot_unpaired, sorts=True),
    "apo_zero": Loss(losses.apo_zero),
    "apo_down": Loss(losses.apo_down),
    "discopop": Loss(losses.discopop, of_difference=True),
    "sigmoid_norm": Loss(losses.dpo, of_difference=True, means=True),
    "simpo": Loss(losses.simpo, free=True, means=True),
    "cpo": Loss(losses.cpo, free=True),
    "orpo": Loss(losses.orpo, free=True, means=True, likelihood=1.0),
    "kto": Loss(losses.kto, judged=True),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """`config.objective` as far as the loss reads it; the keys are explained in configs/dpo.py."""

    name: str
    beta: float
    label_smoothing: float
    length_normalize: bool
    gamma: float
    tau: float
    sft_weight: float
    f_divergence: str
    alpha: float
    wpo: bool
    desirable_weight: float
    undesirable_weight: float

    @property
    def loss(self) -> Loss:
        """The row of the table."""
        return LOSSES[self.name]


def settings_of(settings: Mapping[str, Any]) -> Settings:
    """The keys of `config.objective` that a loss of pairs reads."""
    return Settings(**{field.name: settings[field.name] for field in dataclasses.fields(Settings)})


def next_positions(batch: Batch) -> dict[str, Array]:
    """tokens, weights, branches and pairs of the position after each; weight 0 where that is no successor.

    A position predicts the one after it if that one sees it.
    """
    now = {name: jnp.asarray(batch[name]) for name in ("segments", "branches")}
    after = {
        name: jnp.roll(jnp.asarray(batch[name]), -1, axis=1)
        for name in ("tokens", "weights", "branches", "pairs", "segments")
    }
    length = after["tokens"].shape[1]
    sees = (now["branches"] == 0) | (now["branches"] == after["branches"])
    sees = sees & (now["segments"] == after["segments"]) & (now["segments"] != 0)
    sees = sees & (jnp.arange(length) < length - 1)[None, :]
    return after | {"weights": jnp.where(sees, after["weights"], 0.0), "follows": sees}


def position_log_probabilities(
    config: Config, params: Params, batch: Batch, *, collisions: bool = False
) -> tuple[Float[Array, "batch length"], Float[Array, "batch length"] | None]:
    """log p of the token after each position and, if asked, log sum_v p(v)^2 there, a constant to the gradient."""
    tokens, segments, positions, branches = (
        jnp.asarray(batch[name]) for name in ("tokens", "segments", "positions", "branches")
    )
    hidden = hidden_states(config, params, tokens, segments, positions, branches)
    head, cap = head_of(params), config.logit_softcap
    log_p = token_log_probabilities(hidden, head, next_positions(batch)["tokens"], softcap=cap)
    if not collisions:
        return log_p, None
    return log_p, collision_log_probabilities(hidden, head, softcap=cap)


def pair_sums(values: Float[Array, "batch length"], batch: Batch) -> Pair:
    """The sums over the tokens of each completion, (batch, slots), of what stands at the positions before them."""
    after = next_positions(batch)
    slots = jnp.asarray(batch["present"]).shape[1]
    number = jnp.arange(1, slots + 1, dtype=jnp.int32)
    member = (after["pairs"][:, :, None] == number[None, None, :]).astype(values.dtype)
    weighed = values * after["weights"]
    return Pair(
        *(
            jnp.einsum("BT,BTS->BS", jnp.where(after["branches"] == branch, weighed, 0.0), member)
            for branch in (CHOSEN, REJECTED)
        )
    )


def completion_log_probabilities(config: Config, params: Params, batch: Batch) -> Pair:
    """log p(completion | prompt) of every pair of a batch, (batch, slots) each."""
    return pair_sums(position_log_probabilities(config, params, batch)[0], batch)


def preference_loss(
    config: Config,
    params: Params,
    batch: Batch,
    reference: Params | None = None,
    *,
    settings: Settings,
    reference_config: Config | None = None,
) -> tuple[Float[Array, ""], Counted]:
    """The sum of the loss over a batch's pairs, and what is counted beside it.

    Args:
        config: the decoder's shape.
        params: the policy's whole tree.
        batch: tokens, segments, positions, branches, pairs int32 and weights float32, (batch, length); present and
            labels float32 (batch, slots), and reference (batch, slots, 2) float32 where the reference's
            log-probabilities are known; likelihood_scale, where the batch is part of another.
        reference: the reference's tree, if they are not and the loss needs them.
        settings: `config.objective`.
        reference_config: the reference's shape, where it is another.

    A likelihood term is a mean over the tokens of the whole batch, whose pairs by tokens are its scale.
    """
    loss = settings.loss
    log_p, collisions = position_log_probabilities(config, params, batch, collisions=settings.wpo)
    policy = pair_sums(log_p, batch)
    lengths = jax.tree.map(lambda x: jnp.maximum(x, 1.0), pair_sums(jnp.ones_like(log_p), batch))
    held = _reference(reference_config or config, reference, batch, policy)
    present = jnp.asarray(batch["present"])
    each = _losses(settings, policy, held, lengths, batch)
    if collisions is not None:
        aligned = pair_sums(jax.lax.stop_gradient(log_p - collisions), batch)
        means = jax.tree.map(jnp.divide, aligned, lengths)
        each = each * jnp.exp(means.chosen + means.rejected)
    total = jnp.sum(each)
    sums = _metrics(settings, policy, held, lengths, batch)
    if weight := settings.sft_weight + loss.likelihood:
        likelihood, sums["nll"] = _likelihood(log_p, batch, settings)
        total = total + weight * likelihood
    tokens = jnp.sum(next_positions(batch)["weights"])
    return total, Counted(jnp.sum(present), tokens, sums)


def _reference(config: Config, params: Params | None, batch: Batch, policy: Pair) -> Pair:
    """The reference's log-probabilities: those in the batch, else its own, else 0."""
    if "reference" in batch:
        known = jnp.asarray(batch["reference"])
        return Pair(known[:, :, 0], known[:, :, 1])
    if params is None:
        return jax.tree.map(jnp.zeros_like, policy)
    frozen = jax.lax.stop_gradient(params)
    return jax.lax.stop_gradient(completion_log_probabilities(config, frozen, batch))


def _losses(
    settings: Settings, policy: Pair, reference: Pair, lengths: Pair, batch: Batch
) -> Float[Array, "batch slots"]:
    """The loss of each pair."""
    loss = settings.loss
    present = jnp.asarray(batch["present"])
    arguments = {name: getattr(settings, name) for name in loss.takes}
    for name in set(inspect.signature(loss.function).parameters) & set(OWN):
        arguments[name] = jnp.asarray(batch[name]).reshape(-1)
    divisor = lengths if loss.means or settings.length_normalize else None
    if loss.of_difference:
        policy = losses.scores(policy, reference, divisor, settings.f_divergence, settings.alpha)
        reference = jax.tree.map(jnp.zeros_like, policy)
    elif divisor is not None:
        policy = jax.tree.map(jnp.divide, policy, divisor)
        reference = jax.tree.map(jnp.divide, reference, divisor)
    flat = [jax.tree.map(lambda x: x.reshape(-1), pair) for pair in (policy, reference)]
    each = loss.function(*flat, **arguments)
    # Quantiles stand in the first entries, whichever entries hold pairs.
    kept = jnp.ones_like(present) if loss.sorts else present
    return jnp.where(kept > 0, each.reshape(present.shape), 0.0)


def likelihood_positions(batch: Batch, *, whole: bool) -> Float[Array, "batch length"]:
    """1.0 at the positions that predict a token of a chosen completion or, if `whole`, of its prompt."""
    after = next_positions(batch)
    if whole:
        kept = (after["branches"] != REJECTED) & after["follows"]
    else:
        kept = (after["branches"] == CHOSEN) & (after["weights"] > 0)
    return kept.astype(jnp.float32)


def with_likelihood_scale(batch: Batch, *, settings: Settings) -> Batch:
    """The batch with the factor of its likelihood term: pairs by tokens, the same for all of its parts."""
    positions = likelihood_positions(batch, whole=settings.loss.likelihood > 0)
    present = jnp.asarray(batch["present"])
    scale = jnp.sum(present) / jnp.maximum(jnp.sum(positions), 1.0)
    return {**batch, "likelihood_scale": jnp.broadcast_to(scale, present.shape)}


def _likelihood(
    log_p: Array, batch: Batch, settings: Settings
) -> tuple[Float[Array, ""], tuple[Array, Array]]:
    """-log p of the likelihood term's tokens times its scale; and (sum, tokens) without."""
    positions = likelihood_positions(batch, whole=settings.loss.likelihood > 0)
    if "likelihood_scale" not in batch:
        batch = with_likelihood_scale(batch, settings=settings)
    total = -jnp.sum(log_p * positions)
    return jnp.max(jnp.asarray(batch["likelihood_scale"])) * total, (total, jnp.sum(positions))


def _metrics(
    settings: Settings, policy: Pair, reference: Pair, lengths: Pair, batch: Batch
) -> Sums:
    """name -> (sum, weight), names as in TRL: rewards are beta r, or of a loss over means beta times the mean."""
    policy, reference = jax.lax.stop_gradient((policy, reference))
    present, labels = jnp.asarray(batch["present"]), jnp.asarray(batch["labels"])
    ratio = losses.minus(policy, reference)
    rewards = jax.tree.map(lambda x: settings.beta * x, ratio)
    if settings.loss.free and settings.loss.means:
        rewards = jax.tree.map(jnp.divide, rewards, lengths)
    if settings.loss.judged:
        # One completion an example, which its label calls chosen or rejected; the other one measures the KL.
        kept = Pair(present * labels, present * (1.0 - labels))
        rewards, logps, lengths = (Pair(x.chosen, x.chosen) for x in (rewards, policy, lengths))
        count = jnp.sum(present)
        sums: Sums = {"kl": (losses.kto_baseline(policy, reference, present) * count, count)}
    else:
        kept, logps = Pair(present, present), policy
        tokens = jnp.sum(present * (lengths.chosen + lengths.rejected))
        ahead = (rewards.chosen > rewards.rejected).astype(present.dtype)
        sums = {"rewards/accuracies": (jnp.sum(ahead * present), jnp.sum(present))}
        if not settings.loss.free:
            sums["kl"] = (jnp.sum(present * (ratio.chosen + ratio.rejected)), tokens)
    for index, side in enumerate(Pair._fields):
        weight = jnp.sum(kept[index])
        for name, values in (("rewards", rewards), ("logps", logps), ("lengths", lengths)):
            sums[f"{name}/{side}"] = (jnp.sum(values[index] * kept[index]), weight)
    return sums
