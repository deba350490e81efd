"""What a model says to questions, and what it gives to the answers that stand in the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.adaptation import base_tree
from jaxft.data.chat import encode_chat
from jaxft.data.questions import prompt_and_reference
from jaxft.data.sources import Row
from jaxft.data.tokenizer import Tokenizer
from jaxft.errors import UserError, counted
from jaxft.evaluation.items import PROMPT, Item, Likelihood
from jaxft.evaluation.likelihood import likelihoods
from jaxft.evaluation.metrics import ANSWER, LIKELIHOOD, PAIR, REWARDS, Metric
from jaxft.inference.asked import Before, Prompt
from jaxft.inference.generate import answers
from jaxft.inference.judge import ask_folder
from jaxft.inference.opening import conversation
from jaxft.models import Transformer
from jaxft.objectives.graders import Grader, Outside, case_of, grade
from jaxft.retrieval.embeddings import embedded
from jaxft.runtime.sandbox import TooMuch
from jaxft.weights import is_adapter, saved_in, weights_of


def score(
    model: Transformer,
    params: Mapping[str, Any],
    items: Sequence[Item],
    tokenizer: Tokenizer,
    table: Sequence[Metric],
    graders: Sequence[Grader] = (),
    *,
    max_new_tokens: int,
    batching: Mapping[str, Any],
    progress: bool = False,
) -> list[Item]:
    """The items with what the metrics need of a model: answers, and likelihoods of what stands in the data.

    Args:
        model: the decoder.
        params: its tree.
        items: the questions.
        tokenizer: the model's.
        table: the metrics, which say what they need.
        graders: of answers.
        max_new_tokens: the most tokens of an answer.
        batching: as of `token_scores`.
        progress: show a bar.
    """
    found = list(items)
    config = model.config
    needs = {metric.needs for metric in table}
    if LIKELIHOOD in needs:
        rows = [_single(row, "chosen") for item in found for row in item.rows]
        rows = [row for row in rows if row.format != PROMPT]
        known, reasons = likelihoods(config, params, rows, tokenizer, **batching)
        found = [_with_likelihood(item, known, reasons) for item in found]
    if PAIR in needs or REWARDS in needs:
        found = _with_pairs(model, params, found, tokenizer, batching)
    if REWARDS in needs:
        found = _with_rewards(model, params, found, tokenizer, batching)
    if ANSWER in needs:
        settings = (tokenizer, max_new_tokens, batching["batch_size"], progress)
        found = _with_answers(model, params, found, bool(graders), *settings)
        found = with_grades(found, graders)
    return found


def as_chats(items: Sequence[Item], chat: bool, system: str) -> list[Item]:
    """The items as a model is asked them: texts as a user's messages, and the system's message first.

    Args:
        items: as they stand in the data.
        chat: whether a prompt that is a text is a user's message.
        system: of the conversations that have none; "" for none.
    """
    found = []
    for item in items:
        rows = tuple(_as_chat(row, chat, system) for row in item.rows)
        asks = rows[0].format != "text" and (chat or not isinstance(item.prompt, str))
        prompt = conversation(item.prompt, system) if asks else item.prompt
        found.append(dataclasses.replace(item, rows=rows, prompt=prompt))
    return found


def with_passages(items: Sequence[Item], before: Before, room: int) -> list[Item]:
    """The items with passages of an index before their questions, and refused ones answered. A text asks nothing.

    Args:
        items: as a model is asked them.
        before: ({origin: prompt}, room) -> what is asked instead, as `Retriever.ask`.
        room: tokens that the model reads of a prompt.

    Raises:
        UserError: as of `before`.
    """
    asking = {item.origin: item.prompt for item in items if not _is_text(item) and item.prompt}
    put = dict(zip(asking, before(asking, room), strict=True))
    found = []
    for item in items:
        if (one := put.get(item.origin)) is not None:
            rows = tuple(_asking(row, one.prompt) for row in item.rows)
            item = dataclasses.replace(
                item, prompt=one.prompt, rows=rows, answer=one.answer, cite=one.row
            )
        found.append(item)
    return found


def _asking(row: Row, prompt: Prompt) -> Row:
    """The row with another prompt before what it answers."""
    values = dict(row.values)
    if row.format == "messages":
        asked, _ = prompt_and_reference(row)
        values["messages"] = [*prompt, *values["messages"][len(asked) :]]
    else:
        values["prompt"] = prompt
    return dataclasses.replace(row, values=values)


def _is_text(item: Item) -> bool:
    return any(row.format == "text" for row in item.rows)


def _as_chat(row: Row, chat: bool, system: str) -> Row:
    """The row with its texts as messages, and with the system's before them."""
    values = dict(row.values)
    if row.format == "messages":
        values["messages"] = conversation(values["messages"], system)
    elif "prompt" in values and (chat or not isinstance(values["prompt"], str)):
        values["prompt"] = conversation(values["prompt"], system)
        for key in ("completion", "chosen", "rejected"):
            if isinstance(values.get(key), str):
                values[key] = [{"role": "assistant", "content": values[key]}]
    return dataclasses.replace(row, values=values)


def _single(row: Row, key: str) -> Row:
    """Of a pair, its prompt with one completion, as a row to train on; other rows as they are."""
    if row.format != "pair":
        return row
    values = {"prompt": row.values["prompt"], "completion": row.values[key]}
    if row.values.get("tools"):
        values["tools"] = row.values["tools"]
    return dataclasses.replace(row, format="prompt_completion", values=values)


def _with_likelihood(
    item: Item, known: Mapping[str, Likelihood], reasons: Mapping[str, str]
) -> Item:
    lost = [
        reasons.get(row.origin, "the row has no completion")
        for row in item.rows
        if row.origin not in known
    ]
    if lost:
        return dataclasses.replace(item, unscored={**item.unscored, LIKELIHOOD: lost[0]})
    each = [known[row.origin] for row in item.rows]
    total = Likelihood(
        sum(one.loss for one in each),
        sum(one.tokens for one in each),
        sum(one.hits for one in each),
    )
    tokens = {**item.tokens, "scored": total.tokens}
    return dataclasses.replace(item, likelihood=total, tokens=tokens)


def _with_pairs(
    model: Transformer,
    params: Mapping[str, Any],
    items: Sequence[Item],
    tokenizer: Tokenizer,
    batching: Mapping[str, Any],
) -> list[Item]:
    sides = []
    for key in ("chosen", "rejected"):
        rows = [_single(item.rows[0], key) for item in items]
        sides.append(likelihoods(model.config, params, rows, tokenizer, **batching))
    (chosen, lost), (rejected, lost_too) = sides
    reasons = {**lost_too, **lost}
    found = []
    for item in items:
        if item.origin in reasons:
            unscored = {**item.unscored, PAIR: reasons[item.origin]}
            found.append(dataclasses.replace(item, unscored=unscored))
        else:
            pair = chosen[item.origin], rejected[item.origin]
            found.append(dataclasses.replace(item, pair=pair))
    return found


def _with_rewards(
    model: Transformer,
    params: Mapping[str, Any],
    items: Sequence[Item],
    tokenizer: Tokenizer,
    batching: Mapping[str, Any],
) -> list[Item]:
    """The pairs with what DPO calls their rewards, without its beta: log p less log p of the base."""
    if not any(is_adapter(weight) for _, weight in weights_of(params)):
        reason = {REWARDS: "rewards are an adapter's beside its base, and this is a model alone"}
        return [dataclasses.replace(item, unscored={**item.unscored, **reason}) for item in items]
    saved = saved_in(params)
    if whole := [*(path for path, _ in saved.whole), *(["biases"] if saved.bias != "none" else [])]:
        raise UserError(
            f"rewards: the adapter holds {whole[0]} whole, so that its base is not in the tree any more: "
            "preference_margin of the adapter and of the base (--base) tells the same"
        )
    base = _with_pairs(model, base_tree(params), items, tokenizer, batching)
    found = []
    for item, before in zip(items, base, strict=True):
        if item.pair and before.pair:
            both = zip(before.pair, item.pair, strict=True)
            chosen, rejected = (old.loss - new.loss for old, new in both)
            found.append(dataclasses.replace(item, rewards=(chosen, rejected)))
        else:
            reason = {REWARDS: item.unscored.get(PAIR, "its completions are not scored")}
            found.append(dataclasses.replace(item, unscored={**item.unscored, **reason}))
    return found


def _with_answers(
    model: Transformer,
    params: Mapping[str, Any],
    items: Sequence[Item],
    graded: bool,
    tokenizer: Tokenizer,
    max_new_tokens: int,
    batch_size: int,
    progress: bool,
) -> list[Item]:
    room = model.config.max_length - max_new_tokens
    reasons = {item.origin: _not_asked(item, graded, tokenizer, room) for item in items}
    refused = {item.origin for item in items if item.answer is not None}
    asked = [item for item in items if not reasons[item.origin] and item.origin not in refused]
    said = answers(
        model,
        params,
        [item.prompt for item in asked],
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        origins=[item.origin for item in asked],
        tools=[item.tools for item in asked],
        progress=progress,
    )
    by_origin = {item.origin: answer for item, answer in zip(asked, said, strict=True)}
    found = []
    for item in items:
        if item.origin in by_origin:
            answer = by_origin[item.origin]
            tokens = {**item.tokens, "prompt": answer.prompt_tokens, "answer": answer.tokens}
            tokens["ended"] = int(answer.ended)
            found.append(dataclasses.replace(item, answer=answer.text, tokens=tokens))
        elif item.origin in refused and not reasons[item.origin]:
            found.append(item)
        else:
            unscored = {**item.unscored, ANSWER: reasons[item.origin]}
            found.append(dataclasses.replace(item, unscored=unscored))
    return found


def with_grades(items: Sequence[Item], graders: Sequence[Grader]) -> list[Item]:
    """The items with what the graders say of their answers, and why they cannot where they cannot."""
    found = list(items)
    answered = [index for index, item in enumerate(found) if item.answer is not None]
    cases = [case_of(_seen(found[index]), found[index].answer or "") for index in answered]
    outside = Outside(ask_folder, embedded)
    for grader, verdicts in zip(graders, grade(graders, cases, outside), strict=True):
        for index, verdict in zip(answered, verdicts, strict=True):
            item = found[index]
            if verdict.reward is None:
                reason = {**item.unscored, f"grader/{grader.name}": verdict.reason}
                found[index] = dataclasses.replace(item, unscored=reason)
            else:
                grades = {**item.grades, grader.name: verdict.reward}
                found[index] = dataclasses.replace(item, grades=grades)
    return found


def _seen(item: Item) -> Mapping[str, Any]:
    """What a grader sees of an item: its row, and under `reference` what is right."""
    reference = {"reference": item.references[0]} if item.references else {}
    return {**reference, **item.values}


def _not_asked(item: Item, graded: bool, tokenizer: Tokenizer, room: int) -> str:
    """Why the model cannot be asked this; "" where it can. What is graded needs no reference."""
    if not item.prompt or _is_text(item):
        return "nothing is asked"
    if not item.references and not graded:
        return "the row has no reference"
    try:
        if isinstance(item.prompt, str):
            length = len(tokenizer.encode(item.prompt))
        else:
            length = len(
                encode_chat(tokenizer, item.prompt, add_generation_prompt=True, tools=item.tools)
            )
    except TooMuch as error:
        return str(error)
    if length > room:
        return f"its prompt has {counted(length, 'token')}, and there is room for {max(room, 0)}"
    return "" if length else "its prompt has no tokens"
