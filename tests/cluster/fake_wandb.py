"""A stand-in for the W&B server on localhost: as much of its API as sweeps, agents, runs and artifacts use.

``python tests/cluster/fake_wandb.py PORT`` prints unknown requests to stderr; ``GET /state`` returns all it was told.
"""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

ENTITY = "local"


class UnknownQuery(Exception):
    """A GraphQL query that no test has needed so far; kept in ``Server.unknown`` and printed."""


def opaque(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def grid(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The points of a grid sweep as the server sends them to an agent."""
    values = {
        name: found["values"] if "values" in found else [found["value"]]
        for name, found in config["parameters"].items()
    }
    points = itertools.product(*values.values())
    return [{name: {"value": value} for name, value in zip(values, point, strict=True)} for point in points]


class Server(ThreadingHTTPServer):
    """Keeps everything it is told: sweeps, runs (with their summary, config, history) and artifacts."""

    daemon_threads = True

    def __init__(self, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.lock = threading.Lock()
        self.sweeps: dict[str, dict] = {}
        self.agents: dict[str, dict] = {}
        self.runs: dict[str, dict] = {}
        self.artifacts: dict[str, dict] = {}
        self.files: dict[str, bytes] = {}
        self.unknown: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def state(self) -> dict[str, Any]:
        return {
            "sweeps": self.sweeps,
            "runs": self.runs,
            "artifacts": self.artifacts,
            "files": {name: len(content) for name, content in self.files.items()},
            "unknown": self.unknown,
        }

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are no news."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def run(self, name: str) -> dict[str, Any]:
        return self.runs.setdefault(
            name, {"name": name, "history": [], "offsets": [], "summary": {}, "states": []}
        )

    def answer(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        """The ``data`` of a GraphQL request's answer."""
        project = {
            "id": opaque("Project:p"),
            "name": given.get("projectName") or given.get("project") or "none",
        }
        project["entity"] = {"id": opaque("Entity:e"), "name": ENTITY}
        if "upsertSweep" in query:
            name = f"s{len(self.sweeps) + 1:07d}"
            config = yaml.safe_load(given["config"])
            self.sweeps[name] = {
                "config": given["config"],
                "waiting": grid(config),
                "given": [],
                "state": "RUNNING",
            }
            return {
                "upsertSweep": {"sweep": {"name": name, "project": project}, "configValidationWarnings": []}
            }
        if "createAgent" in query:
            agent = opaque(f"Agent:{len(self.agents)}")
            self.agents[agent] = {"sweep": given["sweep"]}
            return {"createAgent": {"agent": {"id": agent}}}
        if "agentHeartbeat" in query:
            return {"agentHeartbeat": {"agent": {"id": given["id"]}, "commands": self._next_point(given)}}
        if "sweep(" in query:
            return {"project": {"sweep": self._describe_sweep(given["sweep"])}}
        if "upsertBucket" in query:
            run = self.run(given.get("name") or given["id"])
            run |= {key: value for key, value in given.items() if value is not None}
            bucket = {"id": opaque(f"Run:v1:{run['name']}"), "name": run["name"], "description": ""}
            bucket |= {
                "displayName": run.get("displayName") or run["name"],
                "config": run.get("config") or "{}",
            }
            bucket |= {
                "sweepName": run.get("sweep"),
                "project": project,
                "historyLineCount": len(run["history"]),
            }
            return {"upsertBucket": {"bucket": bucket, "inserted": not run["history"]}}
        if "bucket(" in query:  # a resumed run asks for what there is
            return {"model": {"bucket": self._describe_run(given["name"])}}
        if "createRunFiles" in query:
            return {
                "createRunFiles": {
                    "runID": opaque(given["run"]),
                    "uploadHeaders": [],
                    "files": self._uploads(given["run"], given["files"]),
                }
            }
        if "rtifact" in query and (
            told := self._answer_about_artifacts(query, given.get("input") or given, given)
        ):
            return told
        if "coreWeaveOrganizationId" in query:
            return {"entity": {"organization": None}}
        if "viewer" in query:
            viewer = {"id": opaque("User:1"), "entity": ENTITY, "username": ENTITY, "email": "a@example.com"}
            viewer |= {"flags": "{}", "admin": False, "teams": {"edges": []}}
            return {
                "viewer": viewer,
                "serverInfo": {
                    "cliVersionInfo": {"max_cli_version": "9.9.9"},
                    "latestLocalVersionInfo": None,
                    "features": [],
                },
            }
        if "serverInfo" in query or "__type" in query or "__schema" in query:
            empty = {"fields": [], "inputFields": []}
            server = {"features": [], "cliVersionInfo": {}, "latestLocalVersionInfo": None}
            return {"serverInfo": server, "__type": empty} | dict.fromkeys(
                ("QueryType", "MutationType", "ServerInfoType"), empty
            )
        raise UnknownQuery(query)

    def _answer_about_artifacts(
        self, query: str, told: dict[str, Any], given: dict[str, Any]
    ) -> dict[str, Any] | None:
        if "ArtifactType(" in query:
            return {"project": {"artifact": None}}
        if "createArtifactFiles" in query:
            edges = []
            for spec in told["artifactFiles"]:
                place = f"{spec['artifactID']}/{spec['name']}"
                self.artifacts[spec["artifactID"]]["files"].append(spec["name"])
                node = {"storagePath": place, "uploadUrl": f"{self.url}/storage/{place}", "uploadHeaders": []}
                edges.append(
                    {"node": node | {"uploadMultipartUrls": None, "artifact": {"id": spec["artifactID"]}}}
                )
            return {"createArtifactFiles": {"files": {"edges": edges}}}
        if "ArtifactManifest(" in query:
            place = (
                f"{told['artifactID'] if 'artifactID' in told else told['artifactManifestID']}/manifest.json"
            )
            file = {"id": opaque(place), "uploadUrl": f"{self.url}/storage/{place}", "uploadHeaders": []}
            manifest = {"artifactManifest": {"id": place.partition("/")[0], "file": file}}
            return {"createArtifactManifest": manifest, "updateArtifactManifest": manifest}
        if "createArtifact(" in query:
            identity = f"artifact-{len(self.artifacts) + 1}"
            self.artifacts[identity] = {
                "name": told["artifactCollectionName"],
                "type": told["artifactTypeName"],
                "run": told["runName"],
                "files": [],
                "committed": False,
            }
            artifact = {"id": identity, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
            return {"createArtifact": {"artifact": artifact}}
        if "commitArtifact" in query:
            self.artifacts[told["artifactID"]]["committed"] = True
            return {"commitArtifact": {"artifact": {"id": told["artifactID"], "digest": "none"}}}
        return None

    def _next_point(self, given: dict[str, Any]) -> str:
        name = self.agents[given["id"]]["sweep"]
        sweep = self.sweeps[name]
        if json.loads(given["runState"]):
            return "[]"
        if not sweep["waiting"]:
            sweep["state"] = "FINISHED"
            return json.dumps([{"type": "exit"}])
        point = sweep["waiting"].pop(0)
        run = f"{name}-{len(sweep['given']) + 1}"
        sweep["given"].append(run)
        self.run(run)["sweep"] = name
        return json.dumps([{"type": "run", "id": opaque(run), "run_id": run, "program": "", "args": point}])

    def _describe_sweep(self, name: str) -> dict[str, Any] | None:
        sweep = self.sweeps.get(name)
        if sweep is None:
            return None
        nothing = ("description", "heartbeatAt", "updatedAt", "bestLoss", "controller", "scheduler")
        found = {
            "id": opaque(name),
            "name": name,
            "method": "grid",
            "state": sweep["state"],
            "config": sweep["config"],
        }
        found |= {"createdAt": "2026-01-01T00:00:00Z", "earlyStopJobRunning": False, "runs": {"edges": []}}
        return found | dict.fromkeys(nothing)

    def _describe_run(self, name: str) -> dict[str, Any] | None:
        run = self.runs.get(name)
        if run is None:
            return None
        lines = [json.dumps(entry) for entry in run["history"]]
        found = {"id": opaque(f"Run:v1:{name}"), "name": name, "summaryMetrics": json.dumps(run["summary"])}
        found |= {
            "displayName": run.get("displayName"),
            "config": run.get("config") or "{}",
            "tags": None,
            "wandbConfig": '{"t": 1}',
        }
        found |= {
            "historyLineCount": len(lines),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "events": [],
            "logs": [],
        }
        return found | {"history": lines[-1:], "historyTail": json.dumps(lines[-1:]), "eventsTail": "[]"}

    def _uploads(self, run: str, names: list[str]) -> list[dict[str, Any]]:
        return [{"name": name, "uploadUrl": f"{self.url}/storage/{run}/{name}"} for name in names]

    def stream(self, run_name: str, told: dict[str, Any]) -> None:
        """History and summary lines of a run's file stream."""
        run = self.run(run_name)
        for name, chunk in (told.get("files") or {}).items():
            lines = [json.loads(line) for line in chunk["content"]] if "output" not in name else []
            if "history" in name:
                run["offsets"].append(chunk["offset"])
                run["history"][chunk["offset"] :] = (
                    lines  # as the server does: an offset of 0 would begin anew
                )
            elif "summary" in name and lines:
                run["summary"] = lines[-1]
        for key in ("exitcode", "complete", "preempting"):
            if told.get(key) is not None:
                run["states"].append({key: told[key]})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        if self.path.startswith("/sdk/"):  # the client's own telemetry
            self._body()
            return self._reply({})
        body = json.loads(self._body() or b"{}")
        found = re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path)
        with self.server.lock:
            if found:
                self.server.stream(found[1], body)
                return self._reply({"exitcode": None, "limits": {}})
            if self.path == "/graphql":
                try:
                    return self._reply(
                        {"data": self.server.answer(body["query"], body.get("variables") or {})}
                    )
                except UnknownQuery:
                    self.server.unknown.append(body["query"][:2000])
                    print("unknown query", body["query"], body.get("variables"), file=sys.stderr, flush=True)
                    return self._reply({"data": None, "errors": [{"message": "not known here"}]})
        self._unknown()

    def do_PUT(self) -> None:
        with self.server.lock:
            self.server.files[self.path.removeprefix("/storage/")] = self._body()
        self._reply({})

    def do_GET(self) -> None:
        if self.path == "/state":
            with self.server.lock:
                return self._reply(self.server.state())
        self._unknown()

    def _unknown(self) -> None:
        self._body()
        self.server.unknown.append(f"{self.command} {self.path}")
        print(404, self.command, self.path, file=sys.stderr, flush=True)
        self._reply({}, 404)

    def _body(self) -> bytes:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content

    def _reply(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


if __name__ == "__main__":
    Server(int(sys.argv[1])).serve_forever()
