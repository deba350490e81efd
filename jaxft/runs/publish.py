"""RUN's logs and exports as files of this machine, and their way into an object store."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxft.runs.folder import written
from jaxft.runtime import storage
from jaxft.runtime.processes import first

SECONDS = 30.0  # between two copies of logs that grow
# They say that what stands in other files is whole, and are copied after those.
LAST = ("metrics.jsonl", "manifest.json")


class Logs:
    """The folder in which a process writes logs and exports.

    Attributes:
        folder: RUN; of a RUN in an object store, and in every process but the first, a temporary folder.

    Args:
        folder: as above.
        target: RUN, where it is an object store that the folder is copied to.
        may: raises where this process has lost the run to another.
    """

    def __init__(
        self, folder: Path, target: Path | None = None, may: Callable[[], None] = lambda: None
    ) -> None:
        self.folder, self._target, self._may = folder, target, may
        self._copied: dict[str, tuple[int, int]] = {}
        self._time = time.monotonic()

    def publish(self, *, at_once: bool = True) -> None:
        """Copies each file that has changed; not `at_once`, nothing for a while after the last time.

        A run publishes before it begins a checkpoint, so that what a checkpoint's step has told is there with it,
        and what is lost with a killed process is told again by the next.
        """
        if self._target is None or not (at_once or time.monotonic() - self._time > SECONDS):
            return
        with written(self._target):
            self._may()
            files = storage.files_under(self.folder)
            for name in sorted(files, key=lambda name: (name.endswith(LAST), name)):
                status = files[name].stat()
                state = (status.st_mtime_ns, status.st_size)
                if self._copied.get(name) != state:
                    storage.copy_file(files[name], self._target / name)
                    self._copied[name] = state
        self._time = time.monotonic()


@contextlib.contextmanager
def logs_of(workdir: Path, may: Callable[[], None]) -> Iterator[Logs]:
    """Where this process writes logs and exports.

    So all processes do the same, and one of them leaves a trace. A temporary folder begins with RUN's logs, because
    what is still to be evaluated is read from them.

    Args:
        workdir: RUN.
        may: as of `Logs`.
    """
    if first() and not storage.is_remote(workdir):
        yield Logs(workdir)
        return
    with tempfile.TemporaryDirectory(prefix="jaxft-") as name:
        folder = Path(name, workdir.name)  # the plots' title
        folder.mkdir()
        for file in workdir.glob("*.jsonl"):
            (folder / file.name).write_bytes(file.read_bytes())
        logs = Logs(folder, workdir if first() else None, may)
        try:
            yield logs
        except BaseException:
            with contextlib.suppress(Exception):
                logs.publish()
            raise
        logs.publish()
