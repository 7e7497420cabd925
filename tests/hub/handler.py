# SPDX-License-Identifier: Apache-2.0
"""The Hub's HTTP protocol, request by request: what huggingface.co answers to the calls of `huggingface_hub`."""

import base64
import hashlib
import json
import re
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from .faults import Dropped, Faults
from .store import Commit, HubError, HubStore, Repository, blob_id, is_lfs


REPO, REVISION = r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
MODEL = f"/api/models/{REPO}"
# method, path, whether it needs a token, method of the handler
ROUTES = [
    ("GET", "/api/whoami-v2", True, "whoami"),
    ("POST", "/api/repos/create", True, "create"),
    ("POST", "/api/validate-yaml", False, "validate_yaml"),
    ("GET", MODEL, False, "info"),
    ("GET", f"{MODEL}/revision/{REVISION}", False, "info"),
    ("GET", f"{MODEL}/refs", False, "refs"),
    ("GET", f"{MODEL}/tree/{REVISION}", False, "tree"),
    ("POST", f"{MODEL}/paths-info/{REVISION}", False, "paths_info"),
    ("POST", f"{MODEL}/branch/(?P<branch>[^/]+)", True, "create_branch"),
    ("POST", f"{MODEL}/preupload/{REVISION}", True, "preupload"),
    ("POST", f"{MODEL}/commit/{REVISION}", True, "commit"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", True, "lfs_batch"),
    ("PUT", "/lfs-upload/(?P<ticket>[0-9a-f]+)", False, "lfs_upload"),
    ("PUT", r"/lfs-part/(?P<ticket>[0-9a-f]+)/(?P<part>\d+)", False, "lfs_part"),
    ("POST", "/lfs-complete/(?P<ticket>[0-9a-f]+)", False, "lfs_complete"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/verify", True, "lfs_verify"),
    ("GET", "/lfs/(?P<oid>[0-9a-f]+)", False, "lfs_download"),
    ("GET", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", False, "resolve"),
]
# of one answer, so that slow downloads are in pieces
PIECE = 1 << 14


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Upload:
    """A presigned upload that has been granted: of which content, and the parts that have arrived."""

    oid: str
    parts: dict[int, bytes] = field(default_factory=dict)


def as_json(content: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})


def ranged(content: bytes, wanted: str | None, headers: dict[str, str]) -> Answer:
    """The bytes that a Range header asks for, "bytes=5-" or "bytes=5-9"."""
    headers = {**headers, "Accept-Ranges": "bytes"}
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "")
    if match is None:
        return Answer(200, content, headers)
    start, end = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
    if start > end:
        raise HubError(416, "Requested range not satisfiable", **{"Content-Range": f"bytes */{len(content)}"})
    headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
    return Answer(206, content[start : end + 1], headers)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: HubStore
    faults: Faults
    log: list[tuple[str, str, int]]
    url: str
    lock: Any
    uploads: dict[str, Upload]
    body = b""
    reader: str | None = None

    def route(self) -> tuple[Callable[..., Answer], dict[str, str]]:
        method = "GET" if self.command == "HEAD" else self.command
        for known, pattern, needs_token, action in ROUTES:
            match = re.fullmatch(pattern, urlsplit(self.path).path)
            if known == method and match is not None:
                # storage outside the Hub knows no tokens: its addresses are signed
                if "/lfs" not in pattern[:5]:
                    self.authorise(needs_token)
                return getattr(self, action), {name: unquote(value) for name, value in match.groupdict().items()}
        raise HubError(404, f"No such route: {method} {self.path}")

    def authorise(self, needs_token: bool) -> None:
        given = self.headers.get("Authorization")
        if given is not None or needs_token:
            self.reader = self.store.users.get((given or "").removeprefix("Bearer "))
            if self.reader is None:
                raise HubError(401, "Invalid credentials in Authorization header")

    def readable(self, repo: str) -> Repository:
        return self.store.readable(repo, self.reader)

    def writable(self, repo: str) -> Repository:
        repository = self.readable(repo)
        if self.reader != repo.split("/")[0]:
            raise HubError(403, f"You have no rights to write to {repo}")
        return repository

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.path).query)

    def serve(self) -> None:
        self.reader = None
        try:
            self.body = self.faults.read(
                self.command, self.path, self.rfile, int(self.headers.get("Content-Length", 0))
            )
            if "Transfer-Encoding" in self.headers:
                raise HubError(411, "Send a Content-Length")
            with self.lock:
                action, arguments = self.route()
                answer = action(**arguments)
        except Dropped:
            self.log.append((self.command, self.path, 0))
            self.close_connection = True
            return
        except HubError as error:
            answer = as_json({"error": str(error)}, error.status)
            answer.headers |= error.headers
        self.log.append((self.command, self.path, answer.status))
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.send_body(answer.body)

    def handle(self) -> None:
        # a client that has gone reads no answer
        with suppress(ConnectionError):
            super().handle()

    def send_body(self, body: bytes) -> None:
        served, pause = self.faults.download(self.command, self.path, len(body))
        for start in range(0, served, PIECE):
            self.wfile.write(body[start : min(start + PIECE, served)])
            time.sleep(pause)
        self.close_connection |= served < len(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are kept in `log`, not printed."""

    def whoami(self) -> Answer:
        return as_json({"type": "user", "name": self.reader, "orgs": []})

    def validate_yaml(self) -> Answer:
        block = re.match(r"---\n(.*?)\n---", json.loads(self.body)["content"], re.DOTALL)
        try:
            metadata = yaml.safe_load(block[1]) if block else {}
        except yaml.YAMLError as error:
            return as_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        if not isinstance(metadata, dict):
            return as_json({"errors": [{"message": "metadata must be a mapping"}], "warnings": []}, 400)
        return as_json({"errors": [], "warnings": []})

    def create(self) -> Answer:
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or self.reader
        if owner != self.reader:
            raise HubError(403, f"You don't have the rights to create a model under the namespace {owner}")
        repo = f"{owner}/{wanted['name']}"
        exists = repo in self.store.repositories
        if not exists:
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            self.store.create(repo, private)
        return as_json({"url": f"{self.url}/{repo}"}, 409 if exists else 200)

    def info(self, repo: str, revision: str = "main") -> Answer:
        repository = self.readable(repo)
        commit = repository.history(revision)[-1]
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        whole = {"id": repo, "sha": commit.sha, "private": repository.private, "tags": [], "siblings": siblings}
        return as_json(whole)

    def refs(self, repo: str) -> Answer:
        repository = self.readable(repo)

        def entry(name: str, ref: str, history: list[Commit]) -> dict[str, str]:
            return {"name": name, "ref": ref, "targetCommit": history[-1].sha}

        branches = [entry(name, f"refs/heads/{name}", history) for name, history in repository.branches.items()]
        pulls = [entry(str(n), f"refs/pr/{n}", history) for n, history in enumerate(repository.pulls, 1)]
        return as_json({"branches": branches, "tags": [], "converts": [], "pullRequests": pulls})

    def create_branch(self, repo: str, branch: str) -> Answer:
        repository = self.writable(repo)
        if branch in repository.branches:
            raise HubError(409, f"Reference already exists: {branch}")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repository.branches[branch] = list(repository.history(start))
        return as_json({})

    def entry(self, path: str, content: bytes) -> dict[str, Any]:
        found: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
        found["oid"] = blob_id(path, content)[:40]
        if is_lfs(path):
            found["lfs"] = {"oid": blob_id(path, content), "size": len(content), "pointerSize": 134}
        return found

    def tree(self, repo: str, revision: str) -> Answer:
        files = self.readable(repo).history(revision)[-1].files
        return as_json([self.entry(*file) for file in sorted(files.items())])

    def paths_info(self, repo: str, revision: str) -> Answer:
        files = self.readable(repo).history(revision)[-1].files
        wanted = parse_qs(self.body.decode())["paths"]
        return as_json([self.entry(path, files[path]) for path in wanted if path in files])

    def resolve(self, repo: str, revision: str, path: str) -> Answer:
        commit = self.readable(repo).history(revision)[-1]
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", **headers)
        content, oid = commit.files[path], blob_id(path, commit.files[path])
        if not is_lfs(path):
            return ranged(content, self.headers.get("Range"), {**headers, "ETag": f'"{oid}"'})
        # to another host, as to a content delivery network: the client takes the metadata from the redirect itself
        location = f"{self.url.replace('127.0.0.1', 'localhost')}/lfs/{oid}"
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content)), "Location": location}
        return Answer(302, b"", headers)

    def lfs_download(self, oid: str) -> Answer:
        if oid not in self.store.lfs_objects:
            raise HubError(404, "No such object", "EntryNotFound")
        return ranged(self.store.lfs_objects[oid], self.headers.get("Range"), {"ETag": f'"{oid}"'})

    def preupload(self, repo: str, revision: str) -> Answer:
        repository = self.readable(repo) if "create_pr" in self.query else self.writable(repo)
        present, files = repository.history(revision)[-1].files, []
        for path in (entry["path"] for entry in json.loads(self.body)["files"]):
            oid = {"oid": blob_id(path, present[path])} if path in present else {}
            ignored = path in present.get(".gitignore", b"").decode().split()
            mode = "lfs" if is_lfs(path) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": ignored, **oid})
        return as_json({"files": files})

    def lfs_batch(self, repo: str) -> Answer:
        self.readable(repo)
        wanted = json.loads(self.body)
        objects = []
        for entry in ({"oid": item["oid"], "size": item["size"]} for item in wanted["objects"]):
            objects.append(entry)
            if entry["oid"] in self.store.lfs_objects:
                continue
            ticket = secrets.token_hex(16)
            self.uploads[ticket] = Upload(entry["oid"])
            actions: dict[str, Any] = {"verify": {"href": f"{self.url}/{repo}.git/info/lfs/objects/verify"}}
            size, chunk = entry["size"], self.faults.part_size
            if size > chunk and "multipart" in wanted["transfers"]:
                parts = {f"{n:05}": f"{self.url}/lfs-part/{ticket}/{n}" for n in range(1, -(-size // chunk) + 1)}
                header = {"chunk_size": str(chunk), **parts}
                actions["upload"] = {"href": f"{self.url}/lfs-complete/{ticket}", "header": header}
            else:
                actions["upload"] = {"href": f"{self.url}/lfs-upload/{ticket}"}
            entry["actions"] = actions
        return as_json({"transfer": "basic", "objects": objects})

    def granted(self, ticket: str) -> Upload:
        if ticket not in self.uploads:
            raise HubError(403, "No such upload was granted")
        return self.uploads[ticket]

    def store_upload(self, ticket: str, content: bytes) -> Answer:
        oid = hashlib.sha256(content).hexdigest()
        if self.granted(ticket).oid != oid:
            raise HubError(400, "Content of another hash than announced")
        self.store.lfs_objects[oid] = self.faults.stored(content)
        del self.uploads[ticket]
        return as_json({})

    def lfs_upload(self, ticket: str) -> Answer:
        return self.store_upload(ticket, self.body)

    def lfs_part(self, ticket: str, part: str) -> Answer:
        self.granted(ticket).parts[int(part)] = self.body
        return Answer(200, b"", {"ETag": hashlib.md5(self.body, usedforsecurity=False).hexdigest()})

    def lfs_complete(self, ticket: str) -> Answer:
        parts = self.granted(ticket).parts
        for entry in json.loads(self.body)["parts"]:
            content = parts.get(entry["partNumber"], b"")
            if hashlib.md5(content, usedforsecurity=False).hexdigest() != entry["etag"]:
                raise HubError(400, f"Part {entry['partNumber']} is missing or another")
        return self.store_upload(ticket, b"".join(parts[number] for number in sorted(parts)))

    def lfs_verify(self, repo: str) -> Answer:
        wanted = json.loads(self.body)
        stored = self.store.lfs_objects.get(wanted["oid"])
        if stored is None or len(stored) != wanted["size"]:
            raise HubError(404, "The upload did not arrive")
        return as_json({})

    def commit(self, repo: str, revision: str) -> Answer:
        pull = "create_pr" in self.query
        repository = self.readable(repo) if pull else self.writable(repo)
        base = repository.history(revision)
        header: dict[str, Any] = {}
        files: dict[str, bytes] = {}
        deleted: set[str] = set()
        for line in map(json.loads, self.body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                header = value
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"], validate=True)
            elif key == "lfsFile" and value["oid"] in self.store.lfs_objects:
                files[value["path"]] = self.store.lfs_objects[value["oid"]]
            elif key == "deletedFile" and value["path"] in base[-1].files:
                deleted.add(value["path"])
            else:
                raise HubError(400, f"Unknown operation, LFS object or file: {key} {value}")
        if header.get("parentCommit", base[-1].sha) != base[-1].sha:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        if pull:
            base = list(base)
            repository.pulls.append(base)
        elif not (revision in repository.branches or revision.startswith("refs/pr/")):
            raise HubError(400, f"{revision} is not a branch")
        sha = repository.add(base, header["summary"], files, deleted).sha
        made = {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{repo}/commit/{sha}"}
        if pull:
            made["pullRequestUrl"] = f"{self.url}/{repo}/discussions/{len(repository.pulls)}"
        return as_json(made)
