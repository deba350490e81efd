"""What is asked, and what was found: an item is a question with all its references."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxft.data.questions import prompt_and_reference
from jaxft.data.sources import Row
from jaxft.errors import UserError, nearest

PROMPT = "prompt"  # the format of a row that asks and does not say what is right


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """What the model gives to tokens that stand in the data.

    Attributes:
        loss: the sum of -log p(token | those before).
        tokens: how many there are.
        hits: how many of them are the likeliest token.
    """

    loss: float
    tokens: int
    hits: int


@dataclasses.dataclass(frozen=True)
class Item:
    """A question, its references, and what a model says to it.

    Attributes:
        origin: "path:line" of its first row.
        prompt: a text or messages.
        references: what would be right; () where the data have none.
        cluster: what it belongs to: items of one cluster are not independent.
        rows: of the data that ask it.
        answer: the model's; None where it was not asked.
        likelihood: of the references, or of a row's whole text; None where it was not computed.
        pair: of the chosen and the rejected completions; None where there are none.
        rewards: of the chosen and the rejected completions, log p less that of the base without the adapter.
        tokens: how many the prompt and the answer have, as "prompt" and "answer".
        unscored: what could not be found, "answer", "likelihood" or a grader's verdict, and why.
        values: the first row as it stands in the data, for graders.
        grades: what graders gave to the answer, by their names.
        cite: of an answer, what is told of the passages put before its question; None where none were.
    """

    origin: str
    prompt: Any
    references: tuple[str, ...]
    cluster: str
    rows: tuple[Row, ...] = ()
    answer: str | None = None
    likelihood: Likelihood | None = None
    pair: tuple[Likelihood, Likelihood] | None = None
    rewards: tuple[float, float] | None = None
    tokens: Mapping[str, int] = dataclasses.field(default_factory=dict)
    unscored: Mapping[str, str] = dataclasses.field(default_factory=dict)
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    grades: Mapping[str, float] = dataclasses.field(default_factory=dict)
    cite: Callable[[str], dict[str, Any]] | None = None

    @property
    def tools(self) -> Any:
        """The tools of the question."""
        return self.rows[0].values.get("tools") if self.rows else None


def items_of(
    rows: Iterable[Row],
    clusters: Mapping[str, str] | None = None,
    values: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Item]:
    """The questions of the rows. Rows that ask the same are one question with several references.

    A text alone asks nothing: it is an item by itself, without references.

    Args:
        rows: as `read_rows` gives them; or of preferences, whose chosen completion is the reference.
        clusters: of each row's origin, what it belongs to; by default every question stands alone.
        values: of each row's origin, the row as it stands in the data.
    """
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(_question(row), []).append(row)
    items = []
    for same in found.values():
        origin = same[0].origin
        asked = [_asked(row) for row in same]
        references = tuple(
            dict.fromkeys(reference for _, reference in asked if reference is not None)
        )
        cluster = clusters[origin] if clusters else origin
        given = (values or {}).get(origin, {})
        items.append(Item(origin, asked[0][0], references, cluster, tuple(same), values=given))
    return items


def _asked(row: Row) -> tuple[Any, str | None]:
    """What a row asks, and what is right; None where it does not say."""
    if row.format == "pair":
        prompt, chosen = row.values["prompt"], row.values["chosen"]
        return prompt, chosen if isinstance(chosen, str) else str(chosen[-1].get("content", ""))
    if row.format in ("text", PROMPT):
        return row.values.get("text", row.values.get("prompt")), None
    if row.format == "messages" and row.values["messages"][-1]["role"] != "assistant":
        return row.values["messages"], None
    prompt, reference = prompt_and_reference(row)
    return prompt, reference if prompt else None


def _question(row: Row) -> str:
    """Equal for rows that ask the same."""
    if row.format in ("text", "pair"):
        return row.origin
    prompt, _ = _asked(row)
    if not prompt:  # the assistant speaks first
        return row.origin
    return json.dumps([prompt, row.values.get("tools")], sort_keys=True, ensure_ascii=False)


def clusters_of(records: Iterable[tuple[str, Mapping[str, Any]]], key: str) -> dict[str, str]:
    """What each row belongs to: the value of a key, by the row's origin.

    Raises:
        UserError: a row does not have the key.
    """
    found = {}
    for origin, values in records:
        if key not in values:
            raise UserError(
                f"{origin}: the row has no key {key!r} to cluster by{nearest(key, values)}"
            )
        found[origin] = json.dumps(values[key], sort_keys=True, ensure_ascii=False)
    return found
