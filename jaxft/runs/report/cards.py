"""A card: a drawing with its words and its figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from markupsafe import Markup


@dataclasses.dataclass(frozen=True)
class Card:
    """A drawing with its words and its figures.

    Attributes:
        title: its head.
        text: under it.
        pictures: drawings.
        told: what they show, in words.
        members: (name, its (what, figure)) of each that the drawing stands for; "" for the only one.
        names: who learns so.
    """

    title: str
    text: str = ""
    pictures: Sequence[Markup] = ()
    told: str = ""
    members: Sequence[tuple[str, Sequence[tuple[str, str]]]] = ()
    names: Sequence[str] = ()
