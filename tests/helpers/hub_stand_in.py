"""A stand-in for the Hub's HTTP interface, as far as repositories of models and commits to them go, on this machine."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from unittest.mock import patch

from huggingface_hub import constants
from huggingface_hub.utils.sha import git_hash


@dataclass
class Repository:
    """Files of a repository by name, whether each is large, and the titles of its commits."""

    files: dict[str, bytes] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    commits: list[str] = field(default_factory=list)


@dataclass
class StandIn:
    """All that the server has been told. It refuses commits when `commits_left` is down to 0."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # large files by their SHA-256
    commits_left: int = 1000
    sent: int = 0  # bytes of files
    url: str = ""


def _info(name: str, repository: Repository) -> dict[str, Any]:
    siblings = []
    for path, content in repository.files.items():
        large = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 100}
        about = {"rfilename": path, "size": len(content), "blobId": git_hash(content)}
        siblings.append(about | ({"lfs": large} if path in repository.large else {}))
    return {"id": name, "modelId": name, "private": False, "tags": [], "siblings": siblings}


class _Handler(BaseHTTPRequestHandler):
    hub: StandIn

    def log_message(self, *words: object) -> None:
        """Say nothing."""

    def _answer(self, document: object, status: int = 200, **headers: str) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        owner, name, *path = self.path.strip("/").split("/")
        if path[:1] == ["resolve"]:
            content = self.hub.repositories[f"{owner}/{name}"].files.get("/".join(path[2:]))
            if content is None:
                self._answer({}, 404, **{"X-Error-Code": "EntryNotFound"})
                return
            part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            content = content[int(part[1]) : int(part[2]) + 1] if part else content
            self.hub.sent += len(content) * (self.command == "GET")
            self.send_response(206 if part else 200)
            about = {"X-Repo-Commit": "0" * 40, "ETag": f'"{git_hash(content)}"', "Content-Length": str(len(content))}
            for header, value in about.items():
                self.send_header(header, value)
            self.end_headers()
            self.wfile.write(content if self.command == "GET" else b"")
            return
        match = re.match(r"/api/models/([^/?]+/[^/?]+)", self.path)
        if match and match.group(1) in self.hub.repositories:
            self._answer(_info(match.group(1), self.hub.repositories[match.group(1)]))
        else:
            self._answer({"error": "Repository not found"}, 404, **{"X-Error-Code": "RepoNotFound"})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.objects[self.path.rpartition("/")[2]] = content
        self._answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
            is_new = name not in self.hub.repositories
            self.hub.repositories.setdefault(name, Repository())
            self._answer({"url": f"{self.hub.url}/{name}", "name": name}, 200 if is_new else 409)
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".gguf") else "regular"}
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": [file | {"shouldIgnore": False} for file in files]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            uploads = [
                asked | {"actions": {"upload": {"href": f"{self.hub.url}/objects/{asked['oid']}"}}}
                for asked in json.loads(body)["objects"]
            ]
            self._answer({"objects": uploads, "transfer": "basic"})
        elif "/commit/" in self.path:
            self._commit([json.loads(line) for line in body.decode().splitlines()])
        else:  # the metadata of a card
            self._answer({"errors": [], "warnings": []})

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        if self.hub.commits_left == 0:
            self._answer({}, 403, **{"X-Error-Message": "Storage quota exceeded"})
            return
        self.hub.commits_left -= 1
        name = self.path.split("/")[3] + "/" + self.path.split("/")[4]
        repository = self.hub.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repository.commits.append(value["summary"])
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.objects[value["oid"]]
                repository.large.add(value["path"])
        commit = f"{len(repository.commits):040x}"
        self._answer({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})


@contextmanager
def hub_stand_in() -> Iterator[StandIn]:
    """Context manager: huggingface_hub talks to the stand-in that is yielded, and to nobody else."""
    hub = StandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    settings = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": template}
    settings |= {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    try:
        with patch.multiple(constants, **settings):
            yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
