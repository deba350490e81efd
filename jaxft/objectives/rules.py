"""Which settings of a preference loss go together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from jaxft.errors import UserError, shown
from jaxft.methods import row_of
from jaxft.objectives.pairs import LOSSES, Loss

# Settings that only some losses take; what a loss does not take must stand at its default.
OWN = ("label_smoothing", "gamma", "tau", "desirable_weight", "undesirable_weight")
REFERENCE = ("reference", "reference_every", "reference_mix", "reference_offload", "precompute")


def check_preferences(flat: Mapping[str, Any], changed: Collection[str]) -> None:
    """Raises UserError for a setting that the loss would ignore, and for values that do not go together.

    Args:
        flat: each key's value by the key's full name.
        changed: the keys whose values are not the recipe's defaults.
    """
    name = flat["objective.name"]
    loss = LOSSES[name]
    changed = {key.removeprefix("objective.") for key in changed if key.startswith("objective.")}
    for key in OWN:
        if key in changed and key not in loss.takes:
            takers = ", ".join(other for other, row in LOSSES.items() if key in row.takes)
            raise UserError(f"config.objective.{key}: {name} takes none; it is for {takers}")
    for key in REFERENCE:
        if loss.free and key in changed and flat[f"objective.{key}"] != "none":
            raise UserError(f"config.objective.{key}: {name} has no reference")
    if "f_divergence" in changed and not loss.of_difference:
        takers = ", ".join(other for other, row in LOSSES.items() if row.of_difference)
        raise UserError(f"config.objective.f_divergence: {name} takes none; it is for {takers}")
    for key, only in (("format", "auto"), ("loss_on", "completion"), ("mix", ()), ("retrieve", "")):
        if flat[f"data.{key}"] != only:
            raise UserError(f"config.data.{key}: preferences take {only!r} alone")
    _check_values(name, loss, flat)
    _check_reference(name, loss, flat)


def _check_values(name: str, loss: Loss, flat: Mapping[str, Any]) -> None:
    rate, beta = flat["objective.label_smoothing"], flat["objective.beta"]
    if not beta > 0:
        raise UserError(f"config.objective.beta takes a number above 0, not {beta}")
    if loss.smooths and not rate:
        raise UserError(f"config.objective.label_smoothing: {name} needs a number above 0, as 1e-3")
    if rate >= 0.5:
        raise UserError(
            f"config.objective.label_smoothing takes a number below 0.5, not {rate}: at 0.5 a label says nothing"
        )
    if loss.likelihood and flat["objective.sft_weight"]:
        raise UserError(f"config.objective.sft_weight: {name} has a likelihood term of its own")
    if loss.judged and flat["objective.sft_weight"]:
        raise UserError(f"config.objective.sft_weight: {name} has no chosen completions")
    if loss.judged and flat["batch_size"] // flat["grad_accum"] < 2:
        raise UserError(
            f"config.batch_size: {name} measures the KL between the examples of a batch, of which "
            f"batch_size={flat['batch_size']} and grad_accum={flat['grad_accum']} leave one"
        )
    if flat["objective.wpo"] and (loss.judged or loss.sorts):
        raise UserError(f"config.objective.wpo: {name} has no loss of a pair that could be weighed")


def _check_reference(name: str, loss: Loss, flat: Mapping[str, Any]) -> None:
    reference, every = flat["objective.reference"], flat["objective.reference_every"]
    if reference == "none" and loss.judged:
        raise UserError(f"config.objective.reference: {name} measures the KL to a reference")
    if every and reference != "start":
        raise UserError(
            f"config.objective.reference_every: only the reference 'start' can move, not {shown(reference)}"
        )
    if flat["objective.precompute"] and (every or reference == "none"):
        raise UserError(
            "config.objective.precompute: the log-probabilities of a reference that moves, or of none, "
            "cannot be computed beforehand"
        )
    trains_base = row_of(str(flat["method.name"]))().weight is None
    if flat["objective.reference_offload"] and (reference != "start" or not trains_base):
        raise UserError(
            "config.objective.reference_offload: only full tuning has a frozen copy to keep elsewhere"
        )
