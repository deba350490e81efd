"""The states of a run from which it can go on: in RUN, and more often on each host's own disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxft.runs.checkpoint import Checkpoints
from jaxft.runs.host_checkpoint import local_of, newest_of
from jaxft.runs.identity import check_identity
from jaxft.tree import PyTree


class Saves:
    """RUN/checkpoints, and the hosts' disks where `config.checkpoint.local` names a folder.

    Args:
        settings: `config.checkpoint`.
        workdir: RUN.
        identity: what the run stands on, which each state records.
        may: raises where this process has lost the run to another.

    Attributes:
        workdir: RUN.
        checkpoints: in RUN.
        local: on this host's disk.
    """

    def __init__(
        self,
        settings: ConfigDict,
        workdir: Path,
        identity: Mapping[str, Any],
        may: Callable[[], None],
    ) -> None:
        self.workdir, self._identity = workdir, identity
        self.checkpoints = Checkpoints(
            workdir / "checkpoints",
            keep=settings.keep,
            asynchronous=settings.asynchronous,
            may=may,
        )
        self.local = local_of(settings, workdir)

    def newest(
        self, like: PyTree, say: Callable[[str], None], at: int | None = None
    ) -> tuple[int, PyTree, dict[str, Any]] | None:
        """(step, its tree as `like`, the feed's state) of the last whole state, or None.

        With `at` it is the state of that step in RUN; of step 0 there is none.

        Raises:
            UserError: it stands on another base or tokenizer than this run.
        """
        if at is None:
            step, source = newest_of(self.checkpoints, self.local, like, say)
        else:
            step, source = at or None, self.checkpoints
        if step is None:
            return None
        told = source.data(step)
        check_identity(told["run"], self._identity, self.workdir, say)
        return step, source.restore(step, like), told["iterator"]

    def save(
        self, step: int, tree: PyTree, feed: Mapping[str, Any], protect: Sequence[int] = ()
    ) -> None:
        """Begins a checkpoint of a tree and a feed's state; those of the steps in `protect` stay."""
        self.checkpoints.save(step, tree, self._told(feed), protect)

    def save_local(self, step: int, tree: PyTree, feed: Mapping[str, Any]) -> None:
        """The same on this host's disk, unless RUN gets it."""
        if self.checkpoints.current != step:
            self.local.save(step, tree, self._told(feed))

    def _told(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        return {"iterator": dict(feed), "run": dict(self._identity)}

    def left(self) -> str:
        """What of RUN's checkpoints stays where the run breaks off, in words."""
        self.checkpoints.wait()
        last = self.checkpoints.latest
        return "no checkpoint was written yet" if last is None else f"checkpoint {last} stays"

    def wait(self) -> None:
        """Until what was begun is written; raises UserError if it cannot be."""
        self.checkpoints.wait()
        self.local.wait()

    def close(self) -> None:
        """Lets go of both folders."""
        self.checkpoints.close()
        self.local.close()
