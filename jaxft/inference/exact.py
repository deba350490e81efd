"""Rollouts beside what training's program says of them: log-probabilities, and tokens it would have drawn otherwise.

A sampler reads a cache token by token, and training reads whole rows: their scores differ by rounding, and so a
sampler draws, now and then, another token than the policy that is trained would have. The draws are argmaxes of scores
plus a noise that depends on the completion and the token's number alone. So training's scores with the same noise tell
which tokens these are, and, drawn again from the first of them on, a completion is the trained policy's own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxft.data.packing import length_buckets, smallest_bucket
from jaxft.inference.decoding import LEAST_LENGTH, bucket
from jaxft.inference.rollouts import Prompts, Rollouts, completion_keys, padded_prompts, sample
from jaxft.inference.sampling import Drawn, draw
from jaxft.inference.slots import LEAST_SLOTS, batch_parts, slots_of
from jaxft.mesh import sizes_in_force
from jaxft.models.config import Config
from jaxft.models.transformer import Params, hidden_states, logits
from jaxft.objectives.cross_entropy import chunk_length
from jaxft.runtime.processes import to_host

ROWS = 8  # prompts scored at once, with their groups
BY_TOKEN = ("told", "index")  # the rest is by place


class Scored(NamedTuple):
    """What training's program says of n completions of `room` places; 0 behind their ends.

    Attributes:
        log_probabilities: (n, room) float32 of each token, as in `Rollouts`.
        log_masses: (n, room) float32, as in `Rollouts`.
        drawn: (n, room) int32: the token that these scores draw in each place.
        differs: (n, room) bool: where that is another token than the completion's.
    """

    log_probabilities: Float[Any, "n room"]
    log_masses: Float[Any, "n room"]
    drawn: Int[Any, "n room"]
    differs: Bool[Any, "n room"]


def score(
    config: Config,
    params: Params,
    prompts: Prompts,
    key: Key[Array, ""],
    rollouts: Rollouts,
    *,
    rows: int = ROWS,
) -> Scored:
    """Reads rollouts as training does, each prompt in a row with its group as branches behind it.

    Args:
        config: the decoder's shape.
        params: its tree, as they were sampled from.
        prompts: as they were sampled from.
        key: of the draws.
        rollouts: of these prompts.
        rows: prompts scored at once; fewer are filled up to as many, for one program serves all.

    Returns:
        Arrays on the host.
    """
    count, group = prompts.numbers.shape
    room = rollouts.tokens.shape[1]
    pieces = parts_to_score(prompts, rollouts, rows)
    found = [run_score(config, params, *piece, key, room=room) for piece in pieces]
    columns = zip(*([to_host(x) for x in one] for one in found), strict=True)
    whole = [np.concatenate(column)[: count * group] for column in columns]
    told = np.arange(room)[None, :] < rollouts.lengths[:, None]
    log_p, mass, drawn = (np.where(told, x, 0).astype(x.dtype) for x in whole)
    return Scored(log_p, mass, drawn, told & (drawn != rollouts.tokens))


def parts_to_score(
    prompts: Prompts, rollouts: Rollouts, rows: int
) -> list[tuple[dict[str, np.ndarray], Prompts]]:
    """Rollouts in parts of `rows` prompts, in the shapes for which `run_score` is compiled on the mesh in force.

    Returns:
        Of each part, the rows of `group_rows`, padded, and the prompts without their tokens, which the rows hold.
    """
    count, parts = len(prompts.numbers), batch_parts()
    rows = -(-rows // parts) * parts
    laid = group_rows(prompts, rollouts)
    longest = (
        bucket(prompts.tokens.shape[1], LEAST_LENGTH)
        + rollouts.tokens[: prompts.numbers.shape[1]].size
    )
    length = smallest_bucket(laid["tokens"].shape[1], length_buckets(longest))
    found = []
    for start in range(0, count, rows):
        here = slice(start, start + rows)
        part = Prompts(*(x[here] for x in prompts))
        # the draws' rules and numbers are asked alone: no program of its own for each length of prompts
        part = part._replace(tokens=part.tokens[:, :0], segments=part.segments[:, :0])
        more = rows - len(laid["tokens"][here])
        batch = {
            name: np.pad(x[here], ((0, more), (0, 0 if name in BY_TOKEN else length - x.shape[1])))
            for name, x in laid.items()
        }
        found.append((batch, padded_prompts(part, rows, 0)))
    return found


def group_rows(prompts: Prompts, rollouts: Rollouts) -> dict[str, np.ndarray]:
    """A row a prompt: its tokens, then its completions as branches 1, 2, ..., each going on from the prompt.

    Returns:
        tokens, segments, positions and branches (prompts, length) int32, of the longest row's length; told (prompts,
        group * room), the completions' tokens, and index, where in its row each of them is predicted.
    """
    count, group = prompts.numbers.shape
    room = rollouts.tokens.shape[1]
    known = np.asarray(prompts.segments, bool)
    lengths = np.asarray(rollouts.lengths).reshape(count, group)
    length = int((known.sum(axis=1) + lengths.sum(axis=1)).max())
    tokens, segments, positions, branches = np.zeros((4, count, length), np.int32)
    index = np.zeros((count, group, room), np.int32)
    for row in range(count):
        size = int(known[row].sum())
        tokens[row, :size] = prompts.tokens[row][known[row]]
        positions[row, :size] = np.arange(size)
        end = size
        for number in range(group):
            own = int(lengths[row, number])
            here = slice(end, end + own)
            tokens[row, here] = rollouts.tokens[row * group + number, :own]
            positions[row, here] = size + np.arange(own)
            branches[row, here] = number + 1
            index[row, number] = np.minimum(end - 1 + np.arange(room), length - 1)
            index[row, number, 0] = size - 1
            end += own
        segments[row, :end] = 1
    laid = {"tokens": tokens, "segments": segments, "positions": positions, "branches": branches}
    told = np.asarray(rollouts.tokens).reshape(count, group * room)
    return {**laid, "index": np.maximum(index, 0).reshape(count, group * room), "told": told}


@functools.partial(jax.jit, static_argnames=("config", "room"))
def run_score(
    config: Config,
    params: Params,
    batch: Mapping[str, Any],
    prompts: Prompts,
    key: Key[Array, ""],
    *,
    room: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The program of `score`: log-probabilities, log-masses and drawn tokens, (rows * group, room) each.

    Behind the ends of completions stands anything.
    """
    hidden = hidden_states(
        config, params, *(batch[name] for name in ("tokens", "segments", "positions", "branches"))
    )
    (count, group), mesh = prompts.numbers.shape, sizes_in_force()
    chunk = chunk_length(count, room, config.vocabulary, math.prod(mesh.values()), mesh["tensor"])
    chunks = -(-room // chunk)
    index = batch["index"]
    states = jnp.take_along_axis(hidden, index[:, :, None], axis=1)

    def pieces(x: jax.Array) -> jax.Array:
        """(rows, group * room, ...) -> (group * chunks, rows, chunk, ...)."""
        x = x.reshape(count, group, room, *x.shape[2:])
        x = jnp.pad(x, [(0, 0), (0, 0), (0, chunks * chunk - room)] + [(0, 0)] * (x.ndim - 3))
        x = x.reshape(count, group * chunks, chunk, *x.shape[3:])
        return x.swapaxes(0, 1)

    keys = completion_keys(key, prompts).reshape(count, group).swapaxes(0, 1)
    asked = (prompts.temperature, prompts.top_k, prompts.top_p)
    temperature, top_k, top_p = (jnp.repeat(jnp.asarray(x), chunk) for x in asked)

    def step(_: None, piece: Any) -> tuple[None, Drawn]:
        keys, start, states, told = piece
        places = start + jnp.arange(chunk, dtype=jnp.int32)[None, :]
        places = places + jnp.asarray(prompts.first)[:, None]
        own = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))(keys, places)
        scores = logits(config, params, states).reshape(count * chunk, -1)
        rules = (temperature, top_k, top_p, told.reshape(-1))
        drawn = draw(scores, own.reshape(-1), *rules)
        return None, jax.tree.map(lambda x: x.reshape(count, chunk), drawn)

    starts = jnp.tile(jnp.arange(chunks, dtype=jnp.int32) * chunk, group)
    scanned = (jnp.repeat(keys, chunks, axis=0), starts, pieces(states), pieces(batch["told"]))
    drawn = jax.lax.scan(step, None, scanned)[1]

    def whole(x: jax.Array) -> jax.Array:
        x = x.swapaxes(0, 1).reshape(count * group, chunks * chunk)
        return x[:, :room]

    return whole(drawn.log_probability), whole(drawn.log_mass), whole(drawn.token)


class Exact(NamedTuple):
    """Completions that are training's own, and what was done to have them.

    Attributes:
        rollouts: the completions; `log_probabilities` and `log_masses` are those of training's program, and
            `slot_steps` of all that was sampled.
        scored: of them. What still differs is where the program contradicts itself: it scores a token otherwise when
            another one stands behind it.
        mismatches: how many tokens of the first sample training's program would have drawn otherwise.
        redrawn: how many tokens were sampled again.
    """

    rollouts: Rollouts
    scored: Scored
    mismatches: int
    redrawn: int


def exactly(
    config: Config,
    params: Params,
    prompts: Prompts,
    key: Key[Array, ""],
    rollouts: Rollouts,
    *,
    eos_ids: Sequence[int],
    rows: int = ROWS,
    slots: int = 0,
    scored: Scored | None = None,
) -> Exact:
    """The completions that training's program would have drawn, with the same noise, token by token.

    A completion keeps its tokens up to the first that training's scores draw otherwise; that one is exchanged, the
    rest sampled again, and all of its group scored again, until nothing differs.

    Args:
        config: the decoder's shape.
        params: its tree.
        prompts: as they were sampled from.
        key: of the draws.
        rollouts: of these prompts.
        eos_ids: the ids after which a completion ends.
        rows: prompts scored at once.
        slots: as of `sample`: completions continued at once.
        scored: of these rollouts, where that is known.
    """
    rows = min(rows, len(prompts.numbers))
    if scored is None:
        scored = score(config, params, prompts, key, rollouts, rows=rows)
    scored = Scored(*map(np.array, scored))  # written over
    mismatches, redrawn = int(scored.differs.sum()), 0
    group, room = prompts.numbers.shape[1], rollouts.tokens.shape[1]
    agreed = np.full(len(rollouts.tokens), -1)  # up to here a completion has been exchanged already
    while True:
        at = np.argmax(scored.differs & (np.arange(room)[None, :] > agreed[:, None]), axis=1)
        wrong = np.flatnonzero(scored.differs[np.arange(len(at)), at] & (at > agreed))
        if not len(wrong):
            found = rollouts._replace(
                log_probabilities=scored.log_probabilities, log_masses=scored.log_masses
            )
            return Exact(found, scored, mismatches, redrawn)
        agreed[wrong] = at[wrong]
        rollouts, more = _exchanged(
            config, params, prompts, key, rollouts, wrong, at[wrong], scored, eos_ids, slots
        )
        redrawn += more
        again = np.unique(wrong // group)
        mine = (again[:, None] * group + np.arange(group)).reshape(-1)
        some = Prompts(*(x[again] for x in prompts))
        rows_of = {name: x[mine] for name, x in rollouts._asdict().items() if name != "slot_steps"}
        its = Rollouts(**rows_of, slot_steps=rollouts.slot_steps)
        part = score(config, params, some, key, its, rows=rows)
        for old, new in zip(scored, part, strict=True):
            old[mine] = new


def _exchanged(
    config: Config,
    params: Params,
    prompts: Prompts,
    key: Key[Array, ""],
    rollouts: Rollouts,
    wrong: Int[np.ndarray, " some"],
    at: Int[np.ndarray, " some"],
    scored: Scored,
    eos_ids: Sequence[int],
    slots: int,
) -> tuple[Rollouts, int]:
    """The rollouts with completions `wrong` drawn again from their token number `at` on, and how many tokens that is.

    That token is training's own; what follows is sampled behind the prompt and all tokens before.
    """
    room = rollouts.tokens.shape[1]
    made = {name: np.array(x) for name, x in rollouts._asdict().items()}
    exchanged = scored.drawn[wrong, at]
    made["tokens"][wrong, at] = exchanged
    made["tokens"][wrong] *= np.arange(room) <= at[:, None]
    left = prompts.limits.reshape(-1)[wrong] - at - 1
    ends = np.isin(exchanged, eos_ids)
    made["lengths"][wrong] = at + 1
    made["truncated"][wrong] = ~ends
    asked = _continued_prompts(prompts, made["tokens"], wrong, at, np.where(ends, 0, left))
    size, redrawn = _at_once(prompts, len(wrong), slots), len(wrong)
    for first in range(0, len(wrong), size):
        some = slice(first, first + size)
        part = Prompts(*(x[some] for x in asked))
        part = padded_prompts(part, size, prompts.tokens.shape[1] + room)
        new = sample(config, params, part, key, max_new_tokens=room, eos_ids=eos_ids, slots=size)
        _put(made, new, wrong[some], at[some] + 1)
        redrawn += int(new.lengths.sum())
    return Rollouts(**made), redrawn


def _at_once(prompts: Prompts, wrong: int, slots: int) -> int:
    """How many completions are sampled again at once: as many as the sampler continues, or a few.

    Two sizes are two programs, however many differ.
    """
    parts = batch_parts()
    few = LEAST_SLOTS * parts
    return few if wrong <= few else slots_of(prompts.numbers.size, slots, parts)


def _put(
    made: dict[str, np.ndarray],
    new: Rollouts,
    rows: Int[np.ndarray, " some"],
    starts: Int[np.ndarray, " some"],
) -> None:
    """Writes the new completions into `made` in place: completion i into row rows[i], from token starts[i] on."""
    for row, start, own, count in zip(rows, starts, new.tokens, new.lengths, strict=False):
        made["tokens"][row, start : start + count] = own[:count]
        made["lengths"][row] += count
    went_on = new.lengths[: len(rows)] > 0
    made["truncated"][rows[went_on]] = new.truncated[: len(rows)][went_on]
    made["slot_steps"] = made["slot_steps"] + new.slot_steps


def _continued_prompts(
    prompts: Prompts,
    tokens: Int[np.ndarray, "n room"],
    wrong: Int[np.ndarray, " some"],
    at: Int[np.ndarray, " some"],
    limits: Int[np.ndarray, " some"],
) -> Prompts:
    """Prompts of one completion each: what a completion of a group has up to token `at`."""
    group, room = prompts.numbers.shape[1], tokens.shape[1]
    owner = wrong // group
    more = (np.arange(room)[None, :] <= at[:, None]).astype(np.int32)
    own = Prompts(*(x[owner] for x in prompts))
    return own._replace(
        tokens=np.concatenate([own.tokens, tokens[wrong] * more], axis=1),
        segments=np.concatenate([own.segments, more], axis=1),
        numbers=own.numbers[np.arange(len(wrong)), wrong % group][:, None],
        first=own.first + at + 1,
        limits=limits.astype(np.int32)[:, None],
    )
