"""What a server serves, by name: the base, and versions of it; and what a request of one asks the engine."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxft.data.chat import Ending, encode_chat_and_text, end_of_turn
from jaxft.data.messages import read_message
from jaxft.data.tokenizer import Tokenizer
from jaxft.defaults import MAX_NEW_TOKENS
from jaxft.errors import UserError, counted, nearest, shown
from jaxft.inference.asked import Asked, Before
from jaxft.inference.generate import frame
from jaxft.inference.serving.engine import Ask
from jaxft.inference.serving.protocol import Refused, Request

COLDEST = 1e-4  # a lower temperature is none: scores divided by it are no numbers


@dataclasses.dataclass(frozen=True)
class Served:
    """A model that is served.

    Attributes:
        name: what requests call it.
        root: the folder, or the name of the hub, that it was read from.
        tokenizer: its own.
        turn: how its turns in a chat end.
        parent: the name of the base; None for the base itself.
        adapter: its index in the bank; -1 for the base.
        version: tells it apart from what had the same index before.
        created: when it was read, in seconds since 1970.
    """

    name: str
    root: str
    tokenizer: Tokenizer
    turn: Ending
    parent: str | None = None
    adapter: int = -1
    version: int = 0
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def card(self) -> dict[str, Any]:
        """As /v1/models lists it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "jaxft",
            "root": self.root,
            "parent": self.parent,
        }


def served(name: str, root: str, tokenizer: Tokenizer, **others: Any) -> Served:
    """A model by that name; how its turns end is asked of its template."""
    turn = end_of_turn(tokenizer) if tokenizer.chat_template is not None else Ending()
    return Served(name, root, tokenizer, turn, **others)


def find(models: Mapping[str, Served], name: str) -> Served:
    """The model of that name. Raises Refused with the nearest where there is none."""
    if name in models:
        return models[name]
    close = nearest(name, models) or f"; there are: {', '.join(map(repr, models))}"
    raise Refused(404, f"there is no model {shown(name)}{close}", "model", "model_not_found")


@dataclasses.dataclass(frozen=True)
class Planned:
    """How one answer is made.

    Attributes:
        ask: of the engine; None where it is not asked.
        prompt_tokens: of what is asked.
        echo: what stands before the answer, where that was asked.
        said: the answer, where the engine is not asked.
        row: answer -> what is told beside it.
    """

    ask: Ask | None
    prompt_tokens: int
    echo: str
    said: str
    row: Callable[[str], dict[str, Any]]


def planned(
    model: Served,
    request: Request,
    *,
    context: int,
    vocabulary: int,
    before: Before | None = None,
) -> list[Planned]:
    """Reads a request's prompts as tokens: how n answers to each are made, one prompt's after another's.

    Args:
        model: which is asked.
        request: what.
        context: tokens of prompt and answer that there is room for.
        vocabulary: how many tokens the model has.
        before: what puts something before chats and texts; ids are asked as they are.

    Raises:
        Refused: what cannot be read, a token that the model does not have, or too many of them.
    """
    name = "messages" if request.chat else "prompt"
    try:
        put = _put_before(model, request, context, before)
        if request.chat:
            encoded = [_chat_ids(model, one.prompt) for one in put]
        else:
            encoded = _ids(model, [one.prompt for one in put])
    except UserError as error:
        raise Refused(400, str(error), name) from error
    seed = uuid.uuid4().int % 2**32 if request.seed is None else request.seed
    plans = []
    for one, ids in zip(put, encoded, strict=True):
        if one.answer is not None:
            plans += [Planned(None, 0, "", one.answer, one.row)] * request.n
            continue
        _check(ids, request, name, context, vocabulary)
        echo = ""
        if request.echo:
            given = one.prompt
            echo = given if isinstance(given, str) else model.tokenizer.decode(ids, False)
        room = context - len(ids)
        for stream in range(request.n):
            ask = _ask(model, request, ids, room, seed, stream)
            plans.append(Planned(ask, len(ids), echo, "", one.row))
    return plans


def _put_before(
    model: Served, request: Request, context: int, before: Before | None
) -> list[Asked]:
    """What is asked instead of a request's prompts."""
    given: list[Any] = [list(request.messages)] if request.chat else list(request.prompts)
    texts = {
        f"prompt {number}": prompt
        for number, prompt in enumerate(given, start=1)
        if not isinstance(prompt, tuple)
    }
    each = [Asked(prompt, None, lambda _: {}) for prompt in given]
    if before is None or not texts:
        return each
    room = context - (request.limit or MAX_NEW_TOKENS)
    room -= frame(model.tokenizer, list(texts.values()))
    found = iter(before(texts, room))
    return [one if isinstance(one.prompt, tuple) else next(found) for one in each]


def _ask(
    model: Served, request: Request, ids: Sequence[int], room: int, seed: int, stream: int
) -> Ask:
    """What the engine is asked for one answer."""
    ends: tuple[int, ...] = model.tokenizer.eos_ids
    stops = request.stops
    if request.chat:
        ends = (*ends, *model.turn.ids)
        stops = (*stops, *([model.turn.text] if model.turn.text else []))
    return Ask(
        ids=tuple(ids),
        tokenizer=model.tokenizer,
        limit=room if request.limit is None else min(request.limit, room),
        adapter=model.adapter,
        version=model.version,
        temperature=request.temperature if request.temperature >= COLDEST else 0.0,
        top_k=request.top_k,
        top_p=request.top_p,
        seed=seed,
        stream=stream,
        ends=() if request.ignore_eos else ends,
        stops=stops,
        probabilities=request.alternatives is not None,
        scored=request.echo and request.alternatives is not None,
    )


def _ids(model: Served, prompts: Sequence[Any]) -> list[list[int]]:
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    encoded = iter(model.tokenizer.encode_all(texts))
    return [next(encoded) if isinstance(prompt, str) else list(prompt) for prompt in prompts]


def _chat_ids(model: Served, messages: Any) -> list[int]:
    if model.tokenizer.chat_template is None:
        raise UserError(f"{model.name} has no chat template: ask it through /v1/completions")
    read = [read_message(f"messages[{i}]", dict(message)) for i, message in enumerate(messages)]
    return encode_chat_and_text(model.tokenizer, read, add_generation_prompt=True)[0]


def _check(ids: Sequence[int], request: Request, name: str, context: int, vocabulary: int) -> None:
    if not ids:
        raise Refused(400, f"{name}: no token of it is left to go on from", name)
    strange = next((token for token in ids if not 0 <= token < vocabulary), None)
    if strange is not None:
        have = f"the model has {counted(vocabulary, 'token')}"
        raise Refused(400, f"{name}: there is no token {shown(strange)}: {have}", name)
    least = 0 if request.limit == 0 else 1
    wanted = request.limit if request.limit is not None and not request.chat else least
    if len(ids) + max(wanted, least) > context:
        raise Refused(
            400,
            f"{counted(len(ids), 'token')} and {wanted:,} new ones are more than the {context:,} that there is room "
            "for: shorten it, or serve with a larger --context",
            name,
            "context_length_exceeded",
        )
