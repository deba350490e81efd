"""One process at a time on a run's folder."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType

from jaxft.errors import UserError
from jaxft.training.folder import written

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
        """Takes the lock, once; UserError, naming the process that has it, if it is taken."""
        if self._descriptor >= 0:
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
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
