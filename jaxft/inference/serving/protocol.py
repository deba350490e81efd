"""OpenAI's protocol, reading: a body as what is asked, or as the error object that says what is wrong with it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from jaxft.errors import nearest, shown
from jaxft.inference.serving.engine import ALTERNATIVES

DEFAULT_LIMIT = 16  # of `max_tokens` of a completion, by the protocol; a chat goes on to its end
MOST_CHOICES = 128  # of one request
MOST_STOPS = 16

SHARED = (
    "model", "n", "stream", "stream_options", "stop", "seed", "max_tokens", "temperature", "top_p", "top_k", "logprobs",
    "ignore_eos",
)  # fmt: skip
COMPLETION = (*SHARED, "prompt", "echo", "best_of")
CHAT = (*SHARED, "messages", "max_completion_tokens", "top_logprobs")
# What says nothing about the answer; and what may be given as long as it asks for nothing.
PASSED_OVER = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
IDLE: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "repetition_penalty": (1, None),
    "min_p": (0, None),
    "logit_bias": ({}, None),
    "suffix": ("", None),
    "tools": ([], None),
    "tool_choice": ("none", "auto", None),
    "functions": ([], None),
    "parallel_tool_calls": (True, False, None),
    "response_format": ({"type": "text"}, None),
    "modalities": (["text"], None),
}


class Refused(Exception):
    """A request that is not answered: an HTTP status and OpenAI's error object.

    Attributes:
        status: of HTTP.
        parameter: which key of the body is meant; None: none alone.
        code: a name for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        parameter: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.parameter, self.code = status, parameter, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        error = {"message": str(self), "type": kind, "param": self.parameter, "code": self.code}
        return {"error": error}


@dataclasses.dataclass(frozen=True)
class Request:
    """What a body asks.

    Attributes:
        model: whose answer.
        prompts: texts, or ids of tokens; () for a chat.
        messages: a chat's; () for a completion.
        n: answers to each.
        limit: of new tokens; None: as many as there is room for.
        temperature, top_p, top_k: as of `generate`.
        seed: of the draws; None: any.
        stops: texts before which an answer ends.
        ignore_eos: whether no token ends an answer.
        alternatives: likeliest tokens told of each token; None: no probabilities.
        echo: whether the prompt stands before the answer.
        stream: whether the answer comes in parts.
        usage: whether a stream ends with what it took.
    """

    model: str
    prompts: tuple[str | tuple[int, ...], ...] = ()
    messages: tuple[dict[str, Any], ...] = ()
    n: int = 1
    limit: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stops: tuple[str, ...] = ()
    ignore_eos: bool = False
    alternatives: int | None = None
    echo: bool = False
    stream: bool = False
    usage: bool = False

    @property
    def chat(self) -> bool:
        """Whether it is a conversation."""
        return bool(self.messages)


def read_json(body: bytes) -> dict[str, Any]:
    """The object that a body holds. Raises Refused: it is none."""

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        value = json.loads(body, parse_constant=constant)
        if b"\\ud" in body.lower():  # half of a character of two is no text
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = shown(str(error)) if not isinstance(error, RecursionError) else "nested too deeply"
        raise Refused(400, f"the body is not JSON: {reason}") from None
    if not isinstance(value, dict):
        raise Refused(400, f"the body must be an object, not {_kind(value)}")
    return value


def read_completion(body: Mapping[str, Any]) -> Request:
    """What a body of /v1/completions asks. Raises Refused, as `read_chat`."""
    _check_keys(body, COMPLETION)
    shared = _shared(body)
    n = shared["n"]
    if body.get("best_of") is not None and _whole(body, "best_of", n, 1, MOST_CHOICES) != n:
        raise Refused(400, "best_of must be n: answers are not ranked here", "best_of")
    alternatives = None
    if body.get("logprobs") is not None and body["logprobs"] is not False:
        alternatives = _whole(body, "logprobs", 0, 0, ALTERNATIVES)
    prompts = _prompts(body.get("prompt"))
    if len(prompts) * n > MOST_CHOICES:
        raise Refused(400, f"prompts times n: at most {MOST_CHOICES} answers a request", "prompt")
    limit = _whole(body, "max_tokens", DEFAULT_LIMIT, 0)
    return Request(
        prompts=prompts,
        limit=limit,
        alternatives=alternatives,
        echo=_flag(body, "echo"),
        **shared,
    )


def read_chat(body: Mapping[str, Any]) -> Request:
    """What a body of /v1/chat/completions asks. Raises Refused: what cannot be read or is not served."""
    _check_keys(body, CHAT)
    alternatives = None
    if _flag(body, "logprobs"):
        alternatives = _whole(body, "top_logprobs", 0, 0, ALTERNATIVES)
    elif body.get("top_logprobs"):
        raise Refused(400, "top_logprobs goes with logprobs: true", "top_logprobs")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages must be a list of one message or more", "messages")
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            where = f"messages[{number}]"
            raise Refused(400, f"{where} must be an object, not {_kind(message)}", where)
    names = [name for name in ("max_completion_tokens", "max_tokens") if body.get(name) is not None]
    limit = _whole(body, names[0], 0, 1) if names else None
    return Request(
        messages=tuple(messages), limit=limit, alternatives=alternatives, **_shared(body)
    )


def _check_keys(body: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for name, value in body.items():
        if name in known or name in PASSED_OVER:
            continue
        if name not in IDLE:
            close = nearest(name, known)
            raise Refused(400, f"{shown(name)} is not served{close}", name, "unknown_parameter")
        if not any(type(value) is type(idle) and value == idle for idle in _alike(IDLE[name])):
            raise Refused(400, f"{name}: {shown(value)} is not served", name, "unsupported_value")


def _alike(values: tuple[Any, ...]) -> list[Any]:
    """The values, and whole numbers as real ones too."""
    return [*values, *(float(value) for value in values if type(value) is int)]


def _shared(body: Mapping[str, Any]) -> dict[str, Any]:
    model = body.get("model")
    if not isinstance(model, str):
        raise Refused(400, "model must be a name", "model")
    stream, options = _flag(body, "stream"), body.get("stream_options")
    if options is not None and (not stream or not isinstance(options, dict)):
        raise Refused(
            400, "stream_options must be an object, and goes with stream: true", "stream_options"
        )
    seed = _whole(body, "seed", 0, -(2**63), 2**64) if body.get("seed") is not None else None
    return {
        "model": model,
        "n": _whole(body, "n", 1, 1, MOST_CHOICES),
        "temperature": _number(body, "temperature", 1.0, 0.0, 100.0),
        "top_p": _number(body, "top_p", 1.0, 0.0, 1.0),
        "top_k": max(_whole(body, "top_k", 0, -1), 0),
        "seed": seed,
        "stops": _stops(body.get("stop")),
        "ignore_eos": _flag(body, "ignore_eos"),
        "stream": stream,
        "usage": _flag(options or {}, "include_usage"),
    }


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """Texts or lists of ids, from one of either or a list of them."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return (tuple(value),)
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if all(isinstance(item, list) and item for item in value) and all(
            type(number) is int for item in value for number in item
        ):
            return tuple(map(tuple, value))
    what = "prompt must be a text, a list of token ids, or a list of either"
    raise Refused(400, what, "prompt")


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise Refused(400, "stop must be a text or a list of texts", "stop")
    if len(stops) > MOST_STOPS:
        raise Refused(400, f"stop: at most {MOST_STOPS} texts", "stop")
    return tuple(stop for stop in stops if stop)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise Refused(400, f"{name} must be true or false, not {shown(value)}", name)


def _whole(
    body: Mapping[str, Any], name: str, default: int, low: int, high: int = 2**31 - 1
) -> int:
    value = body.get(name)
    if value is None:
        return default
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int or not low <= value <= high:
        upper = "" if high == 2**31 - 1 else f" to {high}"
        raise Refused(
            400, f"{name} must be a whole number from {low}{upper}, not {shown(value)}", name
        )
    return value


def _number(body: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not (math.isfinite(value) and low <= value <= high):
        raise Refused(
            400, f"{name} must be a number from {low:g} to {high:g}, not {shown(value)}", name
        )
    return float(value)


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        type(None): "null",
    }
    return names.get(type(value), "a number")
