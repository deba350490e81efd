"""Code of a grader: whatever it does, its answer is a number or one line, and nothing of it is left."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxft.errors import UserError
from jaxft.runtime.sandbox import call_function, client, verdicts
from jaxft.runtime.sandbox.kernel import MACHINES

BODY = "def grade(sample, item):\n    "
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part is Linux's")
HOSTILE = {
    "loop": ("while True: pass", "processor time: does it loop for ever"),
    "fork": ("import os; os.fork()", "os.fork is not allowed"),
    "fork bomb": ("import os\n    while True: os.fork()", "os.fork is not allowed"),
    "10 GB": ("return len(bytearray(10**10))", "more than 512 MB of memory"),
    "grows": ("x = ['a' * 10**6]\n    while True: x = x + x", "memory|processor time"),
    "exit": ("import os; os._exit(0)", "ended its process without an answer"),
    "sys.exit": ("import sys; sys.exit(1)", "it ends the process"),
    "socket": ("import socket; socket.create_connection(('127.0.0.1', 1))", "socket.* is not allowed"),
    "recursion": ("return grade(sample, item)", "recurses too deeply"),
    "sleep": ("import time; time.sleep(100)", "more than 1.5 s"),
    "another program": ("import subprocess; subprocess.run(['id'])", "is not allowed"),
    "reads": ("return len(open('/etc/passwd').read())", "no file is opened here"),
    "writes": ("open('/tmp/x.py', 'w')", "no file is written here"),
    "kills": ("import os; os.kill(os.getppid(), 9)", "os.kill is not allowed"),
    "lifts its limits": (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "not allowed",
    ),
    "stops its clock": (
        "import signal; signal.setitimer(signal.ITIMER_PROF, 0)\n    while True: pass", "1.5 s|processor time",
    ),
    "C": ("import ctypes; return ctypes.CDLL(None).fork()", "ctypes.dlopen is not allowed"),
    "floods its pipe": ("import os\n    while True: os.write(3, b'1' * 1000)", "without an answer"),
    "raises": ("raise KeyboardInterrupt('a\\nb')", "KeyboardInterrupt: a b"),
    "a text": ("return 'good'", "it returned str 'good', not a number"),
    "nan": ("return float('nan')", "it returned nan"),
    "nothing": ("pass", "it returned None"),
}  # fmt: skip
LIMITS = {"seconds": 0.2, "waiting": 1.5}


def children_of(pid: int) -> list[int]:
    """The processes whose parent it is."""
    return [
        int(found.name)
        for found in Path("/proc").iterdir()
        if found.name.isdigit() and parent_of(found) == pid
    ]


def parent_of(folder: Path) -> int:
    try:
        return int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has just ended
        return 0


def judge(body: str, **limits: float) -> tuple[float | None, str]:
    each = [{"item": {"a": 1}, "sample": {"output_text": "x"}}]
    [verdict] = verdicts("python", {"source": BODY + body}, each, **(LIMITS | limits))
    return verdict


@pytest.mark.parametrize(("body", "reason"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_code_is_one_line_and_leaves_no_process(body, reason):
    value, said = judge(body)
    assert value is None
    assert re.search(reason, said), said
    assert "\n" not in said
    if sys.platform == "linux":
        assert not children_of(client._judge._process.pid)


@LINUX
@pytest.mark.skipif(os.uname().machine not in MACHINES, reason="no table of its system calls")
def test_the_kernel_refuses_what_the_interpreter_would_let_through():
    """The audit hook is not asked by these: without the kernel they would work."""
    last = "" if sys.version_info >= (3, 14) else ", False"
    fork_exec = (
        "import _posixsubprocess as p, os; r, w = os.pipe(); p.fork_exec([b'id'], [b'/usr/bin/id'], True, (w,), None, "
        f"None, -1, -1, -1, -1, -1, -1, r, w, False, False, -1, None, None, None, -1, None{last})"
    )
    assert "Operation not permitted" in judge(fork_exec)[1]
    assert "Operation not permitted" in judge("import _socket; _socket.socketpair()")[1]


def test_threads_numpy_and_prints_are_allowed():
    thread = "import threading; t = threading.Thread(target=print); t.start(); t.join(); return 0.5"
    assert judge(thread, seconds=2, waiting=20) == (0.5, "")
    assert judge("import numpy as np; return np.float32(2.5)", seconds=5, waiting=60) == (2.5, "")
    assert judge("print('x' * 10**6); return True") == (1.0, "")


def test_one_grading_changes_nothing_for_the_next():
    """Another `json.dumps`, or a number kept in a module, is gone with its process."""
    assert judge("import json, math; json.dumps = lambda x: '[9.0, \"\"]'; math.pi = 9; return 1")
    assert judge("import math; return math.pi > 4") == (0.0, "")


def test_verdicts_come_in_the_order_of_the_answers():
    source = "import time\ndef grade(sample, item): time.sleep(item['wait']); return item['n']"
    each = [{"item": {"wait": 0.1 * (n % 3 == 0), "n": n}, "sample": {}} for n in range(9)]
    assert verdicts("python", {"source": source}, each) == [(float(n), "") for n in range(9)]


def test_the_next_is_judged_after_the_process_that_judges_was_ended():
    assert judge("return 1") == (1.0, "")
    client._judge._process.kill()
    client._judge._process.wait()
    assert judge("return 1") == (1.0, "")


@LINUX
def test_no_process_outlives_the_one_that_judges():
    """Not even one that sleeps: the kernel ends it with its parent."""
    judge("return 1")
    process = client._judge._process
    thread = threading.Thread(
        target=judge, args=("import time; time.sleep(60)",), kwargs={"waiting": 60}
    )
    thread.start()
    deadline = time.monotonic() + 20
    while not (started := children_of(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)  # until it has asked the kernel for this
    process.kill()
    thread.join(20)
    while any(map(os.path.exists, map("/proc/{}".format, started))) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert started
    assert not any(parent_of(Path(f"/proc/{pid}")) for pid in started)


@pytest.mark.thorough
def test_a_thousand_hostile_graders_leave_a_good_one_as_it_was():
    bodies = [body for body, _ in HOSTILE.values()]
    for number in range(1000):
        value, reason = judge(bodies[number % len(bodies)], seconds=0.1, waiting=0.5)
        assert value is None
        assert reason
        assert "\n" not in reason
    assert judge("return 1") == (1.0, "")
    if sys.platform == "linux":
        assert not children_of(client._judge._process.pid)


OWN = """
import os
calls = []

def plain(sample, item):
    calls.append(1)
    return len(sample["output_text"]) + item["a"] + len(calls) / 10

def of_trl(completions, prompts, a, **rest):
    return [float(len(text)) + n for text, n in zip(completions, a)]

def short(completions):
    return [1.0]

def named(completions):
    return {0: 1.0}

def of_ids(completion_ids, **rest):
    return [float(len(ids)) for ids in completion_ids]

def of_names(**names):
    return of_ids(**names)

def alone(completions):
    return 5

async def later(completions):
    return [float(len(completion[0]["content"])) for completion in completions]

def leaves(sample, item):
    os._exit(3)

def fails(sample, item):
    raise ValueError("no\\nway")

number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's, in the working folder of a process that is started anew."""
    (tmp_path / "own_rewards.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    client._own.stop()
    yield "own_rewards"
    client._own.stop()


def test_a_function_of_ones_own_keeps_what_it_has_in_memory(own):
    each = [{"item": {"a": 1, "prompt": "p"}, "sample": {"output_text": "xy"}}] * 2
    assert call_function(f"{own}:plain", each) == [(3.1, ""), (3.2, "")]
    assert call_function(f"{own}:of_trl", each) == [(3.0, ""), (3.0, "")]
    assert call_function(f"{own}:short", each)[0] == (
        None,
        "it returned 1 reward for 2 completions",
    )
    assert call_function(f"{own}:named", each)[0] == (
        None,
        "it returned dict '{0: 1.0}', not a list of rewards",
    )
    each = [one | {"ids": [7] * n} for n, one in enumerate(each)]
    assert (
        call_function(f"{own}:of_ids", each)
        == call_function(f"{own}:of_names", each)
        == [(0.0, ""), (1.0, "")]
    )
    assert call_function(f"{own}:alone", each)[0] == (
        None,
        "it returned int '5', not a list of rewards",
    )
    assert call_function(f"{own}:fails", each)[0] == (None, "ValueError: no way")
    talk = {"item": {"prompt": [{"role": "user", "content": "p"}]}, "sample": {"output_text": "xy"}}
    assert call_function(f"{own}:later", [talk]) == [(2.0, "")]


def test_a_function_that_ends_its_process_ends_no_run(own):
    each = [{"item": {"a": 1}, "sample": {"output_text": "xy"}}]
    [(value, reason)] = call_function(f"{own}:leaves", each)
    assert value is None
    assert reason == "own_rewards:leaves: it ended its process, with status 3"
    assert call_function(f"{own}:plain", each) == [(3.1, "")]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{}:nothing", "module 'own_rewards' has no function 'nothing'"),
        ("{}:number", "has no function 'number'"),
        ("{}s:plain", "no module 'own_rewardss' is found"),
        ("{}", "module:function is expected"),
    ],
)
def test_a_function_that_is_not_there_is_an_error(own, name, message):
    with pytest.raises(UserError, match=message):
        call_function(name.format(own), [])
