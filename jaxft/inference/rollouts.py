"""Many completions of each prompt, sampled by one compiled program: what a policy that learns from rewards tries.

A completion's draws depend on the key, its prompt's stream, its number in the group and the token's number in it: not
on the slot, the other prompts, their order, or the mesh.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from jaxft.errors import UserError
from jaxft.inference.decoding import LEAST_LENGTH, bucket
from jaxft.inference.slots import (
    Prompts,
    Rollouts,
    batch_parts,
    completion_keys,
    run_slots,
    slots_of,
)
from jaxft.models.block import original_length
from jaxft.models.config import Config
from jaxft.models.transformer import Params
from jaxft.runtime.processes import to_host

__all__ = [
    "Prompts",
    "Rollouts",
    "as_compiled",
    "completion_keys",
    "padded_prompts",
    "prompts_of",
    "sample",
    "sample_rollouts",
    "slots_of",
]


def sample_rollouts(
    config: Config,
    params: Params,
    tokens: Int[np.ndarray, "prompts length"],
    segments: Int[np.ndarray, "prompts length"],
    key: Key[Array, ""],
    *,
    group: int,
    max_new_tokens: int,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    eos_ids: Sequence[int] = (),
    streams: Int[np.ndarray, " prompts"] | None = None,
    numbers: Int[np.ndarray, "prompts group"] | None = None,
    first: Any = 0,
    limits: Any = None,
    slots: int = 0,
) -> Rollouts:
    """Samples `group` completions of each prompt, each up to its first EOS or `max_new_tokens`.

    Parameters stay as they are and where they are: adapters unmerged, bases quantized, sharded by the mesh in force.

    Args:
        config: the decoder's shape.
        params: its tree, with adapters of any kind; dropout is off, as it has no key.
        tokens: (prompts, length) ids, padded on either side.
        segments: (prompts, length): 1 where a prompt's token stands, 0 where there is padding.
        key: of the draws.
        group: completions of each prompt.
        max_new_tokens: at least 1; static, as `group` and `slots`.
        temperature: of all prompts or (prompts,); 0 takes the likeliest token.
        top_k: of all prompts or (prompts,), as of `jaxft.inference.sampling.restrict`.
        top_p: the same.
        eos_ids: the ids after which a completion ends; () for none.
        streams: (prompts,) uint32, by which the prompts' draws differ; by default 0, 1, ...
        numbers: (prompts, group) numbers of the completions in their group; by default 0 to group - 1.
        first: the number of the first token drawn, of all prompts or (prompts,): as many tokens of a completion stand
            at the end of its prompt.
        limits: the most tokens of each completion, (prompts, group), or of all; by default `max_new_tokens`.
        slots: completions continued at once; 0 chooses.

    Returns:
        The completions, as arrays on the host.

    Raises:
        UserError: a model whose longrope would turn the tokens of one text by two kinds of angles.
    """
    asked = prompts_of(
        tokens,
        segments,
        group=group,
        limits=max_new_tokens if limits is None else limits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        streams=streams,
        numbers=numbers,
        first=first,
    )
    return sample(
        config, params, asked, key, max_new_tokens=max_new_tokens, eos_ids=eos_ids, slots=slots
    )


def prompts_of(
    tokens: Int[np.ndarray, "prompts length"],
    segments: Int[np.ndarray, "prompts length"],
    *,
    group: int,
    limits: Any,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    streams: Int[np.ndarray, " prompts"] | None = None,
    numbers: Int[np.ndarray, "prompts group"] | None = None,
    first: Any = 0,
) -> Prompts:
    """The record of prompts, in NumPy's arrays; arguments are as of `sample_rollouts`."""
    count = tokens.shape[0]

    def each(x: Any, dtype: Any) -> np.ndarray:
        return np.broadcast_to(np.asarray(x, dtype), (count,))

    return Prompts(
        tokens=np.asarray(tokens, np.int32),
        segments=np.asarray(segments, np.int32),
        streams=each(np.arange(count) if streams is None else streams, np.uint32),
        numbers=np.tile(np.arange(group, dtype=np.int32), (count, 1))
        if numbers is None
        else np.asarray(numbers, np.int32),
        first=each(first, np.int32),
        limits=np.broadcast_to(np.asarray(limits, np.int32), (count, group)),
        temperature=each(temperature, np.float32),
        top_k=each(top_k, np.int32),
        top_p=each(top_p, np.float32),
    )


def sample(
    config: Config,
    params: Params,
    prompts: Prompts,
    key: Key[Array, ""],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    slots: int = 0,
) -> Rollouts:
    """`sample_rollouts` of prompts whose record is made: the completions, as arrays on the host."""
    lengths = np.asarray(prompts.segments, bool).sum(axis=1)
    _check_angles(config, lengths, lengths + np.max(prompts.limits, axis=1, initial=0))
    asked, width = as_compiled(prompts, slots)
    ends = jnp.asarray(np.asarray(eos_ids, np.int32))
    found = run_slots(config, params, asked, key, ends, room=max_new_tokens, slots=width)
    found = jax.tree.map(to_host, found)
    count = prompts.numbers.size
    rows = {name: x[:count] for name, x in found._asdict().items() if name != "slot_steps"}
    return Rollouts(**rows, slot_steps=found.slot_steps)


def as_compiled(prompts: Prompts, slots: int) -> tuple[Prompts, int]:
    """The record in the shapes for which `run_slots` is compiled on the mesh in force, and its number of slots."""
    (count, length), parts = prompts.tokens.shape, batch_parts()
    asked = padded_prompts(prompts, -(-count // parts) * parts, bucket(length, LEAST_LENGTH))
    return asked, slots_of(prompts.numbers.size, slots, parts)


def padded_prompts(prompts: Prompts, count: int, length: int) -> Prompts:
    """The record with `count` prompts, of which those that are added are empty, of `length` tokens."""
    more, room = count - prompts.tokens.shape[0], length - prompts.tokens.shape[1]

    def pad(x: Any) -> np.ndarray:
        return np.pad(x, [(0, more)] + [(0, 0)] * (np.ndim(x) - 1))

    padded = Prompts(*map(pad, prompts))
    wide = {
        name: np.pad(getattr(padded, name), ((0, 0), (room, 0))) for name in ("tokens", "segments")
    }
    return padded._replace(**wide)


def _check_angles(config: Config, lengths: np.ndarray, wholes: np.ndarray) -> None:
    """Refuses texts that longrope would turn by its short factors at first and by its long ones later."""
    original = original_length(config)
    if original is None or not len(lengths):
        return
    longest, shortest = int(wholes.max()), int(lengths.min())
    if longest > original >= shortest:
        raise UserError(
            f"rollouts: longrope turns texts of up to {original} tokens by other angles than longer ones, and the "
            f"longest prompt with its new tokens has {longest}, the shortest prompt {shortest}: keep all of "
            "them on one side"
        )
