"""How a lever's answers are asked for: with the question alone, with examples before it, or with passages."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxft.comparison.given import Given
from jaxft.data.chat import encode_chat
from jaxft.data.tokenizer import Tokenizer
from jaxft.evaluation.asking import score
from jaxft.evaluation.asking import with_passages as passages_before
from jaxft.evaluation.evaluate import summarize
from jaxft.evaluation.items import Item
from jaxft.evaluation.metrics import ANSWER
from jaxft.inference.asked import Asked, Before, Prompt
from jaxft.inference.generate import answers
from jaxft.models import Transformer
from jaxft.retrieval import open_retriever
from jaxft.tree import PyTree

SHOWN = 5  # questions whose answers are shown
BETWEEN = ("\n\n", "\n\n---\n\n")  # examples of text; the second where the first stands in one


class Way(NamedTuple):
    """How questions are asked.

    Attributes:
        before: what is put before them; None for nothing.
        stop: what ends an answer, where the prompt has taught the model to go on; "" for nothing.
    """

    before: Before | None = None
    stop: str = ""


# (what is given, the lever's setting, seed) -> how it asks
Asks = Callable[[Given, Mapping[str, Any], int], Way]


def plainly(given: Given, setting: Mapping[str, Any], seed: int) -> Way:
    """The question alone."""
    return Way()


def with_examples(given: Given, setting: Mapping[str, Any], seed: int) -> Way:
    """`setting["examples"]` of the training rows before each question, the same for all, drawn by the seed."""
    answered = [item for item in given.train if item.references and item.prompt]
    drawn = np.random.default_rng((given.config.seed, seed)).permutation(len(answered))
    shots = [answered[place] for place in drawn[: setting["examples"]]]
    texts = [f"{item.prompt}{item.references[0]}" for item in shots]
    between = BETWEEN[any(BETWEEN[0] in text.strip() for text in texts)]

    def before(prompts: Mapping[str, Prompt], room: int) -> list[Asked]:
        return [
            Asked(_put(shots, prompt, between, given.tokenizer, room), None, lambda _: {})
            for prompt in prompts.values()
        ]

    return Way(before, between)


def with_passages(given: Given, setting: Mapping[str, Any], seed: int) -> Way:
    """`setting["passages"]` of the documents before each question."""
    count = setting.get("passages", max(given.config.search.passages))
    return Way(open_retriever(given.index, given.tokenizer, passages=count).ask)


def _put(
    shots: Sequence[Item], prompt: Prompt, between: str, tokenizer: Tokenizer, room: int
) -> Prompt:
    """The prompt behind as many of the examples as there is room for."""
    for count in range(len(shots), 0, -1):
        asked = _behind(shots[:count], prompt, between)
        if _tokens(asked, tokenizer) <= room:
            return asked
    return prompt


def _behind(shots: Sequence[Item], prompt: Prompt, between: str) -> Prompt:
    if isinstance(prompt, str):
        texts = [f"{item.prompt}{item.references[0]}{between}" for item in shots]
        return "".join([*texts, prompt])
    head = [one for one in prompt[:1] if one["role"] in ("system", "developer")]
    turns = [
        turn
        for item in shots
        for turn in (*_turns(item.prompt), {"role": "assistant", "content": item.references[0]})
    ]
    return [*head, *turns, *prompt[len(head) :]]


def _turns(prompt: Prompt) -> list[Any]:
    """An example's own turns, without what a system says."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [turn for turn in prompt if turn["role"] not in ("system", "developer")]


def _tokens(prompt: Prompt, tokenizer: Tokenizer) -> int:
    if isinstance(prompt, str):
        return len(tokenizer.encode(prompt))
    return len(encode_chat(tokenizer, [dict(one) for one in prompt], add_generation_prompt=True))


@dataclasses.dataclass(frozen=True)
class Found:
    """What a model said and scored.

    Attributes:
        records: of every item, as `jaxft.evaluation.Result.records`.
        value: the metric's.
        tokens: of a prompt, on average.
        seconds: of an answer, on average, with all programs compiled; None where that was not asked for.
    """

    records: list[dict[str, Any]]
    value: float | None
    tokens: float
    seconds: float | None


def ask(
    given: Given,
    model: Transformer,
    params: PyTree,
    items: Sequence[Item],
    way: Way,
    *,
    timed: bool = False,
) -> Found:
    """The metric of a model on the items, asked in that way. Some answers are there for any metric, to be shown.

    With `timed` the longest are answered once more, to see how long an answer takes.
    """
    config = given.config
    room = model.config.max_length - config.max_new_tokens
    asked = list(items)
    if way.before is not None:
        asked = passages_before(asked, way.before, room)
    judged = given.metric.needs == ANSWER
    few = asked if judged else asked[:SHOWN]
    said, seconds = _answered(given, model, params, few, way.stop, room, timed)
    scored = score(
        model,
        params,
        [said.get(item.origin, item) for item in asked],
        given.tokenizer,
        [given.metric],
        given.graders if judged else (),
        max_new_tokens=config.max_new_tokens,
        batching={"batch_size": config.eval_batch_size, "packing": False},
    )
    lengths = [item.tokens["prompt"] for item in said.values() if "prompt" in item.tokens]
    plain = [
        dataclasses.replace(after, prompt=before.prompt)
        for before, after in zip(items, scored, strict=True)
    ]
    result = summarize([given.metric], plain)
    value = result.metrics[given.metric.name].value
    return Found(result.records, value, float(np.mean(lengths)) if lengths else 0.0, seconds)


def _answered(
    given: Given,
    model: Transformer,
    params: PyTree,
    items: Sequence[Item],
    stop: str,
    room: int,
    timed: bool,
) -> tuple[dict[str, Item], float | None]:
    """The items that can be asked, with answers, by origin; and the seconds of an answer, warm, if they are timed."""
    able = [
        item
        for item in items
        if item.prompt and item.answer is None and item.rows[0].format != "text"
        and 0 < _tokens(item.prompt, given.tokenizer) <= room
    ]  # fmt: skip
    if not able:
        return {}, 0.0 if timed else None

    def say(some: Sequence[Item]) -> Any:
        return answers(
            model,
            params,
            [item.prompt for item in some],
            tokenizer=given.tokenizer,
            max_new_tokens=given.config.max_new_tokens,
            batch_size=given.config.eval_batch_size,
            origins=[item.origin for item in some],
            tools=[item.tools for item in some],
        )

    found = {}
    for item, answer in zip(able, say(able), strict=True):
        text = answer.text.split(stop)[0] if stop else answer.text
        tokens = {**item.tokens, "prompt": answer.prompt_tokens, "answer": answer.tokens}
        found[item.origin] = dataclasses.replace(item, answer=text, tokens=tokens)
    if not timed:
        return found, None
    longest = sorted(able, key=lambda item: found[item.origin].tokens["prompt"], reverse=True)
    first = longest[: given.config.eval_batch_size]  # the first batch, whose program is compiled
    began = time.perf_counter()
    say(first)
    return found, (time.perf_counter() - began) / len(first)
