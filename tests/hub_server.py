"""A stand-in for the Hugging Face Hub on this machine: what huggingface_hub and llama.cpp call of its HTTP API.

Repositories are kept in memory. Large files go over LFS (Xet has to be switched off), everything has commits, tokens
may read only or write, and repositories may be private or gated. Uploads and downloads can be made to break off.
"""

import base64
import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".gguf", ".safetensors", ".bin")
WRITER, READER = "hf_writerwriterwriter", "hf_readerreaderreader"


@dataclass
class Repository:
    """Commits are (sha, files), the last one is `main`; `refs` are other names of commits."""

    private: bool = False
    gated: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        before = self.commits[-1][1] if self.commits else {}
        digest = hashlib.sha1(f"{len(self.commits)}".encode())
        for name, content in sorted(files.items()):
            digest.update(name.encode() + hashlib.sha1(content).digest())
        self.commits.append((digest.hexdigest(), {**before, **files}))
        return self.commits[-1][0]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1] if self.commits else None
        sha = self.refs.get(revision, revision)
        return next((commit for commit in self.commits if commit[0] == sha), None)

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1] if self.commits else {}


@dataclass
class Hub:
    """The state of the server.

    Attributes:
        lfs: large files by sha256, whether a commit names them or not.
        requests: method and path of everything that was asked, with how many bytes of a file were sent.
        uploads_left: LFS uploads that still work; afterwards they break off in the middle. None for all.
        downloads_break_after: bytes after which a download breaks off once, None for never.
        refuse: status to answer everything with, None to work; `refuse_after_break` is the same from then on.
        slow: a file whose downloads wait for a second first.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    uploads_left: int | None = None
    downloads_break_after: int | None = None
    refuse: int | None = None
    refuse_after_break: int | None = None
    slow: str | None = None
    url: str = ""

    def add(self, name: str, folder: Path, **options: Any) -> Repository:
        """A repository with the files of `folder`."""
        repository = self.repositories[name] = Repository(**options)
        repository.commit({str(path.relative_to(folder)): path.read_bytes() for path in _files(folder)})
        return repository

    def asked(self, method: str, part: str) -> list[str]:
        return [path for used, path in self.requests if used == method and part in path]


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


@contextmanager
def serving() -> Iterator[Hub]:
    """The hub, at `hub.url` while the context lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _RefusedError(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        address = urlsplit(self.path)
        path, self._query = unquote(address.path), parse_qs(address.query)
        self.hub.requests.append((self.command, path))
        self._body_left = int(self.headers.get("Content-Length", 0))
        try:
            if self.hub.refuse:
                raise _RefusedError(self.hub.refuse, message="refused")
            for method, pattern, handle in _ROUTES:
                if self.command in method and (match := re.fullmatch(pattern, path)):
                    handle(self, **match.groupdict())
                    return
            raise _RefusedError(404, message=f"no such route: {self.command} {path}")
        except _RefusedError as refused:
            self._body()
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self._json({"error": refused.message}, refused.status, {key: text for key, text in headers.items() if text})
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _body(self) -> bytes:
        data = self.rfile.read(self._body_left)
        self._body_left = 0
        return data

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for key, text in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # Who may do what

    def _token(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        if token not in (None, WRITER, READER):
            raise _RefusedError(401, message="Invalid credentials in Authorization header")
        return token

    def _repository(self, name: str, *, write: bool = False, content: bool = False) -> Repository:
        token, repository = self._token(), self.hub.repositories.get(name)
        if repository is None or (repository.private and token is None):
            raise _RefusedError(404 if token else 401, "RepoNotFound", "Repository not found")
        if write and token is None:
            raise _RefusedError(401, message="Unauthorized")
        if write and token != WRITER:
            raise _RefusedError(403, message="You have no right to write here")
        if content and repository.gated and token != WRITER:
            raise _RefusedError(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted")
        return repository

    def _commit(self, repository: Repository, revision: str) -> tuple[str, dict[str, bytes]]:
        found = repository.at(revision)
        if found is None:
            raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    # What is asked

    def whoami(self) -> None:
        if self._token() is None:
            raise _RefusedError(401, message="Invalid username or password.")
        self._json({"type": "user", "name": "someone", "auth": {"accessToken": {"role": "write"}}})

    def info(self, name: str, revision: str = "main") -> None:
        repository = self._repository(name)
        sha, files = repository.at(revision) or (None, {})
        if sha is None and repository.commits:
            self._commit(repository, revision)
        siblings = [{"rfilename": path, **self._facts(content, path)} for path, content in files.items()]
        self._json(
            {"id": name, "sha": sha, "private": repository.private, "gated": repository.gated, "siblings": siblings}
        )

    def refs(self, name: str) -> None:
        sha, _ = self._commit(self._repository(name), "main")
        self._json({"branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": sha}]})

    def tree(self, name: str, revision: str) -> None:
        _, files = self._commit(self._repository(name), revision)
        self._json(
            [
                {"type": "file", "path": path, "oid": facts.pop("blobId"), **facts}
                for path, content in files.items()
                for facts in [self._facts(content, path)]
            ]
        )

    def _facts(self, content: bytes, path: str) -> dict[str, Any]:
        facts: dict[str, Any] = {"size": len(content), "blobId": git_hash(content)}
        if path.endswith(LFS_SUFFIXES):
            sha256 = hashlib.sha256(content).hexdigest()
            facts["lfs"] = {"oid": sha256, "sha256": sha256, "size": len(content), "pointerSize": 134}
        return facts

    def resolve(self, name: str, revision: str, path: str) -> None:
        sha, files = self._commit(self._repository(name, content=True), revision)
        if path not in files:
            raise _RefusedError(404, "EntryNotFound", "Entry not found")
        content = files[path]
        large = path.endswith(LFS_SUFFIXES)
        etag = hashlib.sha256(content).hexdigest() if large else git_hash(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        start, status = 0, 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start = int(match[1])
            end = min(int(match[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            content, status = content[start : end + 1], 206
        self.send_response(status)
        for key, text in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command == "HEAD":
            return
        if path == self.hub.slow:
            time.sleep(1)
        limit = self.hub.downloads_break_after
        if limit is not None and len(content) > limit:
            self.hub.downloads_break_after, self.hub.refuse = None, self.hub.refuse_after_break
            content = content[:limit]
            self.close_connection = True
        self.hub.sent[path] += len(content)
        self.wfile.write(content)

    def create(self) -> None:
        wanted = json.loads(self._body())
        if self._token() is None:
            raise _RefusedError(401, message="Unauthorized")
        if self._token() != WRITER:
            raise _RefusedError(403, message="You have no right to create a model here")
        name = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
        if name in self.hub.repositories:
            raise _RefusedError(409, message="You already created this model repo")
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.hub.repositories[name] = Repository(private=private)
        self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def validate_yaml(self) -> None:
        content = json.loads(self._body())["content"]
        front = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        errors = []
        if front is None or not isinstance(yaml.safe_load(front[1]), dict):
            errors.append({"message": "no front matter"})
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, name: str, revision: str) -> None:
        repository = self._repository(name, write=True)
        files = (repository.at(revision) or (None, {}))[1]
        answers = []
        for file in json.loads(self._body())["files"]:
            large = file["path"].endswith(LFS_SUFFIXES)
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if file["path"] in files:
                content = files[file["path"]]
                answer["oid"] = hashlib.sha256(content).hexdigest() if large else git_hash(content)
            answers.append(answer)
        self._json({"files": answers})

    def lfs_batch(self, name: str) -> None:
        self._repository(name, write=True)
        objects = []
        for wanted in json.loads(self._body())["objects"]:
            if wanted["oid"] not in self.hub.lfs:
                href = f"{self.hub.url}/lfs/{wanted['oid']}?signature=secretsecret"
                wanted["actions"] = {"upload": {"href": href}}
            objects.append(wanted)
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, sha256: str) -> None:
        if self.hub.uploads_left == 0:
            self.rfile.read(self._body_left // 2)
            self.close_connection = True
            return
        data = self._body()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise _RefusedError(400, message="wrong digest")
        self.hub.lfs[sha256] = data
        if self.hub.uploads_left:
            self.hub.uploads_left -= 1
        self._json({})

    def commit(self, name: str, revision: str) -> None:
        repository = self._repository(name, write=True)
        files = {}
        for line in self._body().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    raise _RefusedError(400, message=f"{value['path']} was not uploaded")
                files[value["path"]] = self.hub.lfs[value["oid"]]
        sha = repository.commit(files)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})


def git_hash(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


_NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[tuple[str, ...], str, Any]] = [
    (("GET",), r"/api/whoami-v2", _Handler.whoami),
    (("POST",), r"/api/repos/create", _Handler.create),
    (("POST",), r"/api/validate-yaml", _Handler.validate_yaml),
    (("GET",), rf"/api/models/{_NAME}", _Handler.info),
    (("GET",), rf"/api/models/{_NAME}/refs", _Handler.refs),
    (("GET",), rf"/api/models/{_NAME}/revision/(?P<revision>.+)", _Handler.info),
    (("GET",), rf"/api/models/{_NAME}/tree/(?P<revision>[^/]+)", _Handler.tree),
    (("POST",), rf"/api/models/{_NAME}/preupload/(?P<revision>.+)", _Handler.preupload),
    (("POST",), rf"/api/models/{_NAME}/commit/(?P<revision>.+)", _Handler.commit),
    (("POST",), rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("PUT",), r"/lfs/(?P<sha256>[0-9a-f]{64})", _Handler.lfs_put),
    (("GET", "HEAD"), rf"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
