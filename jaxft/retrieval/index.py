"""An index's folder: chunks with their offsets, what finds them, and a manifest of the digests of all its files.

    INDEX/chunks.arrow      a row a chunk: key, source, start, end, tokens, heading, text; by source and offset
    INDEX/documents.arrow   a row a document: source, root (the path that was named), digest, chunks
    INDEX/lexical/          BM25, which bm25s alone can load too
    INDEX/vectors/          where it embeds: unit vectors
    INDEX/manifest.json     the sha256 of each file, and the settings; written last

The folder depends on the documents and the settings alone: one that was brought up to date has the bytes of one made
anew. It is made beside the old one and takes its place when it is whole.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jaxft.errors import UserError, shown
from jaxft.formats.manifest import NAME, Damaged, check_manifest, read_manifest, write_manifest
from jaxft.retrieval.chunks import Chunk
from jaxft.retrieval.embeddings import model_embedding, static_embedding
from jaxft.retrieval.lexical import Lexical
from jaxft.retrieval.searching import NONE, Found, Searcher, fuse
from jaxft.retrieval.stores import open_store
from jaxft.retrieval.vectors import Embed, Vectors
from jaxft.runtime.storage import local, remove

VERSION = 1
WHAT = "an index of documents is a folder that jaxft index made"
CHUNKS, DOCUMENTS, LEXICAL, VECTORS = "chunks.arrow", "documents.arrow", "lexical", "vectors"
DEPTH = 100  # of each ranking that is fused, at least
CHUNK_COLUMNS = pa.schema(
    [
        ("key", pa.int64()),
        ("source", pa.large_string()),
        ("start", pa.int64()),
        ("end", pa.int64()),
        ("tokens", pa.int32()),
        ("heading", pa.large_string()),
        ("text", pa.large_string()),
    ]
)
DOCUMENT_COLUMNS = pa.schema(
    [
        ("source", pa.large_string()),
        ("root", pa.large_string()),
        ("digest", pa.large_string()),
        ("chunks", pa.int64()),
    ]
)
HOW = ("auto", "lexical", "dense", "hybrid")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How an index was made; what changes one of these makes another index.

    Attributes:
      tokenizer: the folder whose tokens are counted, or "tiny".
      tokens: of a chunk, at most.
      overlap: tokens that a chunk may begin with of the one before.
      stop_words: a language of bm25s, or "none".
      embed: "none", "static" (wordllama) or "model".
      embed_model: the folder whose hidden states are the vectors; "" for none.
      store: "" for this folder, else what `open_store` takes.
      text_key: where rows of data have their text.
      digests: {"tokenizer": {file: sha256}, "embed": ...} of what it was made with.
    """

    tokenizer: str = "tiny"
    tokens: int = 128
    overlap: int = 0
    stop_words: str = "en"
    embed: str = "none"
    embed_model: str = ""
    store: str = ""
    text_key: str = "text"
    digests: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Passage:
    """A chunk that was found.

    Attributes:
      key: the chunk's.
      source, start, end: the bytes of the source that it covers.
      heading, text: what it says.
      tokens: of the text.
      score: by which it was found; of a hybrid search a sum of reciprocal ranks.
    """

    key: int
    source: str
    start: int
    end: int
    heading: str
    text: str
    tokens: int
    score: float


@dataclasses.dataclass
class Index:
    """Chunks and what finds them.

    Attributes:
      settings: how it was made.
      chunks: a table of `CHUNK_COLUMNS`.
      documents: a table of `DOCUMENT_COLUMNS`.
      parts: what finds chunks, {"lexical": ..., "dense": ...}; a store is one or both.
      threshold: the confidence below which a question counts as not answered by any passage; None: not calibrated.
      name: the folder, for messages.
    """

    settings: Settings
    chunks: pa.Table
    documents: pa.Table
    parts: dict[str, Searcher]
    threshold: float | None = None
    name: str = ""

    def __post_init__(self) -> None:
        keys = self.chunks["key"].to_numpy()
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    def __len__(self) -> int:
        return int(self.chunks.num_rows)

    def search(self, queries: Sequence[str], k: int, how: str = "auto") -> Found:
        """The k best chunks of each query.

        Args:
          queries: texts.
          k: how many of each, at most.
          how: "lexical", "dense", "hybrid" (both, by reciprocal ranks), or "auto": hybrid where there are both.

        Raises:
          UserError: the index has no such part.
        """
        if how == "auto":
            how = "hybrid" if len(self.parts) > 1 else next(iter(self.parts))
        wanted = list(self.parts) if how == "hybrid" else [how]
        if (
            how not in HOW
            or not set(wanted) <= set(self.parts)
            or (how, len(wanted)) == ("hybrid", 1)
        ):
            there = ", ".join(self.parts)
            raise UserError(f"{self.name}: has no {how} search; it has: {there} (--embed)")
        found = [self.parts[name].search(queries, max(k, DEPTH)) for name in wanted]
        if len(found) == 1:
            return Found(found[0].ids[:, :k], found[0].scores[:, :k])
        return fuse(found, k)

    def passages(self, found: Found) -> list[list[Passage]]:
        """The chunks of each query that were found."""
        rows = []
        for ids, scores in zip(found.ids, found.scores, strict=True):
            known = ids != NONE
            rows.append(
                [
                    self.passage(key, score)
                    for key, score in zip(ids[known].tolist(), scores[known].tolist(), strict=True)
                ]
            )
        return rows

    def passage(self, key: int, score: float = 0.0) -> Passage:
        """The chunk with this key."""
        index = int(np.searchsorted(self._keys, key))
        if index >= len(self._keys) or self._keys[index] != key:
            raise UserError(
                f"{self.name}: {self.settings.store} gives a chunk that the index does not have: it was changed by "
                "another; make the index again"
            )
        row = self.chunks.slice(int(self._order[index]), 1).to_pylist()[0]
        return Passage(**row, score=score)

    def confidence(self, query: str) -> float:
        """How surely some passage answers the query, the higher the surer: what a threshold is compared with.

        Of BM25 the best chunk's score as a share of what one could reach that had every word of the query (a word
        that no chunk has counts as the rarest); of vectors the highest cosine; of both their mean; of a store its
        best score.
        """
        scores = []
        for part in self.parts.values():
            found = part.search([query], 1)
            most = part.most(query) if isinstance(part, Lexical) else 1.0
            scores.append(float(found.scores[0, 0]) / most if most else 0.0)
        return sum(scores) / len(scores)


def indexed_text(chunk: Chunk | Passage) -> str:
    """What of a chunk is searched: its section's heading, and its text."""
    return f"{chunk.heading}\n{chunk.text}" if chunk.heading else chunk.text


def empty_index(settings: Settings, name: str) -> Index:
    """An index of no chunks yet."""
    chunks, documents = CHUNK_COLUMNS.empty_table(), DOCUMENT_COLUMNS.empty_table()
    if settings.store:
        store = open_store(settings.store, embedding_of(settings))
        return Index(settings, chunks, documents, dict(store), name=name)
    parts: dict[str, Searcher] = {"lexical": Lexical(settings.stop_words)}
    embed = embedding_of(settings)
    if embed is not None:
        parts["dense"] = Vectors(embed, embed([""]).shape[1])
    return Index(settings, chunks, documents, parts, name=name)


def embedding_of(settings: Settings) -> Embed | None:
    """What embeds texts for an index of these settings; None where nothing does.

    Raises:
      UserError: it is another one than the index was made with.
    """
    if settings.embed == "none":
        return None
    if settings.embed == "static":
        embed, known = static_embedding()
    else:
        embed, known = model_embedding(settings.embed_model, 2 * settings.tokens)
    before = settings.digests.get("embed", known)
    if dict(before) != known:
        what = settings.embed_model or "wordllama"
        raise UserError(
            f"{what}: its files are not those that the index was made with: make the index again"
        )
    return embed


def open_index(name: str | Path) -> Index:
    """The index in a folder.

    Raises:
      UserError: there is no index, it is damaged, of another version, or empty, or what it embeds by is missing.
    """
    folder = local(name, WHAT)
    about = _about(folder)
    try:
        check_manifest(folder, required=True)
        return _read(folder, about)
    except Damaged as error:
        raise Damaged(f"{error}; make it again") from error
    except (ValueError, TypeError, KeyError, IndexError, OSError, pa.ArrowException) as error:
        raise Damaged(f"{folder}: damaged: {shown(str(error))}; make it again") from error


def _about(folder: Path) -> dict[str, Any]:
    """What the manifest says of the index, which is of this version."""
    if not (folder / NAME).is_file():
        what = "a folder without a manifest.json" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {what}; {WHAT}: jaxft index --documents PATH --output {folder}")
    about = read_manifest(folder).get("index")
    if not isinstance(about, dict):
        raise UserError(f"{folder}: its {NAME} is of something else; {WHAT}")
    if about.get("version") != VERSION:
        raise UserError(
            f"{folder}: an index of version {shown(about.get('version'))}; this jaxft reads {VERSION}: make it again"
        )
    return about


def _read(folder: Path, about: dict[str, Any]) -> Index:
    settings = Settings(**about["settings"])
    chunks = _table(folder / CHUNKS, CHUNK_COLUMNS)
    documents = _table(folder / DOCUMENTS, DOCUMENT_COLUMNS)
    if not chunks.num_rows:
        raise UserError(f"{folder}: an empty index: no document in it has any text")
    parts: dict[str, Searcher]
    embed = embedding_of(settings)
    if settings.store:
        parts = dict(open_store(settings.store, embed))
    else:
        lexical = Lexical.load(folder / LEXICAL, settings.stop_words)
        parts = {"lexical": lexical}
        _check_keys(lexical.ids, chunks)
        if embed is not None:
            vectors = Vectors.load(folder / VECTORS, embed)
            parts["dense"] = vectors
            _check_keys(vectors.ids, chunks)
    threshold = about["threshold"]
    return Index(settings, chunks, documents, parts, threshold, str(folder))


def _check_keys(ids: np.ndarray, chunks: pa.Table) -> None:
    if not np.array_equal(ids, chunks["key"].to_numpy()):
        raise ValueError("its parts are not of the same chunks")


def _table(file: Path, columns: pa.Schema) -> pa.Table:
    with pa.memory_map(str(file)) as source:
        table = pa.ipc.open_file(source).read_all()
    if table.schema != columns:
        raise ValueError(f"{file.name} has other columns")
    table.validate()
    return table


def save_index(index: Index, output: str | Path) -> None:
    """Writes an index, in the place of what is there, once it is whole."""
    folder = local(output, WHAT)
    if folder.exists() and any(folder.iterdir()):
        _about(folder)  # nothing else is written over
    new, old = (folder.with_name(f"{folder.name}.{end}") for end in ("new", "old"))
    for stale in (new, old):
        remove(stale)
    new.mkdir(parents=True)
    for name, table in ((CHUNKS, index.chunks), (DOCUMENTS, index.documents)):
        with pa.OSFile(str(new / name), "wb") as sink, pa.ipc.new_file(sink, table.schema) as out:
            out.write_table(table, max_chunksize=1 << 16)
    for name, part in ((LEXICAL, "lexical"), (VECTORS, "dense")):
        searcher = index.parts.get(part)
        if isinstance(searcher, Lexical | Vectors):
            searcher.save(new / name)
    settings = dataclasses.asdict(index.settings)
    about = {"version": VERSION, "settings": settings, "threshold": index.threshold}
    write_manifest(new, index=about)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    remove(old)
