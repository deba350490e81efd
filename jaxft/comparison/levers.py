"""The levers: each what it needs, what it tunes and how its answer is asked for; one row apiece, the simplest first.

    lever          needs                 tunes by                     asked with
    prompt                               nothing                      the question
    examples       answers               nothing                      examples before it
    retrieval      documents             nothing                      passages before it
    lora ... full  answers               configs/sft.py:METHOD        the question
    raft           documents, answers    configs/sft.py:lora          passages before it
    dpo            pairs                 configs/dpo.py:lora          the question
    reinforcement  a grader              configs/rl.py:lora           the question

Nobody else compares a lever's name. To add one, add its row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from jaxft.comparison.asking import Asks, plainly, with_examples, with_passages
from jaxft.comparison.search import rate_at
from jaxft.errors import UserError, nearest

Setting = Mapping[str, Any]

# What a lever may need, and why it is left out where that is not given.
NEEDS = {
    "answers": "the training rows have no answers to learn from",
    "questions": "the training rows have no questions with their answers to show",
    "pairs": "the training rows have no chosen and rejected answers",
    "documents": "no documents are given (--documents PATH...)",
    "grader": "no grader is given (config.graders)",
}
WIDTH = 2048  # hidden numbers, for which the table's rates are meant
EDIT = "edit the documents and index them again: nothing is tuned anew"
AGAIN = "write new training rows and tune again"


@dataclasses.dataclass(frozen=True)
class Lever:
    """A row of the table.

    Attributes:
        name: as `config.levers` takes it.
        title: a few words for a reader.
        kind: where what is learned stands: "prompt", "retrieval", "adapter" or "weights".
        signal: what it learns from: "none", "examples", "preferences" or "rewards".
        facts: what is to be done when the facts change.
        needs: keys of `NEEDS`.
        recipe: of its tuning runs; "" tunes nothing.
        rows: what those train on, a key of `Given.files`.
        rate: around which learning rates are searched, for a model of width `WIDTH`.
        work: seconds of an update over those of lora, about; a guess for the time that is left.
        settings: keys of its recipe that are its own.
        asked: (what is given, setting, seed) -> what is put before the questions, or None.
        tries: configuration -> the settings that are tried where nothing is tuned.
        drawn: whether a seed changes it, so that several are measured.
        together: whether its runs train as a population: not where they train the base, or learn from what they say.
    """

    name: str
    title: str
    kind: str
    signal: str
    facts: str
    needs: tuple[str, ...] = ()
    recipe: str = ""
    rows: str = "answers"
    rate: float = 0.0
    work: float = 1.0
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    asked: Asks = plainly
    tries: Callable[[ConfigDict], Sequence[Setting]] = lambda config: ({},)
    drawn: bool = True
    together: bool = True


def middle_of(lever: Lever, width: int) -> float:
    """The rate around which those of a lever are searched: Adam's best rate goes as 1 / width (arXiv 2203.03466).

    >>> middle_of(LEVERS["lora"], 2048), middle_of(LEVERS["lora"], 256)
    (0.0003, 0.0024)
    """
    return rate_at(lever.rate * WIDTH / width, 0, 1.0)


def _tuned(method: str, title: str, rate: float, kind: str = "adapter", **more: Any) -> Lever:
    """A lever that learns from examples by a method."""
    given: dict[str, Any] = {
        "signal": "examples",
        "facts": AGAIN,
        "needs": ("answers",),
        "recipe": f"configs/sft.py:{method}",
    }
    return Lever(method, title, kind, rate=rate, **(given | more))


LEVERS: dict[str, Lever] = {
    row.name: row
    for row in (
        Lever(
            "prompt", "a plain prompt", "prompt", "none", "edit what the prompt says", drawn=False
        ),
        Lever(
            "examples",
            "examples in the prompt",
            "prompt",
            "examples",
            "edit the examples",
            ("questions",),
            asked=with_examples,
            tries=lambda config: [{"examples": count} for count in config.search.examples],
        ),
        Lever(
            "retrieval",
            "passages before the question",
            "retrieval",
            "none",
            EDIT,
            ("documents",),
            asked=with_passages,
            tries=lambda config: [{"passages": count} for count in config.search.passages],
            drawn=False,
        ),
        _tuned("lora", "LoRA", 3e-4),
        _tuned("vera", "VeRA", 1e-2),
        _tuned("lora_fa", "LoRA-FA", 1e-3),
        _tuned("qlora", "LoRA over a base of 4 bits", 3e-4, work=1.3),
        _tuned("dora", "DoRA", 3e-4, work=1.2),
        _tuned(
            "raft",
            "LoRA that reads passages",
            3e-4,
            kind="retrieval",
            facts=EDIT,
            needs=("answers", "documents"),
            recipe="configs/sft.py:lora",
            work=3.0,
            asked=with_passages,
        ),
        Lever(
            "dpo",
            "LoRA by preferences",
            "adapter",
            "preferences",
            AGAIN,
            ("pairs",),
            recipe="configs/dpo.py:lora",
            rows="pairs",
            rate=1e-4,
            work=2.5,
        ),
        Lever(
            "reinforcement",
            "LoRA by rewards",
            "adapter",
            "rewards",
            "tune again: the grader knows the new ones",
            ("grader",),
            recipe="configs/rl.py:lora",
            rows="prompts",
            rate=1e-4,
            work=10.0,
            settings={"data.packing": False},  # prompts are not packed
            together=False,
        ),
        _tuned("full", "full tuning", 3e-5, kind="weights", work=1.3, together=False),
    )
}


def chosen_levers(
    config: ConfigDict, given: Mapping[str, bool]
) -> tuple[list[Lever], dict[str, str]]:
    """The levers to measure, the simplest first, and of the others why not.

    Args:
        config: whose `levers` names some; () for all.
        given: of each key of `NEEDS`, whether it is there.

    Raises:
        UserError: an unknown name, or no lever that what is given allows.
    """
    for name in config.levers:
        if name not in LEVERS:
            close = nearest(str(name), LEVERS) or f"; there are: {', '.join(LEVERS)}"
            raise UserError(f"config.levers: unknown lever {name!r}{close}")
    allowed, left = list[Lever](), dict[str, str]()
    for name, lever in LEVERS.items():
        lacking = [NEEDS[need] for need in lever.needs if not given[need]]
        if config.levers and name not in config.levers:
            left[name] = "config.levers does not name it"
        elif lacking:
            left[name] = "; ".join(lacking)
        else:
            allowed.append(lever)
    if not allowed:
        why = "; ".join(f"{name}: {left[name]}" for name in config.levers)
        raise UserError(f"config.levers: none of them can be measured: {why}")
    return allowed, left
