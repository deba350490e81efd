"""The held-out loss of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from jaxft.objectives import averages, counted
from jaxft.runtime.stalls import fetch
from jaxft.tree import PyTree

Sums = Callable[..., tuple[jax.Array, Any]]


def held_out(
    sums: Sums,
    trainable: PyTree,
    frozen: PyTree,
    batches: Iterable[Mapping[str, Any]],
    *held: PyTree,
) -> dict[str, float]:
    """{"loss": mean over all that is counted, "tokens": how many are trained, ...} of the batches.

    What the objective reports besides is averaged over all batches too; what was never counted is left out.

    Args:
        sums: jitted (trainable, frozen, batch, *held) -> (sum of losses, number of tokens or `Counted`).
        trainable: the trainable tree.
        frozen: the frozen tree.
        batches: placed on the devices.
        held: what the objective needs besides: a reference.
    """
    parts = [sums(trainable, frozen, batch, *held) for batch in batches]
    if not parts:
        return {}
    read = fetch([(loss, counted(more)) for loss, more in parts])
    total = sum(float(loss) for loss, _ in read)
    weight, tokens = (sum(float(more[i]) for _, more in read) for i in (0, 1))
    added = jax.tree.map(lambda *each: sum(each), *(more.sums for _, more in read)) if read else {}
    named = {name: float(value) for name, value in averages(added).items()}
    named = {name: value for name, value in named.items() if not math.isnan(value)}
    return {"loss": total / max(weight, 1.0), "tokens": tokens, **named}
