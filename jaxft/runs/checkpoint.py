"""A run's checkpoints: what training changes or drew at random, and never the frozen base."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxft.errors import UserError
from jaxft.formats.manifest import NAME as MANIFEST
from jaxft.formats.manifest import Damaged, check_manifest, write_manifest
from jaxft.runs.folder import written
from jaxft.runtime import storage
from jaxft.tree import PyTree, flatten_with_paths, partition
from jaxft.weights import SHARED, is_adapter, weights_of

OVERHEAD = 1.25  # what a checkpoint may take, by the bytes of its arrays
LATE = ("Event loop is closed", "cannot schedule new futures after shutdown")
PARTIAL = ".partial"  # the ending of a checkpoint that is being written


def drawn_patterns(params: PyTree) -> list[tuple[str, bool]]:
    """(pattern, True) of every leaf that an adapter added to the tree: all parts but the base.

    Among the frozen leaves these are the random ones (LoRA-FA's a, VeRA's projections, Delta-LoRA's a0, b0),
    which a checkpoint must hold, because the base's folder does not.
    """
    adapted = [path for path, weight in weights_of(params) if is_adapter(weight)]
    base = [(f"{path}/base", False) for path in adapted]
    parts = [(f"{path}/*", True) for path in adapted]
    shared = [(name, True) for name in SHARED if name in params]
    return [*base, *parts, *shared]


def split_base(params: PyTree, frozen: PyTree) -> tuple[PyTree, PyTree]:
    """(drawn, base): the frozen tree as what belongs in a checkpoint and what does not."""
    return partition(frozen, drawn_patterns(params))


def _quiet() -> None:
    """Leaves what goes wrong in writing to the one line that tells it.

    Orbax logs it as well, and its writes that were under way then call an event loop that it has closed.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not (kind is RuntimeError and str(error) in LATE):
            before(kind, error, trace)

    sys.excepthook = hook


def steps_in(folder: Path) -> list[int]:
    """The steps whose folders stand in a folder, in order."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


class Checkpoints:
    """The folder RUN/checkpoints, written by Orbax while training goes on.

    The checkpoint of step n holds the state after n updates, the drawn frozen leaves, and whatever
    else the caller tells (the data iterator's state). Trees are stored flat, by path. A checkpoint is
    written as `n.partial` and gets its manifest there; it is renamed to `n` when it is whole, and only
    then do older ones go. In an object store, where no folder can be renamed, it is written as `n`, and whole once
    its manifest, the last object, is there.

    Args:
        folder: where they stand.
        keep: how many of the last stay.
        asynchronous: write while training goes on.
        may: raises where this process has lost the run to another; asked before a checkpoint becomes whole.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        asynchronous: bool = True,
        may: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self._keep = storage.absolute(folder), keep
        self._asynchronous, self._may = asynchronous, may
        self._ending = "" if storage.is_remote(folder) else PARTIAL
        self._primary = jax.process_index() == 0
        with written(self.folder):
            storage.make(self.folder)
            if self._primary:
                for left in self._unfinished():
                    storage.remove(left)
        logging.getLogger("absl").setLevel(
            logging.CRITICAL
        )  # Orbax's failures are told in one line
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._pending: tuple[int, Future[None]] | None = None
        self._current: int | None = None

    def _unfinished(self) -> list[Path]:
        """What a run that was killed had begun to write."""
        if self._ending:
            return list(self.folder.glob(f"*{PARTIAL}*"))
        return [path for path in map(self._of, self.steps) if not (path / MANIFEST).exists()]

    def _of(self, step: int) -> Path:
        return self.folder / str(step)

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints, in order; some may be damaged."""
        return steps_in(self.folder)

    @property
    def current(self) -> int | None:
        """The step that was saved or restored last."""
        return self._current

    @property
    def latest(self) -> int | None:
        """The last checkpoint's step, or None."""
        return max(self.steps, default=None)

    def save(
        self, step: int, tree: PyTree, data: Mapping[str, Any], protect: Sequence[int] = ()
    ) -> None:
        """Begins to write; the tree's arrays are copied before this returns.

        Args:
            step: updates made; nothing happens if that is what was saved or restored last.
            tree: what to keep.
            data: fit for JSON.
            protect: steps of older checkpoints that are to stay beside the last `keep`.

        Raises:
            UserError: this checkpoint or the one before it cannot be written.
        """
        if step == self._current:
            return
        self.wait()
        partial = self.folder / f"{step}{self._ending}"
        items = ocp.args.Composite(
            tree=ocp.args.StandardSave(dict(flatten_with_paths(tree))),
            data=ocp.args.JsonSave(dict(data)),
        )
        with written(self._of(step)):
            self._require_room(tree)
            if (
                self._primary
            ):  # a damaged one: Orbax would ask a bucket for more rights to remove it
                storage.remove(partial)
            self._orbax.save(partial, args=items, force=True)
        self._pending = (step, self._thread.submit(self._commit, step, frozenset(protect)))
        self._current = step
        if not self._asynchronous:
            self.wait()

    def _require_room(self, tree: PyTree) -> None:
        """OSError where the disk cannot hold the tree: said before anything is written."""
        need = int(OVERHEAD * sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
        if self._primary and need > storage.free_bytes(self.folder):
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {need:,} bytes are needed")

    def _commit(self, step: int, protect: frozenset[int]) -> None:
        """Waits for Orbax, then makes the checkpoint whole and removes those that are no more needed."""
        self._orbax.wait_until_finished()
        if not self._primary:
            return
        self._may()
        partial, whole = self.folder / f"{step}{self._ending}", self._of(step)
        write_manifest(partial)
        if partial != whole:
            storage.remove(whole)  # a damaged one, made again
            partial.rename(whole)
        past = [known for known in self.steps if known <= step]
        stay = {*past[-self._keep :], *protect}
        for known in set(self.steps) - stay:
            storage.remove(self._of(known))

    def wait(self) -> None:
        """Until what was begun is written; raises UserError, with path and bytes, if it cannot be."""
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        with written(self._of(step)):
            try:
                future.result()
            except Exception:
                self._current = None
                with contextlib.suppress(Exception):
                    storage.remove(self.folder / f"{step}{self._ending}")
                raise

    def newest(self, say: Callable[[str], None]) -> int | None:
        """The last whole checkpoint's step, or None. Those that are damaged are named to `say`."""
        for step in reversed(self.steps):
            try:
                check_manifest(self._of(step), required=True)
            except Damaged as error:
                say(f"{error}; the checkpoint before it is used")
            else:
                return step
        return None

    def data(self, step: int) -> dict[str, Any]:
        """What was told of the step beside the tree."""
        items = ocp.args.Composite(data=ocp.args.JsonRestore())
        with self._read(step):
            return dict(self._orbax.restore(self._of(step), args=items)["data"])

    def restore(self, step: int, like: PyTree) -> PyTree:
        """The tree of a checkpoint in the structure, dtypes and shardings of `like`.

        Raises:
            Damaged: a file is not as it was written.
            UserError: the tree is another one, as of another method.
        """
        check_manifest(self._of(step), required=True)
        wanted = dict(flatten_with_paths(like))
        abstract = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for path, leaf in wanted.items()
        }
        items = ocp.args.Composite(tree=ocp.args.StandardRestore(abstract))
        with self._read(step):
            restored = self._orbax.restore(self._of(step), args=items)
            leaves = [restored["tree"][path] for path in wanted]
        self._current = step
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    @contextlib.contextmanager
    def _read(self, step: int) -> Iterator[None]:
        try:
            with storage.failing(self.folder):
                yield
        except (ValueError, KeyError, OSError) as error:
            line = str(error).strip().split("\n")[0]
            raise UserError(f"{self._of(step)}: this checkpoint cannot be read: {line}") from error

    def close(self) -> None:
        """Lets go of the folder. What `wait` would raise is not raised here."""
        with contextlib.suppress(Exception):
            self.wait()
        self._thread.shutdown()
        with contextlib.suppress(Exception):
            self._orbax.close()
