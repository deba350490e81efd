"""Two systems beside each other on the same items, from what was written of each: no model is needed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxft.data.records import json_type
from jaxft.data.sources import read_objects
from jaxft.errors import UserError, counted
from jaxft.evaluation.confidence import Difference, Figure, difference, figure
from jaxft.evaluation.metrics import Metric, metric_named

Record = Mapping[str, Any]


def read_results(path: str) -> dict[str, list[Record]]:
    """{system: its records} of a file that `jaxft evaluate --output` wrote.

    Raises:
        UserError: a line that is none of its, or none at all.
    """
    systems: dict[str, list[Record]] = {}
    for origin, record in read_objects(path):
        for key, kind in (("system", str), ("prompt", object), ("references", list),
                          ("statistics", dict), ("cluster", str)):  # fmt: skip
            if key not in record or not isinstance(record[key], kind):
                found = f"not {json_type(record[key])}" if key in record else "which is missing"
                raise UserError(
                    f"{origin}: not a line of jaxft evaluate --output: {key} is needed, {found}"
                )
        _check_statistics(origin, record["statistics"])
        systems.setdefault(record["system"], []).append(record)
    if not systems:
        raise UserError(f"{path}: the file is empty")
    return systems


def _check_statistics(origin: str, statistics: Mapping[str, Any]) -> None:
    for name, row in statistics.items():
        numbers = isinstance(row, list) and all(isinstance(one, int | float) for one in row)
        if not numbers or len(row) < 2:
            raise UserError(f"{origin}: statistics.{name} must be a list of numbers")


def compare(
    first: Sequence[Record], second: Sequence[Record], names: tuple[str, str] = ("A", "B")
) -> dict[str, Difference]:
    """{metric: how the second system differs from the first}, of the metrics that both have.

    Args:
        first: records of the items, as `Result.records`; in any order.
        second: likewise, of the same items.
        names: what an error calls the two.

    Raises:
        UserError: they are of other items, or have no metric in common.
    """
    one, two = (_by_item(records) for records in (first, second))
    for (mine, others), (here, there) in (((one, two), names), ((two, one), names[::-1])):
        if lacking := [key for key in mine if key not in others]:
            first_of_them = mine[lacking[0]].get("origin", lacking[0])
            raise UserError(
                f"{here} and {there} are of other items: {counted(len(lacking), 'item')} of {here} "
                f"{'is' if len(lacking) == 1 else 'are'} not in {there} (first: {first_of_them})"
            )
    shared = [name for name in metrics_in(first) if name in metrics_in(second)]
    if not shared:
        raise UserError(f"{names[0]} and {names[1]} have no metric in common")
    found = {}
    for metric in map(metric_named, shared):
        before, after = (rows_in(metric, [side[key] for key in one]) for side in (one, two))
        if before.shape != after.shape:
            raise UserError(f"{names[0]} and {names[1]}: {metric.name} has other statistics there")
        clusters = [record["cluster"] for record in one.values()]
        found[metric.name] = difference(before, after, clusters, metric.value, lower=metric.lower)
    return found


def figures_in(records: Sequence[Record]) -> dict[str, Figure]:
    """{metric: its value and interval} from records alone."""
    clusters = [record["cluster"] for record in records]
    return {
        metric.name: figure(rows_in(metric, records), clusters, metric.value, metric.most)
        for metric in map(metric_named, metrics_in(records))
    }


def metrics_in(records: Sequence[Record]) -> list[str]:
    """The metrics of which any record has numbers."""
    return list(dict.fromkeys(name for record in records for name in record["statistics"]))


def rows_in(metric: Metric, records: Sequence[Record]) -> np.ndarray:
    """The metric's numbers of every record; NaN where one has none."""
    rows = [record["statistics"].get(metric.name) for record in records]
    width = max((len(row) for row in rows if row is not None), default=2)
    blank = [float("nan")] * width
    return np.asarray(
        [row if row is not None and len(row) == width else blank for row in rows], float
    )


def _by_item(records: Sequence[Record]) -> dict[str, Record]:
    """Records by what was asked and what is right; the second of equal ones is another item."""
    found: dict[str, Record] = {}
    for record in records:
        asked = [record["prompt"], record["references"]]
        key, times = json.dumps(asked, sort_keys=True, ensure_ascii=False), 0
        while f"{times} {key}" in found:
            times += 1
        found[f"{times} {key}"] = record
    return found
