"""What is measured on held-out data as a run goes on: the objective's own numbers, and what the model says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxft.data import Row, Tokenizer
from jaxft.data.feed import Feed
from jaxft.data.questions import prompt_and_reference
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
        check: called between two batches; it raises where the run is to stop.
    """

    sums: Callable[..., Any]
    sets: Mapping[str, Feed]
    samples: Callable[[PyTree], list[dict[str, Any]]]
    check: Callable[[], None]

    def __call__(self, standing: Any) -> Measured:
        """The numbers of each set, then the samples."""
        trees = (standing.state.trainable, standing.frozen)
        numbers = {
            name: held_out(self.sums, *trees, self._batches(feed, standing), *standing.held)
            for name, feed in self.sets.items()
        }
        return Measured(numbers, self.samples(standing.params))

    def _batches(self, feed: Feed, standing: Any) -> Iterator[Any]:
        for fed in feed.once(standing):
            self.check()
            yield fed.arrays
        self.check()


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
