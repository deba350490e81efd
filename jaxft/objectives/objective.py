"""The objectives: what a run makes of its data, and what it minimises; one row apiece.

    objective        a row of examples is    its loss                        a frozen reference
    sft              a text                  cross entropy of its tokens     none
    dpo, ipo, ...    a pair of completions   a loss of `preference.py`       asked, but by simpo, cpo and orpo
    kto              a judged completion     `preference.kto`                asked
    grpo, dapo, ...  a prompt                a loss of `policy.py`           asked where beta is not 0

Nobody else compares an objective's name: what differs between objectives stands in the row. To add one see
CONTRIBUTING.md.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple

from ml_collections import ConfigDict

from jaxft.data.feed import Feed, Fixed
from jaxft.objectives.comparisons import JUDGED, PAIRS
from jaxft.objectives.completions import policy_objective, reference_tokens, with_items
from jaxft.objectives.kind import Kind
from jaxft.objectives.pairs import (
    LOSSES,
    completion_log_probabilities,
    preference_loss,
    settings_of,
    with_likelihood_scale,
)
from jaxft.objectives.prompted import PROMPTS
from jaxft.objectives.rewarding import REWARDING, asks_reference, check_rewarded
from jaxft.objectives.rewarding import settings_of as rewarding_settings
from jaxft.objectives.rollouts import Rollouts
from jaxft.objectives.rules import check_preferences
from jaxft.objectives.sft import sft
from jaxft.objectives.texts import TEXTS

Settings = Mapping[str, Any]
Batch = Mapping[str, Any]
Loss = Callable[..., tuple[Any, Any]]


class Metric(NamedTuple):
    """A number that a run reports.

    Attributes:
        name: as in metrics.jsonl.
        per: what its sum is divided by: "token", "pair", ...
        better: which way it gets better; "" for neither.
    """

    name: str
    per: str
    better: Literal["lower", "higher", ""] = ""


TOKENS_LOSS = Metric("loss", "token", "lower")


def by_keys(loss: Loss) -> Callable[[Settings], Loss]:
    """What makes a loss of settings: its keyword-only arguments are the keys of `config.objective` of their names."""
    parameters = inspect.signature(loss).parameters.values()
    keys = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
    return lambda settings: functools.partial(loss, **{key: settings[key] for key in keys})


def nothing_noted(settings: Settings) -> Callable[[Batch], Batch]:
    """For objectives that note nothing in a batch before it is taken in parts."""
    del settings
    return dict


def always(settings: Settings) -> bool:
    """For objectives that ask their reference whatever the settings."""
    del settings
    return True


def nothing_refused(flat: Mapping[str, Any], changed: Collection[str]) -> None:
    """For objectives whose settings all go together."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """A row of the table.

    Attributes:
        name: `config.objective.name`.
        recipe: the file whose `get_config(method)` holds the keys and their defaults.
        loss: settings of `config.objective` -> the pure loss (decoder's config, params, batch, *reference) -> (sum,
            what is counted beside it: a `Counted`, or the number of tokens alone). Of an objective with a reference it
            also takes `reference_config`, the shape of the reference's tree.
        metrics: what the loss reports, and how. The first is the loss itself.
        best: the one of them by which, on held-out data, the best checkpoint is chosen.
        examples: what rows of data become, how they stand in a batch, and what a batch is before data are read.
        prepare: settings -> (batch -> batch): what is noted in the whole batch before it is taken in parts.
        reference: (decoder's config, params, batch) -> what the loss asks a frozen policy; None where it asks none.
            Its recipe then has the keys reference, reference_every, reference_mix and reference_offload.
        asks: settings -> whether they ask the reference at all.
        ahead: who asks the reference: the feed, once for each batch that it makes, and not the step.
        samples: its feed samples from the policy, and gets what that takes.
        feed: (batches, given) -> what gives the loop its batches: of data that stay as they are, `Fixed`.
        check: (each key's value by its full name, the keys that are not at their default) -> None; raises
            UserError for settings that do not go together.
    """

    name: str
    recipe: str
    loss: Callable[[Settings], Loss]
    metrics: tuple[Metric, ...] = (TOKENS_LOSS,)
    best: Metric = TOKENS_LOSS
    examples: Kind = TEXTS
    prepare: Callable[[Settings], Callable[[Batch], Batch]] = nothing_noted
    reference: Callable[..., Any] | None = None
    asks: Callable[[Settings], bool] = always
    ahead: bool = False
    samples: bool = False
    feed: Callable[..., Feed] = Fixed
    check: Callable[[Mapping[str, Any], Collection[str]], None] = nothing_refused


def preference(name: str) -> Objective:
    """The row of a loss of `jaxft.objectives.pairs.LOSSES`."""
    loss = LOSSES[name]
    metrics = _metrics("judged completion" if loss.judged else "pair", judged=loss.judged)
    return Objective(
        name=name,
        recipe="configs/dpo.py",
        loss=lambda settings: functools.partial(preference_loss, settings=settings_of(settings)),
        metrics=metrics,
        best=metrics[0],
        examples=JUDGED if loss.judged else PAIRS,
        prepare=lambda settings: functools.partial(
            with_likelihood_scale, settings=settings_of(settings)
        ),
        reference=None if loss.free else completion_log_probabilities,
        check=check_preferences,
    )


REWARD = Metric("reward", "completion", "higher")
OF_REWARDS = (
    Metric("loss", "completion"),
    REWARD,
    Metric("held_out/reward", "completion", "higher"),
    Metric("rewards/", "completion", "higher"),  # of each grader
    Metric("reward_std", "completion"),
    Metric("frac_reward_zero_std", "prompt", "lower"),
    Metric("completions/mean_length", "completion"),
    Metric("completions/max_length", "completion"),
    Metric("completions/clipped_ratio", "completion", "lower"),
    Metric("entropy", "token"),
    Metric("kl", "token"),
    Metric("clip_ratio/", "token"),
    Metric("cispo_clip_ratio", "token"),
    Metric("rollout/", "completion"),
)


def rewarded(name: str) -> Objective:
    """The row of a loss of `jaxft.objectives.policy.LOSSES`."""
    return Objective(
        name=name,
        recipe="configs/rl.py",
        loss=lambda settings: functools.partial(
            policy_objective, settings=rewarding_settings(settings)
        ),
        metrics=OF_REWARDS,
        best=REWARD,
        examples=PROMPTS,
        prepare=lambda settings: with_items,
        reference=reference_tokens,
        asks=asks_reference,
        ahead=True,
        samples=True,
        feed=Rollouts,
        check=check_rewarded,
    )


def _metrics(per: str, *, judged: bool) -> tuple[Metric, ...]:
    """What losses of preferences report, named as in TRL."""
    own = (
        ()
        if judged
        else (Metric("rewards/accuracies", per, "higher"), Metric("nll", "token", "lower"))
    )
    chosen, rejected = ("desirable", "undesirable") if judged else (per, per)
    return (
        Metric("loss", per, "lower"),
        *own,
        Metric("rewards/margins", per, "higher"),
        Metric("rewards/chosen", chosen, "higher"),
        Metric("rewards/rejected", rejected, "lower"),
        Metric("logps/chosen", chosen),
        Metric("logps/rejected", rejected),
        Metric("lengths/chosen", chosen),
        Metric("lengths/rejected", rejected),
        Metric("kl", per if judged else "token"),
    )


OBJECTIVES: dict[str, Objective] = {
    row.name: row
    for row in (
        Objective("sft", "configs/sft.py", by_keys(sft)),
        *map(preference, LOSSES),
        *map(rewarded, REWARDING),
    )
}


def has_reference(config: ConfigDict) -> bool:
    """Whether a run of this configuration asks a frozen reference."""
    row, settings = objective_of(config), config.objective
    return row.reference is not None and row.asks(settings) and settings.reference != "none"


def objective_of(config: ConfigDict) -> Objective:
    """The row that `config.objective` names."""
    return OBJECTIVES[config.objective.name]
