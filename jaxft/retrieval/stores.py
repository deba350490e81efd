"""Stores past one machine behind the protocol of `Searcher`: LanceDB and Qdrant, embedded here or as a service, and
OpenSearch (`opensearch.py`), a service.

The index's folder keeps the chunks and their offsets; a store holds their keys, texts and vectors, and finds them.
LanceDB and OpenSearch find by words (full-text search) and by vectors, Qdrant by vectors alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from jaxft.errors import UserError, nearest
from jaxft.retrieval.opensearch import open_service
from jaxft.retrieval.searching import Found, Searcher, together, told
from jaxft.retrieval.vectors import Embed
from jaxft.runtime.storage import scheme_of

TABLE = "jaxft"
EXTRAS = {
    "lancedb": ("lancedb", "lancedb"),
    "qdrant": ("qdrant_client", "qdrant-client"),
    "opensearch": ("opensearchpy", "opensearch-py"),
}
KNOWN = "lancedb:URI, qdrant:LOCATION or opensearch:URL"
DELETED = 5000  # keys in one statement


def open_store(name: str, embed: Embed | None) -> dict[str, Searcher]:
    """What finds chunks in a store: {"lexical": ..., "dense": ...}, of which it may have one alone.

    Args:
        name: "lancedb:URI", "qdrant:LOCATION", where a location is a folder, ":memory:", or a service's URL, or
            "opensearch:URL".
        embed: gives the vectors of texts; None for none.

    Raises:
        UserError: an unknown kind, a package that is not installed, or a store that cannot be reached.
    """
    kind, colon, location = name.partition(":")
    if kind not in EXTRAS or not (colon and location):
        close = nearest(kind, EXTRAS)
        raise UserError(f"--store {name!r}: no such store{close}; write {KNOWN}")
    module, package = EXTRAS[kind]
    try:
        __import__(module)
    except ImportError as error:
        raise UserError(
            f"{name}: needs the package {package}, which is not installed: "
            f"pip install 'jaxft[{kind}]'"
        ) from error
    if kind == "qdrant":
        if embed is None:
            raise UserError(f"{name}: Qdrant finds by vectors: it needs --embed static or model")
        return {"dense": QdrantStore(location, embed)}
    if kind == "opensearch":
        return open_service(location, embed)
    table = LanceTable(location, embed)
    words: dict[str, Searcher] = {"lexical": LanceWords(table)}
    return words | ({"dense": LanceVectors(table)} if embed is not None else {})


class LanceTable:
    """A table of LanceDB with the columns id, text and, where something embeds, vector."""

    def __init__(self, uri: str, embed: Embed | None) -> None:
        import lancedb

        self.name, self.embed = f"lancedb:{uri}", embed
        columns = [("id", pa.int64()), ("text", pa.string())]
        if embed is not None:
            columns.append(("vector", pa.list_(pa.float32(), embed([""]).shape[1])))
        self.schema = pa.schema(columns)
        with told(self.name):
            self.table = lancedb.connect(uri).create_table(TABLE, schema=self.schema, exist_ok=True)
        self.indexed = False

    def add(self, ids: Sequence[int], texts: Sequence[str]) -> None:
        columns: dict[str, Any] = {"id": list(ids), "text": list(texts)}
        if self.embed is not None:
            columns["vector"] = list(self.embed(texts))
        with told(self.name):
            rows = pa.table(columns, self.schema)
            merge = self.table.merge_insert("id").when_matched_update_all()
            merge.when_not_matched_insert_all().execute(rows)
        self.indexed = False

    def remove(self, ids: Sequence[int]) -> None:
        with told(self.name):
            for start in range(0, len(ids), DELETED):
                some = ", ".join(map(str, map(int, ids[start : start + DELETED])))
                self.table.delete(f"id in ({some})")
        self.indexed = False

    def index_words(self) -> None:
        """Makes the full-text index of what is there now."""
        if not self.indexed:
            with told(self.name):
                self.table.create_fts_index("text", replace=True)
            self.indexed = True


class LanceWords:
    """LanceDB's full-text search: BM25 with its own words and stop words."""

    def __init__(self, table: LanceTable) -> None:
        self.table = table

    def add(self, ids: Sequence[int], texts: Sequence[str]) -> None:
        """Adds chunks, or writes them again."""
        self.table.add(ids, texts)

    def remove(self, ids: Sequence[int]) -> None:
        """Takes chunks away."""
        self.table.remove(ids)

    def search(self, queries: Sequence[str], k: int) -> Found:
        """The k best chunks of each query."""
        from lancedb.query import MatchQuery

        self.table.index_words()
        rows = []
        with told(self.table.name):
            for query in queries:
                asked = self.table.table.search(MatchQuery(query, "text"), query_type="fts")
                found = asked.select(["id", "_score"]).limit(k).to_arrow()
                rows.append((found["id"].to_numpy(), found["_score"].to_numpy()))
        return together(rows, k)


class LanceVectors:
    """LanceDB's search by cosine, exact: no index of vectors is made. Chunks come and go by `LanceWords`."""

    def __init__(self, table: LanceTable) -> None:
        self.table = table

    def add(self, ids: Sequence[int], texts: Sequence[str]) -> None:
        """Nothing: the table has them already."""

    def remove(self, ids: Sequence[int]) -> None:
        """Nothing, likewise."""

    def search(self, queries: Sequence[str], k: int) -> Found:
        """The k nearest chunks of each query, and their cosines."""
        assert self.table.embed is not None
        rows = []
        with told(self.table.name):
            for vector in self.table.embed(queries):
                asked = self.table.table.search(vector, vector_column_name="vector")
                asked = asked.distance_type("cosine").select(["id", "_distance"])
                found = asked.limit(k).to_arrow()
                rows.append((found["id"].to_numpy(), 1.0 - found["_distance"].to_numpy()))
        return together(rows, k)


class QdrantStore:
    """A collection of Qdrant, searched exactly by cosine."""

    def __init__(self, location: str, embed: Embed) -> None:
        import qdrant_client
        from qdrant_client import models

        self.name, self.embed, self.models = f"qdrant:{location}", embed, models
        where: dict[str, Any] = {"path": location}
        if location == ":memory:":
            where = {"location": location}
        elif scheme_of(location):
            where = {"url": location}
        # in this process every search is exact, and Qdrant warns where it is asked for
        self.exact = models.SearchParams(exact=True) if "url" in where else None
        with told(self.name):
            self.client = qdrant_client.QdrantClient(**where)
            if not self.client.collection_exists(TABLE):
                width = embed([""]).shape[1]
                cosine = models.VectorParams(size=width, distance=models.Distance.COSINE)
                self.client.create_collection(TABLE, vectors_config=cosine)

    def add(self, ids: Sequence[int], texts: Sequence[str]) -> None:
        """Adds chunks, or writes them again."""
        vectors = self.embed(texts)
        points = self.models.Batch(ids=[int(i) for i in ids], vectors=vectors.tolist())
        with told(self.name):
            self.client.upsert(TABLE, points, wait=True)

    def remove(self, ids: Sequence[int]) -> None:
        """Takes chunks away."""
        chosen = self.models.PointIdsList(points=[int(i) for i in ids])
        with told(self.name):
            self.client.delete(TABLE, points_selector=chosen, wait=True)

    def search(self, queries: Sequence[str], k: int) -> Found:
        """The k nearest chunks of each query, and their cosines."""
        rows = []
        with told(self.name):
            for vector in self.embed(queries):
                found = self.client.query_points(
                    TABLE, query=vector.tolist(), limit=k, search_params=self.exact
                ).points
                ids = np.array([point.id for point in found], np.int64)
                rows.append((ids, np.array([point.score for point in found])))
        return together(rows, k)
