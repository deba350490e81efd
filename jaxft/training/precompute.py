"""The reference's log-probabilities in one pass before training, kept in the run's folder and checked when read."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float32
from ml_collections import ConfigDict

from jaxft.assets import model_folder
from jaxft.data.preferences import Comparison, Comparisons
from jaxft.errors import UserError
from jaxft.formats.manifest import BASE
from jaxft.formats.manifest import fingerprint as base_fingerprint
from jaxft.objectives import objective_of
from jaxft.runs.folder import open_folder, written
from jaxft.runtime import processes, storage
from jaxft.training.reference import Reference
from jaxft.training.sharding import host_rows, place_batch
from jaxft.training.step import nothing_more
from jaxft.tree import PyTree

Known = Float32[np.ndarray, "pairs 2"]
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}  # of a recomputed log-probability


@dataclasses.dataclass(frozen=True)
class Precomputed:
    """Gives examples the reference's log-probabilities: from RUN/reference, or computed and written there.

    Attributes:
        config: the run's configuration.
        folder: RUN/reference.
        mesh: where it is computed.
        reference: what makes the reference's tree.
        frozen: the frozen tree.
    """

    config: ConfigDict
    folder: Path
    mesh: Mesh
    reference: Reference
    frozen: PyTree

    def __call__(
        self, name: str, examples: Comparisons, *, max_length: int, pad_id: int
    ) -> Comparisons:
        """The examples with what the reference says of them; `name` is the split's, which names the file.

        Raises:
            UserError: the file is of other data or of another reference.
        """
        path = self.folder / f"{name}.npz"
        batches = objective_of(self.config).examples.batches(
            self.config,
            examples,
            max_length=max_length,
            batch_size=self.config.eval_batch_size,
            shuffle=False,
            pad_id=pad_id,
            epochs=1,
            host_rows=host_rows(self.config.eval_batch_size, self.mesh),
        )
        data = fingerprint(examples.pairs())
        if path.exists():
            values = self._read(path, data)
            self._check(path, values, examples.pairs(), next(iter(self._pass([batches[0]]))))
        else:
            values = np.zeros((len(examples), 2), np.float32)
            for index, found in self._pass(batches[number] for number in range(len(batches))):
                values[index] = found
            if processes.first():
                file, base = io.BytesIO(), np.asarray(self._base())
                np.savez(file, log_probabilities=values, data=np.asarray(data), base=base)
                with written(path):
                    storage.make(self.folder)
                    storage.write_bytes(path, file.getvalue())
        known = zip(examples.pairs(), values.tolist(), strict=True)
        return Comparisons(
            [dataclasses.replace(pair, reference=(one, two)) for pair, (one, two) in known]
        )

    def _base(self) -> str:
        """What the reference stands on: the digests of the base's or the reference's files."""
        folder = self.config.objective.reference
        folder = self.config.model if folder == "start" else folder
        return json.dumps(base_fingerprint(model_folder(folder), BASE), sort_keys=True)

    def _pass(self, batches: Any) -> Any:
        """Yields (index of the examples, their log-probabilities (n, 2)) batch by batch."""
        held, beside, shape = self.reference.held, self.reference.beside, self.reference.config
        ask = objective_of(self.config).reference
        assert ask is not None

        def run(frozen: PyTree, batch: Any, *held: PyTree) -> tuple[jax.Array, jax.Array]:
            (params,) = beside(frozen, *held)
            pair = ask(shape, params, batch)
            return jax.numpy.stack(pair, axis=-1), batch["index"]

        # On every device, so that each host has all of them.
        jitted = jax.jit(run, out_shardings=NamedSharding(self.mesh, PartitionSpec()))
        for batch in batches:
            placed = place_batch(batch, self.config.eval_batch_size, self.mesh)
            found, index = jax.device_get(jitted(self.frozen, placed, *held))
            yield index[index >= 0], found[index >= 0]

    def _read(self, path: Path, data: str) -> Known:
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                values, written, base = (file[key] for key in ("log_probabilities", "data", "base"))
        except (OSError, ValueError, KeyError, EOFError) as error:
            reason = str(error).split("\n")[0]
            raise UserError(f"{path}: not log-probabilities of a reference: {reason}") from error
        if str(base) != self._base():
            raise UserError(
                f"{path}: the log-probabilities are of another reference: the base's files are others; begin in a "
                "new folder, or remove it to have them computed again"
            )
        if str(written) != data:
            raise UserError(
                f"{path}: the reference's log-probabilities are of other data (fingerprint {str(written)[:12]}, "
                f"that of the rows now {data[:12]}); begin in a new folder, or remove it to have them computed again"
            )
        return values

    def _check(
        self, path: Path, values: Known, examples: Sequence[Comparison], probe: tuple[Any, Known]
    ) -> None:
        """Raises UserError where a few of the log-probabilities, computed again, are not the same."""
        index, found = probe
        close = TOLERANCE[self.config.dtype] * (1.0 + np.abs(found))
        for row, was, now in zip(index, values[index], found, strict=True):
            if not np.all(np.abs(was - now) <= close.max()):
                raise UserError(
                    f"{path}: the log-probabilities are of another reference: {examples[row].origin} has "
                    f"{was[0]:.4f} there and {now[0]:.4f} now; the base or the adapter changed"
                )


def computed_beforehand(
    config: ConfigDict,
    workdir: Path,
    mesh: Mesh,
    reference: Reference,
    frozen: PyTree,
) -> tuple[Precomputed | None, Reference]:
    """What completes the examples, and the reference that the step then needs: as asked, or nothing and itself."""
    if not beforehand(config):
        return None, reference
    processes.wait("asked")  # the others have seen the folder as it was
    if processes.first():
        open_folder(config, workdir)
    folder = workdir / "reference"
    line = f"{config.objective.name}: the reference's log-probabilities stand in {folder}"
    return Precomputed(config, folder, mesh, reference, frozen), without(reference, line)


def beforehand(config: ConfigDict) -> bool:
    """Whether the reference's log-probabilities are computed before training."""
    row = objective_of(config)
    return row.reference is not None and not row.ahead and bool(config.objective.precompute)


def without(reference: Reference, line: str = "") -> Reference:
    """The reference of a step whose batches bring its log-probabilities."""
    return Reference(nothing_more, (), reference.config, line)


def fingerprint(examples: Sequence[Comparison]) -> str:
    """sha256 of the tokens and of which are trained, in the examples' order."""
    digest = hashlib.sha256()
    for example in examples:
        for array in (example.tokens, example.branches, example.trained):
            digest.update(len(array).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
