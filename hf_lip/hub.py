# SPDX-License-Identifier: Apache-2.0
"""Publishing a checkpoint folder on the Hub: checked first, sent in one commit, compared afterwards.

    report = push_folder("runs/digits", "owner/digits")
    report.url

What is sent is what the folder holds for others to use: weights, config, image processor or tokenizer, certificate,
card, results and plots, and in addition the shim (hf-plugin 10.3), with which the checkpoint loads without
`import hf_lip`. Hidden files, training checkpoints, optimiser states and logs stay at home. The folder is not changed.

`transformers.Trainer` uploads its output folder by itself (`push_to_hub=True`, `trainer.push_to_hub()`): with the
certificate, without the shim, and with its arguments as a pickle. Give `push_folder` (or `hf-lip push`) that folder
after the training instead, or call `trainer.model.push_to_hub(...)`, which has the shim.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitInfo
from huggingface_hub.errors import RepositoryNotFoundError
from transformers.utils import logging

from .checkpoints.source import CONFIG_FILE, INDEX_SUFFIX, WEIGHTS_FILE, Checkpoint
from .checkpoints.stored_weights import stored_weights_sha256
from .models.certificate import CERTIFICATE_NAME, LipschitzCertificate
from .models.certified_model import PICKLE_SUFFIXES, finish_interrupted_save
from .models.hub_upload import Files, clear_errors, open_hub, open_repository, publish, require_destination
from .models.lipschitz_vision.configuration_lipschitz_vision import LipschitzVisionConfig
from .models.shim import shim_files


logger = logging.get_logger(__name__)

CARD_NAME = "README.md"
# the class whose `save_pretrained` always writes a certificate
CERTIFIED_CLASS = "LipschitzVisionForImageClassification"
# what a new repository holds
_INITIAL = (".gitattributes", CARD_NAME)
# of the training script, of transformers.Trainer and of trackers
PRIVATE_FOLDERS = ("checkpoint-*", "logs", "runs", "wandb", "trackio", "__pycache__")
PRIVATE_FILES = (
    *("*.log", "*.tmp", "events.out.tfevents*", "training_state.json", "trainer_state.json", "training_args.bin"),
    *("optimizer.pt", "optimizer.bin", "scheduler.pt", "scheduler.bin", "scaler.pt", "rng_state*.pth"),
    *("random_states_*.pkl", "custom_checkpoint_*.pkl"),
)

__all__ = ["PushReport", "push_folder", "require_pushable"]


@dataclass(frozen=True)
class PushReport:
    """What `push_folder` did.

    Attributes:
        repo: the repository with its owner.
        commit: as the Hub's client returns it; its `oid` is the revision that was compared with the folder.
        files: paths in the repository that are now as they were sent.
        left_out: files and folders that were not sent.
    """

    repo: str
    commit: CommitInfo
    files: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def url(self) -> str:
        """Of the pull request if there is one, else of the commit."""
        return self.commit.pr_url or self.commit.commit_url


def require_pushable(repo_id: str, token: str | bool | None = None, *, new: bool = False) -> None:
    """Raise before the work rather than after it if a push cannot succeed: no such name, no token, one refused.

    Args:
        new: refuse a repository that holds more than a card, so that none of its files are mixed with the new ones.

    Raises:
        ValueError: `repo_id` is not the name of a repository, there is no token, or a repository that is not `new`.
        OSError: the Hub refuses the token, or cannot be reached.
    """
    require_destination(repo_id)
    api = open_hub(token)
    if not new:
        return
    try:
        with clear_errors(f"{repo_id} could not be read"):
            name = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
            files = api.model_info(name).siblings or []
    except RepositoryNotFoundError:
        return
    present = sorted(file.rfilename for file in files if file.rfilename not in _INITIAL)
    if present:
        raise ValueError(
            f"`repo_id` {repo_id} holds {', '.join(present[:5])} already, and nothing is overwritten: name a new "
            "repository."
        )


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    revision: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> PushReport:
    """Publish a checkpoint folder in one commit.

    Nothing is sent before everything that can be known here is checked. Weights, certificate and results of an earlier
    push that are not in the folder are deleted in the same commit; other files of the repository stay.

    Args:
        folder: with config.json and safetensors weights; a certificate in it has to be that of the weights.
        repo_id: "name" or "owner/name"; made if there is none.
        token: default: that of `hf auth login` or HF_TOKEN.
        revision: branch to push to, made from main if there is none. Default: main.
        private: of a repository that is made; for one that exists it must agree.
        commit_message: default: what was uploaded.
        create_pr: open a pull request against main instead of pushing to it.

    Raises:
        FileNotFoundError: no such folder, or a shard is missing.
        ValueError: no name of a repository or branch; no weights, pickles, damaged files, a certificate of other
            weights; no token; another visibility than `private`.
        OSError: refused by the Hub, broken off, or other bytes there than were sent; the text says what is published.
    """
    require_destination(repo_id, revision, create_pr)
    folder = Path(folder).expanduser()
    paths, left_out = _files_to_push(folder)
    certified = _check(folder, paths)
    if CARD_NAME not in paths:
        logger.warning(f"{folder} has no {CARD_NAME}: the repository gets no new card. `hf-lip card` writes one.")
    files: Files = {**paths, **shim_files(folder)}
    api = open_hub(token)
    repo = open_repository(api, repo_id, revision=revision, private=private)
    what = "a certified image classifier" if certified else "a model"
    commit = publish(
        api,
        repo,
        files,
        revision=revision,
        commit_message=commit_message or f"Upload {what}",
        create_pr=create_pr,
    )
    return PushReport(repo, commit, tuple(sorted(files)), tuple(left_out))


def _files_to_push(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The files by their paths in the repository, and what stays at home."""
    if not folder.is_dir():
        raise FileNotFoundError(f"`folder` {str(folder)!r} is not a folder: give the one `save_pretrained` wrote.")
    finish_interrupted_save(folder)
    paths: dict[str, Path] = {}
    left_out = []

    def visit(part: Path) -> None:
        for path in sorted(part.iterdir()):
            name = PurePosixPath(*path.relative_to(folder).parts).as_posix()
            patterns = PRIVATE_FOLDERS if path.is_dir() else PRIVATE_FILES
            if path.name.startswith(".") or any(fnmatch(path.name, pattern) for pattern in patterns):
                left_out.append(name)
            elif path.is_dir() and path.is_symlink():
                # it may lead out of the folder, or back into it
                left_out.append(name)
            elif path.is_dir():
                visit(path)
            else:
                paths[name] = path

    visit(folder)
    return paths, left_out


def _check(folder: Path, paths: Mapping[str, Path]) -> bool:
    """Whether the folder has a certificate, after everything in it has been checked."""
    pickles = [name for name in paths if PurePosixPath(name).suffix in PICKLE_SUFFIXES]
    if pickles:
        raise ValueError(
            f"{folder} holds {', '.join(pickles)}: pickles can run code when they are loaded and are not published. "
            "Move them elsewhere; weights are saved as safetensors by `save_pretrained`."
        )
    if CONFIG_FILE not in paths:
        raise ValueError(f"{folder} has no {CONFIG_FILE}: give the folder that `save_pretrained` wrote.")
    if not {WEIGHTS_FILE, f"{Path(WEIGHTS_FILE).stem}{INDEX_SUFFIX}"} & set(paths):
        raise ValueError(
            f"{folder} has no weights: neither {WEIGHTS_FILE} nor the index of its shards. Give the folder that "
            "`save_pretrained` wrote."
        )
    stored = Checkpoint.open(folder).config or {}
    if CERTIFICATE_NAME not in paths:
        if CERTIFIED_CLASS in (stored.get("architectures") or ()):
            raise ValueError(
                f"{folder} has no {CERTIFICATE_NAME}: load the model and `save_pretrained` to certify it again."
            )
        return False
    certificate = LipschitzCertificate.load(folder)
    if not certificate.model_type == stored.get("model_type") == LipschitzVisionConfig.model_type:
        raise ValueError(
            f"{CERTIFICATE_NAME} in {folder} is of a {certificate.model_type}, its {CONFIG_FILE} of a "
            f"{stored.get('model_type')}: save the model again."
        )
    architecture = LipschitzVisionConfig.from_pretrained(folder).architecture()
    certificate.require_match(stored_weights_sha256(folder), architecture, str(folder))
    return True
