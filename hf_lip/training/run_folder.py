# SPDX-License-Identifier: Apache-2.0
"""Files of a training run that survive `kill -9` at any moment: whole, or not there."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any


STATE_NAME = "training_state.json"

__all__ = [
    "STATE_NAME",
    "checkpoint_folder",
    "checkpoint_state",
    "find_checkpoint",
    "finish_checkpoint",
    "list_checkpoints",
    "prune_checkpoints",
    "publish_checkpoint",
    "remove_checkpoint",
    "unfinished_folder",
    "write_json",
]


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimiser steps lies once it is whole."""
    return output_dir / f"checkpoint-{step}"


def unfinished_folder(output_dir: Path, step: int) -> Path:
    """Where that checkpoint is written before it is whole."""
    return output_dir / f".checkpoint-{step}.tmp"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first; unfinished ones and other files are left out."""
    found = []
    for path in output_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and (path / STATE_NAME).is_file():
            found.append((int(match.group(1)), path))
    return [path for _, path in sorted(found)]


def find_checkpoint(output_dir: Path, wanted: str) -> Path:
    """The checkpoint to resume from: `latest`, or a path that must lie in this run's own folder.

    A checkpoint holds pickles (optimiser and random state), which can run code when loaded; those in the run's own
    folder are as trustworthy as the run, others are refused.

    Raises:
        FileNotFoundError: there is none, or it is not whole.
        ValueError: it belongs to another run.
    """
    whole = list_checkpoints(output_dir)
    if wanted == "latest":
        if not whole:
            raise FileNotFoundError(
                f"`resume_from_checkpoint` latest: no whole checkpoint in `output_dir` {str(output_dir)!r}; "
                "start without it."
            )
        return whole[-1]
    path = Path(wanted)
    if path.resolve().parent != output_dir.resolve():
        raise ValueError(
            f"`resume_from_checkpoint` {wanted!r} lies outside `output_dir` {str(output_dir)!r}: optimiser states are "
            "pickles, only the run's own are loaded. Use --model_name_or_path to start from another run's weights."
        )
    if path.resolve() not in [checkpoint.resolve() for checkpoint in whole]:
        raise FileNotFoundError(
            f"`resume_from_checkpoint` {wanted!r} is not a whole checkpoint; this run has "
            f"{[checkpoint.name for checkpoint in whole]}."
        )
    return path


def finish_checkpoint(
    output_dir: Path, step: int, state: dict[str, Any], identity: dict[str, Any], num_processes: int, keep: int
) -> None:
    """Write what a checkpoint knows beside its tensors, publish it, and delete all but the newest `keep`."""
    # last: a folder without this file does not count as a checkpoint
    whole = {"state": state, "arguments": identity, "num_processes": num_processes}
    write_json(unfinished_folder(output_dir, step) / STATE_NAME, whole)
    publish_checkpoint(output_dir, step)
    prune_checkpoints(output_dir, keep)


def checkpoint_state(folder: Path, identity: dict[str, Any], num_processes: int) -> dict[str, Any]:
    """The state that `finish_checkpoint` wrote.

    Raises:
        ValueError: other arguments or another number of processes than those of the run. An option that did not exist
            when the run was begun may be left unset.
    """
    saved = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
    before, wanted = saved["arguments"], json.loads(json.dumps(identity))
    changed = {
        name: before.get(name)
        for name, value in wanted.items()
        if (before[name] != value if name in before else value is not None and value is not False)
    }
    if changed:
        raise ValueError(f"{folder.name} belongs to a run with other arguments; resume it with {changed}.")
    if saved["num_processes"] != num_processes:
        raise ValueError(
            f"{folder.name} was written by {saved['num_processes']} processes and this run has {num_processes}: "
            "resume with as many."
        )
    return saved["state"]


def publish_checkpoint(output_dir: Path, step: int) -> Path:
    """Give the finished folder its name, in one rename."""
    final = checkpoint_folder(output_dir, step)
    if final.exists():
        remove_checkpoint(final)
    unfinished_folder(output_dir, step).rename(final)
    return final


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint so that a kill half-way leaves nothing that looks whole."""
    condemned = path.with_name(f".{path.name}.deleted.tmp")
    shutil.rmtree(condemned, ignore_errors=True)
    path.rename(condemned)
    shutil.rmtree(condemned)


def prune_checkpoints(output_dir: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what interrupted saves and deletions have left."""
    if keep < 1:
        raise ValueError(f"`keep` must be at least 1, got {keep}.")
    for path in list_checkpoints(output_dir)[:-keep]:
        remove_checkpoint(path)
    for path in output_dir.glob(".checkpoint-*.tmp"):
        shutil.rmtree(path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON to a temporary name beside `path`, then rename over it; NaN is an error, not a token."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
