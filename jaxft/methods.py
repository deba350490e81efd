"""The methods of fine-tuning: each a tree transform plus a partition, one row apiece.

    method      transform          trainable leaves          optimizer groups
    full        none               everything                one
    lora        LoRA               a, b                      one
    rslora      LoRA, alpha/sqrt r a, b                      one
    lora_plus   LoRA               a, b                      b at the rate x ratio
    lora_fa     LoRA               b                         one
    lora_fa_v2  LoRA               b                         one, b's gradient preconditioned
    vera        VeRA               d, g                      one
    dora        DoRA               a, b, magnitude           one
    delta_lora  DeltaLoRA          a, b                      one

A row's settings compose: `dora(trainable=("b", "magnitude"))` is DoRA under LoRA-FA's partition, and
`dora(rank_stabilized=True)` takes rsLoRA's scale. To add a method see CONTRIBUTING.md.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxft.errors import UserError, nearest, shown
from jaxft.tree import PyTree
from jaxft.weights import (
    STARTS,
    DeltaLoRA,
    DoRA,
    LoRA,
    Site,
    VeRA,
    Weight,
    map_weights,
    precondition_by_a,
    projections,
)


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table with its settings.

    Attributes:
        name: the row's name.
        transform: makes the weight that stands for a kernel, from its `Site`; None for no transform.
        weight: the kind of weight that it makes.
        trainable: the parts of that weight that train; ("*",) with no transform: every leaf.
        shared: makes what stands once in the tree for all sites.
        projection_seed: from which that draws.
        rank: the inner width r of an adapter.
        alpha: the numerator of the factor s = alpha / rank.
        rank_stabilized: s = alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732).
        dropout: the rate on the adapter's input.
        dtype: that of the adapter's arrays.
        targets: patterns of the kernels to adapt; () for all projections, as "all-linear" is.
        rank_pattern: {regular expression over module names: rank}, as in PEFT, layer by layer.
        alpha_pattern: the same for alpha.
        layers_to_transform: indices of the layers to adapt; () for all.
        train_also: patterns of further leaves that train (norms, biases, the head, the embedding).
        tie_adapters: an adapter on a tied embedding also acts in the head.
        trainable_token_indices: ids of tokens whose rows of the embedding train, and of a head tied to it; in Python
            also {pattern: ids} for the embedding and the head, as {"embed": ids, "head": ids}.
        init: how an adapter begins: default (it changes nothing), loftq (arXiv 2310.08659: it makes up for what
            quantizing the base lost) or pissa (arXiv 2404.02948: at the kernel's principal parts).
        init_iterations: how often loftq, or pissa over a quantized base, alternates between rounding and SVD.
        learning_rates: (part, factor) of the optimizer's groups.
        precondition: (gradient weight, frozen weight) -> gradient weight, applied before the optimizer.
        adopt: makes the method's weight from a LoRA read from a folder, where it is another kind.
        without: the settings that this row refuses, with the reason.
        events: (step, tree transform) applied to the parameters before that update.
    """

    name: str
    transform: Callable[[Site], Weight] | None = None
    weight: type[Weight] | None = None
    trainable: tuple[str, ...] = ("*",)
    shared: Callable[[Sequence[Site], int], dict[str, Any]] | None = None
    projection_seed: int = 0
    rank: int = 16
    alpha: float = 32.0
    rank_stabilized: bool = False
    dropout: float = 0.0
    dtype: str = "float32"
    targets: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    layers_to_transform: tuple[int, ...] = ()
    train_also: tuple[str, ...] = ()
    tie_adapters: bool = False
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] = ()
    init: str = "default"
    init_iterations: int = 1
    learning_rates: tuple[tuple[str, float], ...] = ()
    precondition: Callable[[Any, Any], Any] | None = None
    adopt: Callable[[Any], Weight] | None = None
    without: Mapping[str, str] = dataclasses.field(default_factory=dict)
    events: tuple[tuple[int, Callable[[PyTree], PyTree]], ...] = ()


# What a user sets on any adapter; the other fields of `Method` are the row's own.
SETTINGS = (
    "rank",
    "alpha",
    "rank_stabilized",
    "dropout",
    "dtype",
    "targets",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "trainable",
    "train_also",
    "tie_adapters",
    "trainable_token_indices",
    "init",
    "init_iterations",
)


# PEFT's names for them, where they are others.
PEFT = {
    "r": "rank",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "modules_to_save": "train_also",
    "use_rslora": "rank_stabilized",
    "init_lora_weights": "init",
}
DTYPES = ("float32", "bfloat16", "float16")
# (the settings, what they take, whether a value is so)
TAKES: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (("rank",), "a whole number from 1", lambda value: _whole(value) and value >= 1),
    (("alpha",), "a number above 0", lambda value: _number(value) and value > 0),
    (("init",), " | ".join(STARTS), lambda value: value in STARTS),
    (("init_iterations",), "a whole number from 1", lambda value: _whole(value) and value >= 1),
    (("dropout",), "a rate of at least 0 and below 1", lambda x: _number(x) and 0 <= x < 1),
    (
        ("rank_pattern",),
        "a mapping of patterns to whole numbers from 0",
        lambda value: _mapping(value, lambda rank: _whole(rank) and rank >= 0),
    ),
    (
        ("alpha_pattern",),
        "a mapping of patterns to numbers above 0",
        lambda value: _mapping(value, lambda alpha: _number(alpha) and alpha > 0),
    ),
    (("layers_to_transform",), "a list of layers", lambda value: _list(value, _whole)),
    (
        ("trainable_token_indices",),
        "a list of token ids",
        lambda value: _list(value, _whole) or _mapping(value, lambda ids: _list(ids, _whole)),
    ),
    (
        ("targets", "trainable", "train_also"),
        "a list of patterns",
        lambda value: _list(value, lambda pattern: isinstance(pattern, str)),
    ),
)


# Why a row whose weight is no plain LoRA begins in no other way.
OWN_START = dict.fromkeys(("init", "init_iterations"), "it is a way to begin LoRA")


def _whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and abs(float(value)) < float("inf")  # NaN is not


def _list(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(map(holds, value))


def _mapping(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(key, str) and holds(part) for key, part in value.items()
    )


def _check_settings(name: str, user: Mapping[str, Any]) -> None:
    for keys, takes, holds in TAKES:
        for key in keys:
            if key in user and not holds(user[key]):
                raise UserError(f"method {name}: {key} takes {takes}, not {shown(user[key])}")
    if "dtype" in user:
        known_dtype(user["dtype"], f"method {name}")


def known_dtype(name: Any, where: str) -> Any:
    """The dtype of that name. Raises UserError that begins with `where` for one that is not known."""
    try:
        dtype = jnp.dtype(name)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in DTYPES:
        close = nearest(str(name), DTYPES)
        raise UserError(f"{where}: dtype {shown(name)} is not known{close}: {', '.join(DTYPES)}")
    return dtype


def _row(
    name: str, weight: type[Any], trainable: tuple[str, ...], user: dict[str, Any], **own: Any
) -> Method:
    """A row of the table: what is the method's `own`, then the `user`'s settings over it."""
    begins = {} if weight is LoRA else OWN_START
    own["without"] = begins | own.get("without", {})
    row = Method(
        **{"name": name, "weight": weight, "transform": weight.at, "trainable": trainable} | own
    )
    allowed = [setting for setting in SETTINGS if setting not in row.without]
    lists = ("targets", "trainable", "train_also")
    user = {k: (v,) if k in lists and isinstance(v, str) else v for k, v in user.items()}
    for key, value in user.items():
        if key in row.without:
            raise UserError(f"method {name} takes no {key}: {row.without[key]}")
        if key not in allowed:
            ours = f"; here it is {PEFT[key]!r}" if key in PEFT else nearest(key, allowed)
            raise UserError(f"method {name}: unknown setting {key!r}{ours}")
        if key == "trainable":
            fields = dataclasses.fields(
                weight
            )  # not the static ones, nor those filled in by binding
            parts = [
                f.name for f in fields if not f.metadata.get("static") and f.default is not None
            ]
            for part in value:
                if part not in parts:
                    raise UserError(
                        f"method {name}: no part {part!r} to train{nearest(str(part), parts)}"
                    )
    _check_settings(name, user)
    return dataclasses.replace(row, **user)


def full() -> Method:
    """Full tuning: every leaf trains and the tree stays as it is."""
    return Method("full")


def lora(**settings: Any) -> Method:
    """LoRA (arXiv 2106.09685): `W + s a b`, with a and b trained."""
    return _row("lora", LoRA, ("a", "b"), settings)


def rslora(**settings: Any) -> Method:
    """Rank-stabilized LoRA (arXiv 2312.03732, theorem 3.2): LoRA with s = alpha / sqrt(rank)."""
    return _row("rslora", LoRA, ("a", "b"), settings, rank_stabilized=True)


def lora_plus(ratio: float = 16.0, **settings: Any) -> Method:
    """LoRA+ (arXiv 2402.12354): LoRA whose b learns at `ratio` times a's rate."""
    return _row("lora_plus", LoRA, ("a", "b"), settings, learning_rates=(("b", ratio),))


def lora_fa(**settings: Any) -> Method:
    """LoRA-FA (arXiv 2308.03303): LoRA whose a stays at its random start; the backward pass keeps `x a`, not x."""
    return _row("lora_fa", LoRA, ("b",), settings)


def lora_fa_v2(**settings: Any) -> Method:
    """LoRA-FA as PEFT ships it: b's gradient times (a^T a)^-1 / s^2 before the optimizer."""
    return _row("lora_fa_v2", LoRA, ("b",), settings, precondition=precondition_by_a)


def vera(d_initial: float = 0.1, projection_seed: int = 0, **settings: Any) -> Method:
    """VeRA (arXiv 2310.11454): shared frozen random a, b; the vectors d and g trained."""
    return _row(
        "vera",
        VeRA,
        ("d", "g"),
        settings,
        rank=256,
        transform=functools.partial(VeRA.at, d_initial=d_initial),
        shared=projections,
        projection_seed=projection_seed,
        without={
            "alpha": "the paper has no scale",
            "alpha_pattern": "the paper has no scale",
            "rank_stabilized": "the paper has no scale",
            "rank_pattern": "all layers share two projections of one rank",
            "tie_adapters": "PEFT's format holds no VeRA on an embedding",
            "trainable_token_indices": "PEFT's format holds no rows of tokens beside VeRA",
        },
    )


def dora(**settings: Any) -> Method:
    """DoRA (arXiv 2402.09353): `m (W + s a b) / |W + s a b|`, with a, b and m trained."""
    return _row("dora", DoRA, ("a", "b", "magnitude"), settings)


def delta_lora(factor: float = 2.0, start_step: int = 0, **settings: Any) -> Method:
    """Delta-LoRA (arXiv 2309.02411): from `start_step` on, W moves by `factor` s times a b's change."""
    begin = functools.partial(map_weights, DeltaLoRA, lambda weight: weight.start(factor))
    return _row(
        "delta_lora",
        DeltaLoRA,
        ("a", "b"),
        settings,
        transform=functools.partial(DeltaLoRA.at, factor=factor, start_step=start_step),
        events=((start_step, begin),) if start_step else (),
        adopt=functools.partial(DeltaLoRA.from_lora, factor=0.0 if start_step else factor),
        without={"dropout": "the paper leaves it out (section 4)"},
    )


METHODS: dict[str, Callable[..., Method]] = {
    row.__name__: row
    for row in (full, lora, rslora, lora_plus, lora_fa, lora_fa_v2, vera, dora, delta_lora)
}


def row_of(name: str) -> Callable[..., Method]:
    """The row of that name. Raises UserError with the nearest names for an unknown one."""
    if name not in METHODS:
        known = ", ".join(METHODS)
        raise UserError(
            f"unknown method {shown(name)}{nearest(name, METHODS) or f' (known: {known})'}"
        )
    return METHODS[name]


def defaults(name: str) -> dict[str, Any]:
    """Every setting of a row with its default: what a configuration's `method` holds.

    >>> defaults("full")
    {}
    >>> defaults("lora_plus")["ratio"], defaults("vera")["rank"], defaults("lora")["trainable"]
    (16.0, 256, ('a', 'b'))
    """
    parameters = inspect.signature(row_of(name)).parameters.values()
    own = {p.name: p.default for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}
    if own.keys() == {p.name for p in parameters}:
        return own
    row = row_of(name)()
    common = {setting: getattr(row, setting) for setting in SETTINGS if setting not in row.without}
    return common | own
