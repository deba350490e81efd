"""The parent's side: requests to the sandboxed child, and what became of them."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxft.errors import UserError

MAX_SOURCE = 1_000_000  # characters of a template or of patterns; real ones have a few thousand
PATIENCE = 120.0  # seconds until a child that gets no processor time is given up
TOGETHER = 64  # texts of a request, for which the limits of time and memory hold together
TOGETHER_BYTES = 1_000_000  # of them, but for one that has more alone
KEPT = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "PYTHONHOME")  # no keys, no tokens
ONE_THREAD = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
}  # each takes memory of the child's

Rendered = tuple[str, list[tuple[int, int]]]


class TooMuch(UserError):
    """What was asked needs more time or memory than the child has, or gives too long a text."""


def render_conversations(
    source: str,
    conversations: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    now: str = "",
) -> list[Rendered]:
    """Renders a chat template for each conversation.

    Args:
        source: Jinja.
        conversations: for each the template's variables of its own: `messages`,
            `add_generation_prompt`; values that JSON can hold.
        variables: those that all have: the special tokens.
        now: the moment that the template takes for the present one, an ISO date or date and time; "": the present.

    Returns:
        For each (text, [(start, end) of the characters inside `{% generation %}`]).

    Raises:
        UserError: the template fails, or reaches for what it must not; a `TooMuch`: it needs too much.

    >>> render_conversations("{{ a }}{{ b }}", [{"b": 1}, {"b": 2}], {"a": "x"})
    [('x1', []), ('x2', [])]
    """
    request = _templates(source, variables, now)
    return [
        (text, [(start, end) for start, end in spans])
        for text, spans in _child.ask("render", request, conversations)
    ]


def assistant_turns(
    source: str,
    conversations: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    now: str = "",
    eos: str = "",
    limits: Sequence[int | None] = (),
) -> list[dict[str, Any]]:
    """`jaxft.runtime.sandbox.turns.turns`, in the child.

    Raises:
        UserError: as of `render_conversations`.
    """
    request = _templates(source, variables, now) | {"eos": eos}
    limits = limits or [None] * len(conversations)
    return _child.ask("turns", request, conversations, limits=limits)


def _templates(source: str, variables: Mapping[str, Any], now: str) -> dict[str, Any]:
    if len(source) > MAX_SOURCE:
        raise UserError(f"a template of {len(source)} characters is refused")
    return {"source": source, "variables": dict(variables), "now": now}


def first_matches(
    patterns: Sequence[str], texts: Sequence[str], form: str = "{}", whole: bool = False
) -> list[Any]:
    """`jaxft.runtime.sandbox.matching.match`, for patterns of a folder's, which can take for ever.

    Raises:
        UserError: a pattern that is no regular expression, or takes too long.

    >>> first_matches(["q.*", "k_(proj)"], ["k_proj", "x"])
    [[1, ['proj']], None]
    """
    if sum(map(len, patterns)) > MAX_SOURCE:
        raise UserError(f"{len(patterns)} patterns of so many characters are refused")
    request = {"patterns": list(patterns), "form": form, "whole": whole}
    return _child.ask("match", request, texts, together=len(texts))


def verdicts(
    action: str,
    request: Mapping[str, Any],
    each: Sequence[Mapping[str, Any]],
    *,
    seconds: float = 2.0,
    waiting: float = 10.0,
    megabytes: int = 512,
) -> list[tuple[float | None, str]]:
    """Judges answers by code of a grader's, each in a process of its own that is made for it.

    Args:
        action: a name of `jaxft.runtime.sandbox.judging.ACTIONS`.
        request: its arguments that all answers have in common.
        each: those of each answer.
        seconds: of processor time, for each.
        waiting: seconds after which one is given up in any case.
        megabytes: of memory beyond the interpreter's, for each.

    Returns:
        For each (number, "") or (None, why it cannot be judged, in one line).

    >>> verdicts("regex", {"pattern": "(a+)+$"}, [{"text": "aaa"}, {"text": "a" * 40 + "!"}], seconds=0.2)
    [(1.0, ''), (None, 'it takes more than 0.2 s of processor time: does it loop for ever?')]
    """
    together = os.cpu_count() or 1
    patience = PATIENCE + waiting * -(-min(len(each), TOGETHER) // together)
    limits = {"limits": [seconds, waiting, megabytes], "together": together}
    try:
        found = _judge.ask(action, {**request, **limits}, each, patience=patience) if each else []
    except TooMuch as error:
        found = [(None, str(error))] * len(each)
    return [(value, reason) for value, reason in found]


def call_function(
    function: str, each: Sequence[Mapping[str, Any]], patience: float = PATIENCE
) -> list[tuple[float | None, str]]:
    """`jaxft.runtime.sandbox.functions.call`: a function of the user's own, in a process beside, as free as this one.

    Args:
        function: `module:function`, as found from the working folder too.
        each: `sample` and `item` of each answer.
        patience: seconds for them all; then none of them is judged, and the process is ended.

    Returns:
        For each (number, "") or (None, why it cannot be judged, in one line).

    Raises:
        UserError: there is no such function.
    """
    try:
        found = _own.ask("call", {"function": function}, each, max(len(each), 1), patience)
    except TooMuch as error:
        return [(None, f"{function}: {error}")] * len(each)
    except UserError as error:
        raise UserError(f"function {function!r}: {error}") from None
    return [(value, reason) for value, reason in found]


class _Child:
    """The child process: one request at a time, from any thread."""

    def __init__(self, module: str, trusted: bool = False) -> None:
        self._trusted = trusted
        self._module = f"jaxft.runtime.sandbox.{module}"
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(
        self,
        action: str,
        request: Mapping[str, Any],
        each: Sequence[Any],
        together: int = TOGETHER,
        patience: float = PATIENCE,
        **columns: Sequence[Any],
    ) -> list[Any]:
        """What the action makes of each part, some parts at a time; `columns` have further values of each part.

        Raises:
            UserError: it fails; a `TooMuch`: the child was ended by a limit, or `patience` seconds are over.
        """
        head = _json(request)[:-1]
        results = list[Any]()
        for start, parts in _portions([_json(part) for part in each], together):
            also = {name: values[start : start + len(parts)] for name, values in columns.items()}
            text = f'{head}, "each": [{", ".join(parts)}], {_json(also | {"action": action})[1:]}'
            results += self._asked(text.encode("utf-8", "surrogatepass"), patience)
        return results

    def _asked(self, data: bytes, patience: float) -> list[Any]:
        with self._lock:
            reply = self._exchange(len(data).to_bytes(8, "little") + data, patience)
        answer = json.loads(reply.decode("utf-8", "surrogatepass"))
        if "error" in answer:
            raise (TooMuch if answer["limited"] else UserError)(answer["error"])
        results: list[Any] = answer["results"]
        return results

    def _exchange(self, data: bytes, patience: float) -> bytes:
        if self._process is None or self._process.poll() is not None:
            self.stop()
            self._process = _start(self._module, self._trusted)
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        whole = False
        try:
            process.stdin.write(data)
            process.stdin.flush()
            poll = select.poll()
            poll.register(process.stdout, select.POLLIN | select.POLLHUP)
            if not poll.poll(1000 * patience):
                raise TooMuch(f"no answer within {patience:g} s")
            length = int.from_bytes(process.stdout.read(8), "little")
            reply = process.stdout.read(length) if length else b""
            whole = 0 < length == len(reply)
        except BrokenPipeError:
            pass
        finally:
            if not whole:  # also when this thread is interrupted: half an answer stays for nobody
                ended = self.stop()
        if not whole:
            raise TooMuch(_reason(ended, self._trusted))
        return reply

    def stop(self) -> int:
        """Ends the child, if there is one; its exit status."""
        process, self._process = self._process, None
        if process is None:
            return 0
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)  # one that a limit has ended says so by its status
        process.kill()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        return process.wait()


def _portions(parts: Sequence[str], most: int) -> Iterator[tuple[int, Sequence[str]]]:
    """(index of the first, parts) of portions that are neither many nor long; a part alone may be long.

    >>> list(_portions(["a", "b", "c"], 2))
    [(0, ['a', 'b']), (2, ['c'])]
    """
    start = size = 0
    for index, part in enumerate(parts):
        if index > start and (index - start == most or size + len(part) > TOGETHER_BYTES):
            yield start, parts[start:index]
            start, size = index, 0
        size += len(part)
    if start < len(parts) or not parts:  # without any the source is looked at all the same
        yield start, parts[start:]


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"a value that JSON cannot hold: {error}") from error


def _plain(value: Any) -> Any:
    """Numbers and arrays of NumPy as Python's own."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")


def _reason(status: int, trusted: bool) -> str:
    if trusted and status >= 0:
        return f"it ended its process, with status {status}"
    if status == -signal.SIGPROF:
        return "it takes too much processor time: does it loop for ever?"
    return "it takes too much memory or processor time"


def _start(module: str, trusted: bool) -> subprocess.Popen[bytes]:
    """A child that finds the same packages, and, unless it is trusted, no credentials in its environment."""
    folders = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    environment = {name: os.environ[name] for name in KEPT if name in os.environ} | ONE_THREAD
    environment = dict(os.environ) if trusted else environment
    return subprocess.Popen(
        [sys.executable, "-P", "-B", "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if trusted else subprocess.DEVNULL,
        env=environment | {"PYTHONPATH": folders},
    )


def _children() -> tuple[_Child, _Child, _Child]:
    return _Child("worker"), _Child("running"), _Child("functions", trusted=True)


_child, _judge, _own = _children()


def _after_fork() -> None:
    # The pipes are the parent's, and the lock may be held by a thread that is not here.
    global _child, _judge, _own
    _child, _judge, _own = _children()


def _stop() -> None:
    for child in (_child, _judge, _own):
        child.stop()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_stop)
