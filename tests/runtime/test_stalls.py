"""A result that never comes is noticed, and one that is merely late is not."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import cli
from jaxft.errors import Stalled
from jaxft.runtime import processes, stalls
from jaxft.runtime.stalls import await_ready, fetch


class Result:
    """An array that is there after so many looks."""

    def __init__(self, looks: float) -> None:
        self.looks = looks

    def is_ready(self) -> bool:
        self.looks -= 1
        return self.looks < 0


@pytest.fixture
def busy() -> Iterator[None]:
    """Another thread of this process works."""
    end = threading.Event()

    def work() -> None:
        while not end.is_set():
            sum(range(1000))

    thread = threading.Thread(target=work)
    thread.start()
    yield
    end.set()
    thread.join()


def test_numbers_are_read() -> None:
    """Whatever the tree holds."""
    read = fetch({"loss": jnp.float32(2.5), "steps": 3, "held": np.ones(2)})
    assert read["loss"] == 2.5
    assert read["steps"] == 3


def test_a_late_result_is_awaited() -> None:
    """The wait is shorter than the limit."""
    late, early = Result(20), Result(5)
    await_ready([late, early], limit=5.0)
    assert late.looks < 0
    assert early.looks < 0


def test_a_result_that_never_comes_is_told() -> None:
    """Nothing works meanwhile."""
    with pytest.raises(
        Stalled, match=r"done nothing.*a fault of jaxlib .*the same command goes on"
    ):
        await_ready([Result(0), Result(float("inf"))], limit=0.3)


@pytest.mark.usefixtures("busy")
def test_while_something_works_it_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a step that is long."""
    monkeypatch.setattr(stalls, "LITTLE", 0.02)
    began = time.monotonic()

    class Late:
        def is_ready(self) -> bool:
            return time.monotonic() - began > 1.5

    await_ready([Late()], limit=0.5)
    assert time.monotonic() - began > 1.5


def test_the_command_line_ends_with_75(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In one line, and without waiting for what never ends."""

    def stall(*_: object, **__: object) -> None:
        raise Stalled("the runtime stands still")

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(cli, "_run", stall)
    monkeypatch.setattr(processes, "leave", leave)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train"])
    assert ended.value.code == 75
    assert capfd.readouterr().err == "jaxft: the runtime stands still\n"
