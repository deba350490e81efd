"""Which settings of a preference loss go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxft.configuration import recipes
from jaxft.configuration.elsewhere import told_value
from jaxft.errors import UserError, nearest, shown
from jaxft.methods import row_of

# Settings that only some losses take; what a loss does not take must stand at its default.
OWN = ("label_smoothing", "gamma", "tau", "desirable_weight", "undesirable_weight")
REFERENCE = ("reference", "reference_every", "reference_mix", "reference_offload", "precompute")


def check_preferences(flat: Mapping[str, Any]) -> None:
    """Raises UserError for an unknown loss, and for a setting that the loss would ignore.

    Args:
        flat: each key's value by the key's full name.
    """
    from jaxft.objectives import LOSSES

    name = flat["objective.name"]
    if name not in LOSSES:
        close = told_value("objective.name", name) or nearest(str(name), LOSSES)
        raise UserError(
            f"config.objective.name takes {' | '.join(LOSSES)}, not {shown(name)}{close}"
        )
    loss = LOSSES[name]
    schema = recipes.run(recipes.find("configs/dpo.py"), str(flat["method.name"]))
    changed = {key for key, value in schema.objective.items() if flat[f"objective.{key}"] != value}
    for key in OWN:
        if key in changed and key not in loss.takes:
            takers = ", ".join(other for other, row in LOSSES.items() if key in row.takes)
            raise UserError(f"config.objective.{key}: {name} takes none; it is for {takers}")
    for key in REFERENCE:
        if loss.free and key in changed and flat[f"objective.{key}"] != "none":
            raise UserError(f"config.objective.{key}: {name} has no reference")
    if changed & {"f_divergence"} and not loss.of_difference:
        takers = ", ".join(other for other, row in LOSSES.items() if row.of_difference)
        raise UserError(f"config.objective.f_divergence: {name} takes none; it is for {takers}")
    for key, only in (("format", "auto"), ("loss_on", "completion"), ("mix", ())):
        if flat[f"data.{key}"] != only:
            raise UserError(f"config.data.{key}: preferences take {only!r} alone")
    _check_values(name, flat)
    _check_reference(name, flat)


def _check_values(name: str, flat: Mapping[str, Any]) -> None:
    rate = flat["objective.label_smoothing"]
    if name == "exo_pair" and not rate:
        raise UserError(
            "config.objective.label_smoothing: exo_pair needs a number above 0, as 1e-3"
        )
    if rate >= 0.5:
        raise UserError(
            f"config.objective.label_smoothing takes a number below 0.5, not {rate}: at 0.5 a label says nothing"
        )
    if name == "orpo" and flat["objective.sft_weight"]:
        raise UserError("config.objective.sft_weight: orpo has a likelihood term of its own")
    if name == "kto" and flat["objective.sft_weight"]:
        raise UserError("config.objective.sft_weight: kto has no chosen completions")
    if name == "kto" and flat["batch_size"] // flat["grad_accum"] < 2:
        raise UserError(
            "config.batch_size: kto measures the KL between the examples of a batch, of which "
            f"batch_size={flat['batch_size']} and grad_accum={flat['grad_accum']} leave one"
        )
    if flat["objective.wpo"] and name in ("kto", "aot", "aot_unpaired"):
        raise UserError(f"config.objective.wpo: {name} has no loss of a pair that could be weighed")


def _check_reference(name: str, flat: Mapping[str, Any]) -> None:
    reference, every = flat["objective.reference"], flat["objective.reference_every"]
    if reference == "none" and name == "kto":
        raise UserError("config.objective.reference: kto measures the KL to a reference")
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
