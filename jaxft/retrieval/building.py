"""An index made of documents, or brought up to date with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxft.assets import model_folder
from jaxft.data.tokenizer import load_tokenizer
from jaxft.errors import UserError, counted
from jaxft.formats.manifest import NAME, TOKENIZER, fingerprint
from jaxft.retrieval.chunks import Chunk, cut
from jaxft.retrieval.documents import Document, Unreadable, read_documents
from jaxft.retrieval.embeddings import model_embedding, static_embedding
from jaxft.retrieval.index import (
    CHUNK_COLUMNS,
    DOCUMENT_COLUMNS,
    WHAT,
    Index,
    Settings,
    empty_index,
    indexed_text,
    open_index,
    save_index,
)
from jaxft.retrieval.lexical import Lexical
from jaxft.retrieval.vectors import Vectors
from jaxft.runtime.storage import local

TOGETHER = 4096  # chunks that are added at once


@dataclasses.dataclass
class Report:
    """What became of the documents.

    Attributes:
      added, changed, removed, kept: how many documents.
      chunks: in the whole index.
      empty: documents without a word, which are in no chunk.
      unreadable: what could not be read, and what is of another kind.
    """

    added: int = 0
    changed: int = 0
    removed: int = 0
    kept: int = 0
    chunks: int = 0
    empty: int = 0
    unreadable: Unreadable = dataclasses.field(default_factory=Unreadable)

    def __str__(self) -> str:
        """One line; what did not occur is left out."""
        documents = self.added + self.changed + self.kept
        named = (("added", self.added), ("changed", self.changed), ("removed", self.removed))
        parts = [
            f"{number:,} {what}" for what, number in (*named, ("as before", self.kept)) if number
        ]
        parts += [f"{self.empty:,} without text"] * bool(self.empty)
        said = f" ({', '.join(parts)})" if parts else ""
        return f"{counted(documents, 'document')}{said}, {counted(self.chunks, 'chunk')}"


def with_digests(settings: Settings) -> Settings:
    """The settings, with the digests of what they name."""
    digests = {"tokenizer": fingerprint(model_folder(settings.tokenizer, weights=False), TOKENIZER)}
    if settings.embed == "static":
        digests["embed"] = static_embedding()[1]
    elif settings.embed == "model":
        digests["embed"] = model_embedding(settings.embed_model, 2 * settings.tokens)[1]
    return dataclasses.replace(settings, digests=digests)


def update_index(
    output: str | Path,
    documents: Sequence[str],
    settings: Mapping[str, Any] | None = None,
    *,
    removed: Sequence[str] = (),
    skip_unreadable: bool = False,
) -> tuple[Index, Report]:
    """Makes an index of documents, or brings the one that is there up to date with them, and writes it.

    The documents below a path that is named here are as they are now: changed and new ones are cut, embedded and
    added, those that are gone are removed, and those that are the same are not looked at again. Documents below
    other paths stay.

    Args:
      output: the index's folder.
      documents: paths, as of `read_documents`.
      settings: fields of `Settings`; those that are not given are as in the index that is there, or the defaults.
      removed: paths that were named before, or sources, whose documents go.
      skip_unreadable: leave out what cannot be read, and say so in the report.

    Raises:
      UserError: what cannot be read, an index of other settings, or one that would be empty.
    """
    folder = local(output, WHAT)
    if (folder / NAME).is_file():
        index = open_index(folder)
        _check_same(index, settings or {})
    else:
        index = empty_index(with_digests(Settings(**settings or {})), str(folder))
    report = Report(unreadable=Unreadable(skip_unreadable))
    new = _updated(index, documents, removed, report)
    report.chunks = len(new)
    if not len(new):
        raise UserError(f"{output}: an empty index: {report}; no document has any text")
    if report.added or report.changed or report.removed:
        save_index(new, folder)
        return new, report
    return index, report


def _check_same(index: Index, given: Mapping[str, Any]) -> None:
    """Raises UserError where the settings that are given are not those of the index that is there."""
    there = dataclasses.asdict(index.settings)
    for name, value in given.items():
        if there[name] != value:
            raise UserError(
                f"{index.name}: is an index with {name} {there[name]!r}, not {value!r}: take another --output, or "
                "remove it and make it again"
            )
    if with_digests(index.settings).digests != index.settings.digests:
        raise UserError(
            f"{index.name}: its tokenizer {index.settings.tokenizer} has other files than it had: remove the index "
            "and make it again"
        )


def _updated(index: Index, roots: Sequence[str], removed: Sequence[str], report: Report) -> Index:
    before = {row["source"]: row for row in index.documents.to_pylist()}
    unknown = [name for name in removed if not any(_is_of(row, [name]) for row in before.values())]
    if unknown:
        raise UserError(f"{index.name}: holds no document of {unknown[0]}")
    after: dict[str, dict[str, Any]] = {}
    fresh = _Fresh(index)
    documents = read_documents(roots, report.unreadable, index.settings.text_key)
    for document in _new_or_changed(documents, before, after, report):
        chunks = cut(document, fresh.tokenizer, index.settings.tokens, index.settings.overlap)
        after[document.source]["chunks"] = len(chunks)
        report.empty += not chunks
        fresh.add(chunks)
    fresh.flush()
    stay = {
        source: row
        for source, row in before.items()
        if source not in after and not _is_of(row, roots) and not _is_of(row, removed)
    }
    report.kept += len(stay)
    gone = [
        source for source, row in before.items() if after.get(source, stay.get(source)) is not row
    ]
    report.removed = sum(source not in after for source in gone)
    rows = sorted((stay | after).values(), key=lambda row: str(row["source"]))
    return _arranged(index, fresh, gone, pa.Table.from_pylist(rows, DOCUMENT_COLUMNS))


def _is_of(row: dict[str, Any], names: Sequence[str]) -> bool:
    return row["root"] in names or row["source"] in names


def _new_or_changed(
    documents: Iterable[Document],
    before: dict[str, dict[str, Any]],
    after: dict[str, dict[str, Any]],
    report: Report,
) -> Iterator[Document]:
    """Yields the documents that are not as before, and notes all of them in `after`."""
    for document in documents:
        source, digest = document.source, document.digest
        if source in after:  # below two of the paths
            continue
        old = before.get(source)
        if old is not None and old["digest"] == digest and old["root"] == document.root:
            after[source] = old
            report.kept += 1
            continue
        report.added += old is None
        report.changed += old is not None
        after[source] = {"source": source, "root": document.root, "digest": digest}
        yield document


class _Fresh:
    """Chunks that are new: added to the index's parts some at a time, their rows kept as columns."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.tokenizer = load_tokenizer(index.settings.tokenizer)
        self.held: list[Chunk] = []
        self.tables: list[pa.Table] = []

    def add(self, chunks: Sequence[Chunk]) -> None:
        self.held += chunks
        if len(self.held) >= TOGETHER:
            self.flush()

    def flush(self) -> None:
        held, self.held = self.held, []
        if not held:
            return
        keys = [chunk.key for chunk in held]
        columns: dict[str, Any] = {
            field.name: [getattr(chunk, field.name) for chunk in held] for field in CHUNK_COLUMNS
        }
        self.tables.append(pa.table(columns, CHUNK_COLUMNS))
        texts = [indexed_text(chunk) for chunk in held]
        for part in self.index.parts.values():
            part.add(keys, texts)


def _arranged(index: Index, fresh: _Fresh, gone: Sequence[str], documents: pa.Table) -> Index:
    """The index without the chunks of what is gone and with the new ones, all in their order."""
    names = pa.array(gone, pa.large_string())
    is_gone = pc.is_in(index.chunks["source"], names)
    lost = index.chunks.filter(is_gone)["key"].to_numpy()
    kept = index.chunks.filter(pc.invert(is_gone))
    chunks = pa.concat_tables([kept, *fresh.tables])
    added = np.concatenate([table["key"].to_numpy() for table in (*fresh.tables, kept.slice(0, 0))])
    again = np.isin(lost, added)  # a changed document may have the same chunk as before
    order = pc.sort_indices(chunks, [(name, "ascending") for name in ("source", "start", "end")])
    chunks = chunks.take(order).combine_chunks()
    keys = chunks["key"].to_numpy()
    if len(np.unique(keys)) < len(keys):
        raise UserError(
            f"{index.name}: two chunks have the same key, which cannot be: cut otherwise"
        )
    for part in index.parts.values():
        if isinstance(part, Lexical | Vectors):
            part.arrange(keys)
        elif len(lost):
            part.remove(lost[~again].tolist())
    return Index(index.settings, chunks, documents, index.parts, name=index.name)
