"""Where a template writes what the assistant says, found by rendering the beginnings of a conversation.

A turn of the assistant's is what the text grows by when its message is added to the messages before it and the
prompt that asks for it. Here, beside the template, because only lengths leave the process: a beginning is forgotten
as soon as it has been compared with the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.runtime.sandbox.streaming import Stream, stream
from jaxft.runtime.sandbox.template import Spans, clock, compile_template, rendered
from jaxft.sequences import common_prefix_length

PROBE = [
    {"role": "user", "content": "?"}
]  # what is asked to learn how the template begins an answer
MANY = 4  # turns, from which on looking for a shorter way is worth it
ANSWER = {"role": "assistant", "content": "!"}
SHOWN = 80  # characters of a text that is shown

Found = dict[
    str, Any
]  # "spans", or "problem" (a key of jaxft.data.chat.PROBLEMS) and what its words tell
Beginning = tuple[int, str]  # how much of the whole text comes first, and what follows there


def turns(
    source: str,
    variables: Mapping[str, Any],
    each: Sequence[Mapping[str, Any]],
    now: str = "",
    eos: str = "",
    limits: Sequence[int | None] = (),
) -> list[Found]:
    """The characters of each assistant's turn, of each conversation.

    Args:
        source: Jinja.
        variables: those that all have.
        each: those of each conversation, `messages` among them.
        now: as of `render`.
        eos: what a template may write behind the whole conversation.
        limits: of each conversation: a turn that begins at this character or behind it is not sought; None: all are.

    Returns:
        For each {"spans": [(start, end)]}, or {"problem": which, "turn": its number, ...}.

    >>> turns("{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}", {},
    ...       [{"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "cd"}]}])
    [{'spans': [(2, 5)]}]
    """
    common = {**clock(now), **variables}
    found = []
    for number, own in enumerate(each):
        conversation = _Conversation(source, {**common, **own}, eos)
        found.append(conversation.found(limits[number] if limits else None))
    return found


class _Problem(Exception):
    """A turn that cannot be told apart; `args` holds what is found of it."""


class _Conversation:
    """A conversation and its beginnings, as the template writes them."""

    def __init__(self, source: str, variables: Mapping[str, Any], eos: str) -> None:
        self._template = compile_template(source)
        self._variables, self._eos = variables, eos
        self._messages: list[Any] = variables["messages"]
        self._text = self._written(self._messages)
        said = [n for n, message in enumerate(self._messages) if message["role"] == "assistant"]
        self._streams = self._streamed(source, said) if len(said) >= MANY else {}

    def _streamed(self, source: str, said: list[int]) -> dict[bool, Stream]:
        """What one rendering tells of all beginnings, without and with a prompt; that of two is looked at."""
        streams = dict[bool, Stream]()
        for prompt in (False, True):
            own = {"messages": self._messages, "add_generation_prompt": prompt}
            found = stream(source, {**self._variables, **own})
            if found is None:
                continue
            starts = found.beginnings
            most = max((common for common, _ in starts.values()), default=0)
            known = [n for n in said if n in starts]
            if self._text[:most] == found.text[:most] and all(
                self._written(self._messages[:n], prompt) == self._text[:common] + rest
                for n, (common, rest) in ((n, starts[n]) for n in {*known[:1], *known[-1:]})
            ):
                streams[prompt] = found
        return streams

    def found(self, limit: int | None) -> Found:
        """The spans, or the first problem."""
        spans = Spans()
        for index, message in enumerate(self._messages):
            if message["role"] != "assistant":
                continue
            try:
                span = self._span(index, limit)
            except _Problem as problem:
                return {"turn": index + 1, **problem.args[0]}
            if span is None:
                break
            spans.append(span)
        return {"spans": spans}

    def _span(self, index: int, limit: int | None) -> tuple[int, int] | None:
        """Where the turn stands; None if it begins at the limit or behind it."""
        before = self._before(index)
        if limit is not None and before is not None and _length(before) >= limit:
            common, rest = before
            if self._holds((common, rest[: max(limit - common, 0)])):
                return None
        stem = self._beginning(index + 1)
        if not self._holds(stem):  # some templates close the whole conversation with an EOS
            stem = stem[0], stem[1].removesuffix(self._eos)
        if not self._holds(stem):
            raise _Problem({"problem": "rewritten", **self._parted(stem)})
        end = _length(stem)
        if before is not None and self._holds(before) and _length(before) <= end:
            return _length(before), end
        if index == 0:
            return self._first_start(end), end
        raise _Problem(self._otherwise_begun(index))

    def _holds(self, beginning: Beginning) -> bool:
        """Whether the whole text begins so."""
        common, rest = beginning
        return self._text.startswith(rest, common)

    def _before(self, index: int) -> Beginning | None:
        """The messages before a turn, and the prompt for it; None where a template writes none without a message."""
        try:
            return self._beginning(index, prompt=True)
        except _Problem:
            if index == 0:
                return None
            raise

    def _beginning(self, count: int, prompt: bool = False) -> Beginning:
        """The first messages, and the prompt for an answer to them."""
        if count == len(self._messages) and not prompt:
            return len(self._text), ""
        known = self._streams.get(prompt)
        if known is not None and count in known.beginnings:
            return known.beginnings[count]
        try:
            return 0, self._written(self._messages[:count], prompt)
        except (MemoryError, RecursionError):
            raise
        except Exception as error:  # a template can raise anything
            raise _Problem({"problem": "refused", "reason": one_line(error)}) from error

    def _first_start(self, end: int) -> int:
        """Where a conversation's first turn begins that is the assistant's: behind the first prompt for one."""
        prompt = self._prompt(PROBE)
        at = self._text.find(prompt, 0, end) if prompt else -1
        if at >= 0:
            return at + len(prompt)
        answered = self._answer(prompt)
        which = "first" if answered.startswith(prompt) else "prompt"
        text = self._text[:end] if which == "first" else answered
        raise _Problem({"problem": which, "prompt": prompt[-SHOWN:], "text": text[:SHOWN]})

    def _prompt(self, messages: Sequence[Any]) -> str:
        """What the template writes to ask for an answer to the messages; "" if that cannot be told."""
        try:
            asked, told = self._written(messages, prompt=True), self._written(messages)
        except (MemoryError, RecursionError):
            raise
        except Exception:  # they are not the user's own, or their failure was told before
            return ""
        told = told if asked.startswith(told) else told.removesuffix(self._eos)
        return asked.removeprefix(told) if asked.startswith(told) else ""

    def _answer(self, prompt: str) -> str:
        """What the template writes of an answer to the probe; the prompt, if that cannot be told."""
        try:
            whole, told = self._written([*PROBE, ANSWER]), self._written(PROBE, prompt=True)
        except (MemoryError, RecursionError):
            raise
        except Exception:
            return prompt
        told = told.removesuffix(prompt)
        return whole.removeprefix(told) if whole.startswith(told) else prompt

    def _otherwise_begun(self, index: int) -> Found:
        """Why a turn does not begin with what stands before it: its prompt, or the messages before."""
        before = self._written(self._messages[:index], prompt=True)
        prompt = self._prompt(self._messages[:index])
        told = before.removesuffix(prompt)
        if prompt and self._text.startswith(told):
            text = self._text[len(told) :]
            return {"problem": "prompt", "prompt": prompt[-SHOWN:], "text": text[:SHOWN]}
        return {"problem": "rewritten", **self._parted((0, before))}

    def _parted(self, beginning: Beginning) -> dict[str, str]:
        """Both texts from the first letter in which the beginning differs from the whole."""
        common, rest = beginning
        text = self._text[common:]
        at = common_prefix_length(rest, text)
        return {"alone": rest[at : at + SHOWN], "text": text[at : at + SHOWN]}

    def _written(self, messages: Sequence[Any], prompt: bool = False) -> str:
        own = {"messages": messages, "add_generation_prompt": prompt}
        return rendered(self._template, {**self._variables, **own})[0]


def _length(beginning: Beginning) -> int:
    return beginning[0] + len(beginning[1])


def one_line(error: BaseException) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    line = getattr(error, "lineno", None)
    reason = (f"line {line}: " if line else "") + " ".join(str(error)[:2000].split())[:300]
    return reason or type(error).__name__
