"""Asking graders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxft.objectives.graders.asking import MOST_REWARD
from jaxft.objectives.graders.kinds import Case, Grader, Judged, Outside, kind_of
from jaxft.runtime.sandbox.judging import parsed

MOST_TEXT = 1_000_000  # characters of an answer that is read as JSON
NOTHING = Outside()


def case_of(item: Mapping[str, Any], output_text: str, ids: Sequence[int] = ()) -> Case:
    """What graders are asked of an answer; `ids` are its tokens.

    >>> case_of({"a": 1}, '{"b": 2}').sample
    {'output_text': '{"b": 2}', 'output_json': {'b': 2}}
    """
    try:
        value = parsed(output_text) if len(output_text) <= MOST_TEXT else None
    except ValueError:
        value = None
    return Case(item, {"output_text": output_text, "output_json": value}, ids)


def grade(
    graders: Sequence[Grader], cases: Sequence[Case], outside: Outside = NOTHING
) -> list[list[Judged]]:
    """What each grader says of each case: [grader][case].

    Raises:
        UserError: a grader asks for what is not in `outside`. What it cannot judge is no error.

    >>> from jaxft.objectives.graders.reading import read_graders
    >>> graders = read_graders([{"type": "string_check", "operation": "ilike", "reference": "{{ item.answer }}",
    ...     "input": "{{ sample.output_text }}"}])
    >>> cases = [case_of({"answer": "Paris"}, "It is paris."), case_of({}, "Rome")]
    >>> grade(graders, cases)[0]
    [Judged(reward=1.0, reason=''), Judged(reward=None, reason='the item has no answer')]
    """
    said = [kind_of(each.kind).judge(each.settings, cases, outside) for each in graders]
    return [list(map(_within, column)) for column in said]


def _within(judged: Judged) -> Judged:
    """The same, or none where the reward is so large that a deviation of rewards would have no value."""
    if judged.reward is None or abs(judged.reward) <= MOST_REWARD:
        return judged
    return Judged(None, f"the reward {judged.reward:g} is larger than {MOST_REWARD:g}")


def rewards_of(judged: Sequence[Sequence[Judged]]) -> Float[np.ndarray, "n functions"]:
    """The rewards as `jaxft.advantages` takes them, (n, functions) float32; NaN where there is none."""
    table = [[np.nan if one.reward is None else one.reward for one in column] for column in judged]
    return np.asarray(table, np.float32).T
