"""`python -m jaxft.runtime.sandbox.running`: judges answers, each in a process of its own, until its input ends.

This process runs none of the code: for every answer it forks one that does, with hard limits (`confine`), takes at
most 64 KB from it, and kills it with all that it may have started, when it has answered or when its time is over. So
what one grading does (an endless loop, 10 GB, `os._exit`, another `json.dumps`) no other sees.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

from jaxft.runtime.sandbox.judging import ACTIONS, NotJudged, prepare
from jaxft.runtime.sandbox.kernel import die_with_parent, forbid
from jaxft.runtime.sandbox.turns import one_line
from jaxft.runtime.sandbox.worker import address_space, refuse

MOST_BYTES = 65_536  # that a process may answer with
Verdict = tuple[float | None, str]


class Limits(NamedTuple):
    """Of one answer: processor time and waiting time in seconds, and memory beyond what there is at the start."""

    seconds: float
    waiting: float
    megabytes: int


class Running(NamedTuple):
    """A process that judges."""

    number: int
    pid: int
    pipe: int
    deadline: float
    text: bytearray


def confine(limits: Limits) -> None:
    """From here on this process has little time and memory, writes nothing, starts nothing, and asks no network."""
    space = address_space() + limits.megabytes * 1_000_000
    whole = int(limits.seconds) + 1
    sizes = {
        "RLIMIT_AS": (space, space),
        "RLIMIT_FSIZE": (0, 0),
        "RLIMIT_CORE": (0, 0),
        "RLIMIT_CPU": (
            whole,
            whole + 1,
        ),  # first the signal that says why, then the one that nobody escapes
    }
    for name, pair in sizes.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, name), pair)
    signal.setitimer(signal.ITIMER_PROF, limits.seconds)
    forbid()
    sys.addaudithook(refuse)


def judged(action: str, request: Mapping[str, Any], each: Mapping[str, Any], limits: Limits) -> Any:
    """[number or None, why there is none]: what the action says, in a process that is confined."""
    try:
        return [ACTIONS[action](**request, **each), ""]
    except NotJudged as error:
        return [None, one_line(error)]
    except MemoryError:
        return [None, f"it takes more than {limits.megabytes} MB of memory"]
    except RecursionError:
        return [None, "it recurses too deeply"]
    except SystemExit:
        return [None, "it ends the process"]
    except BaseException as error:  # it can raise anything
        return [None, f"{type(error).__name__}: {one_line(error)}"]


def start(index: int, silent: int, limits: Limits, action: str, request: Any, each: Any) -> Running:
    """Forks a process that judges, and nothing else of this one's is open in it."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return Running(index, pid, reading, time.monotonic() + limits.waiting, bytearray())
    try:
        os.setsid()
        die_with_parent()
        for descriptor in (0, 1, 2):
            os.dup2(silent, descriptor)
        output = os.dup2(writing, 3)
        os.closerange(4, 1024)
        confine(limits)
        text = json.dumps(judged(action, request, each, limits)).encode("utf-8", "replace")
        while text:
            text = text[os.write(output, text) :]
    finally:
        os._exit(0)


def finish(running: Running, limits: Limits) -> Verdict:
    """Ends a process, with all of its session, and reads what became of it."""
    late = time.monotonic() >= running.deadline
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(running.pid, signal.SIGKILL)
    os.close(running.pipe)
    _, status = os.waitpid(running.pid, 0)
    with contextlib.suppress(ValueError, TypeError):
        value, reason = json.loads(running.text)
        if isinstance(reason, str) and (value is None or isinstance(value, float)):
            return value, reason[:300]
    if late:
        return None, f"it takes more than {limits.waiting:g} s"
    ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if ended in (signal.SIGPROF, signal.SIGXCPU):
        return (
            None,
            f"it takes more than {limits.seconds:g} s of processor time: does it loop for ever?",
        )
    if ended and ended != signal.SIGKILL:
        return None, f"it ended by signal {ended}"
    return None, "it ended its process without an answer"


def verdicts(
    action: str, each: list[Any], limits: list[float], together: int, **request: Any
) -> list[Verdict]:
    """The verdict of each answer, of which `together` are judged at a time."""
    seconds, waiting, megabytes = limits
    bounds = Limits(seconds, waiting, int(megabytes))
    try:
        prepare(action, request)
    except NotJudged as error:
        return [(None, str(error))] * len(each)
    gc.collect()
    found: list[Verdict] = [(None, "")] * len(each)
    waiting_jobs = iter(enumerate(each))
    silent = os.open(os.devnull, os.O_RDWR)
    running: dict[int, Running] = {}
    while True:
        for index, asked in _upto(waiting_jobs, together - len(running)):
            job = start(index, silent, bounds, action, request, asked)
            running[job.pipe] = job
        if not running:
            break
        for job in _ready(running):
            del running[job.pipe]
            found[job.number] = finish(job, bounds)
    os.close(silent)
    return found


def _upto(jobs: Iterator[Any], most: int) -> Iterator[Any]:
    for _ in range(most):
        for job in jobs:
            yield job
            break


def _ready(running: Mapping[int, Running]) -> list[Running]:
    """Those that have ended, or said too much, or whose time is over; waits for the first."""
    left = min(job.deadline for job in running.values()) - time.monotonic()
    poll = select.poll()
    for pipe in running:
        poll.register(pipe, select.POLLIN | select.POLLHUP)
    ready = []
    for pipe, _ in poll.poll(max(0.0, 1000 * left) + 1):
        text = os.read(pipe, MOST_BYTES)
        running[pipe].text.extend(text)
        if not text or len(running[pipe].text) > MOST_BYTES:
            ready.append(running[pipe])
    now = time.monotonic()
    return ready + [job for job in running.values() if job.deadline <= now and job not in ready]


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answers one request after the other: 8 bytes with the length, and JSON."""
    while head := requests.read(8):
        request = json.loads(requests.read(int.from_bytes(head, "little")))
        reply = json.dumps({"results": verdicts(**request)}).encode()
        replies.write(len(reply).to_bytes(8, "little") + reply)
        replies.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's Ctrl-C is the parent's
    output = os.fdopen(os.dup(1), "wb")
    sys.stdout = sys.stderr
    serve(sys.stdin.buffer, output)
