"""RUN/comparison.json: what is known of every lever, and the verdict (the fields: `jaxft.comparison`)."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxft.comparison.asking import SHOWN
from jaxft.comparison.given import Given
from jaxft.comparison.levers import LEVERS, Lever
from jaxft.comparison.measuring import LOSS, Measured
from jaxft.comparison.verdict import Scored, Verdict, difference_of, score_of, verdict
from jaxft.evaluation.confidence import CONFIDENCE, Difference, Figure

VERSION = 1
NAME = "comparison.json"


def lever_object(
    measured: Measured, given: Given, simplest: Measured, base: Scored | None, levers: int
) -> dict[str, Any]:
    """What RUN/comparison.json has of a measured lever.

    Args:
        measured: the lever.
        given: what every lever got.
        simplest: the first one.
        base: the loss on the texts aside before any tuning; None where nothing was tuned.
        levers: how many are measured.
    """
    costs = costs_of(measured, given, simplest)
    difference = None
    if measured is not simplest:
        difference = difference_of(
            simplest.scored,
            measured.scored,
            given.metric,
            comparisons=max(levers - 1, 1),
            worth=worth_of(given, [simplest, measured]),
        )
    forgot = None
    if base is not None and measured.aside is not None:
        forgot = difference_of(base, measured.aside, LOSS, comparisons=1)
    return {
        **named(measured.lever),
        "reason": "",
        "score": figure_object(score_of(measured.scored, given.metric)),
        "difference": None if difference is None else difference_object(difference),
        "untouched": None if forgot is None else figure_object(forgot),
        **costs,
        "facts": measured.lever.facts,
        "changed": None if measured.changed is None else dict(measured.changed),
        "searched": list(measured.searched),
        "setting": dict(measured.setting),
        "seeds": [piece["seed"] for piece in measured.tests],
        "scores": [piece["value"] for piece in measured.tests],
        "runs": [piece["run"] for piece in measured.runs],
        "samples": _samples(measured.records),
    }


def costs_of(measured: Measured, given: Given, simplest: Measured) -> dict[str, Any]:
    """What a lever costs: to tune, to keep, and a request."""
    runs, hourly = measured.runs, given.config.price_per_hour
    seconds = statistics.median(piece["tuning_seconds"] for piece in runs) if runs else 0.0
    tokens, plain = (
        _mean([piece["tokens"] for piece in one.tests]) for one in (measured, simplest)
    )
    first, beside = (one.tests[0]["request_seconds"] for one in (measured, simplest))
    return {
        "parameters": runs[0]["parameters"] if runs else 0,
        "bytes": runs[0]["bytes"] if runs else _kept_bytes(measured, given),
        "memory": measured.memory,
        "planned": measured.planned,
        "tokens_per_second": _mean([piece["tokens_per_second"] for piece in runs])
        if runs
        else None,
        "seconds": round(seconds, 1),
        "search_seconds": round(measured.search_seconds, 1),
        "price": round(seconds / 3600 * hourly, 4) if hourly else None,
        "added_tokens": round(tokens - plain, 1),
        "added_seconds": round(first - beside, 4),
    }


def judged(measured: Sequence[Measured], given: Given, unmeasured: Sequence[str] = ()) -> Verdict:
    """The verdict over what is measured; arguments as of `verdict`."""
    simplest = measured[0]
    rows = []
    for one in measured:
        costs = costs_of(one, given, simplest)
        told = {key: float(value) for key, value in costs.items() if value is not None}
        rows.append(dataclasses.replace(one.scored, costs=told))
    return verdict(rows, given.metric, worth_of(given, measured), unmeasured)


def worth_of(given: Given, measured: Sequence[Measured]) -> float:
    """The smallest gain that counts: as it is set, else a twentieth of the highest score that there can be or is."""
    if given.worth is not None:
        return given.worth
    values = [score_of(one.scored, given.metric).value for one in measured]
    return max(abs(value) for value in values if value is not None) / 20


def whole_object(
    given: Given,
    measured: Sequence[Measured],
    left: Mapping[str, str],
    base: Scored | None,
    about: Mapping[str, Any],
    unmeasured: Sequence[str],
) -> dict[str, Any]:
    """The whole of RUN/comparison.json.

    Args:
        given: what every lever got.
        measured: the levers that are measured, the simplest first.
        left: of the others, why not.
        base: as of `lever_object`.
        about: done, device, steps, budget and seconds.
        unmeasured: as of `verdict`.
    """
    told = judged(measured, given, unmeasured)
    objects = {
        one.lever.name: lever_object(one, given, measured[0], base, len(measured))
        for one in measured
    }
    metric = given.metric
    return {
        "version": VERSION,
        "model": given.config.model,
        **about,
        "metric": {
            "name": metric.name,
            "lower": metric.lower,
            "most": metric.most,
            "worth": worth_of(given, measured),
        },
        "rows": {
            "train": len(given.train),
            "tuning": len(given.tuning),
            "test": len(given.test),
            "overlap": list(given.overlap),
        },
        "batch_size": given.config.batch_size,
        "price_per_hour": given.config.price_per_hour,
        "confidence": CONFIDENCE,
        "levers": [
            objects.get(name, {**named(lever), "reason": left.get(name, "not measured yet")})
            for name, lever in LEVERS.items()
        ],
        "verdict": {
            "sentences": list(told.sentences),
            "told": told.told,
            "chosen": told.chosen,
            "next": told.next,
            "more": told.more,
            "steps": list(told.steps),
        },
    }


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Writes RUN/comparison.json, the whole or nothing."""
    part = folder / f"{NAME}.part"
    part.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(folder / NAME)


def named(lever: Lever) -> dict[str, Any]:
    """What is known of a lever before it is measured."""
    return {
        "name": lever.name,
        "title": lever.title,
        "kind": lever.kind,
        "signal": lever.signal,
        "recipe": lever.recipe,
    }


def figure_object(found: Figure | Difference) -> dict[str, Any]:
    """Value, interval and n."""
    return {"value": found.value, "low": found.low, "high": found.high, "n": found.n}


def difference_object(found: Difference) -> dict[str, Any]:
    """The same, with what it says and how many more rows would tell."""
    return {**figure_object(found), "verdict": found.verdict, "more": found.more}


def _samples(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first questions, what was said and what is right; the same ones for every lever."""
    answered = [record for record in records if record["answer"] is not None]
    return [
        {
            "prompt": record["prompt"],
            "answer": record["answer"],
            "reference": record["references"][0] if record["references"] else None,
        }
        for record in answered[:SHOWN]
    ]


def _kept_bytes(measured: Measured, given: Given) -> int:
    """Of what tunes nothing: the index, or the examples in the prompt."""
    if "documents" in measured.lever.needs:
        files = Path(given.index).rglob("*")
        return sum(file.stat().st_size for file in files if file.is_file())
    shots = measured.setting.get("examples", 0)
    rows = given.train[:shots]
    return sum(len(json.dumps([row.prompt, *row.references[:1]]).encode()) for row in rows)


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)
