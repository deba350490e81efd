"""The table of graders: what each kind is told, and how it judges."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxft.errors import UserError, row_of
from jaxft.objectives.graders import asking, similarity
from jaxft.objectives.graders.formula import parsed, value_of
from jaxft.objectives.graders.similarity import MEASURES, check_installed
from jaxft.objectives.graders.templates import Missing, filled
from jaxft.runtime.sandbox import call_function, verdicts

Settings = Mapping[str, Any]


class Judged(NamedTuple):
    """What a grader says of an answer.

    Attributes:
        reward: the number; None where the answer cannot be judged.
        reason: why it cannot, in one line.
    """

    reward: float | None
    reason: str = ""


class Case(NamedTuple):
    """What is judged.

    Attributes:
        item: the row of data that asked.
        sample: the answer: `output_text`, and `output_json` where that is JSON (else None).
        ids: the tokens of the answer, for functions that ask for `completion_ids`.
    """

    item: Mapping[str, Any]
    sample: Mapping[str, Any]
    ids: Sequence[int] = ()


class Outside(NamedTuple):
    """What graders ask and do not have themselves.

    Attributes:
        ask: (model, conversations, sampling) -> answers: a model's folder, for `score_model` without a url.
        embed: texts -> (texts, features): for `text_similarity` by cosine.
    """

    ask: Callable[[str, Sequence[Any], Mapping[str, Any]], Sequence[str]] | None = None
    embed: Callable[[Sequence[str]], np.ndarray] | None = None


class Grader(NamedTuple):
    """A grader that was read.

    Attributes:
        kind: its `type`, a key of `KINDS`.
        name: unique among those it was read with.
        settings: every field of its kind, defaults filled in; of a `multi`, `graders` are Graders.
        weight: of its reward in the sum.
    """

    kind: str
    name: str
    settings: Settings
    weight: float = 1.0


class Field(NamedTuple):
    """What a field of a grader holds: values of these types; `default` is () where it must be given."""

    types: tuple[type, ...]
    default: Any = ()
    choices: tuple[str, ...] = ()


class Kind(NamedTuple):
    """A kind of grader.

    Attributes:
        fields: by name, beside `type`, `name` and `weight`, which all have.
        judge: says of each case what it is worth.
        check: raises UserError for settings that could not judge anything.
        templates: the fields that hold placeholders for the item and the answer.
    """

    fields: Mapping[str, Field]
    judge: Callable[[Settings, Sequence[Case], Outside], list[Judged]]
    check: Callable[[Settings], Any] = lambda settings: None
    templates: tuple[str, ...] = ("input", "reference")


TEXT = (str,)
TEMPLATE = Field(TEXT)
ANSWER = Field(TEXT, "{{ sample.output_text }}")


def of_texts(function: Callable[..., float]) -> Callable[..., list[Judged]]:
    """A judge by (settings, input, reference), case by case."""

    def one(settings: Settings, texts: list[str] | Judged) -> Judged:
        if isinstance(texts, Judged):
            return texts
        try:
            return Judged(float(function(settings, *texts)))
        except similarity.TooLong as error:
            return Judged(None, str(error))

    def judge(settings: Settings, cases: Sequence[Case], outside: Outside) -> list[Judged]:
        return [one(settings, texts) for texts in _texts(settings, cases, ("input", "reference"))]

    return judge


def _texts(
    settings: Settings, cases: Sequence[Case], names: Sequence[str]
) -> list[list[str] | Judged]:
    """The templates of each case, filled; a verdict where the item lacks something."""

    def one(case: Case) -> list[str] | Judged:
        try:
            return [filled(settings[name], case.item, case.sample) for name in names]
        except Missing as error:
            return Judged(None, str(error))

    return [one(case) for case in cases]


OPERATIONS: dict[str, Callable[[str, str], bool]] = {
    "eq": lambda said, reference: said == reference,
    "ne": lambda said, reference: said != reference,
    "like": lambda said, reference: reference in said,
    "ilike": lambda said, reference: reference.casefold() in said.casefold(),
}


def _string_check(settings: Settings, said: str, reference: str) -> float:
    return OPERATIONS[settings["operation"]](said, reference)


def _similarity(settings: Settings, cases: Sequence[Case], outside: Outside) -> list[Judged]:
    name = settings["evaluation_metric"]
    if name in MEASURES:
        by_measure = of_texts(lambda _, said, reference: MEASURES[name](said, reference))
        return by_measure(settings, cases, outside)
    if outside.embed is None:
        raise UserError(
            "text_similarity by cosine compares embeddings, and there are none here: choose another evaluation_metric"
        )
    embed = outside.embed

    def cosine(_: Settings, said: str, reference: str) -> float:
        left, right = np.asarray(embed([said, reference]), np.float64)
        length = np.linalg.norm(left) * np.linalg.norm(right)
        return float(left @ right / length) if length else 0.0

    return of_texts(cosine)(settings, cases, outside)


def in_sandbox(
    action: str, shared: Sequence[str], each: Sequence[str]
) -> Callable[..., list[Judged]]:
    """A judge that runs in processes of its own: fields that cases share, and templates filled for each."""

    def judge(settings: Settings, cases: Sequence[Case], outside: Outside) -> list[Judged]:
        given = [name for name in each if settings[name] is not None]
        texts = _texts(settings, cases, given)
        names = ["text" if name == "input" else name for name in given]
        asked = [dict(zip(names, one, strict=True)) for one in texts if not isinstance(one, Judged)]
        found = iter(verdicts(action, {name: settings[name] for name in shared}, asked))
        return [one if isinstance(one, Judged) else Judged(*next(found)) for one in texts]

    return judge


def _python(settings: Settings, cases: Sequence[Case], outside: Outside) -> list[Judged]:
    each = [{"item": case.item, "sample": case.sample} for case in cases]
    return [Judged(*one) for one in verdicts("python", {"source": settings["source"]}, each)]


def _function(settings: Settings, cases: Sequence[Case], outside: Outside) -> list[Judged]:
    each = [{"item": case.item, "sample": case.sample, "ids": list(case.ids)} for case in cases]
    return [Judged(*one) for one in call_function(settings["function"], each)]


def _multi(settings: Settings, cases: Sequence[Case], outside: Outside) -> list[Judged]:
    parts = {
        grader.name: KINDS[grader.kind].judge(grader.settings, cases, outside)
        for grader in settings["graders"]
    }
    tree = parsed(settings["calculate_output"], parts)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & parts.keys()

    def one(index: int) -> Judged:
        for name in sorted(used):
            if parts[name][index].reward is None:
                return Judged(None, f"{name}: {parts[name][index].reason}")
        rewards = {name: parts[name][index].reward or 0.0 for name in used}
        try:
            value = value_of(tree, rewards)
        except (ArithmeticError, ValueError, TypeError, RecursionError) as error:
            return Judged(None, f"the formula has no value: {error}")
        return Judged(value) if np.isfinite(value) else Judged(None, f"the formula gives {value}")

    return [one(index) for index in range(len(cases))]


def _score_model(settings: Settings, cases: Sequence[Case], outside: Outside) -> list[Judged]:
    talks: list[Any] = []
    for case in cases:
        try:
            talks.append(asking.conversation(settings, case.item, case.sample))
        except Missing as error:
            talks.append(Judged(None, str(error)))
    asked = [talk for talk in talks if not isinstance(talk, Judged)]
    model, sampling = settings["model"], settings["sampling_params"]
    answers: Sequence[str | Exception]
    if settings["url"]:
        answers = asking.ask_url(settings["url"], model, asked, sampling)
    elif outside.ask is None:
        raise UserError(
            "score_model: no model can be asked here but by its url: give url, as http://127.0.0.1:8000/v1"
        )
    else:
        answers = outside.ask(model, asked, sampling)
    left = iter(answers)
    return [
        talk if isinstance(talk, Judged) else Judged(*asking.score(next(left), settings["range"]))
        for talk in talks
    ]


def _check_tried(action: str, *shared: str, answer: str = "") -> Callable[[Settings], None]:
    """A check that runs the judge once, on `answer`, so that settings it cannot use are refused before the run.

    Args:
        action: the judge, in the sandbox.
        shared: the settings that it is given, the same for all cases; of none, it is not run.
        answer: what it judges.
    """

    def check(settings: Settings) -> None:
        check_installed(action)
        if shared:
            [(_, reason)] = verdicts(action, {name: settings[name] for name in shared}, [{"text": answer}])  # fmt: skip
            if reason:
                raise UserError(f"{shared[0]}: {reason}")

    return check


def _check_source(settings: Settings) -> None:
    [(_, reason)] = verdicts("compiles", {"source": settings["source"]}, [{}])
    if reason:
        raise UserError(f"source: {reason}")


def _check_similarity(settings: Settings) -> None:
    check_installed(settings["evaluation_metric"])


def _check_formula(settings: Settings) -> None:
    parsed(settings["calculate_output"], [grader.name for grader in settings["graders"]])


def _check_function(settings: Settings) -> None:
    call_function(settings["function"], [])


NUMBER = (int, float)
KINDS: dict[str, Kind] = {
    "string_check": Kind(
        {
            "input": TEMPLATE,
            "reference": TEMPLATE,
            "operation": Field(TEXT, choices=tuple(OPERATIONS)),
        },
        of_texts(_string_check),
    ),
    "text_similarity": Kind(
        {
            "input": TEMPLATE,
            "reference": TEMPLATE,
            "evaluation_metric": Field(TEXT, choices=(*MEASURES, "cosine")),
            "pass_threshold": Field(
                NUMBER, None
            ),  # OpenAI's evaluations ask for it: it changes no reward
        },
        _similarity,
        _check_similarity,
    ),
    "python": Kind(
        {
            "source": Field(TEXT),
            "image_tag": Field(TEXT, None),
        },  # the tag names an image of OpenAI's
        _python,
        _check_source,
        (),
    ),
    "score_model": Kind(
        {
            "model": Field(TEXT),
            "input": Field((list,)),
            "range": Field((list,), (0.0, 1.0)),
            "sampling_params": Field((dict,), {}),
            "url": Field(TEXT, ""),
            "pass_threshold": Field(NUMBER, None),
        },
        _score_model,
        asking.check,
        ("input",),
    ),
    "multi": Kind(
        {"graders": Field((dict, list)), "calculate_output": Field(TEXT)},
        _multi,
        _check_formula,
        (),
    ),
    "math": Kind(
        {"input": ANSWER, "reference": TEMPLATE},
        in_sandbox("math", (), ("input", "reference")),
        _check_tried("math"),
    ),
    "json_schema": Kind(
        {"input": ANSWER, "schema": Field((dict,))},
        in_sandbox("json_schema", ("schema",), ("input",)),
        _check_tried("json_schema", "schema", answer="null"),
        ("input",),
    ),
    "regex": Kind(
        {"input": ANSWER, "pattern": Field(TEXT), "reference": Field(TEXT, None)},
        in_sandbox("regex", ("pattern",), ("input", "reference")),
        _check_tried("regex", "pattern"),
    ),
    "function": Kind({"function": Field(TEXT)}, _function, _check_function, ()),
}


def kind_of(name: Any) -> Kind:
    """The kind of that name; UserError for none."""
    kind: Kind = row_of(KINDS, name, "type of grader")
    return kind
