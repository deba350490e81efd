"""Evaluations under way: held-out losses, samples, which step was best, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxft.data.questions import prompt_and_reference
from jaxft.inference import generate
from jaxft.models import Transformer
from jaxft.training.feed import Data
from jaxft.tree import PyTree


def best_step(losses: Mapping[int, float]) -> int | None:
    """The step after the first update whose held-out loss is lowest; the earliest of equals, None without any.

    >>> best_step({0: 1.0, 2: 3.0, 4: 2.0, 6: 2.0})
    4
    """
    ranked = [(_finite(loss), step) for step, loss in losses.items() if step > 0]
    return min(ranked)[1] if ranked else None


def is_exhausted(losses: Mapping[int, float], patience: int, since: int = 0) -> bool:
    """Whether `patience` evaluations have passed since the best one, and since that step; never, where it is 0.

    >>> is_exhausted({2: 3.0, 4: 2.0, 6: 2.5}, 1), is_exhausted({2: 3.0, 4: 2.0, 6: 2.5}, 2)
    (True, False)
    """
    best = best_step(losses)
    return best is not None and 0 < patience <= sum(step > max(best, since) for step in losses)


def answers(
    config: ConfigDict, model: Transformer, params: PyTree, data: Data
) -> list[dict[str, Any]]:
    """What the model says to the held-out prompts, beside what stands in the data."""
    if not data.prompts:
        return []
    prompts, references = zip(*map(prompt_and_reference, data.prompts), strict=True)
    said = generate(
        model,
        params,
        list(prompts),
        tokenizer=data.tokenizer,
        max_new_tokens=config.samples.max_new_tokens,
        tools=[row.values.get("tools") for row in data.prompts],
    )
    return [
        {"prompt": prompt, "completion": answer, "reference": reference}
        for prompt, answer, reference in zip(prompts, said, references, strict=True)
    ]


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
