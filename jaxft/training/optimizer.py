"""From `config.optimizer` and a method to one Optax transform over the trainable tree."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from jaxft.errors import UserError, counted
from jaxft.methods import Method
from jaxft.tree import PyTree, flatten_with_paths, label, require_matches
from jaxft.weights import is_weight, replace


def schedule(settings: ConfigDict, steps: int) -> optax.Schedule:
    """The learning rate of update n = 0, 1, ...: a warm-up in a line from 0, then the named course.

    With warm-up w, T steps in all, final fraction f and u = (n - w) / (T - w):

        linear    1 - (1 - f) u
        cosine    f + (1 - f) (1 + cos(pi u)) / 2
        constant  1
        wsd       1, then in a line to f over the last `decay_steps` (0: a tenth of T)

    times `learning_rate`, as in Optax and transformers; the first update's rate is 0 where w > 0.

    Raises:
        UserError: the warm-up, or the decay, is longer than the run.
    """
    peak, warmup = settings.learning_rate, settings.warmup_steps
    low, rest = peak * settings.final_fraction, max(steps - warmup, 1)
    if warmup > steps:
        raise UserError(
            f"config.optimizer.warmup_steps {warmup} exceeds the run's {counted(steps, 'update')}"
        )
    decay = settings.decay_steps or max(steps // 10, 1)
    if settings.schedule == "wsd" and decay > rest:
        raise UserError(
            f"config.optimizer.decay_steps {decay} exceeds the {counted(rest, 'update')} after the warm-up"
        )
    courses = {
        "linear": lambda: optax.linear_schedule(peak, low, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=settings.final_fraction),
        "constant": lambda: optax.constant_schedule(peak),
        "wsd": lambda: optax.linear_schedule(peak, low, decay, transition_begin=rest - decay),
    }
    course = courses[settings.schedule]()
    if not warmup:
        return course
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), course], [warmup])


def make_optimizer(
    settings: ConfigDict,
    method: Method,
    trainable: PyTree,
    steps: int,
    rate: optax.Schedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clipping, the method's preconditioner, the optimizer, and the method's factors on the rate.

    The transform sees the trainable tree alone. Its `update` takes the frozen tree as the extra argument
    `frozen`, which a preconditioner may read.

    Args:
        settings: `config.optimizer`.
        method: for its `learning_rates` and `precondition`.
        trainable: the trainable tree, abstract or not.
        steps: the run's updates, which the schedule spans.
        rate: the learning rate of each update, where it is not that of `schedule`.
    """
    parts: list[optax.GradientTransformation] = []
    if settings.clip_norm:
        parts.append(optax.clip_by_global_norm(settings.clip_norm))
    if method.precondition is not None:
        parts.append(_preconditioner(method))
    parts.append(_named(settings, trainable, rate or schedule(settings, steps)))
    if method.learning_rates:
        parts.append(_rates(method, trainable))
    return optax.with_extra_args_support(optax.chain(*parts))


def _named(
    settings: ConfigDict, trainable: PyTree, rate: optax.Schedule
) -> optax.GradientTransformation:
    """The Optax function of that name with the arguments it takes."""
    function = getattr(optax, settings.name)
    takes = inspect.signature(function).parameters
    arguments = dict(settings.options)
    if settings.name == "adamw":
        arguments |= {"b1": settings.b1, "b2": settings.b2, "eps": settings.epsilon}
    if "weight_decay" in takes:
        arguments["weight_decay"] = settings.weight_decay
        mask = next((name for name in ("mask", "weight_decay_mask") if name in takes), None)
        if mask:
            arguments[mask] = _decay_mask(settings, trainable)
    elif settings.weight_decay:
        raise UserError(
            f"config.optimizer.weight_decay: optax.{settings.name} takes none; set it to 0.0"
        )
    return function(rate, **arguments)


def _decay_mask(settings: ConfigDict, trainable: PyTree) -> PyTree:
    """True where `config.optimizer.decay` says that a leaf decays."""
    rules = [(pattern, bool(value)) for pattern, value in settings.decay]
    defaults = {"bias", "scale", "*"}  # these serve many families and may match nothing
    paths = [path for path, _ in flatten_with_paths(trainable)]
    own = [pattern for pattern, _ in rules if pattern not in defaults]
    require_matches(own, paths, "optimizer.decay")
    return label(trainable, rules, False)


def _preconditioner(method: Method) -> optax.GradientTransformationExtraArgs:
    """The method's function of (gradient, frozen) on every weight that it makes."""

    def update(
        updates: PyTree, state: Any, params: PyTree = None, *, frozen: PyTree, **_: Any
    ) -> Any:
        def one(gradient: Any, held: Any) -> Any:
            if method.weight is not None and isinstance(gradient, method.weight):
                return method.precondition(gradient, held)  # type: ignore[misc]
            return gradient

        whole = lambda leaf: leaf is None or is_weight(leaf)  # noqa: E731
        return jax.tree.map(one, updates, frozen, is_leaf=whole), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _rates(method: Method, trainable: PyTree) -> optax.GradientTransformation:
    """The method's factors on the updates: its optimizer groups."""
    factors = dict(method.learning_rates)

    def scale(leaf: Any) -> Any:
        if method.weight is None or not isinstance(leaf, method.weight):
            return leaf
        changes = {
            part: getattr(leaf, part) * jnp.asarray(factor, getattr(leaf, part).dtype)
            for part, factor in factors.items()
            if getattr(leaf, part) is not None
        }
        return replace(leaf, **changes)

    return optax.stateless(lambda updates, params: jax.tree.map(scale, updates, is_leaf=is_weight))
