"""The verdict: the simplest lever that nothing beats beyond its interval, from what each scored on the same questions.

Two levers are compared question by question. The error of a difference has two parts: the questions, by the
bootstrap of `jaxft.evaluation.confidence`, and the seeds, by how far the seeds' figures lie apart; Welch and
Satterthwaite's degrees of freedom go with their sum. So a lever is not called better because of one lucky run.

Two levers that scored every question alike are not thereby known to be equal: that interval is Clopper and Pearson's.

The levers are looked at in order, the simplest first. The verdict takes the first lever that no other lever beats; if
that is not the simplest one, it must also beat the simplest one. Without this second condition the verdict could take a
lever whose runs scatter so widely that no other can be shown to beat it. The levers are hypotheses that are tested in a
fixed order, each at the whole 5 %, until the first that stands (Westfall and Krishen, 2001); at each stage the interval
is widened for the number of levers that might beat this one (Bonferroni). Where no lever truly beats the simplest, at
most one verdict in twenty names another.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import special

from jaxft.errors import counted
from jaxft.evaluation.confidence import CONFIDENCE, POWER, Difference, Figure, difference, figure
from jaxft.evaluation.metrics import Metric

CHOSEN, NOTHING, UNKNOWN = "chosen", "nothing helps", "cannot tell"
BETTER, WORSE = "better", "worse"


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a lever scored.

    Attributes:
        name: the lever's.
        numbers: (seeds, items, numbers), what each item adds to the metric; NaN where it could not be scored.
        clusters: of each item, what it belongs to.
        costs: what the verdict tells of them, as {"seconds": 12.0, "bytes": 4096}; one that it lacks is not told.
    """

    name: str
    numbers: Float[np.ndarray, "seeds items numbers"]
    clusters: Sequence[object]
    costs: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What can be said.

    Attributes:
        sentences: two.
        told: "chosen", "nothing helps" or "cannot tell".
        chosen: the lever; None where it cannot be told.
        next: the lever that the second sentence is about; None where there is none.
        more: about how many more rows would tell; None where none would, or none are needed.
        steps: the reasoning.
    """

    sentences: tuple[str, str]
    told: str
    chosen: str | None
    next: str | None
    more: int | None
    steps: tuple[str, ...]


def score_of(scored: Scored, metric: Metric) -> Figure:
    """The lever's figure over all seeds; its interval holds the seeds' differences too."""
    pooled = _pooled(scored)
    found = figure(pooled, scored.clusters, metric.value, metric.most)
    if metric.most is None and found.low is not None and found.low == found.high:  # all alike
        found = figure(pooled, scored.clusters, metric.value, _most(pooled, metric))
    error = _seed_error(scored, metric)
    if found.value is None or found.low is None or found.high is None or not error:
        return found
    reach = float(special.stdtrit(len(scored.numbers) - 1, (1 + CONFIDENCE) / 2)) * error
    low = found.value - math.hypot(found.value - found.low, reach)
    high = found.value + math.hypot(found.high - found.value, reach)
    if metric.most is not None:
        low, high = max(low, 0.0), min(high, metric.most)
    return dataclasses.replace(found, low=low, high=high)


def difference_of(
    first: Scored, second: Scored, metric: Metric, *, comparisons: int, worth: float = 0.0
) -> Difference:
    """How the second lever differs from the first, on the questions that both have.

    Args:
        first: what one scored.
        second: what the other scored.
        metric: which way is better, and the value of sums.
        comparisons: how many intervals are to hold together.
        worth: the smallest difference that `more` is to find.
    """
    one, two = _pooled(first), _pooled(second)
    plain = difference(one, two, first.clusters, metric.value, lower=metric.lower)
    if plain.value is None or plain.high is None:
        return plain
    groups = plain.clusters
    items = (plain.high - plain.value) / float(special.stdtrit(groups - 1, (1 + CONFIDENCE) / 2))
    parts = [(items, groups - 1)]
    parts += [(_seed_error(each, metric), len(each.numbers) - 1) for each in (first, second)]
    error, freedom = _together(parts)
    if error < 1e-12 and abs(plain.value) < 1e-12:
        tail = (1 - CONFIDENCE) / (2 * comparisons)
        return _of_a_tie(plain, _most(one, metric), worth, tail)
    reach = float(special.stdtrit(freedom, 1 - (1 - CONFIDENCE) / (2 * comparisons))) * error
    furthest = math.inf if metric.most is None else metric.most
    low, high = max(plain.value - reach, -furthest), min(plain.value + reach, furthest)
    if abs(plain.value) > reach + 1e-12:
        verdict = BETTER if (plain.value < 0) == metric.lower else WORSE
        return dataclasses.replace(plain, low=low, high=high, verdict=verdict, more=None)
    seeds = math.sqrt(max(error**2 - items**2, 0.0))
    effect = max(abs(plain.value), worth)
    more = _more(effect, items, seeds, reach / error if error else 0.0, plain.n)
    return dataclasses.replace(plain, low=low, high=high, verdict=UNKNOWN, more=more)


def _of_a_tie(tie: Difference, most: float, worth: float, tail: float) -> Difference:
    """The difference of levers that scored every question alike, of which resampling makes nothing but 0.

    Other questions may tell them apart: the share of such is at most 1 - tail^(1 / questions), by Clopper and Pearson.

    Args:
        tie: as it was found.
        most: the highest score of a question, or the highest that was seen where there is none.
        worth: the smallest difference that counts; `more` rows would rule it out.
        tail: outside the interval, on either side.
    """
    reach = most * (1 - tail ** (1 / tie.clusters))
    more = None
    if reach > worth > 0:
        needed = math.log(tail) / math.log1p(-worth / most)
        more = math.ceil((needed - tie.clusters) * tie.n / tie.clusters)
    return dataclasses.replace(tie, low=-reach, high=reach, verdict=UNKNOWN, more=more)


def verdict(
    rows: Sequence[Scored], metric: Metric, worth: float, unmeasured: Sequence[str] = ()
) -> Verdict:
    """The verdict over levers that were measured on the same items, from the simplest on.

    Args:
        rows: what they scored, the simplest first.
        metric: of the scores.
        worth: the smallest gain that counts: if no lever can gain as much over the simplest, nothing helps.
        unmeasured: levers that what is given allows, and that were left out all the same.

    Raises:
        ValueError: no lever.
    """
    if not rows:
        raise ValueError("a verdict needs a lever")
    if len(rows) == 1:
        alone = f"Cannot tell: {rows[0].name} is the only lever that was measured."
        return Verdict(
            (alone, "Another lever is needed beside it."), UNKNOWN, None, None, None, (alone,)
        )
    steps, last = list[str](), rows[-1]
    if unmeasured:
        steps.append(f"Not measured, so that nothing is said of them: {', '.join(unmeasured)}.")
    for row in rows:
        beside = {
            other.name: difference_of(row, other, metric, comparisons=len(rows) - 1, worth=worth)
            for other in rows
            if other is not row
        }
        beating = [name for name, found in beside.items() if found.verdict == BETTER]
        steps.append(_stage(row, beside, beating, metric, len(rows) - 1))
        carried = row is rows[0] or beside[rows[0].name].verdict == WORSE
        if not beating and carried:
            break
        if carried and row is not rows[0]:
            last = row
        if not beating:
            steps.append(
                f"Nor does {row.name} beat {rows[0].name}, which another lever does: it is passed over."
            )
    else:  # where the items of two comparisons are not the same, say
        row, beside = last, {}
    if row is rows[0]:
        return _of_the_simplest(rows, beside, metric, worth, steps, bool(unmeasured))
    return _of_another(rows, row, beside, metric, steps)


def _of_the_simplest(
    rows: Sequence[Scored],
    beside: Mapping[str, Difference],
    metric: Metric,
    worth: float,
    steps: list[str],
    partly: bool,
) -> Verdict:
    simplest = rows[0]
    most = {name: _gain(found.high, found.low, metric) for name, found in beside.items()}
    near = max(beside, key=lambda name: _gain(beside[name].value, beside[name].value, metric))
    figures = _figure(score_of(simplest, metric))
    if max(most.values()) <= worth:
        steps.append(
            f"No lever can gain more than {worth:.3g}, the smallest gain that counts: "
            + ", ".join(f"{name} at most {gain:+.3g}" for name, gain in most.items())
            + f". Nothing helps; {simplest.name} is the simplest."
        )
        those = "that was measured " * partly
        first = (
            f"Nothing {those}helps: no lever {those}gains {worth:.3g} over {simplest.name}, which scores {figures}: "
            "stay with it."
        )
        return Verdict(
            (first, _next_line(rows, simplest, near, beside[near], metric)),
            NOTHING, simplest.name, near, None, tuple(steps),
        )  # fmt: skip
    widest = max(most, key=lambda name: most[name])
    open_one = near if most[near] > worth else widest
    found = beside[open_one]
    steps.append(
        f"{open_one} may gain up to {most[open_one]:.3g} over {simplest.name}, more than {worth:.3g}, the smallest "
        "gain that counts, and does not beat it beyond its interval: it cannot be told."
    )
    first = (
        f"Cannot tell: no lever beats {simplest.name} ({figures}) beyond its interval, and {open_one} may gain up to "
        f"{most[open_one]:.3g}."
    )
    return Verdict(
        (first, _rows_line(open_one, simplest.name, found)),
        UNKNOWN, None, open_one, found.more, tuple(steps),
    )  # fmt: skip


def _of_another(
    rows: Sequence[Scored],
    row: Scored,
    beside: Mapping[str, Difference],
    metric: Metric,
    steps: list[str],
) -> Verdict:
    simplest = rows[0]
    first = (
        f"Take {row.name}: it scores {_figure(score_of(row, metric))} where {simplest.name} scores "
        f"{_figure(score_of(simplest, metric))}, and no lever beats it beyond its interval."
    )
    later = [other.name for other in rows[rows.index(row) + 1 :] if other.name in beside]
    steps.append(f"No lever beats {row.name} beyond its interval: it is the simplest such lever.")
    if not later:
        second = "It is the least simple of those that were measured: there is no next one."
        return Verdict((first, second), CHOSEN, row.name, None, None, tuple(steps))
    near = max(later, key=lambda name: _gain(beside[name].value, beside[name].value, metric))
    second = _next_line(rows, row, near, beside[near], metric)
    return Verdict((first, second), CHOSEN, row.name, near, beside[near].more, tuple(steps))


def _most(rows: np.ndarray, metric: Metric) -> float:
    """The highest score of a question; where the metric has none, the highest in the rows, or 1 if that is 0."""
    if metric.most:
        return metric.most
    with np.errstate(all="ignore"):
        values = np.abs(metric.value(rows[~np.isnan(rows).any(axis=1)]))
    return float(np.max(values, initial=0.0, where=np.isfinite(values))) or 1.0


def _pooled(scored: Scored) -> np.ndarray:
    """The mean over the seeds of what each item adds; NaN where one of them could not score it."""
    return np.asarray(scored.numbers.mean(axis=0))


def _seed_error(scored: Scored, metric: Metric) -> float:
    """The standard error of the mean over the seeds; 0 of one seed."""
    if len(scored.numbers) < 2:
        return 0.0
    kept = ~np.isnan(scored.numbers).any(axis=(0, 2))
    values = [float(metric.value(each[kept].sum(axis=0))) for each in scored.numbers]
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def _together(parts: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """The root of the errors' squares, and Satterthwaite's degrees of freedom of it."""
    total = sum(error**2 for error, _ in parts)
    below = sum(error**4 / freedom for error, freedom in parts if error)
    return math.sqrt(total), total**2 / below if below else 1.0


def _more(effect: float, items: float, seeds: float, reach: float, n: int) -> int | None:
    """Rows beside the n that would show a difference of this size with `POWER`, to two digits; None where none do."""
    needed = reach + float(special.ndtri(POWER))
    room = (effect / needed) ** 2 - seeds**2 if needed else 0.0
    if room <= 0 or not items:
        return None
    more = max(n * items**2 / room - n, 1.0)
    digits = 1 - math.floor(math.log10(more))
    return math.ceil(round(more, digits)) if digits < 0 else math.ceil(more)


def _gain(better: float | None, other: float | None, metric: Metric) -> float:
    """A difference as a gain: above 0 where the second lever is better."""
    value = other if metric.lower else better
    return float("nan") if value is None else (-value if metric.lower else value)


def _figure(found: Figure) -> str:
    if found.value is None:
        return "nothing"
    if found.low is None or found.high is None:
        return f"{found.value:.3g}"
    return f"{found.value:.3g} ({found.low:.3g} to {found.high:.3g})"


def _change(found: Difference) -> str:
    if found.value is None or found.low is None or found.high is None:
        return "unknown"
    return f"{found.value:+.3g} ({found.low:+.3g} to {found.high:+.3g})"


def _stage(
    row: Scored,
    beside: Mapping[str, Difference],
    beating: Sequence[str],
    metric: Metric,
    comparisons: int,
) -> str:
    listed = ", ".join(f"{name} {_change(found)}" for name, found in beside.items())
    end = f"{', '.join(beating)} beat{'s' * (len(beating) == 1)} it" if beating else "none beats it"
    way = "less is better" if metric.lower else "more is better"
    return (
        f"Beside {row.name}, {metric.name} ({way}; {counted(comparisons, 'interval')}, together at "
        f"{CONFIDENCE:.0%}): {listed}: {end} beyond its interval."
    )


def _rows_line(name: str, simplest: str, found: Difference) -> str:
    change = _change(found)
    if found.more is None:
        return (
            f"More rows would not tell whether {name} beats {simplest} ({change}): its runs differ too much by seed, "
            "and more of them would (config.seeds)."
        )
    return (
        f"About {counted(found.more, 'more test row')} would tell whether {name} beats {simplest} "
        f"({change} on {counted(found.n, 'row')})."
    )


def _next_line(
    rows: Sequence[Scored], chosen: Scored, name: str, found: Difference, metric: Metric
) -> str:
    """What the next lever would buy and cost."""
    other = next(row for row in rows if row.name == name)
    costs = [
        told
        for key, tell in COSTS.items()
        if (told := tell(other.costs.get(key), chosen.costs.get(key)))
    ]
    cost = f" and cost {', '.join(costs)}" if costs else ""
    return f"The next, {name}, would buy {_change(found)} {metric.name}{cost}."


def _told(unit: str, scale: float = 1.0, digits: str = ",.0f") -> Any:
    def tell(value: float | None, chosen: float | None) -> str:
        if not value:
            return ""
        instead = f" instead of {format((chosen or 0.0) / scale, digits)}"
        return f"{format(value / scale, digits)}{instead} {unit}"

    return tell


COSTS = {
    "seconds": _told("seconds of tuning"),
    "price": _told("of money", digits=",.2f"),
    "bytes": _told("kB kept", 1000.0),
    "added_tokens": _told("tokens added to a request"),
}
