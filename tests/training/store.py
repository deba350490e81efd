"""A tiny object store: what tensorstore and gcsfs ask of Google Cloud Storage, answered on this machine from a folder.

As there, an object is written whole or not at all, there are no folders, and nothing can be appended to or moved.
"""

from __future__ import annotations

import contextlib
import dataclasses
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

NAME = "bucket"


@dataclasses.dataclass(frozen=True)
class Bucket:
    """The objects of gs://bucket, each a file whose name is the object's, quoted.

    Attributes:
        folder: where the files stand.
    """

    folder: Path

    def names(self) -> list[str]:
        """Of all objects, in order."""
        return sorted(urllib.parse.unquote(file.name) for file in self.folder.iterdir())

    def file(self, name: str) -> Path:
        """Where an object stands."""
        return self.folder / urllib.parse.quote(name, safe="")

    def get(self, name: str) -> bytes:
        """An object's bytes."""
        return self.file(name).read_bytes()

    def put(self, name: str, data: bytes) -> None:
        """Writes an object whole or not at all."""
        with tempfile.NamedTemporaryFile(dir=self.folder.parent, delete=False) as part:
            part.write(data)
        os.replace(part.name, self.file(name))

    def remove(self, name: str) -> None:
        """Takes an object away."""
        self.file(name).unlink()

    def unpacked(self, name: str, folder: Path) -> Path:
        """What stands under a name, copied to a folder."""
        for inside in (one for one in self.names() if one.startswith(f"{name}/")):
            target = folder / inside.removeprefix(f"{name}/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.get(inside))
        return folder

    def fill(self, name: str, folder: Path) -> None:
        """Puts a folder's files under a name."""
        for file in (path for path in folder.rglob("*") if path.is_file()):
            self.put(f"{name}/{file.relative_to(folder).as_posix()}", file.read_bytes())


class Handler(http.server.BaseHTTPRequestHandler):
    """The JSON API: list, read (a range of bytes too), write at once or by pieces, delete."""

    protocol_version = "HTTP/1.1"
    bucket: Bucket
    uploads = itertools.count()
    pieces: dict[str, bytes] = {}  # noqa: RUF012

    def do_GET(self) -> None:
        """Reads an object, what is known of it, or the names that begin with a prefix."""
        path, query = self._asked()
        name = _object_of(path)
        if path.endswith(f"/{NAME}/o"):
            self._list(query)
        elif not name or not self.bucket.file(name).is_file():
            self._fail(404)
        elif query.get("alt") == "media":
            self._read(self.bucket.get(name))
        else:
            self._answer(self._about(name))

    def do_POST(self) -> None:
        """Writes an object; of one that comes in pieces, the last makes it appear."""
        path, query = self._asked()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        name = query.get("name", "")
        if query["uploadType"] == "resumable":
            self._piece(path, name or json.loads(body)["name"], query.get("upload_id"), body)
            return
        if query["uploadType"] == "multipart":
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            about, content = email.message_from_bytes(head + body).get_payload()  # type: ignore[misc]
            name = json.loads(about.get_payload())["name"]  # type: ignore[union-attr, arg-type]
            body = content.get_payload(decode=True)  # type: ignore[union-attr, assignment]
        if query.get("ifGenerationMatch") == "0" and self.bucket.file(name).exists():
            self._fail(412)
            return
        self.bucket.put(name, body)
        self._answer(self._about(name))

    do_PUT = do_POST

    def do_DELETE(self) -> None:
        """Takes an object away."""
        file = self.bucket.file(_object_of(self._asked()[0]))
        if not file.is_file():
            self._fail(404)
            return
        file.unlink()
        self._send(204, b"", {})

    def _asked(self) -> tuple[str, dict[str, str]]:
        path, _, query = self.path.partition("?")
        return path, dict(urllib.parse.parse_qsl(query))

    def _read(self, data: bytes) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not found:
            self._send(200, data, {})
            return
        begin, end = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
        about = {"Content-Range": f"bytes {begin}-{end}/{len(data)}"}
        self._send(206, data[begin : end + 1], about)

    def _piece(self, path: str, name: str, upload: str | None, body: bytes) -> None:
        if upload is None:
            upload = str(next(self.uploads))
            self.pieces[upload] = b""
            about = {"uploadType": "resumable", "name": name, "upload_id": upload}
            place = f"http://{self.headers['Host']}{path}?{urllib.parse.urlencode(about)}"
            self._send(200, b"", {"Location": place})
            return
        self.pieces[upload] += body
        if self.headers["Content-Range"].endswith("/*"):
            self._send(308, b"", {"Range": f"bytes=0-{len(self.pieces[upload]) - 1}"})
            return
        self.bucket.put(name, self.pieces.pop(upload))
        self._answer(self._about(name))

    def _about(self, name: str) -> dict[str, Any]:
        status = self.bucket.file(name).stat()
        stamp = "2026-01-01T00:00:00.000Z"
        return {
            "kind": "storage#object", "name": name, "bucket": NAME, "size": str(status.st_size),
            "generation": str(status.st_mtime_ns), "metageneration": "1", "updated": stamp, "timeCreated": stamp,
        }  # fmt: skip

    def _list(self, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        begin, end = query.get("startOffset", ""), query.get("endOffset", "\U0010ffff")
        items, folders = [], dict[str, None]()
        for name in self.bucket.names():
            if name.startswith(prefix) and begin <= name < end:
                head, more, _ = name[len(prefix) :].partition(delimiter or "\0")
                if more:
                    folders[prefix + head + delimiter] = None
                    continue
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    items.append(self._about(name))
        self._answer({"kind": "storage#objects", "items": items, "prefixes": list(folders)})

    def _answer(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int) -> None:
        body = json.dumps({"error": {"code": status, "message": "no"}}).encode()
        self._send(status, body, {"Content-Type": "application/json"})

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


def _object_of(path: str) -> str:
    """The object that a path of the API means, or ""."""
    found = re.fullmatch(rf"(?:/download)?/storage/v1/b/{NAME}/o/(.+)", path)
    return urllib.parse.unquote(found[1]) if found else ""


class Server(http.server.ThreadingHTTPServer):
    """Serves while clients come and are killed."""

    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Says what a handler did wrong, and not that a client went away."""
        if not isinstance(sys.exception(), ConnectionError):
            traceback.print_exc()


@contextlib.contextmanager
def served(folder: Path) -> Iterator[tuple[Bucket, dict[str, str]]]:
    """Serves gs://bucket from a folder; gives it and the environment that leads tensorstore and gcsfs here."""
    bucket = Bucket(folder / NAME)
    bucket.folder.mkdir()
    server = Server(("127.0.0.1", 0), type("Served", (Handler,), {"bucket": bucket}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"http://127.0.0.1:{server.server_port}"
    try:
        yield (
            bucket,
            {
                "TENSORSTORE_GCS_HTTP_URL": place,
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
                "STORAGE_EMULATOR_HOST": place,
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
                "EPATH_USE_TF": "false",
            },
        )
    finally:
        server.shutdown()
        server.server_close()
