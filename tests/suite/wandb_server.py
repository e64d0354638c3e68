"""A W&B server on loopback: as much of its GraphQL, file stream and storage as the client needs for whole runs.

It keeps what a client sends, so that tests can read it, and fails on command. Names of operations and fields are those
of the client's requests.
"""

import itertools
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import wandb

ENTITY, ORGANIZATION = "team", "people"
API_KEY = "0" * 40
CREATED = "2026-01-01T00:00:00"
JSON_LINES = ("wandb-history.jsonl", "wandb-summary.json")


@dataclass
class RemoteRun:
    """What the server knows of a run."""

    attributes: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def summary(self) -> dict[str, Any]:
        """The run's summary without the client's own keys."""
        lines = self.lines.get("wandb-summary.json", {})
        content = json.loads(lines[max(lines)]) if lines else {}
        return {key: value for key, value in content.items() if not key.startswith("_")}

    @property
    def history(self) -> list[dict[str, Any]]:
        """The run's history, a row a step."""
        return [json.loads(line) for _, line in sorted(self.lines.get("wandb-history.jsonl", {}).items())]


@dataclass
class Artifact:
    """An artifact version: who logged it, who reads it, where it is linked, and its files once it is committed."""

    run_id: str
    name: str
    type: str
    metadata: dict[str, Any]
    digest: str
    files: dict[str, bytes] = field(default_factory=dict)
    committed: bool = False
    used_by: list[str] = field(default_factory=list)
    links: list[tuple[str, list[str]]] = field(default_factory=list)  # path in a registry, aliases there


@dataclass
class RemoteSweep:
    """A grid, and which of its parameters wait, are lent to an agent, and have been taken up by a run.

    A suggestion is lent until its run says something. One whose process ends before that waits again at once, as on the
    real server when the lease runs out, after an hour.
    """

    content: dict[str, Any]
    waiting: list[dict[str, Any]] = field(default_factory=list)
    lent: dict[str, dict[str, Any]] = field(default_factory=dict)
    taken: dict[str, dict[str, Any]] = field(default_factory=dict)
    suggested: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        grid = {key: given.get("values", [given.get("value")]) for key, given in self.content["parameters"].items()}
        self.waiting = [dict(zip(grid, chosen, strict=True)) for chosen in itertools.product(*grid.values())]

    def commands(self, running: Collection[str], name: str) -> list[dict[str, Any]]:
        """What an agent is to do, whose processes of these run ids are still running."""
        for run_id in [run_id for run_id in self.lent if run_id not in running]:
            self.waiting.insert(0, self.lent.pop(run_id))
        if running:
            return []
        if not self.waiting:
            return [{"type": "exit"}]
        parameters, run_id = self.waiting.pop(0), f"{name}{len(self.suggested)}"
        self.suggested.append(parameters)
        self.lent[run_id] = parameters
        arguments = {key: {"value": given} for key, given in parameters.items()}
        return [{"type": "run", "run_id": run_id, "program": self.content["program"], "args": arguments}]


class WandbServer(ThreadingHTTPServer):
    """The server; `url` is its address, `runs` and `artifacts` are what it has received, `sweeps` what agents ask for.

    `broken` makes it answer every request with an internal error; `breaks` decides that by the operation or path.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.runs: dict[str, RemoteRun] = {}
        self.artifacts: list[Artifact] = []
        self.sweeps: dict[str, RemoteSweep] = {}
        self.views: dict[str, dict[str, Any]] = {}
        self.uploads: dict[str, bytes] = {}
        self.requests: Counter[str] = Counter()
        self.unknown: list[str] = []
        self.broken = False
        self.breaks: Callable[[str], bool] = lambda name: False
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves in the middle of a request is no error here."""

    def stream(self, run_id: str, content: dict[str, Any]) -> None:
        """One request of a run's file stream: lines of its files from an offset on, and how it ended."""
        run = self.runs[run_id]
        for name, part in content.get("files", {}).items():
            lines = run.lines.setdefault(name, {})
            lines.update(enumerate(part["content"], part["offset"]))
        if content.get("complete"):
            run.exit_code = content["exitcode"]

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL response."""
        found = getattr(self, f"answer_{operation}", None)
        if found is None:
            self.unknown.append(operation)
            return {}
        return found(variables)

    def answer_ServerFeaturesQuery(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        names = ("ARTIFACT_MEMBERSHIP_IN_LINK_ARTIFACT_RESPONSE",)
        return {"serverInfo": {"features": [{"name": name, "isEnabled": True} for name in names]}}

    def answer_GetDefaultEntity(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"viewer": {"id": "viewer", "entity": ENTITY}}

    def answer_Viewer(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"viewer": {"id": "viewer", "entity": ENTITY, "username": "someone", "flags": "{}", "teams": None}}

    def answer_ArtifactType(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"project": None}

    def answer_OrganizationCoreWeaveOrganizationID(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"entity": None}

    def answer_UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        name = variables["name"]
        inserted = name not in self.runs
        run = self.runs.setdefault(name, RemoteRun())
        given = {key: value for key, value in variables.items() if value is not None}
        if "config" in given:
            run.config = {key: value["value"] for key, value in json.loads(given.pop("config")).items()}
        run.attributes |= given
        sweep = self.sweeps.get(given.get("sweep", ""))
        if sweep is not None and name in sweep.lent:
            sweep.taken[name] = sweep.lent.pop(name)
        entity = {"id": "entity", "name": variables["entity"] or ENTITY}
        bucket = {
            "id": f"bucket-{name}",
            "name": name,
            "displayName": run.attributes.get("displayName"),
            "sweepName": given.get("sweep"),
            "historyLineCount": 0,
            "project": {"id": "project", "name": variables["project"], "entity": entity},
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def answer_SweepWithRuns(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        name = variables["sweep"]
        content = {"id": name, "name": name, "state": "RUNNING", "config": json.dumps(self.sweeps[name].content)}
        return {"project": {"sweep": content | {"runs": {"edges": []}}}}

    def answer_CreateAgent(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"createAgent": {"agent": {"id": variables["sweep"]}}}

    def answer_Heartbeat(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        name = variables["id"]  # an agent is called after its sweep
        commands = self.sweeps[name].commands(json.loads(variables["runState"]), name)
        return {"agentHeartbeat": {"agent": {"id": name}, "commands": json.dumps(commands)}}

    def answer_CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        run_id = variables["run"]
        files = [{"name": name, "uploadUrl": f"{self.url}/storage/run/{run_id}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": f"bucket-{run_id}", "uploadHeaders": [], "files": files}}

    def answer_CreateArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        given = variables["input"]
        metadata = json.loads(given.get("metadata") or "{}")
        name, digest = given["artifactCollectionName"], given["digest"]
        known = [
            i for i, one in enumerate(self.artifacts) if one.committed and (one.name, one.digest) == (name, digest)
        ]
        if not known:
            self.artifacts.append(Artifact(given["runName"], name, given["artifactTypeName"], metadata, digest))
        identifier = str(known[0] if known else len(self.artifacts) - 1)
        latest = {"id": identifier, "versionIndex": 0} if known else None
        shown = {"id": identifier, "state": "COMMITTED" if known else "PENDING"}
        return {"createArtifact": {"artifact": shown | {"artifactSequence": {"id": "s", "latestArtifact": latest}}}}

    def answer_UseArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        given = variables.get("input", variables)
        self.artifacts[int(given["artifactID"])].used_by.append(given["runName"])
        return {"useArtifact": {"artifact": {"id": given["artifactID"], "digest": "", "description": None}}}

    def answer_ArtifactByID(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"artifact": self.shown(int(variables["id"]))}

    def answer_FetchOrgInfoFromEntity(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        organization = {"name": ORGANIZATION, "orgEntity": {"name": f"{ORGANIZATION}_entity"}}
        return {"entity": {"organization": organization, "user": None}}

    def answer_LinkArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        given = variables["input"]
        project, name = given["projectName"], given["artifactPortfolioName"]
        aliases = [one["alias"] for one in given["aliases"]]
        number = int(given["artifactID"])
        self.artifacts[number].links.append((f"{given['entityName']}/{project}/{name}", aliases))
        membership = {
            "__typename": "ArtifactCollectionMembership",
            "id": "membership",
            "versionIndex": 0,
            "createdAt": CREATED,
            "aliases": [{"__typename": "ArtifactAlias", "id": alias, "alias": alias} for alias in aliases],
            "artifactCollection": {"__typename": "ArtifactPortfolio"} | self.collection(name, project),
            "artifact": self.shown(number),
        }
        return {"result": {"versionIndex": 0, "artifactMembership": membership}}

    def collection(self, name: str, project: str) -> dict[str, Any]:
        """A collection of artifacts as queries see it."""
        return {"name": name, "project": {"id": "1", "internalId": "1", "name": project, "entity": {"name": ENTITY}}}

    def shown(self, number: int) -> dict[str, Any]:
        """An artifact as queries see it."""
        artifact = self.artifacts[number]
        return {
            "__typename": "Artifact",
            "id": str(number),
            "artifactSequence": {"__typename": "ArtifactSequence"} | self.collection(artifact.name, "project"),
            "versionIndex": 0,
            "artifactType": {"name": artifact.type},
            "description": None,
            "metadata": json.dumps(artifact.metadata),
            "ttlDurationSeconds": 0,
            "ttlIsInherited": True,
            "tags": [],
            "historyStep": None,
            "state": "COMMITTED" if artifact.committed else "PENDING",
            "size": 0,
            "digest": artifact.digest,
            "commitHash": None,
            "fileCount": len(artifact.files),
            "createdAt": CREATED,
            "updatedAt": None,
            "aliases": [],
        }

    def answer_CreateArtifactManifest(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        given = variables.get("input", variables)
        place = f"/storage/manifest/{given['artifactID']}"
        file = {"id": "file", "name": "manifest", "displayName": "manifest", "uploadUrl": f"{self.url}{place}"}
        return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file | {"uploadHeaders": []}}}}

    def answer_CreateArtifactFiles(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        given = variables.get("input", variables)
        edges = []
        for spec in given["artifactFiles"]:
            place = f"/storage/artifact/{spec['artifactID']}/{spec['name']}"
            node = {
                "id": place,
                "name": spec["name"],
                "displayName": spec["name"],
                "uploadUrl": f"{self.url}{place}",
                "uploadHeaders": [],
                "storagePath": place,
                "artifact": {"id": spec["artifactID"]},
                "uploadMultipartUrls": None,
            }
            edges.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def answer_CommitArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        identifier = variables.get("input", variables)["artifactID"]
        artifact = self.artifacts[int(identifier)]
        prefix = f"/storage/artifact/{identifier}/"
        artifact.files = {
            place.removeprefix(prefix): content for place, content in self.uploads.items() if place.startswith(prefix)
        }
        artifact.committed = True
        return {"commitArtifact": {"artifact": {"id": identifier, "digest": ""}}}

    def answer_Runs(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        edges = [{"node": self.described(name), "cursor": name} for name in self.runs]
        page = {"edges": edges, "pageInfo": {"endCursor": None, "hasNextPage": False}}
        return {"project": {"internalId": "1", "runCount": len(edges), "readOnly": False, "runs": page}}

    def answer_Run(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"project": {"run": self.described(variables["name"])}}

    def answer_RunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        place = f"/storage/run/{variables['name']}/"
        wanted = variables.get("fileNames") or [path.removeprefix(place) for path in self.uploads]
        nodes = [
            {"id": name, "name": name, "url": self.url + place + name, "directUrl": self.url + place + name}
            | {"sizeBytes": len(self.uploads[place + name]), "mimetype": "", "updatedAt": None, "md5": ""}
            for name in wanted
            if place + name in self.uploads
        ]
        edges = [{"node": node, "cursor": node["id"]} for node in nodes]
        files = {"edges": edges, "pageInfo": {"endCursor": None, "hasNextPage": False}}
        return {"project": {"internalId": "1", "run": {"fileCount": len(nodes), "files": files}}}

    def described(self, name: str) -> dict[str, Any]:
        """A run as queries see it."""
        run = self.runs[name]
        state = {None: "running", 0: "finished"}.get(run.exit_code, "failed")
        return {
            "id": f"bucket-{name}",
            "projectId": "1",
            "name": name,
            "displayName": run.attributes.get("displayName"),
            "tags": run.attributes.get("tags", []),
            "sweepName": None,
            "state": state,
            "config": json.dumps({key: {"value": value} for key, value in run.config.items()}),
            "summaryMetrics": json.dumps(run.summary),
            "systemMetrics": "{}",
            "createdAt": CREATED,
            "heartbeatAt": CREATED,
            "historyLineCount": len(run.history),
            "user": {"name": "someone", "username": "someone"},
            "group": run.attributes.get("groupName"),
            "jobType": run.attributes.get("jobType"),
            "commit": None,
            "readOnly": False,
            "description": None,
            "notes": None,
            "historyKeys": None,
        }

    def answer_GetProjects(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {
            "models": {"pageInfo": {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}, "edges": []}
        }

    def answer_CreateProject(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"result": {"inserted": True}}

    def answer_upsertView(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return self.answer_UpsertView2(variables)

    def answer_UpsertView2(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        self.views[variables["name"]] = variables | {"spec": json.loads(variables["spec"])}
        return {"upsertView": {"view": {"id": "view", "name": variables["name"]}, "inserted": True}}


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Requests are counted, not printed."""

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _reply(self, content: Any, code: int = 200) -> None:
        self._reply_bytes(json.dumps(content).encode(), code)

    def _reply_bytes(self, body: bytes, code: int = 200) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _serve(self) -> None:
        body, server = self._read(), self.server
        request = json.loads(body) if self.path == "/graphql" else {}
        operation = re.search(r"\b(?:query|mutation)\s+(\w+)", request.get("query", ""))
        name = operation[1] if operation else self.path
        with server.lock:
            server.requests[name] += 1
            if server.broken or server.breaks(name):
                self._reply({"error": "broken on command"}, 500)
            elif operation:
                self._reply({"data": server.answer(name, request.get("variables") or {})})
            elif self.path.endswith("/file_stream"):
                server.stream(self.path.split("/")[-2], json.loads(body))
                self._reply({})
            elif self.command == "GET" and self.path in server.uploads:
                self._reply_bytes(server.uploads[self.path])
            else:
                server.uploads[self.path] = body
                self._reply({})

    do_GET = do_POST = do_PUT = _serve  # noqa: N815


@contextmanager
def serving() -> Iterator[WandbServer]:
    """A server that answers inside the block and is gone afterwards."""
    with WandbServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def connected(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A server that the client in this process, and commands started inside the block, talk to."""
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", API_KEY)
        wandb.teardown()  # the client reads its settings once
        yield server
        server.broken, server.breaks = False, lambda name: False  # the client's last requests are answered
        try:
            wandb.teardown()
        except ConnectionError:  # its background process is what the test has killed
            wandb.teardown()
