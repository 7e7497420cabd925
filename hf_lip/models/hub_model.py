# SPDX-License-Identifier: Apache-2.0
"""`push_to_hub` of this package's models: with the certificate where there is one, and the shim, in one commit."""

import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers.utils import logging
from transformers.utils.hub import create_and_tag_model_card

from .hub_upload import clear_errors, open_hub, open_repository, publish, require_destination
from .shim import InstalledCode, shim_files


logger = logging.get_logger(__name__)

_HUB_ARGUMENTS = ("repo_id", "commit_message", "private", "token", "revision", "create_pr")


def hub_arguments_of(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take the arguments of `save_pretrained` that are for the push out of the others."""
    return {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if name in kwargs}


def push_model(
    model: Any,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = "50GB",
    tags: list[str] | str | None = None,
) -> CommitInfo:
    """Save and upload the model in one commit: weights, config, certificate, a card if the repository has none,
    and the file with which it loads without `import hf_lip` and with `trust_remote_code=True`.

    Arguments as in transformers. For a folder with its own card, image processor and plots there is
    `hf_lip.hub.push_folder`.

    Raises:
        ValueError: `repo_id` or `revision` are not names, there is no token, or `private` differs from what the
            repository is.
        OSError: refused by the Hub or broken off; nothing is half published.
    """
    require_destination(repo_id, revision, create_pr)
    api = open_hub(token)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        repo = open_repository(api, repo_id, revision=revision, private=private)
        wanted = [*(model.model_tags or []), *([tags] if isinstance(tags, str) else tags or [])]
        with clear_errors(f"The card of {repo} could not be read, nothing was sent"):
            card: Any = create_and_tag_model_card(repo, wanted or None, token=token)  # type: ignore[arg-type]
        if card.data.eval_results:
            logger.warning(
                f"The card of {repo} is kept, and its results are those of the weights before this push: measure "
                "again, write the card (`hf-lip card`) and push the folder (`hf-lip push`)."
            )
        card.save(folder / "README.md")
        files: dict[str, Path | bytes] = {path.name: path for path in folder.iterdir()}
        return publish(
            api,
            repo,
            {**files, **shim_files(folder)},
            revision=revision,
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            create_pr=create_pr,
        )


class PushableModel(InstalledCode):
    """In front of `PreTrainedModel`: `push_to_hub`, and `save_pretrained(push_to_hub=True)`, which calls it."""

    # Any: transformers types its own as a wrapped function, which no method matches
    push_to_hub: Any = push_model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """As in transformers."""
        hub_arguments = hub_arguments_of(kwargs)
        super().save_pretrained(save_directory, is_main_process, state_dict, False, *args, **kwargs)  # type: ignore[misc]
        if push_to_hub and is_main_process:
            self.push_to_hub(hub_arguments.pop("repo_id", Path(save_directory).resolve().name), **hub_arguments)
