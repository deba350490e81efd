"""The program behind rollouts: a queue of completions, continued in slots that are refilled.

All slots go on by a token a step; a slot whose completion has ended takes the next of the queue in the same step. When
the queue is empty and half of the slots have nothing to do, the others go on by themselves, in a loop of half the
width.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxft.inference.decoding import left_padded, read_prompts
from jaxft.inference.sampling import Drawn, draw
from jaxft.kernels.shared_attention import Sharing, shared_attention
from jaxft.mesh import BATCH, sizes_in_force
from jaxft.models.config import Config
from jaxft.models.transformer import Params, continued, empty_cache, logits

LEAST_SLOTS = (
    8  # of a part, where nobody asks for fewer: reading the weights takes as long for fewer
)
NARROWEST = 4  # slots of a part; below, another loop is not worth its compilation


class Prompts(NamedTuple):
    """What is asked, and how it is answered; all of it is data of the program.

    Attributes:
        tokens: (prompts, length) ids, padded on either side.
        segments: (prompts, length): 1 where a prompt's token stands, 0 where there is padding.
        streams: (prompts,) uint32, what a prompt's draws depend on beside the key.
        numbers: (prompts, group): the number of each completion in its group, on which its draws depend.
        first: (prompts,): the number of the first token drawn: above 0 where a prompt ends with tokens drawn before.
        limits: (prompts, group): the most tokens of each completion, at most the program's `room`; 0: there is none.
        temperature, top_k, top_p: (prompts,), as of `jaxft.inference.sampling.draw`.
    """

    tokens: Int[Any, "prompts length"]
    segments: Int[Any, "prompts length"]
    streams: Int[Any, " prompts"]
    numbers: Int[Any, "prompts group"]
    first: Int[Any, " prompts"]
    limits: Int[Any, "prompts group"]
    temperature: Float[Any, " prompts"]
    top_k: Int[Any, " prompts"]
    top_p: Float[Any, " prompts"]


class Rollouts(NamedTuple):
    """What was sampled: n = prompts * group completions; those of a prompt stand together.

    Attributes:
        tokens: (n, room) int32, 0 behind a completion's end.
        lengths: (n,) int32, the EOS counted.
        log_probabilities: (n, room) float32 of each token under the sampler: at its temperature, among the tokens that
            top-k and top-p left; 0 behind the end.
        log_masses: (n, room) float32: the log of the probability that those tokens had together, 0 where all could be
            drawn. `log_probabilities + log_masses` are those of the policy at that temperature.
        truncated: (n,) bool: the limit ended it, and no EOS.
        group: (n,) int32, the number of its prompt.
        slot_steps: (2,) int32: how many tokens the slots read, and how many they could have read in that many steps.
    """

    tokens: Int[Any, "n room"]
    lengths: Int[Any, " n"]
    log_probabilities: Float[Any, "n room"]
    log_masses: Float[Any, "n room"]
    truncated: Bool[Any, " n"]
    group: Int[Any, " n"]
    slot_steps: Int[Any, " 2"]

    @property
    def busy(self) -> float:
        """The share of slot-steps that continued a completion; 1.0 where there were none."""
        used, all_of_them = (int(x) for x in np.asarray(self.slot_steps))
        return used / all_of_them if all_of_them else 1.0


State = dict[str, Any]


def slots_of(completions: int, asked: int, parts: int = 1) -> int:
    """How many slots continue so many completions: what is asked for, or a quarter of them, in whole parts.

    >>> slots_of(64, 0), slots_of(64, 24), slots_of(4, 24), slots_of(64, 5, parts=4), slots_of(3, 0)
    (16, 24, 4, 8, 3)
    """
    most = -(-completions // parts)
    each = -(-asked // parts) if asked else max(LEAST_SLOTS, -(-most // 4))
    return parts * min(each, most)


def batch_parts() -> int:
    """Into how many parts the mesh in force divides a batch."""
    return math.prod(sizes_in_force()[axis] for axis in BATCH)


@functools.partial(jax.jit, static_argnames=("config", "room", "slots"))
def run_slots(
    config: Config,
    params: Params,
    asked: Prompts,
    key: Key[Array, ""],
    eos_ids: Int[Array, " ends"],
    *,
    room: int,
    slots: int,
) -> Rollouts:
    """`sample_rollouts` for shapes as they are: the mesh's parts divide the prompts and `slots`."""
    parts, (count, group) = batch_parts(), asked.numbers.shape
    tokens, segments = left_padded(asked.tokens, asked.segments)
    known = segments.sum(axis=1, dtype=jnp.int32)
    # the longest that a text may become: `_check_angles` has made sure that all are on one side of it
    reach = known.max() - 1
    cache = empty_cache(config, *tokens.shape)
    hidden, cache = read_prompts(config, params, tokens, segments, cache, reach)
    table = _Table(config, params, asked, known, completion_keys(key, asked), eos_ids, room)
    state = _first_tokens(table, hidden)
    order, waiting = _queue(state, parts)
    queue = {"order": order, "waiting": waiting, "taken": jnp.zeros(parts, jnp.int32)}
    width = slots // parts
    own = empty_cache(config, slots, max(room - 1, 1))
    del own["segments"]
    free = jnp.full((parts, width), -1, jnp.int32)
    state |= {"own": own, "queue": queue, "slot": free, "step": jnp.int32(0)}
    state |= {"used": jnp.int32(0), "could": jnp.int32(0)}
    state = _refilled(state)
    while True:
        narrower = -(-width // 2)
        last = narrower < NARROWEST or narrower == width

        def going(state: State, enough: int = 0 if last else narrower) -> jax.Array:
            busy = (state["slot"] >= 0).sum(axis=1)
            waits = state["queue"]["taken"] < state["queue"]["waiting"]
            return jnp.any(waits | (busy > enough))

        state = jax.lax.while_loop(going, functools.partial(_advance, table, cache, reach), state)
        if last:
            break
        state, width = _narrowed(state, narrower), narrower
    ended = state["ended"].reshape(-1)
    index = jnp.arange(count * group, dtype=jnp.int32)
    return Rollouts(
        tokens=state["tokens"],
        lengths=state["lengths"],
        log_probabilities=state["log_probabilities"],
        log_masses=state["log_masses"],
        truncated=~ended & (state["lengths"] > 0),
        group=index // group,
        slot_steps=jnp.stack([state["used"], state["could"]]),
    )


class _Table(NamedTuple):
    """What does not change while the slots run; `keys` (n,) are the completions'."""

    config: Config
    params: Params
    asked: Prompts
    known: Int[Array, " prompts"]
    keys: Key[Array, " n"]
    eos_ids: Int[Array, " ends"]
    room: int


def completion_keys(key: Key[Array, ""], asked: Prompts) -> Key[Array, " n"]:
    """The key of each completion's draws."""
    by_prompt = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, asked.streams)
    by_number = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))(by_prompt, asked.numbers)
    return by_number.reshape(-1)


def _drawn(
    table: _Table, scores: jax.Array, completion: Int[Array, " batch"], place: Int[Array, " batch"]
) -> Drawn:
    """Draws token number `place` of each completion."""
    asked = table.asked
    prompt = completion // asked.numbers.shape[1]
    keys = jax.vmap(jax.random.fold_in)(table.keys[completion], asked.first[prompt] + place)
    rules = (asked.temperature[prompt], asked.top_k[prompt], asked.top_p[prompt])
    return draw(scores, keys, *rules)


def _first_tokens(table: _Table, hidden: Float[Array, "prompts 1 hidden"]) -> State:
    """The first token of every completion, drawn from the prompts' last hidden states."""
    count, group = table.asked.numbers.shape
    scores = logits(table.config, table.params, hidden)[:, 0]
    numbers = jnp.arange(group, dtype=jnp.int32)

    def one(
        number: jax.Array,
    ) -> Drawn:  # of each group: all at once would be group times the logits
        completion = jnp.arange(count, dtype=jnp.int32) * group + number
        return _drawn(table, scores, completion, jnp.zeros_like(completion))

    drawn = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1), jax.lax.map(one, numbers))
    limits = table.asked.limits.reshape(-1)
    some = jnp.repeat(table.known > 0, group) & (limits > 0)
    ended = some & _ends(drawn.token, table.eos_ids)

    def column(x: jax.Array) -> jax.Array:
        return jnp.pad(jnp.where(some, x, 0)[:, None], ((0, 0), (0, table.room - 1)))

    return {
        "tokens": column(drawn.token),
        "log_probabilities": column(drawn.log_probability),
        "log_masses": column(drawn.log_mass),
        "lengths": some.astype(jnp.int32),
        "ended": ended,
        "alive": some & ~ended & (limits > 1),
    }


def _ends(token: jax.Array, eos_ids: jax.Array) -> jax.Array:
    return jnp.any(token[:, None] == eos_ids[None, :], axis=1)


def _queue(state: State, parts: int) -> tuple[jax.Array, jax.Array]:
    """In each part, the numbers of the completions, those first that go on, and how many these are."""
    alive = state["alive"].reshape(parts, -1)
    return (
        jnp.argsort(~alive, axis=1, stable=True).astype(jnp.int32),
        alive.sum(axis=1, dtype=jnp.int32),
    )


def _refilled(state: State) -> State:
    """The state with free slots taken by the next completions of their part's queue."""
    queue, slot = state["queue"], state["slot"]
    free = slot < 0
    ahead = queue["taken"][:, None] + jnp.cumsum(free, axis=1, dtype=jnp.int32) - 1
    takes = free & (ahead < queue["waiting"][:, None])
    last = queue["order"].shape[1] - 1
    taken = jnp.take_along_axis(queue["order"], jnp.minimum(ahead, last), axis=1)
    queue = {**queue, "taken": queue["taken"] + takes.sum(axis=1, dtype=jnp.int32)}
    return {**state, "slot": jnp.where(takes, taken, slot), "queue": queue}


def _advance(table: _Table, cache: dict[str, Any], reach: Int[Array, ""], state: State) -> State:
    """One token in every slot: read, the next one drawn, ended completions exchanged for waiting ones."""
    slot, (parts, each) = state["slot"], state["slot"].shape
    many = state["tokens"].shape[0] // parts
    start = jnp.arange(parts, dtype=jnp.int32)[:, None] * many
    busy = (slot >= 0).reshape(-1)
    completion = (jnp.maximum(slot, 0) + start).reshape(-1)
    prompt = completion // table.asked.numbers.shape[1]
    before = jnp.maximum(state["lengths"][completion] - 1, 0)
    token = jnp.take_along_axis(state["tokens"][completion], before[:, None], axis=1)
    columns = max(table.room - 1, 1)
    column = state["step"] % columns
    sharing = Sharing(
        continuation=jnp.maximum(slot, 0),
        slot=_inverse(slot, many),
        shared=(cache["segments"] != 0).reshape(parts, -1, cache["segments"].shape[1]),
        before=before,
        age=(column - jnp.arange(columns, dtype=jnp.int32)) % columns,
        used=jnp.minimum(state["step"] + 1, columns),
    )

    def attend(name: str) -> Any:
        def look(query: Any, keys: Any, values: Any, number: Any, **settings: Any) -> jax.Array:
            shared = (cache["key"][name][number], cache["value"][name][number])
            return shared_attention(query, *shared, keys, values, number, sharing, **settings)

        return look

    places = (token, jnp.ones_like(token), (table.known[prompt] + before)[:, None])
    hidden, own = continued(
        table.config, table.params, *places, state["own"], column, attend, reach
    )
    drawn = _drawn(table, logits(table.config, table.params, hidden)[:, 0], completion, before + 1)
    state = {**state, **_recorded(table, state, drawn, completion, before + 1, busy)}
    state |= {"own": own, "step": state["step"] + 1}
    state |= {
        "used": state["used"] + busy.sum(dtype=jnp.int32),
        "could": state["could"] + parts * each,
    }
    goes_on = state["alive"][completion].reshape(parts, each)
    return _refilled({**state, "slot": jnp.where(goes_on, slot, -1)})


def _inverse(slot: Int[Array, "parts slots"], many: int) -> Int[Array, "parts many"]:
    """In which slot each completion of a part stands; 0 for one that stands in none."""
    places = jnp.broadcast_to(jnp.arange(slot.shape[1], dtype=jnp.int32), slot.shape)
    free = jnp.where(slot < 0, many, slot)  # out of range: dropped
    empty = jnp.zeros((slot.shape[0], many), jnp.int32)
    return jax.vmap(lambda row, index, value: row.at[index].set(value, mode="drop"))(
        empty, free, places
    )


def _recorded(
    table: _Table,
    state: State,
    drawn: Drawn,
    completion: Int[Array, " slots"],
    place: Int[Array, " slots"],
    busy: Bool[Array, " slots"],
) -> State:
    """What was drawn written down, for slots that are busy."""
    row = jnp.where(busy, completion, state["lengths"].shape[0])  # out of range: dropped

    def put(name: str, value: jax.Array) -> jax.Array:
        return state[name].at[row, place].set(value, mode="drop")

    limit = table.asked.limits.reshape(-1)[completion]
    ended = _ends(drawn.token, table.eos_ids)
    alive = ~ended & (place + 1 < limit)
    return {
        "tokens": put("tokens", drawn.token),
        "log_probabilities": put("log_probabilities", drawn.log_probability),
        "log_masses": put("log_masses", drawn.log_mass),
        "lengths": state["lengths"].at[row].set(place + 1, mode="drop"),
        "ended": state["ended"].at[row].set(ended, mode="drop"),
        "alive": state["alive"].at[row].set(alive, mode="drop"),
    }


def _narrowed(state: State, width: int) -> State:
    """The state with `width` slots a part, which hold all that go on."""
    slot = state["slot"]
    parts = slot.shape[0]
    kept = jnp.argsort(slot < 0, axis=1, stable=True)[:, :width]

    def take(x: jax.Array) -> jax.Array:
        """Of the slots' own keys or values, (layers, slots, ...)."""
        by_part = x.reshape(x.shape[0], parts, -1, *x.shape[2:])
        by_part = jax.vmap(lambda rows, index: rows[:, index], in_axes=(1, 0), out_axes=1)(
            by_part, kept
        )
        return by_part.reshape(x.shape[0], -1, *x.shape[2:])

    own = jax.tree.map(take, state["own"])
    return {**state, "slot": jnp.take_along_axis(slot, kept, axis=1), "own": own}
