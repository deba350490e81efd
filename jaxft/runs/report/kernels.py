"""A method drawn as what it does to a kernel: W, what stands beside it, and which of that trains."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any, cast

from markupsafe import Markup

from jaxft.methods import METHODS, Method
from jaxft.runs.report.svg import arrow, box, drawing, joined, tag, text

# (the parts of a weight that stand in the way beside W, in their order: name on the drawing, their kind)
WAYS = (
    (("a", "down"), ("d", "scale"), ("b", "up"), ("g", "scale")),
    (("a0", "down"), ("b0", "up")),
)
KNOWN = {"base", *(name for way in WAYS for name, _ in way)}
SYMBOLS = {"a0": "a₀", "b0": "b₀", "magnitude": "m"}
BEHIND = {"magnitude": "m / ‖·‖"}  # what it multiplies by, where that is more than its symbol
CODES = (9, 4, 14, 7, 1, 11, 6, 12, 3, 8, 15, 5, 10, 2, 13, 0)  # of a kernel nobody has
WIDTH, TOP, LEFT, SIDE, SUM = 380.0, 42.0, 74.0, 96.0, 268.0


@dataclasses.dataclass(frozen=True)
class Shown:
    """The figures in a drawing; "" for one that is not known.

    Attributes:
        name: begins the ids, and is on the page once.
        title: of the drawing.
        weights: of the kernels: how many, and their bytes.
        trained: what trains: how many.
        costs: what it leaves and needs.
        score: what came out.
    """

    name: str
    title: str
    weights: str = ""
    trained: str = ""
    costs: str = ""
    score: str = ""


def described(name: str) -> str:
    """What a method is, in the words of its row: its paper and its formula."""
    return (inspect.getdoc(METHODS[name]) or "").split("\n")[0].replace("`", "")


def method_drawn(method: Method, scheme: str, shown: Shown) -> Markup:
    """The drawing of a method over a base in a `scheme` of codes ("none": no codes).

    What trains is filled; what is frozen is hatched, and has a broken outline.
    """
    ways = [way for way in map(list, WAYS) if _has(method, way[0][0])]
    height = TOP + SIDE + 50 + 92 * len(ways)
    middle = TOP + SIDE / 2
    parts = [
        box(18, middle - 45, 12, 90, "plain"),
        text(24, middle + 62, "x", "symbol"),
        arrow((32, middle), (LEFT - 2, middle)),
        _base(method, scheme),
        text(LEFT + SIDE / 2, TOP - 10, shown.weights, "small"),
    ]
    for number, way in enumerate(ways):
        parts.append(_way(method, way, number, middle))
    behind, end = _behind(method), WIDTH - 30
    first = end - 24 - 26 * len(behind)  # where the vectors behind the sum begin
    if ways:
        parts += [
            arrow((LEFT + SIDE + 10, middle), (SUM - 11, middle)),
            tag("circle", cx=SUM, cy=middle, r=10.0, class_="plain"),
            text(SUM, middle + 5, "+", "symbol"),
        ]
    begin = SUM + 11 if ways else LEFT + SIDE + 10
    for i, part in enumerate(behind):
        at = first + 26 * i
        parts += [
            arrow((begin, middle), (at - 8, middle)),
            _vector(at, middle, part, part in method.trainable),
        ]
        begin = at + 7
    parts += [
        arrow((begin, middle), (end - 2, middle)),
        box(end, middle - 45, 12, 90, "plain"),
        text(end + 6, middle + 62, "xW'", "symbol"),
        text(WIDTH - 12, height - 10, shown.trained, "small", "end"),
        text(12, height - 10, shown.costs, "small", "start"),
        text(WIDTH - 12, 14, shown.score, "score", "end"),
    ]
    said = told(method, scheme)
    known = " ".join(f"{what}." for what in dataclasses.astuple(shown)[2:] if what)
    return drawing(WIDTH, height, shown.title, f"{said} {known}".strip(), shown.name, *parts)


def told(method: Method, scheme: str) -> str:
    """The drawing in words."""
    everything = "*" in method.trainable
    base = "W trains as a whole" if everything else "W is frozen"
    if scheme != "none":
        base += f", held as codes ({scheme}) with their scales"
    frozen = [SYMBOLS.get(p, p) for p in _parts(method) if p not in method.trainable]
    trained = [SYMBOLS.get(p, p) for p in _parts(method) if p in method.trainable]
    lines = [base]
    if trained:
        lines.append(f"{_listed(trained)} {'train' if len(trained) > 1 else 'trains'}")
    if frozen:
        shared = ", and stand once for all kernels" if method.shared else ""
        lines.append(f"{_listed(frozen)} {'stay' if len(frozen) > 1 else 'stays'} as drawn{shared}")
    return "; ".join(lines) + "."


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _has(method: Method, part: str) -> bool:
    return part in _parts(method)


def _parts(method: Method) -> list[str]:
    """The arrays of the method's weight, in the order of the ways, then others that train."""
    if method.weight is None:
        return []
    fields = {field.name for field in dataclasses.fields(cast(Any, method.weight))}
    ordered = [name for way in WAYS for name, _ in way if name in fields]
    return ordered + _behind(method)


def _behind(method: Method) -> list[str]:
    """The trained parts that stand in no way: they act on the product."""
    if method.weight is None:
        return []
    row = METHODS[method.name]().trainable
    return [part for part in dict.fromkeys((*row, *method.trainable)) if part not in KNOWN]


def _base(method: Method, scheme: str) -> Markup:
    """W: hatched if frozen, filled if it trains; of codes, their grid and the scales beside it."""
    trains = "*" in method.trainable
    kind = "trained" if trains else "frozen"
    if scheme == "none":
        inside = [box(LEFT, TOP, SIDE, SIDE, kind)]
    else:
        cell, inside = SIDE / 8, [box(LEFT, TOP, SIDE, SIDE, "paper")]
        for i in range(64):
            code = CODES[(i * 5 + i // 8) % 16]
            x, y = LEFT + cell * (i % 8), TOP + cell * (i // 8)
            inside.append(
                tag(
                    "rect", x=x, y=y, width=cell, height=cell, class_="code", fill_opacity=code / 22
                )
            )
            inside.append(
                tag(
                    "text",
                    f"{code:x}",
                    x=x + cell / 2,
                    y=y + 9,
                    class_="digit",
                    text_anchor="middle",
                )
            )
        inside.append(box(LEFT, TOP, SIDE, SIDE, "outline"))
        inside.append(box(LEFT + SIDE + 3, TOP, 6, SIDE, "frozen", 1))
        inside.append(
            tag("rect", x=LEFT + 10, y=TOP + 36, width=SIDE - 20, height=26, rx=4, class_="label")
        )
    name = "W" if scheme == "none" else f"W {scheme}"
    inside.append(
        text(LEFT + SIDE / 2, TOP + SIDE / 2 + 6, name, "name" if trains else "name onhatch")
    )
    return joined(*inside)


def _way(method: Method, way: Sequence[tuple[str, str]], number: int, middle: float) -> Markup:
    """x a b and what scales it, below W, up to the sum."""
    fields = _parts(method)
    y = TOP + SIDE + 62 + 92 * number
    x, drawn = LEFT, [arrow((46, middle), (46, y), (LEFT - 2, y))]
    here = [(name, kind) for name, kind in way if name in fields]
    for i, (name, kind) in enumerate(here):
        trains = name in method.trainable
        width, tall = {"down": (24, 66), "up": (66, 24), "scale": (12, 40)}[kind]
        class_ = "trained" if trains else "frozen"
        if method.shared and not trains:  # stands once for all kernels: sheets behind it
            drawn += [
                box(x + 5, y - tall / 2 - 5, width, tall, "sheet"),
                box(x + 2.5, y - tall / 2 - 2.5, width, tall, "sheet"),
            ]
        drawn.append(box(x, y - tall / 2, width, tall, class_))
        symbol = SYMBOLS.get(name, name)
        drawn.append(text(x + width / 2, y + tall / 2 + 15, symbol, "symbol"))
        if kind == "up" and number == 0:
            drawn.append(text(x + width / 2, y - tall / 2 - 8, f"r = {method.rank}", "small"))
        if i + 1 < len(here):
            drawn.append(arrow((x + width + 2, y), (x + width + 20, y)))
        x += width + 22
    sign = "" if number == 0 else "−"  # noqa: RUF001
    turn = SUM + 22 * number
    rise = (turn, middle + 12) if number == 0 else (SUM + 8, middle + 9)
    drawn.append(
        arrow((x - 20, y), (turn, y), rise)
        if number == 0
        else arrow((x - 20, y), (turn, y), (turn, middle + 34), rise)
    )
    drawn.append(text(turn + 10, y - 8, sign, "symbol"))
    return joined(*drawn)


def _vector(x: float, middle: float, name: str, trains: bool) -> Markup:
    """A vector over the outputs, which multiplies the product."""
    symbol = BEHIND.get(name, SYMBOLS.get(name, name))
    return joined(
        box(x - 6, middle - 45, 12, 90, "trained" if trains else "frozen"),
        text(x, middle - 52, f"× {symbol}", "symbol"),  # noqa: RUF001
    )
