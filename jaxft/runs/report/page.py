"""The page of runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxft.errors import UserError, counted
from jaxft.objectives.objective import has_reference
from jaxft.runs.report.cards import Card
from jaxft.runs.report.costs import Cost, Costs, Judged, costs_of
from jaxft.runs.report.curves import curves_of
from jaxft.runs.report.filling import filled
from jaxft.runs.report.kernels import Shown, described, method_drawn, told
from jaxft.runs.report.plots import key
from jaxft.runs.report.reading import Run, differences
from jaxft.runs.report.samples import samples_of
from jaxft.runs.report.signals import signal_drawn, signal_of
from jaxft.runs.report.tables import differing, method_of, table_of
from jaxft.runs.report.words import duration, figure, many, size

# What a method costs: (name, the figure of a run, how it is shown)
COSTS = (
    ("trained parameters", lambda run: run.fact("trained_parameters"), many),
    ("bytes it left", lambda run: run.artefact[1] if run.artefact else None, size),
    ("memory of a step", lambda run: run.fact("peak_bytes"), size),
    ("seconds of its updates", lambda run: run.seconds, duration),
)


def page_of(runs: Sequence[Run]) -> str:
    """The page of runs as HTML. The same runs give the same text."""
    labels = labels_of(runs)
    groups = [
        [i for i, run in enumerate(runs) if _comparable(run) == kind] for kind in _kinds(runs)
    ]
    columns, rows = table_of(runs, labels)
    samples, more = samples_of(runs, labels)
    each = (_costs(runs, labels, group, n) for n, group in enumerate(groups))
    costs = [found for found in each if found]
    return filled(
        "runs.html.jinja",
        contents=_contents(runs, bool(costs), bool(samples)),
        title=labels[0] if len(runs) == 1 else counted(len(runs), "run"),
        verdicts=[
            _verdict([runs[i] for i in group], [labels[i] for i in group]) for group in groups
        ],
        states=[(label, run.state) for run, label in zip(runs, labels, strict=True) if run.state],
        columns=columns,
        rows=rows,
        keys=[key(i) for i in range(len(runs))],
        unknown=[label for run, label in zip(runs, labels, strict=True) if not run.summary],
        methods=_methods(runs, labels),
        signals=_signals(runs, labels),
        costs=costs,
        curves=[
            ([labels[i] for i in group], _curves(runs, labels, group, n))
            for n, group in enumerate(groups)
        ],
        samples=samples,
        more=more,
        differences=differing(differences(runs)) if len(runs) > 1 else [],
        labels=labels,
        runs=runs,
    )


def _contents(runs: Sequence[Run], costs: bool, samples: bool) -> list[tuple[str, str]]:
    """(id, name) of the page's sections."""
    several = len(runs) > 1
    found = [
        ("runs", "The runs" if several else "The run", True),
        ("costs", "Cost and quality", costs),
        ("methods", "What each method does", True),
        ("signals", "What it learns from", True),
        ("curves", "Curves", True),
        ("samples", "What it said", samples),
        ("settings", "Settings", several),
    ]
    return [(id, name) for id, name, there in found if there]


def _curves(runs: Sequence[Run], labels: Sequence[str], group: Sequence[int], number: int) -> Any:
    chosen = [runs[i] for i in group], [labels[i] for i in group]
    return curves_of(*chosen, f"curve{number}", list(group))


def labels_of(runs: Sequence[Run]) -> list[str]:
    """A name for each run that no other has: its folder's own, or the whole path.

    Raises UserError where one run is named twice.
    """
    names = [run.name for run in runs]
    labels = [run.name if names.count(run.name) == 1 else run.place for run in runs]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"{label}: named twice; name each run once")
    return labels


def _comparable(run: Run) -> tuple[str, str]:
    """Runs of the same held-out data and the same measure can be laid side by side."""
    return run.objective.name, str(run.config.data.eval)


def _kinds(runs: Sequence[Run]) -> list[tuple[str, str]]:
    return list(dict.fromkeys(map(_comparable, runs)))


def _verdict(runs: Sequence[Run], labels: Sequence[str]) -> str:
    """What the runs of one group came to, in one or two sentences that claim no more than they carry."""
    best = runs[0].best
    what = f"held-out {best.name.replace('_', ' ')}"
    known = [(run.held_out(best.name), label) for run, label in zip(runs, labels, strict=True)]
    found = [(value, label) for value, label in known if value is not None]
    if not found:
        return (
            f"{_all(labels)}: nothing was measured on held-out data, so nothing is said of quality."
        )
    if len(runs) == 1:
        return _one(runs[0], labels[0], what, found[0][0])
    value, label = (max if best.better == "higher" else min)(found)
    line = (
        f"{'Highest' if best.better == 'higher' else 'Lowest'} {what}: {figure(value)}, by {label}"
    )
    others = sorted((v for v, who in found if who != label), reverse=best.better == "higher")
    beside = f"; the next has {figure(others[0])}" if others else ""
    return (
        f"{line}{beside}. Each is one run of one seed without an interval: that does not say which method is better; "
        "jaxft compare does."
    )


def _one(run: Run, label: str, what: str, value: float) -> str:
    begin = next((line[run.best.name] for line in run.deciding if line["step"] == 0), None)
    before = f", from {figure(begin)} before the first update" if begin is not None else ""
    return f"{label}: {what} {figure(value)} after {counted(run.exported or 0, 'update')}{before}."


def _all(labels: Sequence[str]) -> str:
    return ", ".join(labels[:6]) + (f" and {len(labels) - 6} more" if len(labels) > 6 else "")


def _methods(runs: Sequence[Run], labels: Sequence[str]) -> list[Card]:
    """A card for each method that the runs use, with the figures of each of them."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for i, run in enumerate(runs):
        row = run.method
        kind = (row.name, row.rank, row.trainable, run.config.base.quantize)
        kinds.setdefault(kind, []).append(i)
    cards = []
    for number, members in enumerate(kinds.values()):
        run, scheme = runs[members[0]], runs[members[0]].config.base.quantize
        title = method_of(run)
        shown = Shown(f"method{number}", title, *_in_drawing(run, alone=len(members) == 1))
        cards.append(
            Card(
                title=title,
                text=described(run.method.name),
                pictures=[method_drawn(run.method, scheme, shown)],
                told=told(run.method, scheme),
                members=[(labels[i], _figures(runs[i])) for i in members],
            )
        )
    return cards


def _in_drawing(run: Run, *, alone: bool) -> tuple[str, str, str, str]:
    """What a drawing says of the weights and of what trains; of a run that has it alone, its bytes and its measure."""
    whole, trained = run.fact("parameters"), run.fact("trained_parameters")
    memory, value = run.fact("peak_bytes"), run.held_out(run.best.name)
    frozen = f"{many(whole - trained)} frozen" if whole and trained and whole > trained else ""
    costs = [f"{size(run.artefact[1])} left" if run.artefact else ""]
    costs.append(f"{size(memory)} a step" if memory else "")
    measure = f"held-out {run.best.name} {figure(value)}" if value is not None else ""
    return (
        frozen,
        f"{many(trained)} train" if trained else "",
        ", ".join(filter(None, costs)) if alone else "",
        measure if alone else "",
    )


def _figures(run: Run) -> list[tuple[str, str]]:
    trained, whole = run.fact("trained_parameters"), run.fact("parameters")
    share = f" ({100 * trained / whole:.3g}\u00a0%)" if trained is not None and whole else ""
    found = [
        ("trains", many(trained) + share if trained is not None else ""),
        (
            f"leaves, as {run.artefact[0]}" if run.artefact else "",
            size(run.artefact[1]) if run.artefact else "",
        ),
        ("weights in memory", size(run.fact("weights_bytes")) if run.summary else ""),
        ("memory of a step", size(run.fact("peak_bytes")) if run.fact("peak_bytes") else ""),
        (f"held-out {run.best.name}", figure(run.held_out(run.best.name)) if run.deciding else ""),
    ]
    return [(name, value) for name, value in found if value]


def _signals(runs: Sequence[Run], labels: Sequence[str]) -> list[Card]:
    kinds: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        kinds.setdefault(signal_of(run.objective).title, []).append(i)
    cards = []
    for number, (title, members) in enumerate(kinds.items()):
        signal = signal_of(runs[members[0]].objective)
        held = all(has_reference(runs[i].config) for i in members)
        picture = signal_drawn(signal, f"signal{number}", held=held)
        names = [f"{labels[i]} ({runs[i].objective.name})" for i in members]
        cards.append(Card(title, pictures=[picture], told=signal.text, names=names))
    return cards


def _costs(
    runs: Sequence[Run], labels: Sequence[str], group: Sequence[int], number: int
) -> Costs | None:
    """Each cost against the measure of a group of runs."""
    best = runs[group[0]].best
    judged = [Judged(labels[i], i, runs[i].held_out(best.name)) for i in group]
    costs = [Cost(name, [cost(runs[i]) for i in group], shown) for name, cost, shown in COSTS]
    quality = f"held-out {best.name.replace('_', ' ')}"
    return costs_of(f"cost{number}", quality, best.better, judged, costs)
