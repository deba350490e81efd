"""RUN/plots: the run's curves as PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from jaxft.runs.folder import written
from jaxft.runs.metrics import read_metrics


def plot_run(workdir: Path, per: str = "token") -> Path:
    """Draws plots/loss.png (training and held-out loss, learning rate) from metrics.jsonl; returns its path.

    `per` is what the loss is divided by.
    """
    lines = read_metrics(workdir / "metrics.jsonl")
    train = [line for line in lines if line["split"] == "train"]
    held_out = [line for line in lines if line["split"] == "eval"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    if train:
        steps = [line["step"] for line in train]
        upper.plot(
            steps, [line["loss"] for line in train], color="tab:blue", alpha=0.3, linewidth=1
        )
        upper.plot(
            steps, smoothed([line["loss"] for line in train]), color="tab:blue", label="training"
        )
        lower.plot(steps, [line["learning_rate"] for line in train], color="tab:gray")
    for name in dict.fromkeys(line.get("set", "") for line in held_out):
        lines = [line for line in held_out if line.get("set", "") == name]
        if not all("loss" in line for line in lines):  # of what is sampled there is none
            continue
        color = None if name else "tab:orange"
        label = f"held out: {name}" if name else "held out"
        _curve(upper, lines, "loss", color=color, marker="o", label=label)
    upper.set_ylabel(f"loss (nats per {per})")
    upper.set_title(workdir.absolute().name)
    upper.grid(alpha=0.3)
    if train or held_out:
        upper.legend()
    lower.set_ylabel("learning rate")
    lower.set_xlabel("updates")
    lower.grid(alpha=0.3)
    path = workdir / "plots" / "loss.png"
    with written(path):
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=120)
    return path


def smoothed(values: list[float], keep: float = 0.9) -> list[float]:
    """The bias-corrected exponential mean, as in Adam; a value that is nan changes nothing.

    >>> smoothed([1.0, math.nan, 1.0])
    [1.0, 1.0, 1.0]
    """
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            mean, weight = keep * mean + (1 - keep) * value, keep * weight + 1 - keep
        means.append(round(mean / weight, 12) if weight else math.nan)
    return means


def _curve(axes: Any, lines: list[dict[str, Any]], key: str, **style: Any) -> None:
    axes.plot([line["step"] for line in lines], [line[key] for line in lines], **style)


def plot_averages(workdir: Path, reported: Sequence[str]) -> Path | None:
    """Draws plots/metrics.png, a panel for each kind of average that the objective reports; None if it has none.

    Averages of one kind (`rewards/chosen`, `rewards/rejected`) share a panel: training in thin lines, held-out ones
    with dots.

    Args:
        workdir: with metrics.jsonl.
        reported: names of the averages, "rewards/" for all that begin so; those that no line has are left out.
    """
    lines = read_metrics(workdir / "metrics.jsonl")
    there = dict.fromkeys(name for line in lines for name in line)
    names = [
        name
        for asked in reported
        for name in there
        if name == asked or (asked.endswith("/") and name.startswith(asked))
    ]
    if not names:
        return None
    panels: dict[str, list[str]] = {}
    for name in names:  # a share between 0 and 1 has its own scale
        kind = name if name.endswith("accuracies") else name.split("/")[0]
        panels.setdefault(kind, []).append(name)
    figure = Figure(figsize=(9, 2.6 * -(-len(panels) // 2)), layout="constrained")
    axes = figure.subplots(-(-len(panels) // 2), 2, squeeze=False).flat
    for panel, (kind, shown) in zip(axes, panels.items(), strict=False):
        for number, name in enumerate(shown):
            label = name.removeprefix(f"{kind}/")
            for split, marker, alpha in (("train", None, 0.5), ("eval", "o", 1.0)):
                found = [line for line in lines if line["split"] == split and name in line]
                style = {"color": f"C{number}", "marker": marker, "alpha": alpha}
                if found:
                    _curve(panel, found, name, linewidth=1, label=f"{label}, {split}", **style)
        panel.set_title(kind, fontsize=10)
        panel.set_xlabel("updates")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    path = workdir / "plots" / "metrics.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
