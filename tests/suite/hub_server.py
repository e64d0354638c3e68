"""The Hugging Face hub on loopback: as much of its HTTP interface as whole runs ask for through the real client.

A test publishes folders as commits of repositories, starts the program with `HubServer.environment`, and reads in
`HubServer.requests` what was asked. Routes, statuses and headers are those of the real hub:

- `/api/{models,datasets}/ID/revision/REVISION` and `/api/.../tree/REVISION`: commit and list of files;
- `/ID/resolve/REVISION/FILE`, for data sets below `/datasets`: the file with `ETag` and `X-Repo-Commit`; a large file
  is a redirect with `X-Linked-ETag` and `X-Linked-Size` to another host, as of an LFS file;
- `Range: bytes=N-` is answered with status 206;
- a gated repository shows its list of files, but not their content: status 401 without a token, 403 with another one;
- a missing repository: status 401 without a token, 404 with one.
"""

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

LARGE = 10_000  # bytes from which on a file is a redirect
PIECE = 2**16  # bytes that are sent at once


@dataclass
class Repository:
    """A repository: the files of its commits, the commits of its branches and tags, and the tokens of its readers.

    Without `readers` everyone may read it.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    readers: frozenset[str] | None = None


@dataclass(frozen=True)
class Request:
    """What a client asked for: `path` without the query, `range` as its header says, `status` of the answer."""

    method: str
    path: str
    range: str
    status: int


class HubServer(ThreadingHTTPServer):
    """The server; `repositories` has their names as keys, `ID` of a model and `datasets/ID` of a data set.

    A file whose name is in `cuts` is cut off once after so many bytes. A file whose name is `stalls` stops at its half:
    then `stalled` is set, and nothing more is sent to this client.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.cuts: dict[str, int] = {}
        self.stalls: str | None = None
        self.stalled, self.closing = threading.Event(), threading.Event()
        self.large: dict[str, tuple[str, bytes]] = {}  # sha256 -> name and content

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is killed in the middle of a request is no error here."""

    def publish(self, name: str, folder: Path, branch: str = "main", commit: str | None = None) -> str:
        """The files of a folder as a new commit of a repository, which moves the branch.

        Args:
            name: key of `repositories`.
            branch: a branch or tag.
            commit: 40 hexadecimal digits; None: a checksum of the files.

        Returns:
            The commit.
        """
        files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        if commit is None:
            commit = hashlib.sha1(repr([(path, _sha256(files[path])) for path in sorted(files)]).encode()).hexdigest()
        repository = self.repositories.setdefault(name, Repository())
        repository.commits[commit] = files
        repository.branches[branch] = commit
        return commit

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Variables of a process that asks this server; `home` is the client's cache."""
        return {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}", "HF_HOME": str(home), **more}

    def downloads(self, name: str = "") -> list[Request]:
        """The requests for the contents of files whose path ends with `name`, redirects left out."""
        asked = [request for request in self.requests if request.method == "GET" and request.status in (200, 206)]
        return [request for request in asked if "/api/" not in request.path and request.path.endswith(name)]


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Requests are kept, not printed."""

    def _reply(self, status: int, content: bytes = b"", name: str = "", **headers: str) -> None:
        """Answer and log a request; `name` is that of a file, which may be cut."""
        server, path = self.server, unquote(self.path.partition("?")[0])
        shown = path if not path.startswith("/cdn/") else f"/cdn/{name}"
        server.requests.append(Request(self.command, shown, self.headers.get("Range", ""), status))
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        base = name.rpartition("/")[2]
        if (end := server.cuts.pop(base, None)) is not None:
            content, self.close_connection = content[:end], True
        stops = base == server.stalls
        for start in range(0, len(content) // 2 if stops else len(content), PIECE):
            self.wfile.write(content[start : start + PIECE])
        if stops:
            server.stalls = None
            server.stalled.set()
            server.closing.wait()

    def _refuse(self, code: str, status: int, **headers: str) -> None:
        self._reply(status, X_Error_Code=code, X_Error_Message=f"{code}: refused by the hub", **headers)

    def _json(self, content: Any) -> None:
        self._reply(200, json.dumps(content).encode(), Content_Type="application/json")

    def _content(self, content: bytes, name: str, **headers: str) -> None:
        """A file, or the rest of it."""
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._reply(206 if start else 200, content[start:], name, Accept_Ranges="bytes", **headers)

    def _serve(self) -> None:
        parts = [unquote(part) for part in self.path.partition("?")[0].split("/")[1:]]
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if parts == [""]:
            return self._reply(200)
        if parts[0] == "cdn":
            if token:  # the real storage refuses it too: the URL itself is signed
                return self._reply(400)
            name, content = self.server.large[parts[1]]
            return self._content(content, name, ETag=f'"{parts[1]}"')
        api = parts[0] == "api"
        parts = parts[1:] if api else parts
        if parts[0] == "models":
            parts = parts[1:]
        count = 3 if parts[0] == "datasets" else 2
        repository = self.server.repositories.get("/".join(parts[:count]))
        if repository is None:
            return self._refuse("RepoNotFound", 404 if token else 401)
        action, revision, *rest = parts[count:] or ["revision", "main"]
        commit = revision if revision in repository.commits else repository.branches.get(revision)
        if commit is None:
            return self._refuse("RevisionNotFound", 404)
        if api:
            return self._describe("/".join(parts[:count]), action, commit, "/".join(rest))
        if repository.readers is not None and token not in repository.readers:
            return self._refuse("GatedRepo", 403 if token else 401)
        return self._resolve(commit, "/".join(rest), repository.commits[commit])

    def _describe(self, name: str, action: str, commit: str, below: str) -> None:
        """The information on a commit, or its files below a folder."""
        files = self.server.repositories[name].commits[commit]
        if action != "tree":
            described = {"id": name.removeprefix("datasets/"), "sha": commit, "private": False, "tags": []}
            siblings = [{"rfilename": path} for path in sorted(files)]
            return self._json(described | {"siblings": siblings, "downloads": 0, "likes": 0})
        found = {path: content for path, content in files.items() if path.startswith(f"{below}/" if below else "")}
        if below and not found:
            return self._refuse("EntryNotFound", 404)
        entries = []
        for path, content in sorted(found.items()):
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _blob(content)}
            if len(content) >= LARGE:
                entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        return self._json(entries)

    def _resolve(self, commit: str, path: str, files: dict[str, bytes]) -> None:
        """A file of a commit, or a redirect to it."""
        if path not in files:
            return self._refuse("EntryNotFound", 404, X_Repo_Commit=commit)
        content = files[path]
        if len(content) < LARGE:
            return self._content(content, path, ETag=f'"{_blob(content)}"', X_Repo_Commit=commit)
        digest = _sha256(content)
        self.server.large[digest] = (path, content)
        headers = {"X_Linked_ETag": f'"{digest}"', "X_Linked_Size": str(len(content)), "X_Repo_Commit": commit}
        location = f"http://localhost:{self.server.server_port}/cdn/{digest}"
        return self._reply(302, ETag=f'"{_blob(content)}"', Location=location, **headers)

    do_GET = do_HEAD = _serve  # noqa: N815


def _sha256(content: bytes) -> str:
    """The checksum by which the hub knows a large file."""
    return hashlib.sha256(content).hexdigest()


def _blob(content: bytes) -> str:
    """The checksum by which git knows a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serving() -> Iterator[HubServer]:
    """A server that answers inside the block and is gone afterwards."""
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()
