"""The child's side: `python -m jaxft.runtime.sandbox.worker` answers requests on stdin until it ends.

A request and an answer are 8 bytes with the length and JSON. The limits are set before the first is read.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, BinaryIO

from jaxft.runtime.sandbox.matching import match
from jaxft.runtime.sandbox.template import render
from jaxft.runtime.sandbox.turns import one_line, turns

SECONDS = 0.4  # of processor time for a request, a little for each of its parts, and for its length
SECONDS_EACH = 0.01
SECONDS_MEGABYTE = 0.5
MOST_SECONDS = 30.0
MEGABYTES = 128  # beyond what the interpreter has when it has started
REFUSED = (
    "os.",
    "socket.",
    "subprocess.",
    "ctypes.",
    "shutil.",
    "pty.",
    "webbrowser.",
    "urllib.",
    "resource.",
)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
MAX_REPLY = 32_000_000  # bytes
ACTIONS: dict[str, Callable[..., list[Any]]] = {"render": render, "turns": turns, "match": match}


def limit() -> None:
    """No more memory than `MEGABYTES`, no file written, no core dump, nothing of what `refuse` names."""
    space = address_space() + MEGABYTES * 1_000_000
    for name, value in {"RLIMIT_AS": space, "RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0}.items():
        with suppress(AttributeError, ValueError, OSError):  # not every system has each of them
            resource.setrlimit(getattr(resource, name), (value, value))
    time.localtime()  # reads the time zone's file
    sys.addaudithook(refuse)


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook that lets the interpreter read modules and nothing else.

    Jinja's sandbox is what keeps a template from here; this is for the day when it does not.
    """
    if event.startswith(REFUSED) and event != "os.listdir":  # the importer's
        raise PermissionError(f"{event} is not allowed here")
    if event == "open" and not str(arguments[0]).endswith((".py", ".pyc", ".so")):
        raise PermissionError(f"no file is opened here: {str(arguments[0])[:80]!r}")
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES:
        raise PermissionError(f"no file is written here: {str(arguments[0])[:80]!r}")


def address_space() -> int:
    """Bytes of this process's address space; a usual size where the system does not say."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 100_000_000


def answer(request: bytes) -> bytes:
    """What the request's action returns, or the error it ends in, in one line, and whether a limit was the cause."""
    limited = True
    try:
        values = json.loads(request.decode("utf-8", "surrogatepass"))
        name = values.pop("action")
        signal.setitimer(signal.ITIMER_PROF, seconds_for(name, values["each"], len(request)))
        reply = _encoded({"results": ACTIONS[name](**values)})
        if len(reply) <= MAX_REPLY:
            return reply
        reason = f"the text has {len(reply)} bytes"
    except MemoryError:
        reason = f"it takes more than {MEGABYTES} MB of memory"
    except RecursionError:
        reason = "it is nested too deeply"
    except Exception as error:  # a template can raise anything
        reason, limited = one_line(error), False
    return _encoded({"error": reason, "limited": limited})


def seconds_for(action: str, each: Sequence[Any], length: int) -> float:
    """The processor time that a request of so many bytes may take; the turns of a conversation are parts of it."""
    parts = sum(len(part["messages"]) for part in each) if action == "turns" else len(each)
    asked = SECONDS + SECONDS_EACH * parts + SECONDS_MEGABYTE * length / 1_000_000
    return min(asked, MOST_SECONDS)


def _encoded(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answers one request after the other; SIGPROF, which nobody handles, ends a long one."""
    while head := requests.read(8):
        reply = answer(requests.read(int.from_bytes(head, "little")))
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(len(reply).to_bytes(8, "little") + reply)
        replies.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's Ctrl-C is the parent's
    output = os.fdopen(os.dup(1), "wb")
    sys.stdout = sys.stderr
    limit()
    serve(sys.stdin.buffer, output)
