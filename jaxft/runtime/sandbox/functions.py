"""`python -m jaxft.runtime.sandbox.functions`: calls Python functions of the user's own, until its input ends.

They are not confined: they may open files and ask the network. They stand in another process so that one that never
returns, or ends its process, does not take the run with it; what they keep in memory stays from call to call.

A function takes (sample, item) and returns a number, or it takes `prompts`, `completions` or `completion_ids`, as
TRL's reward functions do (with a list of each of the items' other fields), and returns a list of numbers. As in TRL it
may be `async`, and the completion of a prompt that is messages is a list of one message of the assistant.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, BinaryIO

from jaxft.errors import counted
from jaxft.runtime.sandbox.judging import NotJudged, number
from jaxft.runtime.sandbox.turns import one_line


@functools.lru_cache(maxsize=64)
def function_of(name: str) -> Callable[..., Any]:
    """The function `module:function`; an error that says what is not there."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise LookupError("module:function is expected")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise LookupError(f"no module {error.name!r} is found") from None
    function = getattr(found, attribute, None)
    if not callable(function):
        raise LookupError(f"module {module!r} has no function {attribute!r}")
    return function


def call(function: str, each: Sequence[Any]) -> list[Any]:
    """[number or None, reason] of each; an error where the function is none."""
    called = function_of(function)
    taken = inspect.signature(called).parameters
    by_name = all(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken.values())
    if by_name or not {"prompts", "completions", "completion_ids"}.isdisjoint(taken):
        return _batch(called, each)
    return [_verdict(called, one["sample"], one["item"]) for one in each]


def _verdict(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    try:
        return [number(function(*arguments)), ""]
    except NotJudged as error:
        return [None, one_line(error)]
    except Exception as error:
        return [None, f"{type(error).__name__}: {one_line(error)}"]


def _batch(function: Callable[..., Any], each: Sequence[Any]) -> list[Any]:
    if not each:
        return []
    fields = {name for one in each for name in one["item"]}
    columns = {name: [one["item"].get(name) for one in each] for name in sorted(fields)}
    columns["prompts"] = columns.pop("prompt", columns.get("prompts", [None] * len(each)))
    columns["completions"] = [
        _completion(one["item"], one["sample"]["output_text"]) for one in each
    ]
    columns["completion_ids"] = [one.get("ids", []) for one in each]
    taken = inspect.signature(function).parameters
    if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken.values()):
        columns = {name: values for name, values in columns.items() if name in taken}
    try:
        given = function(**columns)
        given = asyncio.run(given) if inspect.iscoroutine(given) else given
        if isinstance(given, (str, Mapping, Set)) or not isinstance(given, Iterable):
            what = f"{type(given).__name__} {str(given)[:40]!r}"
            return [[None, f"it returned {what}, not a list of rewards"]] * len(each)
        rewards = list(given)
    except Exception as error:
        return [[None, f"{type(error).__name__}: {one_line(error)}"]] * len(each)
    if len(rewards) != len(each):
        said = (
            f"it returned {counted(len(rewards), 'reward')} for {counted(len(each), 'completion')}"
        )
        return [[None, said]] * len(each)
    return [_verdict(lambda value: value, reward) for reward in rewards]


def _completion(item: Any, text: str) -> Any:
    """The answer as TRL has it: of a prompt of messages a message."""
    if isinstance(item.get("prompt", item.get("messages")), list):
        return [{"role": "assistant", "content": text}]
    return text


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answers one request after the other: 8 bytes with the length, and JSON."""
    while head := requests.read(8):
        request = json.loads(requests.read(int.from_bytes(head, "little")))
        try:
            answer: dict[str, Any] = {"results": call(request["function"], request["each"])}
        except Exception as error:
            answer = {"error": one_line(error), "limited": False}
        reply = json.dumps(answer).encode()
        replies.write(len(reply).to_bytes(8, "little") + reply)
        replies.flush()


if __name__ == "__main__":
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a function prints is no answer
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    serve(sys.stdin.buffer, output)
