"""A Hub on this machine: a server that speaks the endpoints of its API by which a folder is uploaded."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

TOKEN = "hf_written_here"


class Commit(NamedTuple):
    oid: str
    branch: str
    message: str
    files: dict[str, bytes]


class Hub:
    """What it holds."""

    def __init__(self) -> None:
        self.url = ""
        self.private: dict[str, bool] = {}
        self.branches: dict[str, set[str]] = {}
        self.commits: dict[str, list[Commit]] = {}
        self.objects: dict[str, bytes] = {}
        """Of large files, by their SHA-256."""
        self.loses_a_byte = False
        """Of the large files that it is sent."""

    def create(self, name: str, private: bool) -> tuple[int, Any]:
        status = 409 if name in self.private else 200
        self.private.setdefault(name, private)
        self.branches.setdefault(name, {"main"})
        self.commits.setdefault(name, [])
        return status, {"url": f"{self.url}/{name}"}

    def commit(self, name: str, branch: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        if branch not in self.branches[name]:
            return 404, {"error": f"no branch {branch}"}
        files: dict[str, bytes] = {}
        message = ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
        oid = hashlib.sha1(f"{len(self.commits[name])} {lines}".encode()).hexdigest()
        self.commits[name].append(Commit(oid, branch, message, files))
        url = f"{self.url}/{name}/commit/{oid}"
        return 200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""}

    def paths(self, name: str, revision: str) -> tuple[int, Any]:
        found = next(commit for commit in self.commits[name] if commit.oid == revision)
        return 200, [self._entry(path, content) for path, content in found.files.items()]

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
        if is_large(path):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}
        return entry


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/").split("?")[0]
        if name in self.hub.private:
            self._answer(200, {"id": name, "modelId": name, "private": self.hub.private[name]})
        else:
            self._answer(404, {"error": "not found"})

    def do_PUT(self) -> None:
        content = self._body()
        self.hub.objects[self.path.rpartition("/")[2]] = content[:-1] if self.hub.loses_a_byte else content
        self._answer(200, {})

    def do_POST(self) -> None:
        body = self._body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not self.path.startswith("/verify"):
            self._answer(401, {"error": "who are you?"})
            return
        self._answer(*self._post(body))

    def _post(self, body: bytes) -> tuple[int, Any]:
        hub, path = self.hub, self.path
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            return hub.create(
                "/".join(filter(None, (asked.get("organization"), asked["name"]))),
                asked.get("visibility") == "private" or asked.get("private") is True,
            )
        if path.startswith("/verify"):
            return 200, {}
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {
                    **entry,
                    "actions": {
                        "upload": {"href": f"{hub.url}/objects/{entry['oid']}"},
                        "verify": {"href": f"{hub.url}/verify/{entry['oid']}"},
                    },
                }
                for entry in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        name, what, revision = re.fullmatch(r"/api/models/([^/]+/[^/]+)/([\w-]+)/(.+)", path).groups()
        if what == "branch":
            status = 409 if revision in hub.branches[name] else 200
            hub.branches[name].add(revision)
            return status, {}
        if what == "preupload":
            asked = json.loads(body)["files"]
            modes = [{**entry, "uploadMode": "lfs" if is_large(entry["path"]) else "regular"} for entry in asked]
            return 200, {"files": [{**entry, "shouldIgnore": False} for entry in modes]}
        if what == "commit":
            return hub.commit(name, revision, [json.loads(line) for line in body.splitlines()])
        assert what == "paths-info", path
        return hub.paths(name, revision)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, content: Any) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@contextmanager
def hub_here() -> Iterator[Hub]:
    """A Hub that listens, until the block ends."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
