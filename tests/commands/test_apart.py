"""A signal ends `jaxft plan` at once, whatever its compiler does; and leaves nothing running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

# A recipe in which C holds Python's lock and hears no signal, as a compiler may.
DEAF = """\
import ctypes, os, sys

def get_config():
    print("ready", os.getpid(), file=sys.stderr, flush=True)
    ctypes.PyDLL(None).sleep(60)
"""
SMALL = """\
import sys
from jaxft.commands.apart import apart

def work():
    {}

sys.exit(apart(work))
"""


def started(tmp_path, *flags):
    (tmp_path / "deaf.py").write_text(DEAF)
    words = [sys.executable, "-m", "jaxft", "plan", "--config", str(tmp_path / "deaf.py")]
    return subprocess.Popen(
        [*words, *flags], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def worker_of(process):
    word, number = process.stderr.readline().split()
    assert word == "ready"
    assert int(number) != process.pid
    return int(number)


def gone(number):
    """Whether the process is no more; it may take a moment."""
    for _ in range(200):
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [
        (signal.SIGINT, 130, "jaxft: interrupted\n"),
        (signal.SIGTERM, 143, "jaxft: terminated\n"),
    ],
)
@pytest.mark.parametrize(
    "flags", [("--device", "local"), ("--topology", "v5e:4x4", "--methods=all")]
)
def test_a_signal_ends_a_plan_while_the_compiler_works(tmp_path, number, status, said, flags):
    with started(tmp_path, *flags) as process:
        worker = worker_of(process)
        time.sleep(0.1)  # it sleeps in C now
        begun = time.monotonic()
        process.send_signal(number)
        out, told = process.communicate(timeout=30)
        assert (
            time.monotonic() - begun < 10
        )  # hundredths of a second; a machine of tests may be busy
    assert (process.returncode, out, told) == (status, "", said)
    assert gone(worker)


def test_a_killed_plan_leaves_no_compiler_behind(tmp_path):
    with started(tmp_path, "--device", "local") as process:
        worker = worker_of(process)
        process.kill()
    assert gone(worker)


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        ("return 0", 0, ""),
        ("return 2", 2, ""),
        ("print('out'); return 0", 0, "out\n"),
        ("sys.exit(3)", 3, ""),
        (
            "import os; os.kill(os.getpid(), 9)",
            137,
            "jaxft: ended by SIGKILL: the machine's memory",
        ),
        ("import os; os.kill(os.getpid(), 11)", 139, "jaxft: ended by SIGSEGV\n"),
    ],
)
def test_the_status_is_the_works(line, status, said):
    code = SMALL.format(line)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == status
    assert done.stdout.startswith(said)
    assert (done.stdout == "") == (said == "")
