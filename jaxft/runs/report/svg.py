"""Pieces of SVG whose texts are escaped, and the marks by which lines are told apart without colour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

from jaxft.runs.report.words import plain

Point = tuple[float, float]
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4")
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "wedge", "bar")
COLOURS = 6  # classes c0, c1, ... of page.css


def tag(name: str, *children: Any, **attributes: Any) -> Markup:
    """An element. `class_` and `aria_label` are written class and aria-label; None leaves an attribute out.

    >>> tag("text", "a < b", x=1.0, class_="note", y=2.345)
    Markup('<text x="1" class="note" y="2.35">a &lt; b</text>')
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_value(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = "".join(escape(plain(child)) for child in children)
    return Markup(f"<{name}{written}>{inside}</{name}>")


def _value(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".") if math.isfinite(value) else "0"
    return plain(value)


def joined(*parts: Markup) -> Markup:
    """Pieces one after the other."""
    return Markup("").join(parts)


def drawing(
    width: float, height: float, title: str, text: str, name: str, *parts: Markup
) -> Markup:
    """A picture that a screen reader reads as its title and description.

    Args:
        width: of the coordinates; on the page it fills the width that it gets.
        height: of the same.
        title: what it is.
        text: what it shows.
        name: begins the ids, and is on the page once.
        parts: what is drawn.
    """
    return tag(
        "svg",
        tag("title", title, id=f"{name}-title"),
        tag("desc", text, id=f"{name}-text"),
        *parts,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_labelledby=f"{name}-title {name}-text",
    )


def text(x: float, y: float, words: str, class_: str = "", anchor: str = "middle") -> Markup:
    """A line of text, by default with its middle at x."""
    return tag("text", words, x=float(x), y=float(y), text_anchor=anchor, class_=class_ or None)


def line(points: Sequence[Point], class_: str = "", dash: str = "") -> Markup:
    """Straight lines from point to point."""
    path = " ".join(f"{_value(float(x))},{_value(float(y))}" for x, y in points)
    return tag(
        "polyline", points=path, class_=f"line {class_}".strip(), stroke_dasharray=dash or None
    )


def box(x: float, y: float, width: float, height: float, class_: str, round_: float = 3) -> Markup:
    """A rectangle."""
    return tag(
        "rect", x=float(x), y=float(y), width=float(width), height=float(height), rx=float(round_), class_=class_
    )  # fmt: skip


def arrow(*points: Point) -> Markup:
    """Lines that end in a head."""
    (x0, y0), (x1, y1) = points[-2:]
    length = math.hypot(x1 - x0, y1 - y0) or 1.0
    u, v = (x1 - x0) / length, (y1 - y0) / length
    back = (x1 - 6 * u, y1 - 6 * v)
    sides = [
        (back[0] - 3.2 * v, back[1] + 3.2 * u),
        (x1, y1),
        (back[0] + 3.2 * v, back[1] - 3.2 * u),
    ]
    corners = " ".join(f"{_value(x)},{_value(y)}" for x, y in sides)
    return joined(line([*points[:-1], back], "flow"), tag("polygon", points=corners, class_="head"))


def marker(x: float, y: float, number: int, size: float = 4.0) -> Markup:
    """The mark of series `number`: its shape and its colour."""
    shape, r = MARKERS[number % len(MARKERS)], size
    corners = {
        "square": [(-r, -r), (r, -r), (r, r), (-r, r)],
        "triangle": [(0, -1.3 * r), (1.2 * r, r), (-1.2 * r, r)],
        "diamond": [(0, -1.4 * r), (1.4 * r, 0), (0, 1.4 * r), (-1.4 * r, 0)],
        "wedge": [(0, 1.3 * r), (1.2 * r, -r), (-1.2 * r, -r)],
        "bar": [(-1.5 * r, -0.5 * r), (1.5 * r, -0.5 * r), (1.5 * r, 0.5 * r), (-1.5 * r, 0.5 * r)],
        "cross": [
            (-r, -0.4 * r), (-0.4 * r, -0.4 * r), (-0.4 * r, -r), (0.4 * r, -r), (0.4 * r, -0.4 * r), (r, -0.4 * r),
            (r, 0.4 * r), (0.4 * r, 0.4 * r), (0.4 * r, r), (-0.4 * r, r), (-0.4 * r, 0.4 * r), (-r, 0.4 * r),
        ],
    }  # fmt: skip
    class_ = f"mark {colour(number)}"
    if shape == "circle":
        return tag("circle", cx=float(x), cy=float(y), r=float(r), class_=class_)
    points = " ".join(
        f"{_value(float(x + dx))},{_value(float(y + dy))}" for dx, dy in corners[shape]
    )
    return tag("polygon", points=points, class_=class_)


def colour(number: int) -> str:
    """The class of the colour of series `number`."""
    return f"c{number % COLOURS}"


def dash(number: int) -> str:
    """The dashes of series `number`: with the marks, no two of the first 35 are alike."""
    return DASHES[number % len(DASHES)]
