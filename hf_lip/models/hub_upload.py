# SPDX-License-Identifier: Apache-2.0
"""Publishing files on the Hub: all of them in one commit, checked there afterwards by their hashes.

Large files are sent first and belong to no commit until the last request, which makes the commit: an upload that
breaks off leaves the branch as it was, and what had arrived is not sent again.
"""

import hashlib
import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from .certificate import CERTIFICATE_NAME


Files = Mapping[str, Path | bytes]
# they speak of weights that a push replaces: none of an earlier push may stay beside the new ones
OF_THE_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", CERTIFICATE_NAME, "results.json")
_PULL_REQUEST = "refs/pr/"


@dataclass(frozen=True)
class Digest:
    """Hashes of a file's content: sha256 in hex, by which large files are known, and git's of a blob, for others."""

    sha256: str
    git: str

    @classmethod
    def of(cls, content: Path | bytes) -> "Digest":
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as file:
            while part := file.read(1 << 20):
                sha256.update(part)
                git.update(part)
        return cls(sha256.hexdigest(), git.hexdigest())


def require_destination(repo_id: str, revision: str | None = None, create_pr: bool = False) -> None:
    """Raise, without the network, unless it is a name to push to.

    Raises:
        ValueError: `repo_id` is not the name of a repository, `revision` not that of a branch, or a pull request is
            asked for against another branch than main.
    """
    try:
        if not isinstance(repo_id, str):
            raise HFValidationError("it must be a string")
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"`repo_id` {repo_id!r} is not the name of a Hub repository, such as 'owner/name' ({error})."
        ) from error
    if revision is not None and (not revision or re.fullmatch("[0-9a-f]{40}", revision)):
        raise ValueError(f"`revision` {revision!r} is not a branch: name one to push to; it is made if there is none.")
    if create_pr and revision not in (None, "main"):
        raise ValueError(f"`create_pr` opens a pull request against main: leave `revision` {revision!r} out.")


def open_hub(token: str | bool | None = None) -> HfApi:
    """The Hub's client, after asking the Hub whether the token is good.

    Raises:
        ValueError: there is no token.
        OSError: the token is refused, or the Hub cannot be reached.
    """
    if not isinstance(token, str) and get_token() is None:
        raise ValueError("A push needs a token: run `hf auth login`, set HF_TOKEN or pass `token`.")
    api = HfApi(token=token)
    with clear_errors(f"{api.endpoint} cannot be reached"):
        api.whoami()
    return api


def open_repository(api: HfApi, repo_id: str, *, revision: str | None, private: bool | None) -> str:
    """Make the repository and the branch if there are none; returns the name with its owner.

    Raises:
        ValueError: the repository exists with another visibility than `private` asks for.
        OSError: no rights, or the network.
    """
    with clear_errors(f"{repo_id} could not be made"):
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # for a repository that exists, the Hub passes over `private`
        found = bool(api.model_info(repo).private)
        if private is not None and found != private:
            raise ValueError(
                f"`private`={private}, but {repo} exists and is {'private' if found else 'public'}: nothing was "
                "sent. Change that in its settings on the Hub, or push to another repository."
            )
        if revision not in (None, "main") and not str(revision).startswith(_PULL_REQUEST):
            api.create_branch(repo, branch=str(revision), exist_ok=True)
    return repo


def publish(
    api: HfApi,
    repo: str,
    files: Files,
    *,
    revision: str | None = None,
    commit_message: str,
    commit_description: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Put files into a repository in one commit, and compare what the Hub then holds with them.

    Weights, certificates and results of an earlier push that are not among the files are deleted in the same commit.

    Args:
        files: content or local file of each path in the repository.

    Raises:
        OSError: refused, broken off, overtaken by another push, or the Hub holds other bytes than were sent; the text
            says what is published.
        ValueError: the metadata of README.md are refused.
    """
    digests = {path: Digest.of(content) for path, content in files.items()}
    with clear_errors(f"{repo} could not be read, nothing was sent"):
        head = api.model_info(repo, revision=revision)
    present = [sibling.rfilename for sibling in head.siblings or []]
    stale = [path for path in present if path not in files and "/" not in path and _is_of_the_weights(path)]
    operations: list[Any] = [CommitOperationAdd(path, content) for path, content in sorted(files.items())]
    operations += [CommitOperationDelete(path) for path in stale]
    try:
        commit = api.create_commit(
            repo,
            operations,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            # what is deleted was read off this commit
            parent_commit=head.sha,
        )
    except HfHubHTTPError as error:
        if error.response.status_code == 412:
            raise OSError(
                f"Another commit was made in {repo} during this push: nothing of this one is published. Repeat it."
            ) from error
        raise
    # the client wraps what breaks off an upload in a RuntimeError
    except (HTTPError, RuntimeError) as error:
        cause = error.__cause__ or error
        raise ConnectionError(
            f"The push to {repo} broke off ({' '.join(str(cause).split()) or type(cause).__name__}). Files are "
            "published by one commit at the end, so nothing is half published: repeat the push; large files that have "
            "arrived are not sent again."
        ) from error
    where = commit.pr_revision if create_pr else commit.oid
    with clear_errors(f"{commit.commit_url} was made, but could not be checked"):
        found = {file.path: file for file in api.get_paths_info(repo, list(digests), revision=where)}
    wrong = [path for path, digest in digests.items() if not _is_same(found.get(path), digest)]
    if wrong:
        raise OSError(
            f"{commit.commit_url} holds other content than was sent, or none, for {', '.join(wrong)}: do not use it. "
            "If the repository's .gitignore does not name them, push again."
        )
    return commit


def _is_of_the_weights(path: str) -> bool:
    return any(fnmatch(path, pattern) for pattern in OF_THE_WEIGHTS)


def _is_same(found: Any, digest: Digest) -> bool:
    if found is None:
        return False
    lfs = getattr(found, "lfs", None)
    return getattr(found, "blob_id", None) == digest.git if lfs is None else lfs.sha256 == digest.sha256


@contextmanager
def clear_errors(failed: str) -> Iterator[None]:
    """Errors of the connection as OSError with what failed; answers of the Hub are OSErrors that say so themselves."""
    try:
        yield
    except HfHubHTTPError:
        raise
    except HTTPError as error:
        raise ConnectionError(f"{failed} ({' '.join(str(error).split()) or type(error).__name__}).") from error
