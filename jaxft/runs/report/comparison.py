"""What the page knows of a comparison: RUN/comparison.json, whose fields stand in `jaxft.comparison`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from jaxft.errors import UserError
from jaxft.runs.report.reading import Run, number_of, read_run
from jaxft.runtime import storage

NAME = "comparison.json"
VERSION = 1
COSTS = (
    "parameters", "bytes", "memory", "planned", "tokens_per_second", "seconds", "search_seconds", "price",
    "added_tokens", "added_seconds",
)  # fmt: skip


class Interval(NamedTuple):
    """A value and the interval around it; None for what is not known."""

    value: float | None
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True)
class Lever:
    """A lever that was measured.

    Attributes:
        name, title, kind, signal, recipe, facts: as in the file.
        score: on the test rows.
        difference: to the simplest lever, and what it says; None of the simplest itself.
        untouched: how the loss changed where nothing was trained; None where nothing can.
        changed: the score once the facts of the documents have changed, and before, on the questions about them; None
            without documents.
        costs: those of `COSTS` that are known.
        setting: what was chosen.
        searched: (setting, value, its name, part of a run) of all that was tried.
        scores: of each seed.
        runs: its tuning runs that are still there.
        samples: (prompt, answer, reference).
    """

    name: str
    title: str
    kind: str
    signal: str
    recipe: str
    facts: str
    score: Interval
    difference: tuple[Interval, str] | None
    untouched: Interval | None
    changed: tuple[Interval, float | None] | None
    costs: Mapping[str, float]
    setting: Mapping[str, Any]
    searched: Sequence[tuple[str, float | None, str, float | None]]
    scores: Sequence[float]
    runs: Sequence[Run]
    samples: Sequence[tuple[Any, Any, Any]]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A comparison, read.

    Attributes:
        place: the folder, as the user named it.
        model, device: what was compared, and on what.
        done: whether all levers are measured.
        metric: name of the score.
        better: "lower" or "higher".
        rows: {"train", "tuning", "test": how many}.
        overlap: how many test rows were left out.
        levers: that were measured, the simplest first.
        left: (titles, reason) of the others.
        sentences: the verdict.
        told: chosen, nothing helps, or cannot tell.
        chosen: name of a lever, or "".
        steps: the reasoning.
        seconds: spent.
    """

    place: str
    model: str
    device: str
    done: bool
    metric: str
    better: str
    rows: Mapping[str, int]
    overlap: int
    levers: Sequence[Lever]
    left: Sequence[tuple[str, str]]
    sentences: Sequence[str]
    told: str
    chosen: str
    steps: Sequence[str]
    seconds: float | None


def is_comparison(place: str | Path) -> bool:
    """Whether a folder holds a comparison."""
    return (storage.place(place) / NAME).is_file()


def read_comparison(place: str | Path) -> Comparison:
    """Reads RUN/comparison.json, and what is left of the runs that it names.

    Raises:
        UserError: it is of another version, or is not what jaxft compare writes.
    """
    root = storage.place(place)
    file = root / NAME
    try:
        found = json.loads(file.read_bytes())
        if found["version"] != VERSION:
            raise UserError(f"{file}: of version {found['version']!r}; this jaxft reads {VERSION}")
        return _comparison(str(place), root, found)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{file}: not what jaxft compare writes: {what}") from None


def _comparison(place: str, root: Path, found: Mapping[str, Any]) -> Comparison:
    verdict, metric = found["verdict"], found["metric"]
    levers = [one for one in found["levers"] if not one["reason"]]
    if not levers:
        raise ValueError("no lever is measured")
    return Comparison(
        place=place,
        model=str(found["model"]),
        device=str(found["device"]),
        done=bool(found["done"]),
        metric=str(metric["name"]),
        better="lower" if metric["lower"] else "higher",
        rows={name: int(found["rows"][name]) for name in ("train", "tuning", "test")},
        overlap=len(found["rows"]["overlap"]),
        levers=[_lever(root, one) for one in levers],
        left=left_out(found["levers"], "title"),
        sentences=[str(sentence) for sentence in verdict["sentences"]],
        told=str(verdict["told"]),
        chosen=str(verdict["chosen"] or ""),
        steps=[str(step) for step in verdict["steps"]],
        seconds=number_of(found["seconds"]),
    )


def left_out(levers: Sequence[Mapping[str, Any]], key: str) -> list[tuple[str, str]]:
    """(names, the reason that they share) of the levers of comparison.json that were left out.

    Args:
        levers: of the file.
        key: of a lever's name: "name" or "title".
    """
    named = dict[str, list[str]]()
    for one in levers:
        if one["reason"]:
            named.setdefault(str(one["reason"]), []).append(str(one[key]))
    return [(", ".join(some), reason) for reason, some in named.items()]


def _lever(root: Path, one: Mapping[str, Any]) -> Lever:
    costs = {name: number_of(one[name]) for name in COSTS}
    difference, changed = one["difference"], one.get("changed")
    return Lever(
        **{name: str(one[name]) for name in ("name", "title", "kind", "signal", "recipe", "facts")},
        score=_interval(one["score"]),
        difference=difference and (_interval(difference), str(difference["verdict"])),
        untouched=one["untouched"] and _interval(one["untouched"]),
        changed=changed and (_interval(changed), number_of(changed["before"])),
        costs={name: cost for name, cost in costs.items() if cost is not None},
        setting=dict(one["setting"]),
        searched=[
            (
                setting_in_words(tried["setting"]),
                number_of(tried["value"]),
                str(tried["name"]),
                number_of(tried["part"]),
            )
            for tried in one["searched"]
        ],
        scores=[value for value in map(number_of, one["scores"]) if value is not None],
        runs=[run for name in one["runs"] if (run := _run(root, str(name))) is not None],
        samples=[(said["prompt"], said["answer"], said["reference"]) for said in one["samples"]],
    )


def _interval(found: Mapping[str, Any]) -> Interval:
    return Interval(*(number_of(found[name]) for name in ("value", "low", "high")))


def setting_in_words(setting: Mapping[str, Any]) -> str:
    """A setting in words.

    >>> setting_in_words({"rate": 0.0003})
    'rate 0.0003'
    """
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in setting.items()
    )


def _run(root: Path, name: str) -> Run | None:
    """A run inside of the comparison's folder; None where it is gone, or the name leads elsewhere."""
    inside = PurePosixPath(name)
    if inside.is_absolute() or ".." in inside.parts or not (root / name / "config.json").is_file():
        return None
    return read_run(root / name)
