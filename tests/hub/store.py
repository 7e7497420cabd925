# SPDX-License-Identifier: Apache-2.0
"""What a Hub holds: users with tokens, repositories with branches and pull requests, large files by their hash."""

import hashlib
import re
import secrets
from dataclasses import dataclass, field


LFS_SUFFIXES = (".safetensors", ".bin", ".parquet")
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


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


def is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


def blob_id(path: str, content: bytes) -> str:
    """The etag: sha256 for LFS files, git's object id for the others."""
    if is_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """`branches` and `pulls` hold whole histories, oldest first; a new one starts as a copy of its base's."""

    name: str
    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)
    pulls: list[list[Commit]] = field(default_factory=list)

    def history(self, revision: str = "main") -> list[Commit]:
        """Up to and including the commit that a branch, a pull request (refs/pr/1) or a sha names."""
        if revision in self.branches:
            return self.branches[revision]
        pull = re.fullmatch(r"refs/pr/([1-9]\d*)", revision)
        if pull and int(pull[1]) <= len(self.pulls):
            return self.pulls[int(pull[1]) - 1]
        for history in (*self.branches.values(), *self.pulls):
            for index, commit in enumerate(history):
                if commit.sha == revision:
                    return history[: index + 1]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def add(self, history: list[Commit], message: str, files: dict[str, bytes], deleted: set[str]) -> Commit:
        """Commit on top of a history of this repository."""
        tree = {**(history[-1].files if history else {}), **files}
        tree = {path: content for path, content in tree.items() if path not in deleted}
        digest = hashlib.sha1(f"{history[-1].sha if history else ''}\0{message}".encode())
        for path, content in sorted(tree.items()):
            digest.update(f"\0{path}\0{blob_id(path, content)}".encode())
        history.append(Commit(digest.hexdigest(), message, tree))
        return history[-1]


class HubStore:
    """`token` is that of `user`; `lfs_objects` has the bytes that are served, by the hash they are known by."""

    def __init__(self, user: str = "owner"):
        self.user, self.token = user, f"hf_{secrets.token_hex(17)}"
        self.users = {self.token: user}
        self.repositories: dict[str, Repository] = {}
        self.lfs_objects: dict[str, bytes] = {}

    @property
    def repos(self) -> dict[str, list[Commit]]:
        """The commits on main of each repository, oldest first."""
        return {name: repository.branches["main"] for name, repository in self.repositories.items()}

    def add_user(self, name: str) -> str:
        """The token of a new user."""
        token = f"hf_{secrets.token_hex(17)}"
        self.users[token] = name
        return token

    def commit(self, repo: str, files: dict[str, bytes], message: str, branch: str = "main") -> Commit:
        """Add or replace files, in a new repository if there is none."""
        repository = self.repositories.setdefault(repo, Repository(repo))
        history = repository.branches.setdefault(branch, list(repository.branches.get("main", [])))
        self.keep(files)
        return repository.add(history, message, files, set())

    def keep(self, files: dict[str, bytes]) -> None:
        """Store the large ones of the files."""
        self.lfs_objects |= {blob_id(*file): file[1] for file in files.items() if is_lfs(file[0])}

    def create(self, name: str, private: bool) -> Repository:
        self.repositories[name] = Repository(name, private)
        self.commit(name, {".gitattributes": GIT_ATTRIBUTES}, "initial commit")
        return self.repositories[name]

    def readable(self, repo: str, reader: str | None) -> Repository:
        """The repository, for someone who may read it; the Hub says of private ones that there are none."""
        repository = self.repositories.get(repo)
        if repository is None or (repository.private and reader != repo.split("/")[0]):
            raise HubError(404 if reader else 401, "Repository not found", "RepoNotFound")
        return repository

    def find(self, repo: str, revision: str = "main") -> Commit:
        if repo not in self.repositories:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return self.repositories[repo].history(revision)[-1]
