"""Chunks in OpenSearch, found by words (its BM25) and by vectors (its k-NN plugin's cosine, exact)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxft.errors import UserError
from jaxft.retrieval.searching import Found, Searcher, together, told
from jaxft.retrieval.vectors import Embed
from jaxft.runtime.storage import scheme_of

INDEX = "jaxft"
WINDOW = 10_000  # the most hits that OpenSearch gives at once
COSINE = "1.0 + cosineSimilarity(params.query_value, doc[params.field])"  # a score is not below 0


def open_service(url: str, embed: Embed | None) -> dict[str, Searcher]:
    """{"lexical": ..., "dense": ...} of the service at a URL; without `embed` by words alone.

    Raises:
        UserError: what is no URL, or a service that cannot be reached.
    """
    if not scheme_of(url).startswith("http"):
        raise UserError(f"opensearch:{url}: write opensearch:https://USER:PASSWORD@HOST:9200")
    index = ChunkIndex(url, embed)
    words: dict[str, Searcher] = {"lexical": Words(index)}
    return words | ({"dense": Vectors(index)} if embed is not None else {})


class ChunkIndex:
    """An index of OpenSearch with a text and, where something embeds, a vector under each chunk's key."""

    def __init__(self, url: str, embed: Embed | None) -> None:
        import opensearchpy

        host = url.rpartition("@")[2].split("//")[-1]  # no password in a message
        self.name, self.embed = f"opensearch:{host}", embed
        fields: dict[str, Any] = {"text": {"type": "text"}}
        if embed is not None:
            fields["vector"] = {"type": "knn_vector", "dimension": int(embed([""]).shape[1])}
        with told(self.name):
            self.client = opensearchpy.OpenSearch(hosts=[url], max_retries=2)
            if not self.client.indices.exists(index=INDEX):
                mappings = {"properties": fields, "dynamic": "strict"}
                self.client.indices.create(index=INDEX, body={"mappings": mappings})

    def add(self, ids: Sequence[int], texts: Sequence[str]) -> None:
        """Adds chunks, or writes them again. A vector of zeros, which has no direction, is left out."""
        rows: list[dict[str, Any]] = [{"text": text} for text in texts]
        if self.embed is not None and len(texts):
            for row, vector in zip(rows, self.embed(texts), strict=True):
                if vector.any():
                    row["vector"] = vector.tolist()
        keys = map(int, ids)
        self._bulk([{"_id": key, "_source": row} for key, row in zip(keys, rows, strict=True)])

    def remove(self, ids: Sequence[int]) -> None:
        """Takes chunks away; one that is not there is no mistake."""
        self._bulk([{"_op_type": "delete", "_id": int(key)} for key in ids])

    def _bulk(self, actions: Sequence[dict[str, Any]]) -> None:
        from opensearchpy import helpers

        with told(self.name):
            _, failed = helpers.bulk(
                self.client, actions, index=INDEX, refresh=True, raise_on_error=False
            )
            lost = [one for each in failed for one in each.values() if one["status"] != 404]
        if lost:
            raise UserError(
                f"{self.name}: chunk {lost[0]['_id']} was not written: {lost[0]['error']}"
            )

    def hits(self, query: dict[str, Any], k: int) -> tuple[np.ndarray, np.ndarray]:
        """(keys, scores) of the k best."""
        body = {"query": query, "size": min(k, WINDOW), "_source": False}
        with told(self.name):
            found = self.client.search(index=INDEX, body=body)["hits"]["hits"]
        keys = np.array([int(hit["_id"]) for hit in found], np.int64)
        return keys, np.array([hit["_score"] for hit in found], np.float64)


class Words:
    """OpenSearch's full-text search: BM25 with its standard analyzer."""

    def __init__(self, index: ChunkIndex) -> None:
        self.index = index

    def add(self, ids: Sequence[int], texts: Sequence[str]) -> None:
        """Adds chunks, or writes them again."""
        self.index.add(ids, texts)

    def remove(self, ids: Sequence[int]) -> None:
        """Takes chunks away."""
        self.index.remove(ids)

    def search(self, queries: Sequence[str], k: int) -> Found:
        """The k best chunks of each query."""
        return together([self.index.hits({"match": {"text": one}}, k) for one in queries], k)


class Vectors:
    """The nearest by cosine, among all chunks that have a vector. Chunks come and go by `Words`."""

    def __init__(self, index: ChunkIndex) -> None:
        self.index = index

    def add(self, ids: Sequence[int], texts: Sequence[str]) -> None:
        """Nothing: the index has them already."""

    def remove(self, ids: Sequence[int]) -> None:
        """Nothing, likewise."""

    def search(self, queries: Sequence[str], k: int) -> Found:
        """The k nearest chunks of each query, and their cosines."""
        assert self.index.embed is not None
        rows = []
        for vector in self.index.embed(queries):
            if not vector.any():
                rows.append((np.zeros(0, np.int64), np.zeros(0)))
                continue
            script = {
                "source": COSINE,
                "params": {"field": "vector", "query_value": vector.tolist()},
            }
            known = {"exists": {"field": "vector"}}
            keys, scores = self.index.hits({"script_score": {"query": known, "script": script}}, k)
            rows.append((keys, scores - 1.0))
        return together(rows, k)
