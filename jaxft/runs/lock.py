"""One process at a time on a run's folder: by a lock, or in an object store, which has none, by the last word."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import socket
from pathlib import Path
from types import TracebackType

from jaxft.errors import UserError
from jaxft.runs.folder import written
from jaxft.runtime import storage
from jaxft.runtime.processes import first

NAME = "lock"


class Lock:
    """The right to write into RUN, which the kernel takes back when the process ends, however it ends.

    The file RUN/checkpoints/lock stays and means nothing by itself: what counts is the `flock` on it.

    Args:
        workdir: RUN.
    """

    def __init__(self, workdir: Path) -> None:
        self._workdir, self._descriptor = workdir, -1

    def __enter__(self) -> Lock:
        if (self._workdir / "config.json").exists():
            self.take()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def take(self) -> None:
        """Takes the lock, once, for all processes; UserError, naming the one that has it, if it is taken."""
        if self._descriptor >= 0 or not first():
            return
        path = self._workdir / "checkpoints" / NAME
        with written(path):
            path.parent.mkdir(exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise UserError(
                f"{self._workdir}: {holder or 'another process'} is training in this folder; "
                "wait for it, or take another folder"
            ) from None
        self._descriptor = descriptor
        with written(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{_process()}\n".encode(), 0)

    def check(self) -> None:
        """What is locked stays so."""


class Claim(contextlib.nullcontext[None]):
    """The right to write into a RUN in an object store: the process that took it last has it.

    Such a store has no lock that ends with its process, and one that stays would keep the next start out. So who
    begins writes down that it did, in RUN/checkpoints/writer, and a process whose name is no more there stops before
    it writes. That is what a start after a preemption needs, whose machine may still live; what two processes lose
    that are started at once is the work of one of them.

    Args:
        workdir: RUN.
    """

    def __init__(self, workdir: Path) -> None:
        super().__init__()
        self._workdir, self._name = workdir, ""

    def take(self) -> None:
        """Takes the run, for all processes, from whoever has it."""
        if self._name or not first():
            return
        self._name = f"{_process()} ({secrets.token_hex(8)})"
        with written(self._file):
            storage.write_text(self._file, self._name)

    def check(self) -> None:
        """UserError, naming the process that has it, if this one has lost the run."""
        if not self._name:
            return
        with written(self._file):
            holder = self._file.read_text()
        if holder != self._name:
            raise UserError(
                f"{self._workdir}: {holder} has gone on with this run since; this one stops and writes nothing more"
            )

    @property
    def _file(self) -> Path:
        return self._workdir / "checkpoints" / "writer"


def lock_of(workdir: Path) -> Lock | Claim:
    """What keeps a run's folder to one process."""
    return Claim(workdir) if storage.is_remote(workdir) else Lock(workdir)


def _process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
