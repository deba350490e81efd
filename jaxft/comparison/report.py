"""What `jaxft compare` prints of RUN/comparison.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.errors import counted
from jaxft.runs.report.comparison import left_out

COLUMNS = ("lever", "score", "95 % interval", "beside the simplest", "trained", "kept", "tuning")


def report_lines(result: Mapping[str, Any], *, explain: bool) -> list[str]:
    """The table, what was left out, and the verdict; with `explain` the reasoning too."""
    measured = [lever for lever in result["levers"] if not lever["reason"]]
    rows = [COLUMNS, *(_cells(lever) for lever in measured)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    metric, counts = result["metric"], result["rows"]
    way = "less is better" if metric["lower"] else "more is better"
    lines.append(
        f"({metric['name']}, {way}, of {counted(counts['test'], 'test row')}; differences hold together at 95 %)"
    )
    left = left_out(result["levers"], "name")
    lines += [f"left out: {names}: {reason}" for names, reason in left]
    changed = [lever for lever in measured if lever["changed"]]
    if changed:
        told = [
            f"{lever['name']} {_number(lever['changed']['value'])}, before {_number(lever['changed']['before'])}"
            for lever in changed
        ]
        questions = counted(changed[0]["changed"]["n"], "question")
        lines.append(f"once the documents' facts have changed, of {questions}: {'; '.join(told)}")
    verdict = result["verdict"]
    if explain:
        lines += [f"{place}. {step}" for place, step in enumerate(verdict["steps"], start=1)]
    return [*lines, "", *verdict["sentences"]]


def _cells(lever: Mapping[str, Any]) -> Sequence[str]:
    score, difference = lever["score"], lever["difference"]
    beside = ""
    if difference is not None:
        beside = f"{_interval(difference, '+')}: {difference['verdict']}"
    return (
        lever["name"],
        _number(score["value"]),
        "" if score["low"] is None else f"{score['low']:.3f} to {score['high']:.3f}",
        beside,
        f"{lever['parameters']:,}",
        f"{lever['bytes'] / 1000:,.0f} kB",
        f"{lever['seconds']:,.0f} s" if lever["seconds"] else "",
    )


def _interval(found: Mapping[str, Any], sign: str) -> str:
    if found["value"] is None:
        return "unknown"
    if found["low"] is None:
        return f"{found['value']:{sign}.3f}"
    return f"{found['value']:{sign}.3f} ({found['low']:{sign}.3f} to {found['high']:{sign}.3f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
