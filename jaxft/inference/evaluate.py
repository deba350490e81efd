"""The held-out loss of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from jaxft.tree import PyTree

Sums = Callable[[PyTree, PyTree, Mapping[str, Any]], tuple[jax.Array, jax.Array]]


def held_out(
    sums: Sums, trainable: PyTree, frozen: PyTree, batches: Iterable[Mapping[str, Any]]
) -> dict[str, float]:
    """{"loss": mean over all trained tokens, "tokens": how many} of the batches.

    Args:
        sums: jitted (trainable, frozen, batch) -> (sum of losses, number of tokens).
        trainable: the trainable tree.
        frozen: the frozen tree.
        batches: placed on the devices.
    """
    parts = [sums(trainable, frozen, batch) for batch in batches]
    total = sum(float(loss) for loss, _ in parts)
    tokens = sum(float(count) for _, count in parts)
    return {"loss": total / max(tokens, 1.0), "tokens": tokens}
