"""Examples as flat arrays, which move to the disk where they outgrow memory."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, overload

import numpy as np
from jaxtyping import Bool, Int32, Int64

IN_MEMORY = 2**26  # tokens that stay in memory before a file takes them: 320 MiB


@dataclasses.dataclass(frozen=True)
class Example:
    """A sequence to train on.

    Attributes:
      tokens: ids.
      trained: which ids are targets. The first never is: nothing stands before it.
      origin: "path:line" of its row.
    """

    tokens: Int32[np.ndarray, " length"]
    trained: Bool[np.ndarray, " length"]
    origin: str


class Examples(Sequence[Example]):
    """A sequence of examples without an object for each: 5 bytes a token and 20 an example.

    Attributes:
      tokens, trained: of all examples, one after the other.
      lengths: of each.
      sources: the sources of the examples ("train.jsonl").
      source: index in `sources` of each.
      lines: of each in its source; -1 where its origin names none.
      row_lengths: of every row before it was cut, split or dropped.
    """

    def __init__(
        self,
        tokens: Int32[np.ndarray, " tokens"],
        trained: Bool[np.ndarray, " tokens"],
        lengths: Int32[np.ndarray, " examples"],
        source: Int32[np.ndarray, " examples"],
        lines: Int64[np.ndarray, " examples"],
        sources: Sequence[str],
        row_lengths: Int32[np.ndarray, " rows"],
    ) -> None:
        self.tokens, self.trained, self.lengths = tokens, trained, lengths
        self.source, self.lines, self.sources = source, lines, list(sources)
        self.row_lengths = row_lengths
        self._ends = np.cumsum(lengths, dtype=np.int64)

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Examples:
        """The same examples, as flat arrays."""
        if isinstance(examples, Examples):
            return examples
        writer = Writer()
        for example in examples:
            writer.append(example)
            writer.row_lengths.append(len(example.tokens))
        return writer.examples()

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: Any) -> Any:
        """The example, whose arrays are views; or a list of those in a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        span = self.span(index)
        return Example(self.tokens[span], self.trained[span], self.origin(index))

    def span(self, index: int) -> slice:
        """Where an example stands in `tokens` and `trained`."""
        end = int(self._ends[index])
        return slice(end - int(self.lengths[index]), end)

    def origin(self, index: int) -> str:
        """Where an example's row stands: "path:line"."""
        source, line = self.sources[self.source[index]], self.lines[index]
        return source if line < 0 else f"{source}:{line}"

    @property
    def starts(self) -> Int64[np.ndarray, " examples"]:
        """Where each example begins in `tokens`."""
        return self._ends - self.lengths

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """sha256 of what each source holds: its lengths, tokens and trained marks, in their order."""
        arrays = (self.tokens, self.trained)
        # Hashes of their own, so that it does not matter what stands between a source's examples.
        hashes = {source: [hashlib.sha256() for _ in range(3)] for source in self.sources}
        changes = (np.flatnonzero(np.diff(self.source)) + 1).tolist()
        for first, last in itertools.pairwise([0, *changes, len(self)]):
            if first == last:
                break
            of_lengths, *of_arrays = hashes[self.sources[self.source[first]]]
            of_lengths.update(self.lengths[first:last].data)
            span = slice(self.span(first).start, self.span(last - 1).stop)
            for digest, flat in zip(of_arrays, arrays, strict=True):
                digest.update(flat[span].data)
        return {
            source: hashlib.sha256(b"".join(part.digest() for part in parts)).hexdigest()
            for source, parts in hashes.items()
        }

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of all examples in their order, whatever the files are called."""
        digest = hashlib.sha256(self.source.data)
        digest.update("".join(self.fingerprints[source] for source in self.sources).encode())
        return digest.hexdigest()


class Writer:
    """Gathers examples one by one; beyond `IN_MEMORY` tokens they go to temporary files without a name.

    Attributes:
      row_lengths: to be appended to, for every row.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []
        self._held = 0
        self._files: tuple[Any, Any] | None = None
        self._lengths, self._source, self._lines = array("i"), array("i"), array("q")
        self._sources: dict[str, int] = {}
        self.row_lengths = array("i")

    def __len__(self) -> int:
        """How many examples were appended."""
        return len(self._lengths)

    def append(self, example: Example) -> None:
        """Adds an example to the end."""
        self._parts.append((example.tokens, example.trained))
        self._lengths.append(len(example.tokens))
        source, _, line = example.origin.rpartition(":")
        if not (source and line.isdecimal() and line == str(int(line))):
            source, line = example.origin, "-1"
        self._source.append(self._sources.setdefault(source, len(self._sources)))
        self._lines.append(int(line))
        self._held += len(example.tokens)
        if self._held >= IN_MEMORY:
            self._spill()

    def _flat(self) -> tuple[np.ndarray, np.ndarray]:
        tokens, trained = zip(*self._parts, strict=True) if self._parts else ((), ())
        flat = (
            np.concatenate([np.zeros(0, np.int32), *tokens]),
            np.concatenate([np.zeros(0, bool), *trained]),
        )
        self._parts, self._held = [], 0
        return flat

    def _spill(self) -> None:
        if self._files is None:
            self._files = (tempfile.TemporaryFile(), tempfile.TemporaryFile())  # noqa: SIM115
        for flat, file in zip(self._flat(), self._files, strict=True):
            flat.tofile(file)

    def examples(self) -> Examples:
        """What was gathered; the writer is spent."""
        tokens, trained = self._flat() if self._files is None else self._mapped()
        gathered = (self._lengths, self._source, self.row_lengths)
        lengths, source, row_lengths = (np.asarray(numbers, np.int32) for numbers in gathered)
        lines = np.asarray(self._lines, np.int64)
        sources = list(self._sources)
        return Examples(tokens, trained, lengths, source, lines, sources, row_lengths)

    def _mapped(self) -> tuple[np.ndarray, np.ndarray]:
        assert self._files is not None
        self._spill()
        maps = []
        for file, dtype in zip(self._files, (np.int32, np.bool_), strict=True):
            file.flush()
            maps.append(np.memmap(file, dtype=dtype, mode="r"))
            file.close()  # the mapping keeps it
        return maps[0], maps[1]
