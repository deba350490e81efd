"""The endpoints of OpenSearch that jaxft asks, as its documentation describes them, on localhost.

A stand-in, because no OpenSearch can be had in the tests: its bodies are what opensearch-py sends and reads. Words are
ranked by Lucene's BM25 without stop words, vectors by the one script that jaxft sends.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COSINE = "1.0 + cosineSimilarity(params.query_value, doc[params.field])"
K1, B = 1.2, 0.75


class Service:
    """One index: its mappings and documents, and every request that came."""

    def __init__(self) -> None:
        self.mappings: dict[str, Any] | None = None
        self.documents: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []

    def bulk(self, lines: list[dict[str, Any]]) -> dict[str, Any]:
        """{"items": ...} of actions, of which each "index" is followed by its document."""
        items, rest = [], iter(lines)
        for line in rest:
            ((kind, about),) = line.items()
            key, status = str(about["_id"]), 200
            if kind == "index":
                self.documents[key] = self.checked(next(rest))
            elif self.documents.pop(key, None) is None:
                status = 404
            items.append({kind: {"_index": "jaxft", "_id": key, "status": status}})
        return {
            "errors": any(one[kind]["status"] > 299 for one in items for kind in one),
            "items": items,
        }

    def checked(self, document: dict[str, Any]) -> dict[str, Any]:
        """A document, as the strict mappings take it."""
        fields = self.mappings["properties"]
        assert document.keys() <= fields.keys(), document.keys()
        if "vector" in document:
            assert len(document["vector"]) == fields["vector"]["dimension"]
        return document

    def search(self, body: dict[str, Any]) -> dict[str, Any]:
        """The hits of a match or of the script, the best first."""
        ((kind, query),) = body["query"].items()
        scores = self.matched(query["text"]) if kind == "match" else self.scripted(query)
        order = sorted(scores, key=lambda key: -scores[key])[: body["size"]]
        hits = [{"_index": "jaxft", "_id": key, "_score": scores[key]} for key in order]
        return {"timed_out": False, "hits": {"total": {"value": len(scores)}, "hits": hits}}

    def matched(self, text: str) -> dict[str, float]:
        words = {
            key: collections.Counter(tokens(one["text"])) for key, one in self.documents.items()
        }
        mean = sum(sum(one.values()) for one in words.values()) / max(len(words), 1)
        scores: dict[str, float] = collections.defaultdict(float)
        for word in tokens(text):
            having = [key for key in words if words[key][word]]
            weight = math.log(1 + (len(words) - len(having) + 0.5) / (len(having) + 0.5))
            for key in having:
                count, length = words[key][word], sum(words[key].values())
                scores[key] += weight * count / (count + K1 * (1 - B + B * length / mean))
        return dict(scores)

    def scripted(self, query: dict[str, Any]) -> dict[str, float]:
        assert query["query"] == {"exists": {"field": "vector"}}
        assert query["script"]["source"] == COSINE
        assert query["script"]["params"]["field"] == "vector"
        asked = query["script"]["params"]["query_value"]
        known = {key: one["vector"] for key, one in self.documents.items() if "vector" in one}
        return {key: 1.0 + cosine(asked, vector) for key, vector in known.items()}


def tokens(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def cosine(x: list[float], y: list[float]) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True)) / (math.hypot(*x) * math.hypot(*y))


@contextlib.contextmanager
def running() -> Iterator[tuple[str, Service]]:
    """(its URL, the service) while it runs."""
    service = Service()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status: int, body: Any) -> None:
            data = b"" if self.command == "HEAD" else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def handle_one(self) -> None:
            path, _, options = self.path.partition("?")
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            service.asked.append(f"{self.command} {path}")
            if (self.command, path) == ("HEAD", "/jaxft"):
                self.answer(200 if service.mappings is not None else 404, {})
            elif (self.command, path) == ("PUT", "/jaxft"):
                service.mappings = json.loads(data)["mappings"]
                self.answer(200, {"acknowledged": True, "index": "jaxft"})
            elif (self.command, path) == ("POST", "/jaxft/_bulk"):
                assert "refresh=true" in options
                self.answer(200, service.bulk([json.loads(line) for line in data.splitlines()]))
            elif (self.command, path) == ("POST", "/jaxft/_search"):
                self.answer(200, service.search(json.loads(data)))
            else:
                error = {"type": "invalid_index_name_exception", "reason": f"no {path}"}
                self.answer(400, {"error": {"root_cause": [error], **error}, "status": 400})

        do_HEAD = do_PUT = do_POST = do_GET = handle_one

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", service
    finally:
        server.shutdown()
        server.server_close()
