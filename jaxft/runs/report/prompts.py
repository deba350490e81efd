"""What stands before a question, drawn: nothing, examples, or passages that a search found. No weight changes."""

from __future__ import annotations

from markupsafe import Markup

from jaxft.runs.report.svg import arrow, box, drawing, joined, line, text

WIDTH, HEIGHT = 380.0, 176.0


def prompt_drawn(name: str, title: str, score: str, added: str) -> Markup:
    """The question alone."""
    said = "The question goes to the model as it is: no weight changes."
    return _drawn(name, title, said, score, added, _asked(85))


def examples_drawn(name: str, title: str, score: str, added: str) -> Markup:
    """Examples before the question."""
    said = "Questions with their answers stand before the question, in every request: no weight changes."
    shown = [
        joined(box(22, 30 + 24 * i, 78, 18, "plain"), box(104, 30 + 24 * i, 48, 18, "given"))
        for i in range(3)
    ]
    parts = (*shown, text(87, 18, "examples of the data", "small"), _asked(108), _together(28, 134))
    return _drawn(name, title, said, score, added, *parts)


def passages_drawn(name: str, title: str, score: str, added: str) -> Markup:
    """Passages of documents before the question: knowledge beside the weights."""
    said = (
        "A search in the documents finds passages for the question, which stand before it: what is known lies beside "
        "the weights, and changes with the documents."
    )
    sheets = [
        joined(
            box(22 + 7 * i, 10 + 5 * i, 44, 50, "plain"),
            *(
                line([(28 + 7 * i, 20 + 5 * i + 8 * j), (60 + 7 * i, 20 + 5 * i + 8 * j)], "flow")
                for j in range(4)
            ),
        )
        for i in range(3)
    ]
    parts = (
        *sheets,
        text(86, 16, "documents", "small", "start"),
        arrow((82, 46), (118, 46), (118, 76)),
        text(124, 56, "search", "small", "start"),
        box(22, 78, 130, 12, "given"),
        box(22, 93, 130, 12, "given"),
        _asked(108),
        _together(76, 134),
    )
    return _drawn(name, title, said, score, added, *parts)


def _drawn(name: str, title: str, said: str, score: str, added: str, *parts: Markup) -> Markup:
    figures = (
        text(12, HEIGHT - 10, added, "small", "start"),
        text(WIDTH - 12, HEIGHT - 10, score, "score", "end"),
    )
    words = " ".join(filter(None, (said, f"{score}.", added and f"{added}.")))
    return drawing(WIDTH, HEIGHT, title, words, name, *parts, *figures)


def _asked(y: float) -> Markup:
    """The question at a height, the model with its frozen weights, and the answer."""
    return joined(
        box(22, y, 130, 24, "plain"),
        text(87, y + 16, "the question", "small"),
        arrow((166 if y > 90 else 154, 97), (198, 97)),
        box(200, 53, 88, 88, "frozen", 4),
        text(244, 103, "W", "name onhatch"),
        arrow((290, 97), (318, 97)),
        box(320, 86, 48, 22, "plain"),
        text(344, 124, "answer", "small"),
    )


def _together(top: float, bottom: float) -> Markup:
    """A bracket around what is asked together."""
    return line([(156, top), (162, top), (162, bottom), (156, bottom)], "flow")
