"""Plans for people: a table on the terminal, a chart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxft.errors import UserError, counted
from jaxft.planning.plan import Plan
from jaxft.weights.placement import Placement

PARTS = ("base", "adapter", "optimizer", "temporary")
# Okabe and Ito's colours.
COLOURS = {"base": "#0072B2", "adapter": "#D55E00", "optimizer": "#E69F00", "temporary": "#999999"}
GIB = 2**30


def cheapest(plans: Sequence[Plan]) -> Plan | None:
    """Of those that fit, the one with the shortest step; where none is known, with the least memory."""
    fitting = [plan for plan in plans if plan.fits]
    return min(fitting, key=lambda p: (p.seconds_per_step or 0.0, p.peak_bytes), default=None)


def table(plans: Sequence[Plan], price: float = 0.0) -> list[str]:
    """A line a plan; an asterisk marks the cheapest that fits."""
    best = cheapest(plans) if len(plans) > 1 else None
    first = plans[0]
    memory = f"{first.memory_bytes / GIB:.2f} GiB each" if first.memory_bytes else "unknown memory"
    lines = [
        f"{counted(first.devices, 'device')} of {first.topology}, {memory}; GiB of one device,"
        " times estimated",
        f"{'':2}{'method':11}{'base':6}{'remat':8}{'batch':>6}{'length':>8}{'base':>8}{'adapter':>9}{'optim.':>8}"
        f"{'temp.':>8}{'(kept)':>8}{'peak':>8} {'fits':5}{'s/step':>8}{'tokens/s':>10}{'MFU':>6}{'hours':>8}"
        + (f"{'cost':>10}" if price else ""),
    ]
    lines += [_line(plan, plan is best, price) for plan in plans]
    return lines + [_sampled(plan) for plan in plans if plan.rollout_bytes]


def _sampled(plan: Plan) -> str:
    """What is needed beside the step, while the optimizer's state stands by."""
    asks = f", asking the reference {plan.reference_bytes / GIB:.2f}" * bool(plan.reference_bytes)
    return (
        f"  {plan.method}, base {plan.quantize}: sampling completions takes {plan.rollout_bytes / GIB:.2f}, of which "
        f"{plan.cache_bytes / GIB:.2f} are keys and values; scoring them {plan.score_bytes / GIB:.2f}{asks}"
    )


def _line(plan: Plan, best: bool, price: float) -> str:
    sizes = (
        plan.base_bytes, plan.adapter_bytes, plan.optimizer_bytes, plan.temporary_bytes,
        plan.activation_bytes, plan.peak_bytes,
    )  # fmt: skip
    widths = (8, 9, 8, 8, 8, 8)
    memory = "".join(f"{size / GIB:>{w}.2f}" for size, w in zip(sizes, widths, strict=True))
    cost = plan.hours * plan.devices * price if plan.hours and price else None
    return (
        f"{'* ' if best else '  '}{plan.method:11}{plan.quantize:5} {plan.remat:8}{plan.batch_size:>6}"
        f"{plan.length:>8}{memory}"
        f" {'yes' if plan.fits else 'NO':5}{_number(plan.seconds_per_step, '.3g'):>8}"
        f"{_number(plan.tokens_per_second, ',.0f'):>10}{_number(plan.mfu, '.0%'):>6}"
        f"{_number(plan.hours, '.3g'):>8}" + (f"{_number(cost, ',.2f'):>10}" if price else "")
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def sharding_table(placements: Sequence[Placement]) -> list[str]:
    """A line a leaf, and what the copies cost."""
    lines = [f"{'leaf':58}{'shape':>24}  {'axes':32}{'a device':>12}{'copies':>8}"]
    for p in placements:
        axes = ", ".join(str(axis) for axis in p.spec) or "replicated"
        lines.append(f"{p.path:58}{p.shape!s:>24}  {axes:32}{p.bytes_per_device:>12,}{p.copies:>8}")
    whole = sum(p.bytes_per_device for p in placements if p.replicated)
    surplus = sum(p.surplus for p in placements)
    return [
        *lines,
        f"replicated: {whole:,} bytes on each device; all copies beyond the first: {surplus:,} bytes",
    ]


def draw(plans: Sequence[Plan], file: Path) -> None:
    """A bar a plan, of what a device's memory holds at the step's peak, and of what it has.

    Raises UserError if the file exists.
    """
    if file.exists():
        raise UserError(f"--plot {file}: this file exists and is not written over")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.45 * len(plans)), layout="constrained")
    names = [
        f"{plan.method}, base {plan.quantize}, remat {plan.remat}, batch {plan.batch_size}"
        for plan in plans
    ]
    left = [0.0] * len(plans)
    for part in PARTS:
        sizes = [getattr(plan, f"{part}_bytes") / GIB for plan in plans]
        axes.barh(names, sizes, left=left, color=COLOURS[part], label=part)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    if plans[0].memory_bytes:
        axes.axvline(
            plans[0].memory_bytes / GIB, color="black", linestyle="--", label="a device has"
        )
    axes.invert_yaxis()
    axes.set_xlabel(f"GiB on a device of {plans[0].topology}")
    axes.legend(fontsize="small")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
