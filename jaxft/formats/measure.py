"""How far a folder is from what it was made of: the change of its loss, and how many next tokens stay the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.formats.own_text import Text
from jaxft.models.transformer import Transformer
from jaxft.tree import PyTree

KEPT = 128  # tokens whose logits are kept

# By what is stored: the change of the loss, and the share of next tokens that stay the same, that are usual, and what
# helps where it is more. The figures are those of experiments/merged_folders.md.
USUAL = {
    "float32": (0.0005, 0.999, "the folder is not what was written: merge again"),
    "bfloat16": (0.01, 0.98, "--dtype float32 keeps what was trained"),
    "float16": (0.002, 0.99, "--dtype float32 keeps what was trained"),
    "int8": (0.02, 0.9, "leave it dense"),
    "nf4": (0.15, 0.65, "int8 is closer, and training over nf4 (configs/sft.py:qlora) closest"),
    "fp4": (0.4, 0.5, "nf4 and int8 are closer"),
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a model says of a text.

    Attributes:
        loss: mean over the targets of -log p.
        choices: the likeliest token at each target.
        logits: of the first tokens of the first row, (tokens, vocabulary).
    """

    loss: float
    choices: np.ndarray
    logits: np.ndarray


def measure(module: Transformer, params: PyTree, text: Text) -> Measured:
    """Goes through the text row by row, in the module's dtype."""
    longest = max(len(ids) for ids, _ in text.pieces)
    apply: Any = jax.jit(lambda params, tokens: _said(module, params, tokens))
    losses, choices, first = list[np.ndarray](), list[np.ndarray](), None
    for ids, targets in text.pieces:
        padded = np.zeros((1, longest), np.int32)
        padded[0, : len(ids)] = ids
        loss, choice, logits = apply(params, jnp.asarray(padded))
        indices = np.flatnonzero(targets) - 1
        losses.append(np.asarray(loss)[indices])
        choices.append(np.asarray(choice)[indices])
        first = np.asarray(logits[: len(ids)]) if first is None else first
    assert first is not None
    return Measured(float(np.concatenate(losses).mean()), np.concatenate(choices), first)


def _said(module: Transformer, params: PyTree, tokens: jax.Array) -> tuple[jax.Array, ...]:
    """(-log p of the token that follows, the likeliest one, the logits of the first tokens) of a row."""
    logits = module.apply({"params": params}, tokens)[0].astype(jnp.float32)
    following = jnp.roll(tokens[0], -1)
    right = jnp.take_along_axis(logits, following[:, None], axis=-1)[:, 0]
    return (
        jax.nn.logsumexp(logits, axis=-1) - right,
        jnp.argmax(logits, axis=-1),
        logits[:KEPT],
    )


def report(name: str, after: Measured, before: Measured, text: Text, stored: str) -> float:
    """Prints how `after` differs from `before`, and what is usual.

    Args:
        name: what was made: "merged".
        after: what the new folder says.
        before: what it was made of.
        text: what was measured.
        stored: the dtype or the scheme of the new folder.

    Returns:
        The largest deviation of the logits kept, relative to the largest logit.
    """
    change = after.loss - before.loss
    same = float((after.choices == before.choices).mean())
    print(
        f"{name}: on {len(after.choices)} tokens of {text.name} the loss is {after.loss:.4f}, and {before.loss:.4f} "
        f"before ({change:+.4f}); {100 * same:.4g} % of the next tokens stay the same"
    )
    most, least, remedy = USUAL[stored]
    if not text.random:
        line = (
            f"  usual for {stored}: a change below {most:g}, and {100 * least:g} % or more the same"
        )
        beyond = not (abs(change) <= most and same >= least)
        print(f"{line}. This is more: {remedy}." if beyond else f"{line}.")
    return float(np.abs(after.logits - before.logits).max() / np.abs(before.logits).max())
