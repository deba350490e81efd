"""The loss of a policy on a batch of rollouts, whose rows are a prompt and its completions as branches.

The prompt's tokens but the last are branch 0, and each completion, behind a copy of the prompt's last token, is a
branch of its own, 1 to `group`. So a position predicts the next one of its branch, and every token is computed once.
What the losses of `policy` want, (n, length) of n completions, is read out of the row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.data.packing import Batch as Arrays
from jaxft.models import Config, head_of, hidden_states
from jaxft.objectives.cross_entropy import (
    log_probabilities_and_entropies,
    token_log_probabilities,
)
from jaxft.objectives.policy import (
    LOSSES,
    Clip,
    Parts,
    Sizes,
    clipped,
    of_highest_entropy,
    over_all_tokens,
    policy_parts,
)
from jaxft.objectives.sums import Counted, Sums

Batch = Mapping[str, Any]
Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """`config.objective` as far as the loss reads it; the keys are explained in configs/rl.py."""

    name: str
    clip: Clip
    beta: float
    kl: str
    kl_corrected: bool
    importance: str
    entropy_share: float


def row_length_of(prompt: int, group: int, new: int) -> int:
    """The tokens of a row: a prompt of so many, and `group` completions of `new` tokens.

    >>> row_length_of(3, 2, 4)
    12
    """
    return prompt - 1 + group * (1 + new)


def collate_completions(
    prompts: Sequence[Sequence[int]],
    completions: Int[np.ndarray, "n new"],
    lengths: Int[np.ndarray, " n"],
    *,
    length: int,
    pad_id: int,
) -> Arrays:
    """Rows of prompts with their completions: tokens, segments, positions, branches int32 (prompts, length), and
    starts int32 (prompts, group), the position that predicts each completion's first token.

    Args:
        prompts: ids of each.
        completions: those of the first prompt, then those of the next, ...
        lengths: of each completion.
        length: tokens of a row.
        pad_id: the token where there is none.
    """
    rows, group = len(prompts), len(lengths) // len(prompts)
    tokens = np.full((rows, length), pad_id, np.int32)
    segments, positions, branches = np.zeros((3, rows, length), np.int32)
    starts = np.zeros((rows, group), np.int32)
    for row, prompt in enumerate(prompts):
        end = len(prompt) - 1
        tokens[row, :end], positions[row, :end] = prompt[:-1], np.arange(end)
        for number in range(group):
            index = row * group + number
            said = completions[index, : lengths[index]]
            here = slice(end, end + 1 + len(said))
            tokens[row, here] = [prompt[-1], *said]
            positions[row, here] = len(prompt) - 1 + np.arange(1 + len(said))
            branches[row, here] = number + 1
            starts[row, number] = end
            end = here.stop
        segments[row, :end] = 1
    return {
        "tokens": tokens,
        "segments": segments,
        "positions": positions,
        "branches": branches,
        "starts": starts,
    }


def completion_tokens(
    config: Config, params: Params, batch: Batch, *, entropies: bool = False
) -> tuple[Float[Array, "n new"], Float[Array, "n new"] | None]:
    """log p of each token of the batch's completions at the batch's temperature and, if asked, the entropies there.

    Args:
        config: the decoder's shape.
        params: its tree.
        batch: as of `policy_objective`.
        entropies: of the distributions that the tokens were drawn from, constants to the gradient.

    Returns:
        (n, new) float32 of n = rows x group completions; behind a completion's end stands anything.
    """
    names = ("tokens", "segments", "positions", "branches")
    tokens, segments, positions, branches = (jnp.asarray(batch[name]) for name in names)
    hidden = hidden_states(config, params, tokens, segments, positions, branches)
    warmth = jnp.asarray(batch["temperature"])[:, :, None]
    hidden = hidden / warmth.astype(hidden.dtype)
    head, cap, after = head_of(params), config.logit_softcap, jnp.roll(tokens, -1, axis=1)
    if not entropies:
        log_p = token_log_probabilities(hidden, head, after, softcap=cap)
        return _of_completions(log_p, batch), None
    both = log_probabilities_and_entropies(hidden, head, after, softcap=cap)
    log_p, spread = (_of_completions(values, batch) for values in both)
    return log_p, spread


def _of_completions(values: Float[Array, "rows length"], batch: Batch) -> Float[Array, "n new"]:
    """What stands at the positions that predict the completions' tokens."""
    starts, new = jnp.asarray(batch["starts"]), batch["sampled"].shape[2]
    index = starts[:, :, None] + jnp.arange(new, dtype=starts.dtype)[None, None, :]
    index = jnp.minimum(index, values.shape[1] - 1).reshape(starts.shape[0], -1)
    return jnp.take_along_axis(values, index, axis=1).reshape(-1, new)


def reference_tokens(
    config: Config, params: Params, batch: Batch
) -> Float[Array, "rows group new"]:
    """log pi_ref of each token of the completions, as a batch holds it."""
    found, _ = completion_tokens(config, params, batch)
    return found.reshape(batch["sampled"].shape)


def with_items(batch: Batch) -> Batch:
    """The batch with the number of its tokens and of its completions, the same for all of its parts."""
    counted = jnp.asarray(batch["counted"])
    numbers = jnp.stack([jnp.sum(counted), jnp.asarray(counted.size, counted.dtype)])
    return {**batch, "items": jnp.broadcast_to(numbers[None, :], (counted.shape[0], 2))}


def policy_objective(
    config: Config, params: Params, batch: Batch, *, settings: Settings
) -> tuple[Float[Array, ""], Counted]:
    """The loss of a batch's completions times their number, and what is counted beside it.

    Args:
        config: the decoder's shape.
        params: the policy's whole tree.
        batch: as `collate_completions` makes it, and (rows, group): counted int32, how many tokens of a completion are
            trained (0: none, where it was cut off and such ones are left out); advantages float32, or (rows, group,
            new) of each token; (rows, group, new) float32: sampled, log pi_old; off_policy (rows,
            1), where that is of another policy than this one; reference (rows, group, new), log pi_ref, where beta is
            not 0; temperature (rows, 1); items (rows, 2), of `with_items`, where the batch is part of another.
        settings: `config.objective`.

    The mean of parts is that of TRL's accumulated micro-batches: each part's own mean, or of losses that are divided by
    all tokens of an update, the sum over its parts.
    """
    row = LOSSES[settings.name]
    new, entropies = completion_tokens(config, params, batch, entropies=True)
    assert entropies is not None
    counted = jnp.asarray(batch["counted"]).reshape(-1)
    length = new.shape[1]
    mask = jnp.arange(length, dtype=counted.dtype)[None, :] < counted[:, None]
    sampled = jnp.asarray(batch["sampled"]).reshape(new.shape)
    gains = jnp.asarray(batch["advantages"])
    reference = batch["reference"].reshape(new.shape) if "reference" in batch else None
    batch = batch if "items" in batch else with_items(batch)
    items, completions = (jnp.max(jnp.asarray(batch["items"])[:, index]) for index in (0, 1))
    parts = policy_parts(
        new,
        sampled if "off_policy" in batch else None,
        gains.reshape(-1) if gains.ndim == 2 else gains.reshape(new.shape),
        mask,
        reference=reference,
        row=row,
        clip=settings.clip,
        beta=settings.beta,
        kl=settings.kl,
        kl_corrected=settings.kl_corrected,
        importance=settings.importance,
        sizes=Sizes(None, items),
        focus=of_highest_entropy(entropies, mask, settings.entropy_share)
        if settings.entropy_share < 1.0
        else None,
    )
    here = jnp.asarray(len(counted), jnp.float32)
    factor = completions.astype(jnp.float32) if row.mean is over_all_tokens else here
    sums = _metrics(settings, parts, entropies, mask)
    return parts.loss * factor, Counted(here, jnp.sum(mask.astype(jnp.float32)), sums)


def _metrics(settings: Settings, parts: Parts, entropies: Array, mask: Array) -> Sums:
    """name -> (sum, tokens), names as in TRL; of the least and the largest share of a sequence, (share, 1)."""
    parts = jax.lax.stop_gradient(parts)
    ratio, gains = parts.ratio, parts.advantages
    clip, term = settings.clip, LOSSES[settings.name].term
    values, ends = {"entropy": entropies}, Sums()
    if term is clipped:
        low = (ratio < 1.0 - clip.low) & (gains < 0)
        high = (ratio > 1.0 + clip.high) & (gains > 0)
        values |= {
            "clip_ratio/low_mean": low,
            "clip_ratio/high_mean": high,
            "clip_ratio/region_mean": low | high,
        }
        ends = {
            "clip_ratio/low_min": _one(jnp.nanmin(_shares(low, mask))),
            "clip_ratio/high_max": _one(jnp.nanmax(_shares(high, mask))),
        }
    else:
        values["cispo_clip_ratio"] = (ratio > clip.high) & (gains > 0)
    if parts.kl is not None:
        values["kl"] = parts.kl
    means = {name: _averaged(value.astype(jnp.float32), mask) for name, value in values.items()}
    return means | ends


def _averaged(values: Array, mask: Array) -> tuple[Array, Array]:
    """(sum, how many) of what is known of each token, (n, new), or of each sequence, (n, 1)."""
    seen = mask if values.shape == mask.shape else jnp.ones_like(values, bool)
    return jnp.sum(jnp.where(seen, values, 0.0)), jnp.sum(seen.astype(jnp.float32))


def _shares(seen: Array, mask: Array) -> Float[Array, " n"]:
    """The share of each sequence's tokens at which it is so, NaN without a token; of (n, 1), 0 or 1."""
    if seen.shape != mask.shape:
        return seen[:, 0].astype(jnp.float32)
    many = jnp.sum(mask.astype(jnp.float32), axis=1)
    return jnp.sum((seen & mask).astype(jnp.float32), axis=1) / many


def _one(value: Array) -> tuple[Array, Array]:
    """(value, 1); (0, 0) for NaN."""
    known = jnp.isfinite(value)
    return jnp.where(known, value, 0.0), known.astype(jnp.float32)
