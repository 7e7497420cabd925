# SPDX-License-Identifier: Apache-2.0
"""A Hub on loopback: enough of huggingface.co's HTTP protocol for the unmodified `huggingface_hub` client.

Model repositories with their histories, held in memory; public to read, a bearer token to write. Files that end in
`LFS_SUFFIXES` travel by git LFS (batch and presigned PUT; downloads by redirect), the others inside the commit. All
hashes are computed here from the bytes received. There is no xet: set HF_HUB_DISABLE_XET=1 in the client.
"""

import base64
import hashlib
import json
import re
import secrets
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


LFS_SUFFIXES = (".safetensors", ".bin", ".parquet")
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
REPO, REVISION = r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
# method, path, whether it needs a token, method of the handler
ROUTES = [
    ("GET", "/api/whoami-v2", True, "whoami"),
    ("POST", "/api/repos/create", True, "create"),
    ("POST", "/api/validate-yaml", False, "validate_yaml"),
    ("GET", f"/api/models/{REPO}", False, "info"),
    ("GET", f"/api/models/{REPO}/revision/{REVISION}", False, "info"),
    ("GET", f"/api/models/{REPO}/tree/{REVISION}", False, "tree"),
    ("POST", f"/api/models/{REPO}/preupload/{REVISION}", True, "preupload"),
    ("POST", f"/api/models/{REPO}/commit/main", True, "commit"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", True, "lfs_batch"),
    ("PUT", "/lfs-upload/(?P<ticket>[0-9a-f]+)", False, "lfs_upload"),
    ("GET", "/lfs/(?P<oid>[0-9a-f]+)", False, "lfs_download"),
    ("GET", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", False, "resolve"),
]


class HubError(Exception):
    """Answered as `status`, with the headers that the client turns into its exceptions."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


@dataclass(frozen=True)
class Commit:
    """A whole tree with its message; `sha` is the hash of both and of the parent."""

    sha: str
    message: str
    files: dict[str, bytes]


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def as_json(content: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})


def blob_id(path: str, content: bytes) -> str:
    """The etag: sha256 for LFS files, git's object id for the others."""
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubEndpoint:
    """Serves at `url` (for HF_ENDPOINT) while entered as a context; `token` of `user` is the one that may write.

    `repos` holds the commits of each repository, oldest first, the first with .gitattributes; `requests` the
    (method, path, status) of all requests answered.
    """

    def __init__(self, user: str = "owner"):
        self.user, self.token = user, f"hf_{secrets.token_hex(17)}"
        self.repos: dict[str, list[Commit]] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.lfs_objects: dict[str, bytes] = {}
        self.lfs_tickets: dict[str, str] = {}
        self.lock = threading.Lock()
        verbs = {f"do_{verb}": Handler.serve for verb in ("GET", "HEAD", "POST", "PUT")}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self, **verbs}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "HubEndpoint":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def commit(self, repo: str, files: dict[str, bytes], message: str) -> Commit:
        """Add or replace files on main."""
        history = self.repos.setdefault(repo, [])
        tree = {**(history[-1].files if history else {}), **files}
        digest = hashlib.sha1(f"{history[-1].sha if history else ''}\0{message}".encode())
        for path, content in sorted(tree.items()):
            digest.update(f"\0{path}\0{blob_id(path, content)}".encode())
        history.append(Commit(digest.hexdigest(), message, tree))
        self.lfs_objects |= {blob_id(*file): file[1] for file in files.items() if file[0].endswith(LFS_SUFFIXES)}
        return history[-1]

    def find(self, repo: str, revision: str = "main") -> Commit:
        """`revision` is main or the sha of a commit."""
        matching = [commit for commit in self.repos.get(repo, []) if revision in ("main", commit.sha)]
        if not matching:
            code = "RevisionNotFound" if repo in self.repos else "RepoNotFound"
            raise HubError(404, f"{repo} at {revision} was not found", code)
        return matching[-1]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubEndpoint
    body = b""

    def answer(self) -> Answer:
        path = unquote(urlsplit(self.path).path)
        method = "GET" if self.command == "HEAD" else self.command
        for known, pattern, needs_token, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if known == method and match is not None:
                given = self.headers.get("Authorization")
                if (given or needs_token) and given != f"Bearer {self.hub.token}":
                    raise HubError(401, "Invalid credentials in Authorization header")
                return getattr(self, action)(**match.groupdict())
        raise HubError(404, f"No such route: {method} {path}")

    def serve(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            if "Transfer-Encoding" in self.headers:
                raise HubError(411, "Send a Content-Length")
            with self.hub.lock:
                answer = self.answer()
        except HubError as error:
            answer = as_json({"error": str(error)}, error.status)
            answer.headers |= error.headers
        self.hub.requests.append((self.command, self.path, answer.status))
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are kept in `HubEndpoint.requests`, not printed."""

    def info(self, repo: str, revision: str = "main") -> Answer:
        commit = self.hub.find(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        return as_json({"id": repo, "sha": commit.sha, "private": False, "tags": [], "siblings": siblings})

    def tree(self, repo: str, revision: str) -> Answer:
        entries = []
        for path, content in sorted(self.hub.find(repo, revision).files.items()):
            entries.append({"type": "file", "path": path, "oid": blob_id(path, content)[:40], "size": len(content)})
            if path.endswith(LFS_SUFFIXES):
                entries[-1]["lfs"] = {"oid": blob_id(path, content), "size": len(content), "pointerSize": 134}
        return as_json(entries)

    def resolve(self, repo: str, revision: str, path: str) -> Answer:
        commit = self.hub.find(repo, revision)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", **headers)
        content, oid = commit.files[path], blob_id(path, commit.files[path])
        if not path.endswith(LFS_SUFFIXES):
            return Answer(200, content, {**headers, "ETag": f'"{oid}"'})
        # to another host, as to a content delivery network: the client takes the metadata from the redirect itself
        location = f"{self.hub.url.replace('127.0.0.1', 'localhost')}/lfs/{oid}"
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content)), "Location": location}
        return Answer(302, b"", headers)

    def lfs_download(self, oid: str) -> Answer:
        if oid not in self.hub.lfs_objects:
            raise HubError(404, "No such object", "EntryNotFound")
        return Answer(200, self.hub.lfs_objects[oid], {"ETag": f'"{oid}"'})

    def whoami(self) -> Answer:
        return as_json({"type": "user", "name": self.hub.user, "orgs": []})

    def validate_yaml(self) -> Answer:
        return as_json({"errors": [], "warnings": []})

    def create(self) -> Answer:
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or self.hub.user
        if owner != self.hub.user:
            raise HubError(403, f"No rights to create a model under the namespace {owner}")
        repo = f"{owner}/{wanted['name']}"
        exists = repo in self.hub.repos
        if not exists:
            self.hub.commit(repo, {".gitattributes": GIT_ATTRIBUTES}, "initial commit")
        return as_json({"url": f"{self.hub.url}/{repo}"}, 409 if exists else 200)

    def preupload(self, repo: str, revision: str) -> Answer:
        present, files = self.hub.find(repo, revision).files, []
        for path in (entry["path"] for entry in json.loads(self.body)["files"]):
            oid = {"oid": blob_id(path, present[path])} if path in present else {}
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
        return as_json({"files": files})

    def lfs_batch(self, repo: str) -> Answer:
        self.hub.find(repo)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            objects.append(entry := {"oid": wanted["oid"], "size": wanted["size"]})
            if wanted["oid"] not in self.hub.lfs_objects:
                ticket = secrets.token_hex(16)
                self.hub.lfs_tickets[ticket] = wanted["oid"]
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs-upload/{ticket}"}}
        return as_json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, ticket: str) -> Answer:
        oid = hashlib.sha256(self.body).hexdigest()
        if self.hub.lfs_tickets.get(ticket) != oid:
            raise HubError(400, "Unknown upload, or content of another hash")
        self.hub.lfs_objects[oid] = self.body
        return Answer()

    def commit(self, repo: str) -> Answer:
        message, files = "", {}
        self.hub.find(repo)
        for line in map(json.loads, self.body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"], validate=True)
            elif key == "lfsFile" and value["oid"] in self.hub.lfs_objects:
                files[value["path"]] = self.hub.lfs_objects[value["oid"]]
            else:
                raise HubError(400, f"Unknown operation or LFS object: {key} {value}")
        sha = self.hub.commit(repo, files, message).sha
        return as_json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})
