"""A run's checkpoints: what training changes or drew at random, and never the frozen base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxft.errors import UserError
from jaxft.tree import PyTree, flatten_with_paths, partition
from jaxft.weights import SHARED, weights_of


def drawn_patterns(params: PyTree) -> list[tuple[str, bool]]:
    """(pattern, True) of every leaf that an adapter added to the tree: all parts but the base.

    Among the frozen leaves these are the random ones (LoRA-FA's a, VeRA's projections, Delta-LoRA's a0, b0),
    which a checkpoint must hold, because the base's folder does not.
    """
    base = [
        (f"{path}/base", False) for path, weight in weights_of(params) if hasattr(weight, "base")
    ]
    parts = [(f"{path}/*", True) for path, weight in weights_of(params) if hasattr(weight, "base")]
    shared = [(name, True) for name in SHARED if name in params]
    return [*base, *parts, *shared]


def split_base(params: PyTree, frozen: PyTree) -> tuple[PyTree, PyTree]:
    """(drawn, base): the frozen tree as what belongs in a checkpoint and what does not."""
    return partition(frozen, drawn_patterns(params))


class Checkpoints:
    """The folder RUN/checkpoints, written asynchronously by Orbax.

    A checkpoint of step n holds the state after n updates, the drawn frozen leaves, and the data
    iterator's state. Trees are stored flat, by path.

    Args:
        folder: where they stand.
        keep: how many of the last stay.
        asynchronous: write while training goes on.
    """

    def __init__(self, folder: Path, *, keep: int, asynchronous: bool = True) -> None:
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=asynchronous, create=True
            ),
        )

    @property
    def latest(self) -> int | None:
        """The last whole checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, tree: PyTree, data: Mapping[str, Any]) -> None:
        """Begins to write; the tree's arrays are copied before this returns."""
        if step != self.latest:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    tree=ocp.args.StandardSave(dict(flatten_with_paths(tree))),
                    data=ocp.args.JsonSave(dict(data)),
                ),
            )

    def restore(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """The tree of a checkpoint in the structure, dtypes and shardings of `like`, and the data's state."""
        wanted = dict(flatten_with_paths(like))
        abstract = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for path, leaf in wanted.items()
        }
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    tree=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
                ),
            )
        except (ValueError, KeyError, FileNotFoundError) as error:
            line = str(error).strip().split("\n")[0]
            raise UserError(
                f"{self._manager.directory}/{step}: this checkpoint cannot be read: {line}"
            ) from error
        leaves = [restored["tree"][path] for path in wanted]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), restored["data"]

    def wait(self) -> None:
        """Until what was begun is written; raises what went wrong in writing."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and lets go of the folder."""
        self._manager.wait_until_finished()
        self._manager.close()
