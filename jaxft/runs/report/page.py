"""The page: what is known of runs, put into one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from jaxft.errors import UserError, counted
from jaxft.runs.folder import written
from jaxft.runs.report import words
from jaxft.runs.report.curves import curves_of
from jaxft.runs.report.kernels import Shown, described, method_drawn, told
from jaxft.runs.report.plots import Spot, cost_plot, key
from jaxft.runs.report.reading import Run, differences
from jaxft.runs.report.samples import samples_of
from jaxft.runs.report.signals import signal_drawn, signal_told
from jaxft.runs.report.tables import differing, method_of, table_of
from jaxft.runs.report.words import duration, figure, many, plain, size
from jaxft.runtime import storage

PAGE = "report.html"  # in a run's folder
# What a method costs: (name, the figure of a run, how it is shown)
COSTS = (
    ("trained parameters", lambda run: run.fact("trained_parameters"), many),
    ("bytes it left", lambda run: run.artefact[1] if run.artefact else None, size),
    ("memory of a step", lambda run: run.fact("peak_bytes"), size),
    ("seconds of its updates", lambda run: run.seconds, duration),
)


def write_page(path: Path, runs: Sequence[Run], *, force: bool = False) -> None:
    """Writes the page of runs.

    Raises:
        UserError: a file stands there and `force` is off, or it cannot be written.
    """
    if path.is_dir():
        raise UserError(f"{path}: a folder; name a file for the page: {path / PAGE}")
    if path.exists() and not force:
        raise UserError(f"{path}: there is such a file already; name a new one, or add --force")
    text = page_of(runs)
    with written(path):
        storage.make(path.parent)
        storage.write_text(path, text)


def page_of(runs: Sequence[Run]) -> str:
    """The page of runs as HTML. The same runs give the same text."""
    labels = labels_of(runs)
    groups = [
        [i for i, run in enumerate(runs) if _comparable(run) == kind] for kind in _kinds(runs)
    ]
    columns, rows = table_of(runs, labels)
    samples, more = samples_of(runs, labels)
    return _filled(
        "page.html.jinja",
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
        costs=[
            plots for n, group in enumerate(groups) if (plots := _costs(runs, labels, group, n))
        ],
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


def _curves(runs: Sequence[Run], labels: Sequence[str], group: Sequence[int], number: int) -> Any:
    return curves_of([runs[i] for i in group], [labels[i] for i in group], f"curve{number}")


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


def _methods(runs: Sequence[Run], labels: Sequence[str]) -> list[dict[str, Any]]:
    """A card for each method that the runs use, with the figures of each of them."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for i, run in enumerate(runs):
        row = run.method
        kinds.setdefault((row.name, row.rank, row.trainable, run.config.base.quantize), []).append(
            i
        )
    cards = []
    for number, members in enumerate(kinds.values()):
        run, scheme = runs[members[0]], runs[members[0]].config.base.quantize
        title = method_of(run)
        shown = Shown(f"method{number}", title, *_in_drawing(run))
        cards.append(
            {
                "title": title,
                "text": described(run.method.name),
                "told": told(run.method, scheme),
                "picture": method_drawn(run.method, scheme, shown),
                "runs": [(labels[i], _figures(runs[i])) for i in members],
            }
        )
    return cards


def _in_drawing(run: Run) -> tuple[str, str]:
    """What a drawing says of the weights, and of what trains."""
    whole, trained = run.fact("parameters"), run.fact("trained_parameters")
    if whole is None or trained is None:
        return "", ""
    return f"{many(whole - trained)} frozen" if whole > trained else "", f"{many(trained)} train"


def _figures(run: Run) -> list[tuple[str, str]]:
    trained, whole = run.fact("trained_parameters"), run.fact("parameters")
    share = f" ({100 * trained / whole:.3g} %)" if trained is not None and whole else ""
    found = [
        ("trains", many(trained) + share if trained is not None else ""),
        ("leaves", f"{size(run.artefact[1])} ({run.artefact[0]})" if run.artefact else ""),
        ("holds", f"{size(run.fact('weights_bytes'))} of weights" if run.summary else ""),
        ("needs", f"{size(run.fact('peak_bytes'))} a step" if run.fact("peak_bytes") else ""),
        (f"held-out {run.best.name}", figure(run.held_out(run.best.name)) if run.deciding else ""),
    ]
    return [(name, value) for name, value in found if value]


def _signals(runs: Sequence[Run], labels: Sequence[str]) -> list[dict[str, Any]]:
    kinds: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        kinds.setdefault(signal_told(run.objective)[0], []).append(i)
    return [
        {
            "title": title,
            "text": signal_told(runs[members[0]].objective)[1],
            "picture": signal_drawn(runs[members[0]].objective, f"signal{number}"),
            "runs": [(labels[i], runs[i].objective.name) for i in members],
        }
        for number, (title, members) in enumerate(kinds.items())
    ]


def _costs(
    runs: Sequence[Run], labels: Sequence[str], group: Sequence[int], number: int
) -> dict[str, Any] | None:
    """Each cost against the measure of a group of runs; None where fewer than two have both."""
    best = runs[group[0]].best
    beside = f"held-out {best.name.replace('_', ' ')}"
    better = f", {best.better} is better" if best.better else ""
    plots = []
    for at, (name, cost, shown) in enumerate(COSTS):
        spots, rows = [], []
        for i in group:
            x, y = cost(runs[i]), runs[i].held_out(best.name)
            if x is not None and y is not None:
                spots.append(Spot(labels[i], float(x), y, None, None, i))
                rows.append((labels[i], shown(x), figure(y)))
        if len(spots) > 1:
            title = f"{name} against {beside}"
            picture = cost_plot(f"cost{number}-{at}", title, spots, name, beside + better, shown)
            plots.append({"title": name, "picture": picture, "rows": rows})
    return {"id": f"cost{number}", "quality": beside, "plots": plots} if plots else None


def _filled(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=plain,
        loader=jinja2.FunctionLoader(_own),
    )
    environment.globals["words"] = words
    parts = {"style": _own("page.css"), "script": _own("page.js")}
    digests = {f"{name}_digest": _digest(text) for name, text in parts.items()}
    marked = {name: Markup(text) for name, text in parts.items()}
    return environment.get_template(template).render(**values, **marked, **digests)


def _own(name: str) -> str:
    return resources.files("jaxft.runs.report").joinpath(name).read_text("utf-8")


def _digest(text: str) -> str:
    """By which the page's policy knows its own style and script, and no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
