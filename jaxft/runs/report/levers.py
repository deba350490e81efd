"""The page of a comparison: the verdict first, then what it stands on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from jaxft.configuration import load_config
from jaxft.errors import UserError, counted
from jaxft.methods import METHODS, Method
from jaxft.runs.report.cards import Card
from jaxft.runs.report.comparison import Comparison, Lever, setting_in_words
from jaxft.runs.report.costs import Cost, Costs, Judged, costs_of
from jaxft.runs.report.curves import Plot, curves_of
from jaxft.runs.report.filling import filled
from jaxft.runs.report.kernels import Shown, described, method_drawn, told
from jaxft.runs.report.plots import Spot, forest_plot, key
from jaxft.runs.report.prompts import examples_drawn, passages_drawn, prompt_drawn
from jaxft.runs.report.samples import LETTERS, QUESTIONS, Answer, Asked, words_of
from jaxft.runs.report.signals import BY_NAME, signal_drawn
from jaxft.runs.report.tables import Cell, Column, number
from jaxft.runs.report.words import NONE, cut, duration, figure, interval, many, signed, size

TITLE = "Which lever fits?"
# (key of the file, its name on the page, how it is shown)
COSTS: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("parameters", "trained parameters", many),
    ("bytes", "bytes that are kept", size),
    ("memory", "memory of an update", size),
    ("planned", "memory on the topology", size),
    ("tokens_per_second", "tokens a second", many),
    ("seconds", "time of a tuning run", duration),
    ("search_seconds", "time of the search", duration),
    ("price", "price of a tuning run", figure),
    ("added_tokens", "tokens more a request", many),
    ("added_seconds", "time more a request", duration),
)
PLOTTED = ("parameters", "bytes", "memory", "seconds", "price", "added_tokens")


def comparison_page(found: Comparison) -> str:
    """The page as HTML. The same comparison gives the same text."""
    levers = found.levers
    score = found.metric.replace("_", " ")
    axis = f"{score}, {found.better} is better"
    columns, rows = _table(found)
    costs, curves = _costs(found, score), _curves(levers)
    samples, more = _samples(levers)
    signals, searched = _signals(levers), _searched(levers)
    scored = [(i, lever) for i, lever in enumerate(levers) if lever.score.value is not None]
    spots = [Spot(one.name, 0.0, one.score.value or 0.0, *one.score[1:], i) for i, one in scored]
    return filled(
        "comparison.html.jinja",
        contents=_contents(costs, signals, curves, samples, searched),
        title=TITLE,
        told=found.told + (f": {_title(found)}" if found.chosen else ""),
        sentences=found.sentences,
        done=found.done,
        about=_about(found),
        score=score,
        forest=forest_plot("forest", f"{axis}", spots, [one.scores for _, one in scored], axis)
        if spots
        else "",
        forest_rows=[(one.name, interval(*one.score)) for _, one in scored],
        steps=found.steps,
        columns=columns,
        rows=rows,
        keys=[key(i) for i in range(len(levers))],
        left=found.left,
        costs=[costs] if costs else [],
        levers=[_card(lever, i, score) for i, lever in enumerate(levers)],
        signals=signals,
        curves=curves,
        samples=samples,
        more=more,
        searched=searched,
        place=found.place,
    )


def _contents(*there: Any) -> list[tuple[str, str]]:
    costs, signals, curves, samples, searched = map(bool, there)
    found = [
        ("scores", "Scores", True),
        ("levers", "The levers", True),
        ("costs", "Cost and quality", costs),
        ("drawn", "What each does", True),
        ("signals", "What they learn from", signals),
        ("curves", "Curves", curves),
        ("samples", "What they said", samples),
        ("search", "What was tried", searched),
    ]
    return [(id, name) for id, name, shown in found if shown]


def _title(found: Comparison) -> str:
    return next((one.title for one in found.levers if one.name == found.chosen), found.chosen)


def _about(found: Comparison) -> str:
    """What it stands on, in a line."""
    rows = found.rows
    parts = [
        f"{found.model}, on {found.device}",
        f"{counted(rows['train'], 'row')} to learn from, {rows['tuning']:,} to choose by, {rows['test']:,} to judge by",
    ]
    if found.overlap:
        parts.append(
            f"{counted(found.overlap, 'test row')} left out, for they stand in the training data too"
        )
    if found.seconds is not None:
        parts.append(f"{duration(found.seconds)} in all")
    return "; ".join(parts) + "."


def _table(found: Comparison) -> tuple[list[Column], list[list[Cell]]]:
    levers = found.levers
    known = [cost for cost in COSTS if any(cost[0] in one.costs for one in levers)]
    changing = any(one.changed for one in levers)
    columns = [
        Column("lever", False),
        Column(found.metric.replace("_", " "), note=f"{found.better} is better"),
        Column("beside the simplest"),
        Column("loss on untouched text", note="above 0: it forgets"),
        *(Column(name) for _, name, _ in known),
        *[Column("after the facts have changed", note="nothing tuned anew")] * changing,
        Column("when the facts change", False),
    ]
    rows = []
    for lever in levers:
        beside, said = lever.difference or (None, "")
        forgot = lever.untouched
        rows.append(
            [
                Cell(lever.name, note=lever.title),
                _scored(lever.score.value, figure(lever.score.value), _ends(lever.score, figure)),
                _scored(beside.value, signed(beside.value), f"{_ends(beside, signed)}: {said}")
                if beside
                else Cell("the simplest", 0.0),
                _scored(forgot.value, signed(forgot.value), _ends(forgot, signed))
                if forgot
                else Cell(NONE, None, "no weight changes" if not lever.recipe else ""),
                *(
                    number(lever.costs.get(cost), shown(lever.costs.get(cost)))
                    for cost, _, shown in known
                ),
                *[_after(lever)] * changing,
                Cell(lever.facts),
            ]
        )
    return columns, rows


def _after(lever: Lever) -> Cell:
    """What it still scores once the facts have changed."""
    if lever.changed is None:
        return Cell(NONE)
    score, before = lever.changed
    return Cell(
        figure(score.value), score.value, f"{_ends(score, figure)}; before {figure(before)}"
    )


def _scored(value: float | None, shown: str, note: str) -> Cell:
    return Cell(shown, value, note)


def _ends(found: Any, shown: Callable[[float | None], str]) -> str:
    return f"{shown(found.low)} to {shown(found.high)}" if found.low is not None else "no interval"


def _costs(found: Comparison, score: str) -> Costs | None:
    judged = [Judged(one.name, i, *one.score) for i, one in enumerate(found.levers)]
    costs = [
        Cost(name, [one.costs.get(cost) for one in found.levers], shown)
        for cost, name, shown in COSTS
        if cost in PLOTTED
    ]
    return costs_of("cost", score, found.better, judged, costs)


def _curves(levers: Sequence[Lever]) -> list[tuple[list[str], list[Plot]]]:
    """The curves of each lever's first run, those of one objective together."""
    groups: dict[str, list[int]] = {}
    for i, lever in enumerate(levers):
        if lever.runs and lever.runs[0].lines:
            groups.setdefault(lever.runs[0].objective.name, []).append(i)
    return [
        (
            [levers[i].name for i in group],
            curves_of(
                [levers[i].runs[0] for i in group],
                [levers[i].name for i in group],
                f"curve{n}",
                group,
            ),
        )
        for n, group in enumerate(groups.values())
    ]


def _samples(levers: Sequence[Lever]) -> tuple[list[Asked], str]:
    asked: dict[tuple[str, str], list[Answer]] = {}
    for i, lever in enumerate(levers):
        for prompt, answer, reference in lever.samples:
            said, right = words_of(answer).strip(), words_of(reference or "").strip()
            agrees = bool(right) and said == right
            question = (cut(words_of(prompt), LETTERS), cut(right, LETTERS))
            asked.setdefault(question, []).append(
                Answer(lever.name, i, "", cut(said, LETTERS), agrees)
            )
    over = len(asked) - QUESTIONS
    shown = [Asked(*question, answers) for question, answers in list(asked.items())[:QUESTIONS]]
    return shown, f"{counted(over, 'more question')} in comparison.json" if over > 0 else ""


def _searched(levers: Sequence[Lever]) -> list[tuple[str, str, str, str, str, bool]]:
    """(lever, setting, measure, value, part of a run, whether it was chosen) of all that was tried."""
    return [
        (
            lever.title,
            setting,
            name,
            figure(value) if value is not None else "failed",
            figure(part),
            setting == setting_in_words(lever.setting),
        )
        for lever in levers
        for setting, value, name, part in lever.searched
    ]


def _card(lever: Lever, number: int, score: str) -> Card:
    """A lever drawn: what stands before the question, the kernel's weight, or both."""
    id, pictures, said, text = f"lever{number}", [], "", ""
    costs = lever.costs
    tokens = costs.get("added_tokens")
    added = f"{many(tokens)} tokens more" if tokens is not None and tokens >= 1 else ""
    measured = f"{score} {interval(*lever.score)}"
    if lever.recipe:
        method, scheme = _method(lever)
        text, said = described(method.name), told(method, scheme)
        pictures.append(method_drawn(method, scheme, _shown(lever, id, measured)))
    if not lever.recipe or lever.kind == PASSAGES:
        drawn = passages_drawn if lever.kind == PASSAGES else BEFORE.get(lever.signal, prompt_drawn)
        pictures.append(drawn(f"{id}-before", lever.title, measured, added))
    figures = [
        (score, interval(*lever.score)),
        *((name, shown(costs[cost])) for cost, name, shown in COSTS if costs.get(cost)),
        ("chosen setting", setting_in_words(lever.setting)),
    ]
    return Card(lever.title, text, pictures, said, [("", [(n, v) for n, v in figures if v])])


PASSAGES = "retrieval"  # the kind of levers that put passages before the question
BEFORE: Mapping[str, Callable[[str, str, str, str], Markup]] = {"examples": examples_drawn}


def _shown(lever: Lever, id: str, measured: str) -> Shown:
    costs, run = lever.costs, lever.runs[0] if lever.runs else None
    whole, trained = run.fact("parameters") if run else None, costs.get("parameters")
    frozen = f"{many(whole - trained)} frozen" if whole and trained and whole > trained else ""
    kept = [f"{size(costs['bytes'])} kept" if "bytes" in costs else ""]
    kept.append(f"{size(costs['memory'])} an update" if "memory" in costs else "")
    return Shown(
        id, lever.title, frozen, f"{many(trained)} train", ", ".join(filter(None, kept)), measured
    )


def _method(lever: Lever) -> tuple[Method, str]:
    """The method of a lever, and the codes of its base: of its run, else of its recipe."""
    if lever.runs:
        return lever.runs[0].method, lever.runs[0].config.base.quantize
    try:
        config = load_config(lever.recipe)
    except UserError as error:
        raise UserError(f"lever {lever.name}: {error}") from None
    settings = {name: value for name, value in config.method.items() if name != "name"}
    return METHODS[config.method.name](**settings), config.base.quantize


def _signals(levers: Sequence[Lever]) -> list[Card]:
    """The signals of the levers that are tuned, or that show examples."""
    kinds: dict[str, list[str]] = {}
    for lever in levers:
        if lever.recipe:
            kinds.setdefault(lever.signal, []).append(lever.name)
    cards = []
    for n, (kind, names) in enumerate(kinds.items()):
        if kind in BY_NAME:
            signal, held = BY_NAME[kind]
            picture = signal_drawn(signal, f"signal{n}", held=held)
            cards.append(Card(signal.title, pictures=[picture], told=signal.text, names=names))
    return cards
