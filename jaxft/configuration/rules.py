"""What values the keys take, beyond their type."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from jaxft.configuration.elsewhere import told_value
from jaxft.configuration.keys import conform, flatten, schema_of
from jaxft.configuration.populations import check_population
from jaxft.errors import UserError, nearest, shown
from jaxft.methods import TAKES, row_of
from jaxft.runtime.sandbox import check_moment
from jaxft.runtime.storage import is_remote
from jaxft.weights import STARTS

AUTO = "auto"
DTYPES = ("float32", "bfloat16", "float16")
REPORTS = ("tensorboard", "wandb", "trackio", "mlflow")
CHOICES: dict[str, tuple[str, ...]] = {
    "dtype": (AUTO, *DTYPES),
    "param_dtype": (AUTO, *DTYPES),
    "method.dtype": DTYPES,
    "method.init": STARTS,
    "base.quantize": ("none", "nf4", "fp4", "int4", "int8"),
    "data.format": ("auto", "prompt_completion", "messages", "text", "alpaca", "sharegpt"),
    "data.loss_on": ("completion", "all"),
    "data.on_unwritten": ("warn", "error"),
    "optimizer.schedule": ("linear", "cosine", "constant", "wsd"),
    "remat": ("none", "dots", "outputs", "full"),
    "objective.f_divergence": ("reverse_kl", "forward_kl", "js", "alpha"),
    "data.bad_rows": ("error", "skip"),
    "objective.kl": ("k1", "k2", "k3"),
    "objective.importance": ("token", "sequence"),
    "objective.scale": ("group", "batch", "none"),
    "objective.combine": ("sum", "normalize"),
}
# (how the values are described, whether one is so, the keys; a method may lack some of them)
RANGES: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    (
        "of at least 1",
        lambda value: value >= 1,
        (
            "batch_size",
            "data.retrieve_passages",
            "eval_batch_size",
            "grad_accum",
            "log_every",
            "checkpoint.keep",
            "checkpoint.local_every",
            "optimizer.max_bad_steps",
            "samples.max_new_tokens",
            "method.rank",
            "rollout.group",
            "rollout.max_new_tokens",
            "rollout.updates",
            "rollout.parts",
        ),
    ),
    (
        "of 0 or more",
        lambda value: value >= 0,
        (
            "seed",
            "steps",
            "epochs",
            "eval_every",
            "patience",
            "data.max_length",
            "checkpoint.every",
            "samples.count",
            "optimizer.warmup_steps",
            "optimizer.decay_steps",
            "optimizer.weight_decay",
            "optimizer.clip_norm",
            "method.start_step",
            "method.projection_seed",
            "objective.beta",
            "objective.gamma",
            "objective.sft_weight",
            "objective.reference_every",
            "objective.desirable_weight",
            "objective.undesirable_weight",
            "objective.epsilon",
            "objective.epsilon_high",
            "objective.delta",
            "rollout.slots",
            "rollout.top_k",
            "rollout.eval_temperature",
        ),
    ),
    (
        "above 0",
        lambda value: value > 0,
        (
            "optimizer.learning_rate",
            "optimizer.epsilon",
            "method.alpha",
            "method.ratio",
            "objective.tau",
            "rollout.temperature",
            "objective.entropy_share",
        ),
    ),
    ("from 0 to 1", lambda value: 0 <= value <= 1, ("rollout.top_p", "objective.entropy_share")),
    ("that is 0 or 1", lambda value: value in (0, 1), ("rollout.ahead",)),
    (
        "of at least 0 and below 1",
        lambda value: 0 <= value < 1,
        ("objective.label_smoothing", "optimizer.b1", "optimizer.b2", "method.dropout"),
    ),
    (
        "from 0 to 1",
        lambda value: 0 <= value <= 1,
        ("optimizer.final_fraction", "objective.reference_mix", "data.retrieve_oracle"),
    ),
    (
        "from 1, or -1 for a whole column,",
        lambda value: value >= 1 or value == -1,
        ("base.group_size",),
    ),
)
# Arguments of Optax's functions that keys of their own set.
OWN_KEYS = ("learning_rate", "weight_decay", "mask", "b1", "b2", "eps")


def validate(config: ConfigDict) -> None:
    """Raises UserError for a missing or unknown key, a wrong type and a value out of range."""
    check(flatten(conform(config, "configuration")))


def check(flat: dict[str, Any]) -> None:
    """Raises UserError for the first of the values, by full key, that is not what the key takes."""
    check_objective(flat)
    for key, choices in CHOICES.items():
        if key in flat:
            _choice(key, flat[key], choices)
    for saying, holds, keys in RANGES:
        for key in keys:
            if key in flat and not holds(flat[key]):
                raise UserError(f"config.{key} takes a number {saying}, not {shown(flat[key])}")
    for key, value in flat.items():
        if isinstance(value, int) and abs(value) >= 2**63:
            raise UserError(f"config.{key} takes a number of 64 bits, not {shown(value)}")
    for names, saying, holds in TAKES:
        for key in (f"method.{name}" for name in names):
            if key in flat and not holds(flat[key]):
                raise UserError(f"config.{key} takes {saying}, not {shown(flat[key])}")
    for name in flat["report_to"]:
        _choice("report_to", name, REPORTS)
    check_population(flat)
    _mix(flat["data.mix"])
    _ignore(flat["data.ignore"])
    check_moment(flat["data.date"], "config.data.date")
    _length(flat)
    _held_out(flat)
    _half(flat)
    _local(flat["checkpoint.local"])
    _mesh(flat)
    _decay(flat["optimizer.decay"])
    if flat["optimizer.name"] != "adamw" or flat["optimizer.options"]:
        _optimizer(flat["optimizer.name"], flat["optimizer.options"])


def _half(flat: dict[str, Any]) -> None:
    """float16 holds no number below 6e-8: gradients vanish in it without a loss scale, which there is none of."""
    trains_base = row_of(str(flat["method.name"]))().weight is None
    for key in ("dtype", *(("param_dtype",) if trains_base else ())):
        if flat[key] == "float16":
            raise UserError(
                f"config.{key}: gradients vanish in float16 without a loss scale, which jaxft does not have: take "
                "bfloat16, or float32"
            )


def check_objective(flat: dict[str, Any]) -> None:
    """Raises UserError for an objective that there is not, or whose settings do not go together."""
    from jaxft.objectives import OBJECTIVES

    name, defaults = flat["objective.name"], flatten(schema_of(flat))
    if name in OBJECTIVES and defaults.keys() == flat.keys():
        changed = {key for key, value in flat.items() if value != defaults[key]}
        return OBJECTIVES[name].check(flat, changed)
    fit = [
        other
        for other in OBJECTIVES
        if flatten(schema_of(flat | {"objective.name": other})).keys() == flat.keys()
    ]
    close = (
        told_value("objective.name", name)
        or nearest(str(name), fit)
        or nearest(str(name), OBJECTIVES)
    )
    if name in OBJECTIVES:
        file = OBJECTIVES[name].recipe
        close = f"; {name} begins with another recipe, as {file}:{flat['method.name']}"
    raise UserError(f"config.objective.name takes {' | '.join(fit)} here, not {shown(name)}{close}")


def optimizers() -> dict[str, Any]:
    """Optax's optimizers by name: functions of a learning rate that need no value of the loss."""
    import optax

    functions = {name: getattr(optax, name) for name in dir(optax) if name.islower()}
    return {
        name: function
        for name, function in functions.items()
        if inspect.isfunction(function)
        and "learning_rate" in inspect.signature(function).parameters
        and not name.startswith(("_", "scale_by_"))
        and name != "lbfgs"
    }


def _choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        close = told_value(key, value) or nearest(str(value), choices)
        raise UserError(f"config.{key} takes {' | '.join(choices)}, not {shown(value)}{close}")


def _mix(weights: tuple[Any, ...]) -> None:
    for weight in weights:
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < 1e9:
            raise UserError(
                f"config.data.mix takes weights above 0, such as 3,1, not {shown(weight)}"
            )


def _ignore(keys: tuple[Any, ...]) -> None:
    for key in keys:
        if not isinstance(key, str) or not key:
            raise UserError(
                f"config.data.ignore takes keys of the rows, such as context,notes, not {shown(key)}"
            )


def _length(flat: dict[str, Any]) -> None:
    if flat["batch_size"] % flat["grad_accum"]:
        raise UserError(
            f"config.batch_size {flat['batch_size']} does not divide into"
            f" config.grad_accum {flat['grad_accum']} equal parts"
        )
    if flat["steps"] == 0 and flat["epochs"] == 0:
        raise UserError("config.steps and config.epochs are both 0: nothing would be trained")


def _local(folder: str) -> None:
    if is_remote(folder):
        raise UserError(f"config.checkpoint.local: a folder on each host's own disk, not {folder}")


def _held_out(flat: dict[str, Any]) -> None:
    sets = flat["data.eval"]
    for key in ("patience", "checkpoint.best", "eval_metrics"):
        if flat[key] and not sets:
            raise UserError(f"config.{key} needs held-out data: set config.data.eval")
    for name, path in sets.items() if isinstance(sets, dict) else ():
        if not isinstance(name, str) or not name or not isinstance(path, str) or not path:
            raise UserError(
                f"config.data.eval takes names and files, not {shown(name)}: {shown(path)}"
            )


def _mesh(flat: dict[str, Any]) -> None:
    sizes = {key: size for key, size in flat.items() if key.startswith("mesh.")}
    for key, size in sizes.items():
        if size < 1 and size != -1:
            raise UserError(f"config.{key} takes a number of devices or -1 (the rest), not {size}")
    rest = [f"config.{key}" for key, size in sizes.items() if size == -1]
    if len(rest) > 1:
        both = "both" if len(rest) == 2 else "all"
        raise UserError(f"{' and '.join(rest)} cannot {both} be -1: only one can take the rest")


def _decay(decay: tuple[Any, ...]) -> None:
    for rule in decay:
        if (
            not isinstance(rule, tuple)
            or len(rule) != 2
            or not isinstance(rule[0], str)
            or not isinstance(rule[1], bool)
        ):
            raise UserError(
                f"config.optimizer.decay takes pairs such as ('bias', False), not {shown(rule)}"
            )


def _optimizer(name: str, options: dict[str, Any]) -> None:
    known = optimizers()
    if name not in known:
        close = (
            told_value("optimizer.name", name)
            or nearest(name, known)
            or f"; there are: {', '.join(known)}"
        )
        raise UserError(f"config.optimizer.name: Optax has no optimizer {shown(name)}{close}")
    parameters = [key for key in inspect.signature(known[name]).parameters if key not in OWN_KEYS]
    for key in options:
        if key not in parameters:
            close = nearest(key, parameters) or f"; there are: {', '.join(parameters)}"
            raise UserError(f"config.optimizer.options: {name} has no argument {shown(key)}{close}")
