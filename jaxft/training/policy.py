"""What a feed that samples asks of a run: completions of the policy as it stands, and a reference's opinion of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxft.data.feed import Policy, Sampled
from jaxft.data.prompts import ending_of
from jaxft.data.tokenizer import Tokenizer
from jaxft.errors import UserError
from jaxft.inference.exact import ROWS, Scored, exactly, score
from jaxft.inference.generate import decoded, padded
from jaxft.inference.judge import ask_folder
from jaxft.inference.rollouts import Rollouts, prompts_of
from jaxft.inference.rollouts import sample as sample_rollouts
from jaxft.models import Config
from jaxft.objectives.objective import objective_of
from jaxft.retrieval.embeddings import embedded
from jaxft.runtime import processes
from jaxft.training.reference import Reference
from jaxft.training.step import joined, parts_of


def policy_of(
    config: ConfigDict,
    model: Config,
    mesh: Mesh,
    tokenizer: Tokenizer,
    chats: bool,
    reference: Reference | None,
) -> Policy:
    """What `config` samples with and judges by.

    Args:
        config: of the run.
        model: the decoder's shape.
        mesh: of the devices.
        tokenizer: the model's.
        chats: whether prompts are messages: their answers then end as the chat template ends a turn.
        reference: the frozen policy; None where there is none.

    Raises:
        UserError: a temperature that the loss cannot follow.
    """
    if model.logit_softcap is not None and config.rollout.temperature != 1.0:
        raise UserError(
            f"config.rollout.temperature: {config.model} caps its logits, and the loss knows them at temperature 1 "
            "alone: take 1.0"
        )
    ending = ending_of(tokenizer, chats)
    return Policy(
        config=config,
        tokenizer=tokenizer,
        sample=_sampler(config, model, mesh, (*tokenizer.eos_ids, *ending.ids)),
        kept=_kept,
        reference=_asked(config, mesh, reference),
        decode=lambda ids: decoded(tokenizer, ids, ending),
        ask=ask_folder,
        embed=embedded,
        agreed=_agreed,
    )


def _sampler(
    config: ConfigDict, model: Config, mesh: Mesh, eos_ids: Sequence[int]
) -> Callable[..., Sampled]:
    """Samples completions by the parameters of a run as they stand, in a thread of its own too."""
    rollout = config.rollout
    longest = max(rollout.max_new_tokens, 1)
    ends: dict[str, Any] = {"eos_ids": eos_ids, "slots": rollout.slots}
    rows = rows_to_score(config)

    def sample(
        standing: Any,
        prompts: Sequence[list[int]],
        *,
        group: int,
        temperature: float,
        stream: tuple[int, int],
        first: int,
        learned: bool,
    ) -> Sampled:
        kind, number = stream
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), kind), number)
        asked = prompts_of(
            *padded(prompts),
            group=group,
            limits=longest,
            temperature=temperature,
            top_k=rollout.top_k,
            top_p=rollout.top_p,
            streams=np.arange(first, first + len(prompts)),
        )
        what = (model, standing.params, asked, key)
        with jax.set_mesh(mesh):
            found = sample_rollouts(*what, max_new_tokens=longest, **ends)
            mismatches, apart = np.zeros(len(found.lengths), np.int32), np.zeros(len(found.lengths))
            if learned:
                scored = score(*what, found, rows=rows)
                mismatches, apart = scored.differs.sum(axis=1), _apart(found, scored)
                if rollout.exact:
                    found = exactly(*what, found, rows=rows, scored=scored, **ends).rollouts
                else:
                    log_p, mass = scored.log_probabilities, scored.log_masses
                    found = found._replace(log_probabilities=log_p, log_masses=mass)
        log_p = found.log_probabilities + found.log_masses
        arrays = (found.tokens, found.lengths, log_p, found.truncated, mismatches, apart)
        tokens, lengths, given, cut, wrong, apart = map(np.asarray, arrays)
        return Sampled(tokens, lengths, given, cut, wrong, apart, found.busy)

    return sample


def rows_to_score(config: ConfigDict) -> int:
    """How many prompts are scored at once: at most as many as are sampled at once, and as a micro-batch holds."""
    sampled = -(-config.batch_size // config.rollout.parts)
    return min(ROWS, sampled, config.batch_size // config.grad_accum)


def _apart(found: Rollouts, scored: Scored) -> np.ndarray:
    """(n,) float32: how far the sampler and training's program are apart in the log p of a completion's tokens."""
    told = np.arange(found.tokens.shape[1])[None, :] < found.lengths[:, None]
    ours = scored.log_probabilities + scored.log_masses
    each = np.where(told, np.abs(found.log_probabilities + found.log_masses - ours), 0.0)
    return (each.sum(axis=1) / np.maximum(found.lengths, 1)).astype(np.float32)


def _kept(standing: Any) -> Any:
    """The same with a copy of what trains, which the next update writes over."""
    trainable = jax.tree.map(jnp.copy, standing.state.trainable)
    return standing._replace(state=standing.state._replace(trainable=trainable))


def _asked(
    config: ConfigDict, mesh: Mesh, reference: Reference | None
) -> Callable[[Any, Mapping[str, Any]], np.ndarray] | None:
    """What the reference gives to a batch's completions, (rows, group, new); None where it is not asked."""
    run = reference_program(config, reference)
    if run is None:
        return None

    def asked(standing: Any, batch: Mapping[str, Any]) -> np.ndarray:
        with jax.set_mesh(mesh):
            return processes.to_host(run(standing.frozen, batch, *standing.held))

    return asked


def reference_program(
    config: ConfigDict, reference: Reference | None
) -> Callable[..., jax.Array] | None:
    """(frozen, batch, *held) -> what the reference gives to the batch's completions, jitted; None: it is not asked.

    It reads the batch in the micro-batches of an update.
    """
    row = objective_of(config)
    if reference is None or row.reference is None or not row.asks(config.objective):
        return None
    ask, parts = row.reference, config.grad_accum

    @jax.jit
    def run(frozen: Any, batch: Mapping[str, Any], *held: Any) -> jax.Array:
        (params,) = reference.beside(frozen, *held)
        if parts == 1:
            return ask(reference.config, params, batch)
        given = jax.lax.map(
            lambda part: ask(reference.config, params, part), parts_of(batch, parts)
        )
        return joined(given)

    return run


def _agreed(table: np.ndarray) -> np.ndarray:
    """What the first process has."""
    if not processes.several():
        return table
    return np.asarray(multihost_utils.broadcast_one_to_all(table))
