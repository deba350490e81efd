"""The newest state on each host's own disk: written more often than RUN, and taken up where all hosts have it.

Orbax's emergency checkpoints are for meshes of two replicas or more ("at least 2 data-parallel replicas are needed")
and so leave out plain `fsdp`. Here every process writes the pieces that its own devices hold, and reads the same
pieces again; where they lie otherwise after a restart (another mesh, other hosts), RUN's checkpoint is taken.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from jaxft.formats.manifest import Damaged, check_manifest, write_manifest
from jaxft.runs.checkpoint import PARTIAL, Checkpoints, steps_in
from jaxft.runs.folder import written
from jaxft.runtime import processes, storage
from jaxft.tree import PyTree, flatten_with_paths

KEPT = 2  # the one before stays until every process has the newest
PIECES, DATA = "pieces.npz", "data.json"


class Local:
    """States on this host's disk, with the verbs of `Checkpoints`; without a folder it does nothing.

    Args:
        folder: this process's own, of this run; or None.
        every: updates between two states.
    """

    def __init__(self, folder: Path | None, every: int) -> None:
        self.folder, self.every = folder, every
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="local")
        self._pending: tuple[int, Future[None]] | None = None

    @property
    def steps(self) -> list[int]:
        """The steps of the last states, in order; some may be damaged."""
        return self._written()[-KEPT:]

    def _written(self) -> list[int]:
        return steps_in(self.folder) if self.folder and self.folder.exists() else []

    def save(self, step: int, tree: PyTree, data: Mapping[str, Any]) -> None:
        """Begins to write; the pieces are copied before this returns. All processes call it together.

        By then each has the state before this one whole, so that the ones before that may go.

        Raises:
            UserError: this state or the one before it cannot be written.
        """
        if self.folder is None:
            return
        self.wait()
        processes.wait("local")
        pieces = {
            name: np.array(piece)
            for path, leaf in flatten_with_paths(tree)
            for name, piece in _pieces(path, leaf).items()
        }
        future = self._thread.submit(self._write, self.folder / str(step), pieces, dict(data))
        self._pending = (step, future)

    def _write(self, whole: Path, pieces: dict[str, np.ndarray], data: dict[str, Any]) -> None:
        partial = whole.with_name(whole.name + PARTIAL)
        for left in (partial, whole):  # of a process that was killed, or damaged
            storage.remove(left)
        partial.mkdir(parents=True)
        flat: dict[str, Any] = {
            name: np.atleast_1d(piece).view(np.uint8) for name, piece in pieces.items()
        }
        with (partial / PIECES).open("wb") as file:
            np.savez(file, **flat)
        storage.write_text(partial / DATA, json.dumps(data))
        write_manifest(partial)
        partial.rename(whole)
        self._remove(self._written()[:-KEPT])

    def wait(self) -> None:
        """Until what was begun is written; raises UserError, with path and bytes, if it cannot be."""
        if self._pending is None or self.folder is None:
            return
        (step, future), self._pending = self._pending, None
        with written(self.folder / str(step)):
            future.result()

    def newest(self, like: PyTree, say: Callable[[str], None]) -> int | None:
        """The last step that all processes have whole and laid out as `like`, or None. All call it together."""
        if self.folder is None:
            return None
        own = [step for step in self.steps if self._is_whole(step, like, say)]
        return max(processes.common(own, KEPT), default=None)

    def _is_whole(self, step: int, like: PyTree, say: Callable[[str], None]) -> bool:
        try:
            check_manifest(self._of(step), required=True)
        except Damaged as error:
            say(f"{error}; it is not used")
            return False
        needed = {name for path, leaf in flatten_with_paths(like) for name in _pieces(path, leaf)}
        with self._opened(step) as found:
            fits = needed == set(found)
        if not fits:
            say(f"{self._of(step)}: lies otherwise on the devices; it is not used")
        return fits

    def data(self, step: int) -> dict[str, Any]:
        """What was told of the step beside the tree."""
        return dict(json.loads((self._of(step) / DATA).read_text()))

    def restore(self, step: int, like: PyTree) -> PyTree:
        """The tree of a step that `newest` gave, in the structure, dtypes and shardings of `like`."""
        with self._opened(step) as found:
            leaves = [_joined(path, leaf, found) for path, leaf in flatten_with_paths(like)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def _of(self, step: int) -> Path:
        assert self.folder is not None
        return self.folder / str(step)

    @contextlib.contextmanager
    def _opened(self, step: int) -> Iterator[Mapping[str, np.ndarray]]:
        with np.load(self._of(step) / PIECES, allow_pickle=False) as found:
            yield found

    def forget(self, after: int) -> None:
        """Removes the states of later steps: the run goes on from this one, and its metrics end there."""
        self._remove([step for step in self._written() if step > after])

    def _remove(self, steps: Sequence[int]) -> None:
        for step in steps:
            storage.remove(self._of(step))

    def discard(self) -> None:
        """Removes the states: the run is done."""
        if self.folder is not None:
            self.wait()
            storage.remove(self.folder)
            with contextlib.suppress(OSError):  # another process of this host has its own there
                self.folder.parent.rmdir()

    def close(self) -> None:
        """Lets go of the folder. What `wait` would raise is not raised here."""
        with contextlib.suppress(Exception):
            self.wait()
        self._thread.shutdown()


def newest_of(
    checkpoints: Checkpoints, local: Local, like: PyTree, say: Callable[[str], None]
) -> tuple[int | None, Checkpoints | Local]:
    """The last whole state's step and where it is, of RUN or of the hosts' disks; later ones there go."""
    step, near = checkpoints.newest(say), local.newest(like, say)
    source: Checkpoints | Local = checkpoints
    if near is not None and (step is None or near > step):
        say("the hosts' disks have a newer state than RUN")
        step, source = near, local
    local.forget(step or 0)
    return step, source


def local_of(settings: ConfigDict, workdir: Path) -> Local:
    """The states of this process and of this run, as `config.checkpoint` says. All processes call it together.

    RUN has a number of its own in RUN/checkpoints/number: a run that begins anew in a folder of the same name
    takes nothing from the one before.
    """
    if not settings.local:
        return Local(None, 0)
    folder = storage.local(settings.local, "config.checkpoint.local")
    file = workdir / "checkpoints" / "number"
    with written(file):
        if processes.first() and not file.exists():
            storage.make(file.parent)
            storage.write_text(file, secrets.token_hex(8))
        processes.wait("numbered")
        number = file.read_text()
    return Local(folder.absolute() / number / str(jax.process_index()), settings.local_every)


def _pieces(path: str, leaf: jax.Array) -> dict[str, jax.Array]:
    """The parts of an array that this process's devices hold, each once, by a name that says which part of what."""
    return {
        _name(path, leaf, shard.index): shard.data  # replicas have one name
        for shard in leaf.addressable_shards
    }


def _name(path: str, leaf: jax.Array, index: tuple[slice, ...]) -> str:
    """As `layers/x/a float32[4,8] 0:2,:`."""
    part = ",".join(str(i.start) + ":" + str(i.stop) for i in index).replace("None", "")
    return f"{path} {leaf.dtype}{list(leaf.shape)} {part}".replace(", ", ",")


def _joined(path: str, leaf: jax.Array, found: Mapping[str, np.ndarray]) -> jax.Array:
    """The array of which the pieces were found."""
    kind = leaf.sharding.memory_kind
    parts = [
        jax.device_put(
            found[_name(path, leaf, shard.index)].view(leaf.dtype).reshape(shard.data.shape),
            SingleDeviceSharding(shard.device, memory_kind=kind),
        )
        for shard in leaf.addressable_shards
    ]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)
