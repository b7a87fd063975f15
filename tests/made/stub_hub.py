"""A small stand-in for the Hugging Face Hub: the HTTP API that creating and uploading a model repository uses."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


@dataclass
class StubHub:
    """What the hub holds, and how it answers.

    Attributes:
        refusals: HTTP status by the first words of a path, for requests that are refused.
        private: of each repository.
        branches: files by name, of each (repository, branch).
        requests: method and path of each request, in order.
    """

    url: str = ""
    token: str = "hf_stub"
    refusals: dict[str, int] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    branches: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any]:
        """The status and JSON data of a response."""
        self.requests.append(f"{method} {path}")
        for start, status in self.refusals.items():
            if path.startswith(start):
                return status, {"error": "refused"}
        if path.startswith("/lfs/"):
            self.large[path.removeprefix("/lfs/")] = body
            return 200, {}
        if token != f"Bearer {self.token}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._place(one) for one in json.loads(body)["objects"]]}
        if not path.startswith("/api/models/"):
            return 404, {"error": "not found"}
        _, _, _, owner, name, *rest = path.split("/")
        repository = f"{owner}/{name}"
        if not rest:
            return 200, {"id": repository, "private": self.private[repository], "sha": "0" * 40}
        kind, branch = rest
        if kind == "branch":
            self.branches.setdefault((repository, branch), {})
            return 200, {}
        if kind == "preupload":
            paths = [one["path"] for one in json.loads(body)["files"]]
            modes = {one: "lfs" if one.endswith((".safetensors", ".pt")) else "regular" for one in paths}
            return 200, {"files": [{"path": one, "uploadMode": modes[one], "shouldIgnore": False} for one in paths]}
        assert kind == "commit", path
        return self._commit(repository, branch, [json.loads(line) for line in body.splitlines()])

    def _create(self, request: dict[str, Any]) -> tuple[int, Any]:
        name = f"{request['organization']}/{request['name']}"
        if name in self.private:
            return 409, {"error": "exists", "url": f"{self.url}/{name}"}
        self.private[name] = request.get("private") or request.get("visibility") == "private"
        self.branches[name, "main"] = {}
        return 200, {"url": f"{self.url}/{name}", "name": name}

    def _place(self, one: dict[str, Any]) -> dict[str, Any]:
        return {**one, "actions": {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}}

    def _commit(self, repository: str, branch: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        files = self.branches[repository, branch]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
        return 200, {"commitUrl": f"{self.url}/{repository}/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True}


@contextmanager
def stub_hub() -> Iterator[StubHub]:
    """A hub on a free port of this machine."""
    hub = StubHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def respond(self) -> None:
            body = self._body()
            status, data = hub.answer(
                self.command, self.path.partition("?")[0], self.headers["Authorization"] or "", body
            )
            content = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _body(self) -> bytes:
            if "chunked" not in (self.headers["Transfer-Encoding"] or ""):
                return self.rfile.read(int(self.headers["Content-Length"] or 0))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        do_GET = do_POST = do_PUT = respond

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()
