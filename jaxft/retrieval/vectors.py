"""Exact search among vectors: every chunk is compared with every query."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64

from jaxft.retrieval.searching import Found, best, together

BLOCK = 1 << 16  # chunks that are compared at once
VECTORS, IDS = "vectors.npy", "ids.npy"
Embed = Callable[[Sequence[str]], Float32[np.ndarray, "texts width"]]


class Vectors:
    """Chunks by the cosine of their vectors with the query's.

    Attributes:
        ids: the chunks' keys, (chunks,).
        vectors: of length 1, (chunks, width) float32.
        embed: gives the vectors of texts, of length 1.
    """

    def __init__(self, embed: Embed, width: int) -> None:
        self.embed = embed
        self.ids: Int64[np.ndarray, " chunks"] = np.zeros(0, np.int64)
        self.vectors: Float32[np.ndarray, "chunks width"] = np.zeros((0, width), np.float32)

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, ids: Sequence[int], texts: Sequence[str]) -> None:
        """Adds chunks, behind those that are there."""
        if len(ids):
            self.ids = np.concatenate([self.ids, np.asarray(ids, np.int64)])
            self.vectors = np.concatenate([self.vectors, self.embed(texts)])

    def remove(self, ids: Sequence[int]) -> None:
        """Takes chunks away."""
        self._take(np.flatnonzero(~np.isin(self.ids, np.asarray(ids, np.int64))))

    def arrange(self, ids: Int64[np.ndarray, " chunks"]) -> None:
        """Puts the chunks into this order."""
        order = np.argsort(self.ids, kind="stable")
        self._take(order[np.searchsorted(self.ids[order], ids)])

    def _take(self, indices: np.ndarray) -> None:
        self.ids, self.vectors = self.ids[indices], self.vectors[indices]

    def search(self, queries: Sequence[str], k: int) -> Found:
        """The k nearest chunks of each query, and their cosines."""
        if not len(self) or not queries:
            return together([(self.ids[:0], self.ids[:0])] * len(queries), k)
        asked = self.embed(queries)
        rows = [(self.ids[:0], np.zeros(0, np.float32)) for _ in queries]
        for start in range(0, len(self), BLOCK):
            near = asked @ np.asarray(self.vectors[start : start + BLOCK]).T
            for row, scores in enumerate(near):
                indices = best(scores, k)
                ids = np.concatenate([rows[row][0], self.ids[start + indices]])
                values = np.concatenate([rows[row][1], scores[indices]])
                chosen = best(values, k)
                rows[row] = ids[chosen], values[chosen]
        return together(rows, k)

    def save(self, folder: Path) -> None:
        """Writes the folder."""
        folder.mkdir()
        np.save(folder / VECTORS, self.vectors)
        np.save(folder / IDS, self.ids)

    @classmethod
    def load(cls, folder: Path, embed: Embed) -> Vectors:
        """Reads what `save` wrote; the vectors stay on the disk until they are compared."""
        vectors = np.load(folder / VECTORS, mmap_mode="r")
        index = cls(embed, vectors.shape[1])
        index.vectors, index.ids = vectors, np.load(folder / IDS)
        return index


def unit(vectors: np.ndarray) -> Float32[np.ndarray, "texts width"]:
    """Vectors of length 1; one of zeros stays so."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
