# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of an Accelerate run, for exact resume.

A checkpoint folder is written under a temporary name and renamed when whole, so that `kill -9` at any moment leaves
the earlier ones usable. Weights, averages and the penalty's state are safetensors; optimiser and random states are
torch pickles written by Accelerate, so only those in the run's own folder are loaded (`find_checkpoint`), with
`weights_only=True`.
"""

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from ..spectral.regularizer import LipschitzRegularizer
from .averaging import EvaluationCopy
from .run_folder import checkpoint_state, finish_checkpoint, unfinished_folder


if TYPE_CHECKING:
    from accelerate import Accelerator

AVERAGES_NAME = "averages.safetensors"
PENALTY_NAME = "penalty.safetensors"

__all__ = ["RunState", "load_checkpoint", "save_checkpoint"]


@dataclass
class RunState:
    """What a checkpoint knows beside weights, optimiser and random states."""

    step: int = 0
    # mean over the processes of the sum of the losses of the current epoch so far
    loss_sum: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


def save_checkpoint(
    output_dir: Path,
    state: RunState,
    identity: dict[str, Any],
    accelerator: "Accelerator",
    evaluated: EvaluationCopy,
    *,
    keep: int,
    penalty: LipschitzRegularizer | None = None,
) -> None:
    """Write `checkpoint-<step>` and delete all but the newest `keep`. To be called by every process.

    Args:
        identity: the arguments that fix the weights of the run; `load_checkpoint` asks for the same.
    """
    folder = unfinished_folder(output_dir, state.step)
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(folder))
    if accelerator.is_main_process and evaluated.decay is not None:
        save_file(evaluated.state_dict(), folder / AVERAGES_NAME)
    if accelerator.is_main_process and penalty is not None:
        save_file(penalty.state_dict(), folder / PENALTY_NAME)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish_checkpoint(output_dir, state.step, asdict(state), identity, accelerator.num_processes, keep)
    accelerator.wait_for_everyone()


def load_checkpoint(
    folder: Path,
    identity: dict[str, Any],
    accelerator: "Accelerator",
    evaluated: EvaluationCopy,
    penalty: LipschitzRegularizer | None = None,
) -> RunState:
    """Put back into the prepared model, optimiser and averages what `save_checkpoint` wrote.

    Args:
        folder: from `find_checkpoint`.

    Raises:
        ValueError: other arguments or another number of processes than those of the run.
    """
    state = checkpoint_state(folder, identity, accelerator.num_processes)
    accelerator.load_state(str(folder))
    if evaluated.decay is not None:
        evaluated.load_state_dict(load_file(folder / AVERAGES_NAME))
    if penalty is not None:
        penalty.load_state_dict(load_file(folder / PENALTY_NAME))
    return RunState(**state)
