"""A server on localhost that answers as the Hugging Face hub does, for the few questions that its client asks."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Content = dict[str, bytes]


class Hub:
    """The server's repositories, and what it was asked for.

    Attributes:
        repositories: {"models/OWNER/NAME": {"refs": {branch: commit}, "commits": {commit: files}, ...}}.
        asked: "GET /path" of every request, in order.
        downloaded: names of the files whose contents were sent.
        stored: {sha256: content} of what was uploaded apart.
        failing: a status with which every answer is refused, or 0.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []
        self.downloaded: list[str] = []
        self.stored: dict[str, bytes] = {}
        self.failing = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def put(self, name: str, files: Mapping[str, bytes], branch: str = "main", **about: Any) -> str:
        """Makes a commit of these files alone in models/OWNER/NAME or datasets/OWNER/NAME; returns it."""
        name = name if name.startswith("datasets/") else f"models/{name}"
        repository = self.repositories.setdefault(name, {"refs": {}, "commits": {}})
        digest = hashlib.sha1()
        for path in sorted(files):
            digest.update(path.encode() + files[path])
        commit = digest.hexdigest()
        repository["commits"][commit] = dict(files)
        repository["refs"][branch] = commit
        repository.update(about)
        return commit

    def files(self, name: str) -> Content:
        """What the main branch of a model holds."""
        repository = self.repositories[f"models/{name}"]
        return dict(repository["commits"][repository["refs"]["main"]])


def is_apart(name: str) -> bool:
    """Whether the hub stores a file of that name apart from git."""
    return name.endswith(".safetensors")


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def json(self, value: Any, status: int = 200, **headers: str) -> None:
            self.answer(
                status, json.dumps(value).encode(), Content_Type="application/json", **headers
            )

        def refuse(self, status: int, code: str = "") -> None:
            said = {"X_Error_Code": code, "X_Error_Message": code} if code else {}
            self.json({"error": code or "refused"}, status, **said)

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def found(self, name: str, revision: str = "main") -> tuple[str, Content] | None:
            """(commit, files); answers itself where there is none."""
            repository = hub.repositories.get(name)
            if repository is None:
                self.refuse(401 if not self.headers.get("Authorization") else 404, "RepoNotFound")
            elif repository.get("gated"):
                self.refuse(403, "GatedRepo")
            else:
                commit = repository["refs"].get(revision, revision)
                if commit in repository["commits"]:
                    return commit, repository["commits"][commit]
                self.refuse(404, "RevisionNotFound")
            return None

        def begin(self) -> str:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            return path

        def do_GET(self) -> None:
            path = self.begin()
            if hub.failing:
                return self.refuse(hub.failing)
            if match := re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)/refs", path):
                refs = hub.repositories[match[1]]["refs"]
                branches = [
                    {"name": n, "ref": f"refs/heads/{n}", "targetCommit": c}
                    for n, c in refs.items()
                ]
                return self.json({"branches": branches, "tags": [], "converts": []})
            if match := re.fullmatch(
                r"/api/((?:models|datasets)/[^/]+/[^/]+)/tree/([^/]+).*", path
            ):
                if (found := self.found(match[1], match[2])) is None:
                    return None
                return self.json([_entry(name, data) for name, data in found[1].items()])
            pattern = r"/api/((?:models|datasets)/[^/]+/[^/]+)(?:/revision/([^/]+))?"
            if match := re.fullmatch(pattern, path):
                if (found := self.found(match[1], match[2] or "main")) is None:
                    return None
                short = match[1].partition("/")[2]
                names = [{"rfilename": name} for name in found[1]]
                about = {
                    "id": short,
                    "sha": found[0],
                    "siblings": names,
                    "private": False,
                    "tags": [],
                }
                return self.json({**about, "downloads": 0, "likes": 0})
            if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                kind = "datasets" if match[1] else "models"
                if (found := self.found(f"{kind}/{match[2]}", match[3])) is None:
                    return None
                commit, files = found
                if match[4] not in files:
                    return self.refuse(404, "EntryNotFound")
                data = files[match[4]]
                if self.command == "GET":
                    hub.downloaded.append(match[4])
                etag = f'"{hashlib.sha256(data).hexdigest()}"'
                return self.answer(200, data, ETag=etag, X_Repo_Commit=commit)
            return self.refuse(404)

        do_HEAD = do_GET

        def do_PUT(self) -> None:
            path, data = self.begin(), self.body()
            hub.stored[path.rpartition("/")[2]] = data
            self.answer(200)

        def do_POST(self) -> None:
            path, data = self.begin(), self.body()
            if path == "/api/validate-yaml":
                return self.json({"warnings": [], "errors": []})
            if not self.headers.get("Authorization"):
                return self.refuse(401)
            if path == "/api/repos/create":
                asked = json.loads(data)
                name = f"{asked['organization']}/{asked['name']}"
                status = 409 if f"models/{name}" in hub.repositories else 200
                if status == 200:
                    hub.put(name, {".gitattributes": b""}, visibility=asked.get("visibility"))
                return self.json({"url": f"{hub.url}/{name}"}, status)
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
                files = [
                    {
                        "path": one["path"],
                        "uploadMode": "lfs" if is_apart(one["path"]) else "regular",
                        "shouldIgnore": False,
                    }
                    for one in json.loads(data)["files"]
                ]
                return self.json({"files": files})
            if path.endswith(".git/info/lfs/objects/batch"):
                objects = [
                    {**one, "actions": {"upload": {"href": f"{hub.url}/store/{one['oid']}"}}}
                    for one in json.loads(data)["objects"]
                ]
                return self.json({"transfer": "basic", "objects": objects})
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
                files = hub.files(match[1])
                for line in data.splitlines():
                    entry = json.loads(line)
                    value = entry["value"]
                    if entry["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif entry["key"] == "lfsFile":
                        files[value["path"]] = hub.stored[value["oid"]]
                commit = hub.put(match[1], files)
                url = f"{hub.url}/{match[1]}/commit/{commit}"
                return self.json({"commitUrl": url, "commitOid": commit, "success": True})
            return self.refuse(404)

    return Handler


def _entry(name: str, data: bytes) -> dict[str, Any]:
    git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": git}
    if is_apart(name):
        sha = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": sha, "size": len(data), "pointerSize": 130}
    return entry
