"""What an objective learns from, drawn: words to say, the better of two answers, a verdict, or a reward."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from markupsafe import Markup

from jaxft.data.feed import Fixed
from jaxft.objectives.comparisons import JUDGED, PAIRS
from jaxft.objectives.kind import Kind
from jaxft.objectives.objective import Objective
from jaxft.objectives.texts import TEXTS
from jaxft.runs.report.svg import arrow, box, drawing, joined, line, text

WIDTH = 380.0


class Signal(NamedTuple):
    """What is learned from.

    Attributes:
        title: in short.
        text: the drawing in words.
        height: of the drawing.
        parts: whether it is held to its start -> the drawing.
    """

    title: str
    text: str
    height: float
    parts: Callable[[bool], Markup]


def signal_of(objective: Objective) -> Signal:
    """The signal of an objective: by whether its batches depend on the policy, and by its examples."""
    return REWARDS if objective.feed is not Fixed else BY_KIND.get(objective.examples, WORDS)


def signal_drawn(signal: Signal, name: str, *, held: bool) -> Markup:
    """The drawing of a signal.

    Args:
        signal: what is drawn.
        name: begins its ids, and is on the page once.
        held: whether the objective asks a frozen reference.
    """
    return drawing(WIDTH, signal.height, signal.title, signal.text, name, signal.parts(held))


def _tokens(x: float, y: float, count: int, class_: str, width: float = 26) -> Markup:
    return joined(*(box(x + i * (width + 4), y, width, 22, class_) for i in range(count)))


def _words(held: bool) -> Markup:
    del held
    parts = [_tokens(14, 34, 5, "plain"), _tokens(174, 34, 6, "trained")]
    parts += [
        text(86, 22, "the question", "small"),
        text(262, 22, "the answer in the data", "small"),
    ]
    parts += [arrow((187.0 + 30 * i, 88.0), (187.0 + 30 * i, 60.0)) for i in range(6)]
    parts.append(text(262, 106, "each word made likelier", "small"))
    return joined(*parts)


def _pair(held: bool) -> Markup:
    parts = [_tokens(14, 74, 4, "plain"), text(72, 62, "the question", "small")]
    parts += [
        line([(132, 85), (150, 85), (150, 41), (162, 41)], "flow"),
        line([(150, 85), (150, 129), (162, 129)], "flow"),
        _tokens(164, 30, 5, "trained"),
        _tokens(164, 118, 5, "frozen"),
        text(237, 20, "chosen", "small"),
        text(237, 156, "rejected", "small"),
        arrow((332, 58), (332, 26)),
        arrow((332, 112), (332, 144)),
        text(342, 46, "up", "small", "start"),
        text(342, 132, "down", "small", "start"),
    ]
    if held:
        parts += [
            line([(164, 86), (258, 86)], "", "4 4"),
            text(264, 90, "where it began", "small", "start"),
        ]
    return joined(*parts)


def _judged(held: bool) -> Markup:
    parts = []
    for y, word, kind, ends in (
        (52, "yes", "trained", (70, 42)),
        (128, "no", "frozen", (118, 146)),
    ):
        parts += [_tokens(14, y - 11, 3, "plain"), _tokens(112, y - 11, 5, kind)]
        parts += [text(284, y + 5, word, "name"), arrow((330, ends[0]), (330, ends[1]))]
    parts += [text(60, 30, "a question", "small"), text(186, 30, "one answer, judged", "small")]
    if held:
        parts.append(line([(14, 90), (262, 90)], "", "4 4"))
        parts.append(text(268, 94, "where it began", "small", "start"))
    parts.append(text(190, 178, "desirable answers up, undesirable ones down", "small"))
    return joined(*parts)


def _rewards(held: bool) -> Markup:
    parts = [_tokens(10, 82, 3, "plain", 20), text(46, 70, "the question", "small")]
    scores = (0.9, 0.35, 0.6, 0.1)
    mean = sum(scores) / len(scores)
    for i, score in enumerate(scores):
        y = 22.0 + 36 * i
        parts += [
            line([(84, 93), (96, 93), (96, y + 11), (106, y + 11)], "flow"),
            _tokens(108, y, 4, "plain", 20),
        ]
        parts += [box(216, y + 4, 100, 14, "outline"), box(216, y + 4, 100 * score, 14, "trained")]
        up = score > mean
        parts.append(arrow((346, y + (20 if up else 2)), (346, y + (0 if up else 22))))
    parts += [line([(216 + 100 * mean, 12), (216 + 100 * mean, 160)], "", "4 4")]
    parts += [
        text(154, 14, "its own answers", "small"),
        text(216 + 100 * mean, 176, "the group's mean", "small"),
    ]
    parts.append(text(330, 14, "reward", "small", "end"))
    if held:
        parts.append(text(14, 176, "held near its start", "small", "start"))
    return joined(*parts)


WORDS = Signal(
    "Words to say",
    "A question, and the answer of the data after it: each of its words is made likelier (supervised fine-tuning).",
    120.0,
    _words,
)
CHOICES = Signal(
    "The better of two",
    "A question with two answers: the chosen one is made likelier beside the rejected one (preferences).",
    180.0,
    _pair,
)
VERDICTS = Signal(
    "A verdict",
    "A question with one answer that someone judged: a desirable one is made likelier, another less likely.",
    180.0,
    _judged,
)
REWARDS = Signal(
    "A reward",
    "The model answers a question several times; a grader scores each answer; answers above the group's mean are made "
    "likelier, those below it less likely (reinforcement).",
    188.0,
    _rewards,
)
BY_KIND: dict[Kind, Signal] = {TEXTS: WORDS, PAIRS: CHOICES, JUDGED: VERDICTS}
# By the signal of a lever of a comparison, and whether it is held to its start.
BY_NAME = {"examples": (WORDS, False), "preferences": (CHOICES, True), "rewards": (REWARDS, False)}
