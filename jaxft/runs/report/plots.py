"""Plots as SVG with their data beside them as a table: lines over updates, and a cost against a quality."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

from jaxft.runs.report.svg import (
    Point,
    colour,
    dash,
    drawing,
    joined,
    line,
    marker,
    tag,
    text,
)
from jaxft.runs.report.words import figure, interval, tick

WIDTH, HEIGHT = 460.0, 290.0
LEFT, RIGHT, TOP, BOTTOM = 60.0, 334.0, 16.0, 246.0
POINTS = 120  # of a line, at most
NAMES = 11  # letters of a name beside its line
APART = 14.0  # between two names


@dataclasses.dataclass(frozen=True)
class Series:
    """A line of a plot.

    Attributes:
        label: its name.
        points: (x, y), x rising.
        number: which marks and dashes it has.
        dots: whether each point has its mark.
    """

    label: str
    points: Sequence[Point]
    number: int
    dots: bool


@dataclasses.dataclass(frozen=True)
class Spot:
    """A point of a cost against a quality.

    Attributes:
        label: its name.
        x, y: cost and quality.
        low, high: the interval of y; None for none.
        number: which mark it has.
    """

    label: str
    x: float
    y: float
    low: float | None
    high: float | None
    number: int


@dataclasses.dataclass(frozen=True)
class Axis:
    """A range of values along a side of the plot.

    Attributes:
        low, high: what it spans.
        begin, end: where, in the drawing's coordinates.
        log: whether equal factors are equally far apart.
        whole: whether values between whole numbers mean nothing.
    """

    low: float
    high: float
    begin: float
    end: float
    log: bool = False
    whole: bool = False

    def at(self, value: float) -> float:
        """Where a value lies."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.begin + (self.end - self.begin) * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round values within.

        >>> Axis(0.0, 3.0, 0.0, 1.0).ticks()[:3], Axis(0.0, 3.0, 0.0, 1.0, whole=True).ticks()
        ([0.0, 0.5, 1.0], [0.0, 1.0, 2.0, 3.0])
        """
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [10.0**p for p in powers if self.low <= 10.0**p <= self.high]
            if len(found) >= 2:
                every = -(-len(found) // 5)
                return found[::every]
            fine = [m * 10.0**p for p in powers for m in (1, 2, 5)]
            return [value for value in fine if self.low <= value <= self.high]
        step = max(_step(self.high - self.low), 1.0 if self.whole else 0.0)
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor((self.high - first * step) / step + 1e-9)
        return [round((first + i) * step, 12) for i in range(count + 1)]


def _step(span: float) -> float:
    """A round step of which a span has four to eight.

    >>> _step(10.0), _step(3.4), _step(0.07)
    (2.0, 0.5, 0.01)
    """
    power = 10.0 ** math.floor(math.log10(span / 4))
    return next(m * power for m in (10, 5, 2, 1) if m * power <= span / 4)


def axis_of(values: Sequence[float], begin: float, end: float, *, log: bool = False) -> Axis:
    """An axis that holds the values, with a little room at both ends; along equal ones some room too."""
    low, high = min(values), max(values)
    if log and low > 0:
        room = max((high / low) ** 0.08, 1.2)
        return Axis(low / room, high * room, begin, end, True)
    room = (high - low) * 0.06 or abs(high) * 0.5 or 1.0
    return Axis(low - room, high + room, begin, end)


def thinned(points: Sequence[Point], most: int = POINTS) -> tuple[list[Point], int]:
    """At most so many points, each the mean of as many neighbours; and how many that is.

    >>> thinned([(1, 2.0), (2, 4.0), (3, 6.0)], most=2)
    ([(2, 3.0), (3, 6.0)], 2)
    """
    each = -(-len(points) // most) or 1
    parts = [points[i : i + each] for i in range(0, len(points), each)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts], each


def _frame(across: Axis, up: Axis, below: str, beside: str) -> Markup:
    """Grid, figures on both axes, and their names."""
    parts = []
    for value in up.ticks():
        y = up.at(value)
        parts += [
            line([(LEFT, y), (RIGHT, y)], "grid"),
            text(LEFT - 6, y + 4, tick(value), "tick", "end"),
        ]
    for value in across.ticks():
        x = across.at(value)
        parts += [
            line([(x, BOTTOM), (x, BOTTOM + 4)], "axis"),
            text(x, BOTTOM + 17, tick(value), "tick"),
        ]
    parts += [line([(LEFT, TOP), (LEFT, BOTTOM), (RIGHT, BOTTOM)], "axis")]
    parts.append(text((LEFT + RIGHT) / 2, BOTTOM + 36, below, "tick"))
    parts.append(text(4, TOP - 3, beside, "tick", "start"))
    return joined(*parts)


def _apart(wanted: Sequence[float], low: float, high: float) -> list[float]:
    """Places as near to the wanted ones as names fit under one another.

    >>> _apart([10.0, 12.0], 0.0, 100.0)
    [10.0, 24.0]
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = list(wanted)
    gap = min(APART, (high - low) / max(len(wanted) - 1, 1))
    last = low - gap
    for i in order:
        last = placed[i] = max(wanted[i], last + gap)
    over = high
    for i in reversed(order):
        over = placed[i] = min(placed[i], over)
        over -= gap
    return placed


def short(name: str) -> str:
    """A name that fits beside its line."""
    return name if len(name) <= NAMES else name[: NAMES - 1] + "…"


def lines_plot(name: str, title: str, series: Sequence[Series], unit: str) -> Markup:
    """Lines over updates, each with its name at its end.

    Args:
        name: begins the ids, and is on the page once.
        title: what is plotted.
        series: with a point at least.
        unit: above the axis that goes up.
    """
    values = [y for one in series for _, y in one.points]
    across = axis_of([x for one in series for x, _ in one.points], LEFT, RIGHT)
    across = dataclasses.replace(across, whole=True)
    up = axis_of(values, BOTTOM, TOP + 6)
    ends = [one.points[-1] for one in series]
    places = _apart([up.at(y) for _, y in ends], TOP + 6, BOTTOM)
    parts = [_frame(across, up, "updates", unit)]
    for one in reversed(series):
        path = [(across.at(x), up.at(y)) for x, y in one.points]
        width = "curve" if one.dots else "thin"
        parts.append(line(path, f"{width} {colour(one.number)}", dash(one.number)))
        dots = path if one.dots and len(path) <= 30 else path[-1:]
        parts += [marker(x, y, one.number) for x, y in dots]
    for one, place, (x, y) in zip(series, places, ends, strict=True):
        parts.append(line([(across.at(x) + 5, up.at(y)), (RIGHT + 6, place)], "lead"))
        parts.append(marker(RIGHT + 13, place, one.number))
        parts.append(text(RIGHT + 22, place + 4, short(one.label), "tick", "start"))
    said = "; ".join(
        f"{one.label}: {figure(one.points[0][1])} at {one.points[0][0]:,.0f}, {figure(one.points[-1][1])} at "
        f"{one.points[-1][0]:,.0f}"
        for one in series[:12]
    )
    return drawing(WIDTH, HEIGHT, title, f"From the first point to the last: {said}.", name, *parts)


def cost_plot(
    name: str,
    title: str,
    spots: Sequence[Spot],
    below: str,
    beside: str,
    shown: Callable[[float], str],
) -> Markup:
    """A cost to the right against a quality upwards, with intervals.

    Args:
        name: begins the ids, and is on the page once.
        title: what is plotted.
        spots: one at least.
        below: the name of the axis of costs.
        beside: that of the other.
        shown: a cost in words.
    """
    costs = [spot.x for spot in spots]
    ends = [v for spot in spots for v in (spot.y, spot.low, spot.high) if v is not None]
    log = min(costs) > 0 and max(costs) / min(costs) > 20
    across, up = axis_of(costs, LEFT + 8, RIGHT - 8, log=log), axis_of(ends, BOTTOM, TOP + 6)
    places = _apart([up.at(spot.y) for spot in spots], TOP + 6, BOTTOM)
    parts = [_frame(across, up, below, beside)]
    for spot, place in zip(spots, places, strict=True):
        x, y, class_ = across.at(spot.x), up.at(spot.y), colour(spot.number)
        parts.append(line([(x + 6, y), (RIGHT + 6, place)], "lead"))
        if spot.low is not None and spot.high is not None:
            low, high = up.at(spot.low), up.at(spot.high)
            parts.append(line([(x, low), (x, high)], f"whisker {class_}"))
            parts += [
                line([(x - 5, end), (x + 5, end)], f"whisker {class_}") for end in (low, high)
            ]
        parts.append(marker(x, y, spot.number, 5.5))
        parts.append(marker(RIGHT + 13, place, spot.number))
        parts.append(text(RIGHT + 22, place + 4, short(spot.label), "tick", "start"))
    said = "; ".join(
        f"{spot.label}: {shown(spot.x)}, {interval(spot.y, spot.low, spot.high)}"
        for spot in spots[:30]
    )
    return drawing(WIDTH, HEIGHT, title, f"{said}.", name, *parts)


def key(number: int) -> Markup:
    """A piece of the line of series `number`, with its mark: for a legend."""
    parts = (
        line([(1, 8), (33, 8)], f"curve {colour(number)}", dash(number)),
        marker(17, 8, number),
    )
    return tag("svg", *parts, viewBox="0 0 34 16", class_="key", aria_hidden="true")


def forest_plot(
    name: str, title: str, spots: Sequence[Spot], seeds: Sequence[Sequence[float]], below: str
) -> Markup:
    """Scores under one another with their intervals, and a broken line at the first.

    Args:
        name: begins the ids, and is on the page once.
        title: what is plotted.
        spots: x is not looked at.
        seeds: the single scores of each.
        below: the name of the axis.
    """
    height = 34.0 + 30 * len(spots) + 40
    ends = [v for spot in spots for v in (spot.y, spot.low, spot.high) if v is not None]
    across, bottom = (
        axis_of([*ends, *(v for each in seeds for v in each)], 140.0, WIDTH - 14),
        height - 46,
    )
    parts = []
    for value in across.ticks():
        x = across.at(value)
        parts += [line([(x, 12), (x, bottom)], "grid"), text(x, bottom + 17, tick(value), "tick")]
    first = across.at(spots[0].y)
    parts.append(line([(first, 12), (first, bottom)], "axis", "4 3"))
    parts.append(text((140 + WIDTH - 14) / 2, bottom + 36, below, "tick"))
    for at, (spot, each) in enumerate(zip(spots, seeds, strict=True)):
        y, class_ = 34.0 + 30 * at, colour(spot.number)
        parts.append(text(128, y + 4, short(spot.label), "tick", "end"))
        if spot.low is not None and spot.high is not None:
            low, high = across.at(spot.low), across.at(spot.high)
            parts.append(line([(low, y), (high, y)], f"whisker {class_}"))
            parts += [
                line([(end, y - 5), (end, y + 5)], f"whisker {class_}") for end in (low, high)
            ]
        if len(each) > 1:
            parts += [line([(across.at(v), y + 7), (across.at(v), y + 11)], "axis") for v in each]
        parts.append(marker(across.at(spot.y), y, spot.number, 5.0))
    said = "; ".join(f"{spot.label}: {interval(spot.y, spot.low, spot.high)}" for spot in spots)
    return drawing(WIDTH, height, title, f"{said}.", name, *parts)
