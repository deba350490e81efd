"""A model that judges: what it is asked, how a server is asked, and what number its answer holds."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import math
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.errors import UserError, shown
from jaxft.objectives.graders.templates import filled, parts_of

KEY = "JAXFT_JUDGE_KEY"  # the environment's variable with a server's key: a file of graders must not choose it
SAMPLING = ("temperature", "top_p", "seed", "max_completions_tokens")
TOGETHER = 8  # requests at a time
TRIES = 3
WAITING = 60.0  # seconds for an answer
MOST_BYTES = 4_000_000
MOST_REWARD = 1e18  # its square is a float32 still, and with it the deviation of rewards
AGAIN = (408, 409, 429, 500, 502, 503, 504)
NUMBER = r"([+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?)"
NAMED = re.compile(rf'"(?:result|score)"\s*:\s*"?{NUMBER}"?\s*(?=[,}}]|$)', re.I)
# As few signs as can be are skipped before the number: its own minus and point are among them.
NAME = r"(?:final |the )*(?:score|result|grade|rating)(?: is)?"
ALONE = re.compile(rf"^\W*?(?:{NAME}\W*?)?{NUMBER}\W*$", re.I)

Messages = list[dict[str, str]]


def check(settings: Mapping[str, Any]) -> None:
    """Raises UserError for messages, a range, or a url that is none."""
    for index, message in enumerate(settings["input"]):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f"input[{index}] is no message: role and content are expected")
        parts_of(_content(message, index))
    if not settings["input"]:
        raise UserError("input has no message")
    low, high = _bounds(settings["range"])
    if low >= high:
        raise UserError(f"range [{low:g}, {high:g}] holds no numbers")
    for name in SAMPLING:
        value = settings["sampling_params"].get(name)
        if not (value is None or is_number(value)):
            raise UserError(f"sampling_params.{name}: a number is expected, not {shown(value)}")
    if settings["url"]:
        _check_url(settings["url"])


def _check_url(url: str) -> None:
    if not re.match(r"https?://[^/]", url):
        raise UserError(f"url {shown(url)} does not begin with http:// or https://")
    try:
        parts = urllib.parse.urlsplit(url)
        alone = parts.username is None and (parts.port or 1) > 0
    except ValueError as error:
        raise UserError(f"url {shown(url)}: {error}") from None
    if not alone:
        raise UserError(f"url: a key is given in {KEY}, and not in the address")


def is_number(value: Any) -> bool:
    """Whether it is a number of JSON, and one that a reward can be.

    >>> is_number(0.5), is_number(True), is_number(float("inf"))
    (True, False, False)
    """
    return type(value) in (int, float) and abs(value) <= MOST_REWARD


def _bounds(given: Sequence[Any]) -> tuple[float, float]:
    if len(given) != 2 or not all(map(is_number, given)):
        raise UserError(f"range {shown(list(given))}: two numbers are expected")
    return float(given[0]), float(given[1])


def _content(message: Mapping[str, Any], index: int) -> str:
    """A message's text, which may stand alone, or as OpenAI's input_text."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"input[{index}]: content must be a text")
    return "".join(map(str, texts))


def conversation(
    settings: Mapping[str, Any], item: Mapping[str, Any], sample: Mapping[str, Any]
) -> Messages:
    """The messages for an item and an answer, with a sentence behind the last that asks for a number in JSON."""
    messages = [
        {"role": message["role"], "content": filled(_content(message, index), item, sample)}
        for index, message in enumerate(settings["input"])
    ]
    low, high = _bounds(settings["range"])
    messages[-1]["content"] += (
        f'\n\nAnswer with JSON: {{"result": NUMBER}}, a number from {low:g} to {high:g}.'
    )
    return messages


def score(answer: str | Exception, bounds: Sequence[float]) -> tuple[float | None, str]:
    r"""The number of an answer: its last "result", or what its last line is.

    >>> score('It is good. {"result": 0.5}', (0, 1)), score("Good.\nScore: 1", (0, 1)), score("7 of 10", (0, 10))[0]
    ((0.5, ''), (1.0, ''), None)
    """
    if isinstance(answer, Exception):
        return None, f"the model does not answer: {' '.join(str(answer).split())[:200]}"
    named = NAMED.findall(answer)
    lines = [line for line in answer.splitlines() if line.strip()]
    alone = ALONE.match(lines[-1][:200]) if lines else None
    if not named and not alone:
        return None, f"the model's answer holds no result: {shown(answer[-80:])}"
    value = float(named[-1] if named else alone[1])  # type: ignore[index]
    low, high = _bounds(bounds)
    if not (math.isfinite(value) and low <= value <= high):
        return None, f"the model's result {value:g} lies outside of {low:g} to {high:g}"
    return value, ""


def ask_url(
    url: str, model: str, conversations: Sequence[Messages], sampling: Mapping[str, Any]
) -> list[str | Exception]:
    """What an OpenAI-compatible server answers to each conversation, some at a time; the error where it does not.

    A server that answers none of the first `TOGETHER` is not asked the others.
    """

    def asked(talk: Messages) -> str | Exception:
        return _asked(url, model, talk, sampling)

    first, others = conversations[:TOGETHER], conversations[TOGETHER:]
    with concurrent.futures.ThreadPoolExecutor(TOGETHER) as pool:
        answers = list(pool.map(asked, first))
        if others and all(isinstance(answer, Exception) for answer in answers):
            return [*answers, *[answers[-1]] * len(others)]
        return [*answers, *pool.map(asked, others)]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A server that sends elsewhere does not get the key sent there."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


def _asked(
    url: str, model: str, messages: Messages, sampling: Mapping[str, Any]
) -> str | Exception:
    named = dict(sampling)
    for name in ("max_completions_tokens", "max_completion_tokens"):
        if name in named:
            named["max_tokens"] = named.pop(name)
    body = json.dumps({"model": model, "messages": messages, **named}).encode()
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(
        url.rstrip("/") + "/chat/completions", data=body, headers=headers
    )
    opener = urllib.request.build_opener(_NoRedirect)
    error: Exception = ValueError("it was not asked")
    for again in range(TRIES):
        try:
            with opener.open(request, timeout=WAITING) as reply:
                answer = json.loads(_whole(reply))
            return str(answer["choices"][0]["message"]["content"] or "")
        except urllib.error.HTTPError as failed:
            error = failed
            failed.close()
            if failed.code not in AGAIN:
                break
        except TimeoutError:
            return TimeoutError(f"no answer within {WAITING:g} s")
        except (OSError, http.client.HTTPException) as failed:
            if isinstance(getattr(failed, "reason", None), TimeoutError):
                return TimeoutError(f"no connection within {WAITING:g} s")
            error = failed
        except (ValueError, LookupError, TypeError):
            return ValueError("its reply is no chat completion")
        if again + 1 < TRIES:
            time.sleep(2.0**again)
    return error


def _whole(reply: http.client.HTTPResponse) -> bytes:
    """All of a reply; TimeoutError where it takes too long, though each piece of it came in time."""
    latest, found = time.monotonic() + WAITING, b""
    while len(found) < MOST_BYTES and (piece := reply.read1(65_536)):
        found += piece
        if time.monotonic() > latest:
            raise TimeoutError
    return found
