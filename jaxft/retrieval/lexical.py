"""BM25 over chunks, scored by bm25s, and kept as a folder that bm25s alone can load."""

from __future__ import annotations

import array
import functools
import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, Int64

from jaxft.errors import UserError, nearest
from jaxft.retrieval.searching import Found, best, together

CJK = r"\u3040-\u30ff\u3400-\u9fff"  # written without spaces: each letter counts as a word
WORD = re.compile(rf"[{CJK}]|[^\W{CJK}]+")
TERMS, STARTS, IDS = "terms.npy", "term_starts.npy", "ids.npy"


class Lexical:
    """BM25 (Lucene's variant: k1 1.5, b 0.75, as bm25s has it by default) over the words of chunks.

    What is kept of each chunk is its words' numbers. When chunks came or went, bm25s scores them all again from
    these (the statistics of all change): no text is read or cut again.

    Attributes:
        ids: the chunks' keys, (chunks,).
        stop_words: words that do not count.
    """

    def __init__(self, stop_words: str = "en") -> None:
        self.stop_words = stop_words_of(stop_words)
        self.language = stop_words
        self.ids: Int64[np.ndarray, " chunks"] = np.zeros(0, np.int64)
        self.vocabulary: dict[str, int] = {}
        self.terms: Int32[np.ndarray, " terms"] = np.zeros(0, np.int32)
        self.starts: Int64[np.ndarray, " chunks+1"] = np.zeros(1, np.int64)
        self._scored: Any = None

    def __len__(self) -> int:
        return len(self.ids)

    def words(self, text: str) -> list[str]:
        """The words of a text that count, in lower case."""
        return [word for word in WORD.findall(text.lower()) if word not in self.stop_words]

    def add(self, ids: Sequence[int], texts: Sequence[str]) -> None:
        """Adds chunks, behind those that are there."""
        numbers, ends = array.array("i"), []
        known = self.vocabulary
        for text in texts:
            numbers.extend(known.setdefault(word, len(known)) for word in self.words(text))
            ends.append(len(numbers))
        self.ids = np.concatenate([self.ids, np.asarray(ids, np.int64)])
        self.starts = np.concatenate(
            [self.starts, np.asarray(ends, np.int64).reshape(-1) + len(self.terms)]
        )
        self.terms = np.concatenate([self.terms, np.asarray(numbers, np.int32)])
        self._scored = None

    def remove(self, ids: Sequence[int]) -> None:
        """Takes chunks away."""
        self._take(np.flatnonzero(~np.isin(self.ids, np.asarray(ids, np.int64))))

    def arrange(self, ids: Int64[np.ndarray, " chunks"]) -> None:
        """Puts the chunks into this order, and numbers the words by their letters: as an index made anew has them."""
        order = np.argsort(self.ids, kind="stable")
        self._take(order[np.searchsorted(self.ids[order], ids)])
        used = np.zeros(len(self.vocabulary), bool)
        used[self.terms] = True
        kept = sorted(word for word, number in self.vocabulary.items() if used[number])
        renumbered = np.zeros(len(self.vocabulary), np.int32)
        renumbered[[self.vocabulary[word] for word in kept]] = np.arange(len(kept))
        self.terms = renumbered[self.terms]
        self.vocabulary = {word: number for number, word in enumerate(kept)}
        self._scored = None

    def _take(self, indices: np.ndarray) -> None:
        lengths = np.diff(self.starts)[indices]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        gathered = np.repeat(self.starts[:-1][indices] - starts[:-1], lengths)
        self.terms = self.terms[gathered + np.arange(starts[-1])]
        self.ids, self.starts, self._scored = self.ids[indices], starts, None

    @property
    def scored(self) -> Any:
        """The `bm25s.BM25` of these chunks."""
        if self._scored is None:
            self._scored = _bm25s().BM25()
            # bm25s itself gives an empty word to a vocabulary: it has no number where there are no words
            vocabulary = dict(self.vocabulary) or {"": 0}
            numbered = _Numbered(self.starts, self.terms, vocabulary)
            self._scored.index(numbered, create_empty_token=False, show_progress=False)
        return self._scored

    def scores(self, query: str) -> Float32[np.ndarray, " chunks"]:
        """The score of every chunk."""
        numbers = [self.vocabulary[word] for word in self.words(query) if word in self.vocabulary]
        if not numbers or not len(self):
            return np.zeros(len(self), np.float32)
        found: np.ndarray = self.scored.get_scores_from_ids(numbers)
        return found.astype(np.float32)

    def search(self, queries: Sequence[str], k: int) -> Found:
        """The k best chunks of each query, of those that have a word of it."""
        rows = []
        for query in queries:
            scores = self.scores(query)
            indices = best(scores, k, above=0.0)
            rows.append((self.ids[indices], scores[indices]))
        return together(rows, k)

    def most(self, query: str) -> float:
        """What no chunk's score can exceed: the sum of the words' inverse document frequencies.

        A word that no chunk has counts as the rarest. A score divided by this says what share of what the query
        asks for a chunk has, from 0 to 1.
        """
        count, ends = len(self), self.scored.scores["indptr"]
        numbers = [self.vocabulary.get(word, -1) for word in self.words(query)]
        frequencies = [int(ends[n + 1] - ends[n]) if n >= 0 else 0 for n in numbers]
        return float(sum(np.log1p((count - df + 0.5) / (df + 0.5)) for df in frequencies))

    def save(self, folder: Path) -> None:
        """Writes the folder, which `bm25s.BM25.load` reads as well."""
        folder.mkdir()
        self.scored.save(folder, show_progress=False)
        np.save(folder / TERMS, self.terms)
        np.save(folder / STARTS, self.starts)
        np.save(folder / IDS, self.ids)

    @classmethod
    def load(cls, folder: Path, stop_words: str) -> Lexical:
        """Reads what `save` wrote; the large arrays stay on the disk until they are used."""
        index = cls(stop_words)
        index.terms = np.load(folder / TERMS, mmap_mode="r")
        index.starts, index.ids = np.load(folder / STARTS), np.load(folder / IDS)
        scored = _bm25s().BM25.load(folder, mmap=True, show_progress=False)
        scored.nonoccurrence_array = None
        words = json.loads((folder / "vocab.index.json").read_text(encoding="utf-8"))
        index.vocabulary = {word: number for word, number in words.items() if word}
        index._scored = scored
        return index


def _bm25s() -> Any:
    """The package, which logs every step otherwise."""
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return bm25s


class _Numbered:
    """The numbers of the chunks' words as bm25s takes them: lists, of which one at a time is made."""

    def __init__(self, starts: np.ndarray, terms: np.ndarray, vocab: dict[str, int]) -> None:
        self.starts, self.terms, self.vocab = starts, terms, vocab

    @property
    def ids(self) -> _Numbered:
        return self

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __iter__(self) -> Iterator[list[int]]:
        for start, end in zip(self.starts[:-1], self.starts[1:], strict=True):
            yield self.terms[start:end].tolist()


@functools.cache
def stop_words_of(language: str) -> frozenset[str]:
    """The stop words that bm25s has of a language, "en" or another; none for "none"."""
    if language == "none":
        return frozenset()
    from bm25s import stopwords

    names = {
        name.removeprefix("STOPWORDS_").lower(): name
        for name in dir(stopwords)
        if name.startswith("STOPWORDS_")
    }
    if language not in names:
        short = sorted(name for name in names if "_" not in name)
        close = nearest(language, short) or f"; there are: none, {', '.join(short)}"
        raise UserError(f"no stop words of {language!r}{close}")
    return frozenset(getattr(stopwords, names[language]))
