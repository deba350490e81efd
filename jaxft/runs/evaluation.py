"""What is measured on held-out data as a run goes on: the objective's own numbers, and what the model says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxft.data import Row, Tokenizer
from jaxft.data.feed import Feed
from jaxft.data.questions import prompt_and_reference
from jaxft.evaluation.evaluate import evaluate_items
from jaxft.evaluation.items import Item
from jaxft.evaluation.metrics import metrics_of
from jaxft.inference import generate
from jaxft.inference.evaluate import held_out
from jaxft.models import Transformer
from jaxft.tree import PyTree


class Measured(NamedTuple):
    """What an evaluation gives.

    Attributes:
        numbers: of each held-out set by its name, as metrics.jsonl has them.
        samples: as samples.jsonl has them.
    """

    numbers: dict[str, dict[str, float]]
    samples: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Measures a policy. Called with what stands on the devices (`jaxft.training.standing.Standing`).

    Attributes:
        sums: jitted (trainable, frozen, batch, *held) -> the loss's sums.
        sets: a feed of each held-out set, by name.
        samples: params -> lines of samples.jsonl.
        scores: params -> numbers that join those of the first set, by their names.
        check: called between two batches; it raises where the run is to stop.
    """

    sums: Callable[..., Any]
    sets: Mapping[str, Feed]
    samples: Callable[[PyTree], list[dict[str, Any]]]
    scores: Callable[[PyTree], dict[str, float]]
    check: Callable[[], None]

    def __call__(self, standing: Any) -> Measured:
        """The numbers of each set, the scores of the first, then the samples."""
        numbers = {name: self._measured(feed, standing) for name, feed in self.sets.items()}
        for first in list(numbers)[:1]:
            numbers[first] |= self.scores(standing.params)
        return Measured(numbers, self.samples(standing.params))

    def _measured(self, feed: Feed, standing: Any) -> dict[str, float]:
        """The loss, where a feed gives batches to compute it on, and the averages that it knows itself."""
        known: dict[str, tuple[float, float]] = {}
        trees = (standing.state.trainable, standing.frozen)
        numbers = held_out(self.sums, *trees, self._batches(feed, standing, known), *standing.held)
        return numbers | {name: total / weight for name, (total, weight) in known.items() if weight}

    def _batches(
        self, feed: Feed, standing: Any, known: dict[str, tuple[float, float]]
    ) -> Iterator[Any]:
        for fed in feed.once(standing):
            self.check()
            for name, (total, weight) in fed.sums.items():
                before = known.get(name, (0.0, 0.0))
                known[name] = (before[0] + total, before[1] + weight)
            if fed.arrays:
                yield fed.arrays
        self.check()


def scores(
    model: Transformer,
    params: PyTree,
    items: Sequence[Item],
    names: Sequence[str],
    tokenizer: Tokenizer,
    max_new_tokens: int,
    batch_size: int,
) -> dict[str, float]:
    """The metrics of `config.eval_metrics` on the items; one without a value (nothing could be asked) is left out."""
    if not names:
        return {}
    found = evaluate_items(
        model,
        params,
        items,
        metrics_of(names, "spaces"),
        tokenizer,
        chat=False,
        system="",
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    return {name: one.value for name, one in found.metrics.items() if one.value is not None}


def samples(
    model: Transformer,
    params: PyTree,
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """What the model says to held-out rows, beside what stands in the data."""
    if not rows:
        return []
    prompts, references = zip(*map(prompt_and_reference, rows), strict=True)
    said = generate(
        model,
        params,
        list(prompts),
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        tools=[row.values.get("tools") for row in rows],
    )
    return [
        {"prompt": prompt, "completion": answer, "reference": reference}
        for prompt, answer, reference in zip(prompts, said, references, strict=True)
    ]
