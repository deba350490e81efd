"""`jaxft serve` as a process: it listens, answers, and ends in order; and what it refuses to begin with."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from jaxft import cli

ADAPTER = Path(__file__).parents[2] / "golden" / "trl" / "adapters" / "lora"  # of another base


def encoded(body):
    return json.dumps(body).encode()


@pytest.mark.slow
def test_it_answers_over_a_socket_and_ends_with_0_at_sigterm():
    words = (
        "serve",
        "--model",
        "tiny",
        "--name",
        "small",
        "--port",
        "0",
        "--slots",
        "2",
        "--context",
        "64",
    )
    command = [sys.executable, "-m", "jaxft", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        try:
            line = process.stderr.readline()
            assert line.startswith("jaxft: small at http://127.0.0.1:"), line
            address = line.split()[3].rstrip(":")
            body = {"model": "small", "prompt": "Tom", "max_tokens": 3}
            with urllib.request.urlopen(
                f"{address}/completions", encoded(body), timeout=60
            ) as response:
                assert json.load(response)["usage"]["completion_tokens"] == 3
            long = body | {"max_tokens": 50, "ignore_eos": True, "stream": True}
            with urllib.request.urlopen(
                f"{address}/completions", encoded(long), timeout=60
            ) as response:
                response.readline()
                process.send_signal(signal.SIGTERM)
                said = response.read().decode()
            assert said.endswith("data: [DONE]\n\n")  # what is on its way is finished
            assert process.wait(60) == 0
            assert process.stderr.read() == ""
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--context", "100000"), "--context 100,000: the model reads 512 tokens"),
        (("--host", "no.such.host.invalid"), "cannot listen at no.such.host.invalid:8000"),
        (("--slots", "0"), "--slots"),
        (("--adapter", "folder"), "--adapter takes NAME=FOLDER, not 'folder'"),
        (("--adapter", "a=b", "--adapter", "a=c"), "the name 'a' is of b already"),
        (("--adapter", "tiny=b"), "the name 'tiny' is the base's already"),
        (("--adapter", f"a={ADAPTER}", "--port", "0"), "adapter"),
        (("--adapters-from", "nowhere"), "--adapters-from nowhere: no such folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_one_line(capsys, words, told):
    assert cli.main(["serve", "--model", "tiny", *words]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1


def test_a_port_that_is_taken_is_said_before_anything_is_read(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["serve", "--model", "tiny", "--port", str(port)]) == 2
    assert f"cannot listen at 127.0.0.1:{port}: Address already in use" in capsys.readouterr().err
