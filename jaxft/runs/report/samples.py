"""What the models of runs said, beside one another."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.errors import counted
from jaxft.runs.report.reading import Run
from jaxft.runs.report.words import cut

QUESTIONS = 12  # at most
LETTERS = 2000  # of a text, at most


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one said.

    Attributes:
        who: its name on the page.
        number: its mark.
        when: after which update.
        text: what it said.
        agrees: whether that is the reference, but for spaces around it.
    """

    who: str
    number: int
    when: str
    text: str
    agrees: bool


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question with its answers.

    Attributes:
        prompt, reference: what was asked, and what stands in the data.
        answers: of each run.
    """

    prompt: str
    reference: str
    answers: Sequence[Answer]


def samples_of(runs: Sequence[Run], labels: Sequence[str]) -> tuple[list[Asked], str]:
    """The questions that were asked at evaluations, with what each run said last and first; and what is left out."""
    found: dict[tuple[str, str], list[Answer]] = {}
    for number, (run, label) in enumerate(zip(runs, labels, strict=True)):
        steps = {int(row["step"]) for row in run.samples}
        chosen = [step for step in (run.exported, max(steps, default=None)) if step in steps][:1]
        if len(runs) == 1:
            chosen = sorted({min(steps, default=0), *chosen})
        for step in chosen:
            for row in run.samples:
                if row["step"] == step:
                    answer = _answer(row, label, number, step)
                    found.setdefault(_question(row), []).append(answer)
    shown = [Asked(*question, answers) for question, answers in list(found.items())[:QUESTIONS]]
    over = len(found) - len(shown)
    return shown, f"{counted(over, 'more question')} in samples.jsonl" if over else ""


def _answer(row: Mapping[str, Any], label: str, number: int, step: int) -> Answer:
    said, reference = (words_of(row.get(key, "")).strip() for key in ("completion", "reference"))
    when = f"after {counted(step, 'update')}" if step else "before the first update"
    agrees = bool(reference) and said == reference
    return Answer(label, number, when, cut(said, LETTERS), agrees)


def _question(row: Mapping[str, Any]) -> tuple[str, str]:
    prompt, reference = words_of(row.get("prompt", "")), words_of(row.get("reference", ""))
    return cut(prompt, LETTERS), cut(reference.strip(), LETTERS)


def words_of(value: Any) -> str:
    """A text; of messages, who says what.

    >>> words_of([{"role": "user", "content": "Hi"}])
    'user: Hi'
    """
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(m, dict) and "role" in m for m in value):
        return "\n".join(
            f"{m['role']}: {words_of(m.get('content') or m.get('tool_calls', ''))}" for m in value
        )
    return json.dumps(value, ensure_ascii=False)
