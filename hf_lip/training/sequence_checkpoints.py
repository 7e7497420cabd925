# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of sequence models for exact resume, without a pickle: safetensors and JSON.

A folder is written under a temporary name and renamed when whole, so that `kill -9` at any moment leaves the earlier
ones usable. Random states are not kept: what a step draws depends on the seed and the step alone.
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .run_folder import checkpoint_state, finish_checkpoint, unfinished_folder


if TYPE_CHECKING:
    from accelerate import Accelerator

WEIGHTS_NAME = "model.safetensors"
OPTIMIZER_NAME = "optimizer.safetensors"

__all__ = ["SequenceRunState", "load_sequence_checkpoint", "save_sequence_checkpoint"]


@dataclass
class SequenceRunState:
    """What a checkpoint knows beside weights and optimisers."""

    step: int = 0
    # sum over the steps since the last history entry of the mean loss of a step's tokens
    loss_sum: float = 0.0
    loss_steps: int = 0
    # supervised tokens so far
    tokens: int = 0
    # of a stream, after the last step
    position: dict[str, int] | None = None
    # of a curriculum that depends on what was learnt
    pace: dict[str, Any] | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


def save_sequence_checkpoint(
    output_dir: Path,
    state: SequenceRunState,
    identity: dict[str, Any],
    accelerator: "Accelerator",
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    keep: int,
) -> None:
    """Write `checkpoint-<step>` and delete all but the newest `keep`. To be called by every process.

    Args:
        identity: the arguments that fix the weights of the run; `load_sequence_checkpoint` asks for the same.
        model: the model itself, not wrapped.
    """
    if accelerator.is_main_process:
        folder = unfinished_folder(output_dir, state.step)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        save_file(_weights(model), folder / WEIGHTS_NAME, metadata={"format": "pt"})
        save_file(_optimizer_tensors(model, optimizers), folder / OPTIMIZER_NAME)
        finish_checkpoint(output_dir, state.step, asdict(state), identity, accelerator.num_processes, keep)
    accelerator.wait_for_everyone()


def load_sequence_checkpoint(
    folder: Path,
    identity: dict[str, Any],
    accelerator: "Accelerator",
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
) -> SequenceRunState:
    """Put back into the model and its optimisers what `save_sequence_checkpoint` wrote.

    Args:
        folder: from `find_checkpoint`.

    Raises:
        ValueError: other arguments or another number of processes than those of the run, or other tensors.
    """
    state = checkpoint_state(folder, identity, accelerator.num_processes)
    weights, own = load_file(folder / WEIGHTS_NAME), _weights(model)
    if set(weights) != set(own):
        raise ValueError(f"{folder.name} has other weights: {sorted(set(weights) ^ set(own))[:5]} differ.")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])
    names = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = ((optimizer, group) for optimizer in optimizers for group in optimizer.param_groups)
    owner = {id(parameter): optimizer for optimizer, group in groups for parameter in group["params"]}
    for key, tensor in load_file(folder / OPTIMIZER_NAME).items():
        name, _, part = key.rpartition(".")
        parameter = names[name]
        owner[id(parameter)].state[parameter][part] = tensor.to(parameter.device)
    return SequenceRunState(**state)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the state, tied ones once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        found[name] = tensor.detach().contiguous()
    return found


def _optimizer_tensors(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        for optimizer in optimizers:
            for part, value in optimizer.state.get(parameter, {}).items():
                found[f"{name}.{part}"] = value.detach().contiguous()
    return found
