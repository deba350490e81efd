"""A tiny object store: what tensorstore and gcsfs ask of Google Cloud Storage, from a folder, on this machine.

As there, an object is written whole or not at all, there are no folders, and nothing can be appended to or moved.
"""

from __future__ import annotations

import contextlib
import email
import http.server
import itertools
import json
import os
import re
import sys
import tempfile
import threading
import traceback
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Handler(http.server.BaseHTTPRequestHandler):
    """The JSON API: list, read (a range of bytes too), write, delete; a write may be for a name that is free."""

    protocol_version = "HTTP/1.1"
    root: Path
    uploads = itertools.count()
    pieces: dict[str, bytes] = {}  # noqa: RUF012

    def do_GET(self) -> None:
        """Reads an object, what is known of it, or the names that begin with a prefix."""
        path, query = self._asked()
        if re.fullmatch(r"/storage/v1/b/[^/]+/?", path):
            return self._answer(200, {"name": path.split("/")[4]})
        if path.endswith("/o"):
            return self._list(path.split("/")[-2], query)
        bucket, name = self._object(path)
        file = self._file(bucket, name)
        if not file.is_file():
            return self._answer(404, {"error": {"code": 404, "message": "Not Found"}})
        if query.get("alt") != "media":
            return self._answer(200, self._about(bucket, name))
        data = file.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not found:
            return self._send(200, data, {})
        begin, end = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
        about = {"Content-Range": f"bytes {begin}-{end}/{len(data)}"}
        return self._send(206, data[begin : end + 1], about)

    def do_POST(self) -> None:
        """Writes an object: in one piece, or piece by piece, of which the last makes it appear."""
        path, query = self._asked()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        bucket = path.split("/")[5]
        name = query.get("name", "") or json.loads(body or b"{}").get("name", "")
        if query["uploadType"] == "resumable":
            return self._piece(path, bucket, name, query, body)
        if query["uploadType"] == "multipart":
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            about, content = email.message_from_bytes(head + body).get_payload()
            name = json.loads(about.get_payload())["name"]
            body = content.get_payload(decode=True)
        file = self._file(bucket, name)
        if query.get("ifGenerationMatch") == "0" and file.exists():
            return self._answer(412, {"error": {"code": 412, "message": "it exists"}})
        put(file, body)
        return self._answer(200, self._about(bucket, name))

    do_PUT = do_POST

    def _piece(
        self, path: str, bucket: str, name: str, query: dict[str, str], body: bytes
    ) -> None:
        if "upload_id" not in query:
            place = f"http://{self.headers['Host']}{path}?uploadType=resumable&name="
            place += f"{urllib.parse.quote(name, safe='')}&upload_id={next(self.uploads)}"
            self.pieces[place.split("=")[-1]] = b""
            return self._send(200, b"", {"Location": place})
        self.pieces[query["upload_id"]] += body
        have, total = len(self.pieces[query["upload_id"]]), self.headers["Content-Range"].split("/")[1]
        if total == "*":
            return self._send(308, b"", {"Range": f"bytes=0-{have - 1}"})
        put(self._file(bucket, name), self.pieces.pop(query["upload_id"]))
        return self._answer(200, self._about(bucket, name))

    def do_DELETE(self) -> None:
        """Removes an object."""
        file = self._file(*self._object(self._asked()[0]))
        if not file.is_file():
            return self._answer(404, {"error": {"code": 404, "message": "Not Found"}})
        file.unlink()
        return self._send(204, b"", {})

    def _asked(self) -> tuple[str, dict[str, str]]:
        path, _, query = self.path.partition("?")
        return path, dict(urllib.parse.parse_qsl(query))

    def _object(self, path: str) -> tuple[str, str]:
        found = re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)/o/(.+)", path)
        assert found, path
        return found[1], urllib.parse.unquote(found[2])

    def _file(self, bucket: str, name: str) -> Path:
        return self.root / bucket / urllib.parse.quote(name, safe="")

    def _about(self, bucket: str, name: str) -> dict[str, Any]:
        status = self._file(bucket, name).stat()
        stamp = "2026-01-01T00:00:00.000Z"
        generation = str(status.st_mtime_ns)
        return {
            "kind": "storage#object", "name": name, "bucket": bucket, "size": str(status.st_size),
            "generation": generation, "metageneration": "1", "updated": stamp, "timeCreated": stamp,
        }  # fmt: skip

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items, prefixes = [], dict[str, None]()
        for name in names(self.root / bucket):
            if not name.startswith(prefix) or not name >= query.get("startOffset", ""):
                continue
            if name >= query.get("endOffset", "\uffff"):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes[prefix + rest.split(delimiter)[0] + delimiter] = None
            else:
                with contextlib.suppress(FileNotFoundError):
                    items.append(self._about(bucket, name))
        self._answer(200, {"kind": "storage#objects", "items": items, "prefixes": list(prefixes)})

    def _answer(self, status: int, value: Any) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


class Server(http.server.ThreadingHTTPServer):
    """Serves while clients come and are killed."""

    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Says what a handler did wrong, and not that a client went away."""
        if not isinstance(sys.exception(), ConnectionError):
            traceback.print_exc()


def put(file: Path, body: bytes) -> None:
    """Writes an object whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent.parent, delete=False) as part:
        part.write(body)
    os.replace(part.name, file)


def names(bucket: Path) -> list[str]:
    """The names of a bucket's objects, in order."""
    return sorted(urllib.parse.unquote(file.name) for file in bucket.iterdir()) if bucket.exists() else []


@contextlib.contextmanager
def served(root: Path) -> Iterator[dict[str, str]]:
    """Serves the buckets under `root`; gives the environment that leads tensorstore and gcsfs here."""
    handler = type("Served", (Handler,), {"root": root})
    server = Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"http://127.0.0.1:{server.server_port}"
    try:
        yield {
            "TENSORSTORE_GCS_HTTP_URL": place,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "STORAGE_EMULATOR_HOST": place,
        }
    finally:
        server.shutdown()
        server.server_close()
