# SPDX-License-Identifier: Apache-2.0
"""Uploading a finished folder to a Hub repository of its own."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError


# what a new repository holds
_INITIAL = {".gitattributes", "README.md"}


def require_pushable(repo_id: str, token: str | None = None) -> None:
    """Raise before the work rather than after: no token, or a repository that holds another checkpoint.

    Raises:
        ValueError: there is no token, or the repository has files, which an upload would mix with the new ones.
        OSError: from `huggingface_hub`: the token is refused, no network.
    """
    api = HfApi(token=token)
    if token is None and get_token() is None:
        raise ValueError("`push_to` needs a token: run `hf auth login` or set HF_TOKEN.")
    api.whoami()
    try:
        files = api.model_info(repo_id).siblings or []
    except RepositoryNotFoundError:
        return
    present = sorted(file.rfilename for file in files if file.rfilename not in _INITIAL)
    if present:
        raise ValueError(
            f"`push_to` {repo_id} holds {', '.join(present[:5])} already, and nothing is overwritten: name a new "
            "repository."
        )


def push_folder(folder: str | Path, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload a rescaled checkpoint in one commit and return its URL.

    Raises:
        OSError: from `huggingface_hub`; the folder stays.
    """
    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    commit = api.upload_folder(
        repo_id=repo, folder_path=folder, commit_message="Upload a rescaled checkpoint with certified norms"
    )
    return commit.commit_url
