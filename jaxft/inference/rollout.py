"""`jaxft.rollout`: several completions of each prompt, with their log-probabilities, for a policy that learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, Int32

from jaxft.data.chat import end_of_turn
from jaxft.data.tokenizer import Tokenizer, load_tokenizer
from jaxft.data.unwritten import Unwritten
from jaxft.defaults import MAX_NEW_TOKENS
from jaxft.errors import UserError, shown
from jaxft.inference.asked import Prompt
from jaxft.inference.exact import exactly
from jaxft.inference.generate import (
    check_lengths,
    check_settings,
    encode_prompt,
    padded,
    streams_of,
)
from jaxft.inference.rollouts import prompts_of, sample
from jaxft.models import Transformer


def rollout(
    model: Transformer,
    params: Mapping[str, Any],
    prompts: Sequence[Prompt | Sequence[int]],
    *,
    group: int = 8,
    tokenizer: Tokenizer | str | Path | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_ids: Sequence[int] | None = None,
    slots: int = 0,
    exact: bool = False,
) -> tuple[Int32[np.ndarray, "n new"], Float32[np.ndarray, "n new"]]:
    """Samples `group` completions of each prompt: n = prompts * group, those of a prompt together.

    A completion's draws depend on the seed, its prompt's tokens, how often these stood in the list before, and its
    number in the group: not on the other prompts, their order or `slots`.

    Args:
        model: the decoder; its `config` is all that is used.
        params: its tree, with or without adapters of any kind.
        prompts: texts, lists of messages, or lists of token ids.
        group: completions of each prompt.
        tokenizer: the model's, or the Hugging Face folder where it stands; not needed for ids.
        max_new_tokens: the most tokens of a completion.
        temperature: the scores are divided by it; 0 takes the likeliest token each time.
        top_k: draw among the k likeliest tokens; 0 for all.
        top_p: draw among the likeliest tokens that together have this probability; 1.0 for all.
        seed: of the draws.
        eos_ids: the ids that end a completion; by default the tokenizer's and, of conversations, that of a turn's end.
        slots: completions continued at once; 0 chooses.
        exact: whether training's program, which reads whole rows and not a cache, has the last word on each token: the
            sample and its log-probabilities are then exactly those of the policy that is trained.

    Returns:
        tokens: (n, max_new_tokens) int32, -1 behind a completion's end; an EOS is part of it.
        log_probabilities: (n, max_new_tokens) float32 of each token under the sampler: at its temperature and among
            the tokens that top-k and top-p leave; 0 behind a completion's end.

    Raises:
        UserError: a setting out of its range, a text without a tokenizer, and whatever `generate` refuses of a prompt.
    """
    check_settings(max_new_tokens, temperature, top_k, top_p, 1)
    for name, value, least in (("group", group, 1), ("slots", slots, 0)):
        if not (isinstance(value, (int, np.integer)) and value >= least):
            raise UserError(
                f"rollout: {name} must be a whole number of at least {least}, not {shown(value)}"
            )
    if isinstance(prompts, str):
        raise UserError("rollout takes a list of prompts: [prompt] for one")
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    if not len(prompts):
        empty = np.zeros((0, max_new_tokens))
        return empty.astype(np.int32), empty.astype(np.float32)
    encoded = [_ids(prompt, tokenizer, number) for number, prompt in enumerate(prompts, start=1)]
    origins = [f"prompt {number}" for number in range(1, len(prompts) + 1)]
    check_lengths(model.config, encoded, origins, max_new_tokens)
    if eos_ids is None:
        eos_ids = _ends(prompts, tokenizer)
    tokens, segments = padded(encoded)
    asked = prompts_of(
        tokens,
        segments,
        group=group,
        limits=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        streams=streams_of(encoded),
    )
    what = (model.config, params, asked, jax.random.key(seed))
    settings: dict[str, Any] = {"eos_ids": eos_ids, "slots": slots}
    found = sample(*what, max_new_tokens=max_new_tokens, **settings)
    if exact:
        found = exactly(*what, found, **settings).rollouts
    told = np.arange(max_new_tokens)[None, :] < np.asarray(found.lengths)[:, None]
    return np.where(told, found.tokens, -1), np.where(told, found.log_probabilities, 0.0)


def _of_ids(prompt: Any) -> bool:
    """Whether it is a list of token ids, and neither a text nor messages."""
    return not isinstance(prompt, str) and len(prompt) > 0 and not isinstance(prompt[0], Mapping)


def _ids(prompt: Any, tokenizer: Tokenizer | None, number: int) -> list[int]:
    if not hasattr(prompt, "__len__"):
        raise UserError(
            f"prompt {number}: a text, messages or token ids are expected, not {shown(prompt)}"
        )
    if _of_ids(prompt):
        ids = np.asarray(prompt)
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0:
            raise UserError(
                f"prompt {number}: token ids are whole numbers of at least 0, not {shown(prompt)}"
            )
        found: list[int] = ids.tolist()
        return found
    if tokenizer is None:
        raise UserError(
            f"prompt {number}: a text needs the model's tokenizer: rollout(..., tokenizer=folder)"
        )
    return encode_prompt(tokenizer, prompt, None, f"prompt {number}", Unwritten())


def _ends(prompts: Sequence[Any], tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The ids that end completions of these prompts."""
    if tokenizer is None:
        return ()
    chats = any(not isinstance(prompt, str) and not _of_ids(prompt) for prompt in prompts)
    return (*tokenizer.eos_ids, *(end_of_turn(tokenizer).ids if chats else ()))
