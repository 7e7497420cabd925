# SPDX-License-Identifier: Apache-2.0
"""What the scripts for sequence models do around the training loop: start, resume, results, upload."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration, gather_object
from huggingface_hub import get_token
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints.stored_weights import stored_weights_sha256
from ..models.certificate import weights_sha256
from .run_folder import find_checkpoint, list_checkpoints, remove_checkpoint, write_json
from .run_record import command_line, hardware, public_value, versions
from .sequence_arguments import SequenceTrainingArguments, run_identity
from .sequence_checkpoints import SequenceRunState, load_sequence_checkpoint
from .sequence_loop import TrainingBatches, make_optimizers, train_sequence_model
from .sequence_objective import SequenceObjective


__all__ = ["SequenceRun", "check_run", "start_accelerator"]


def check_run(args: SequenceTrainingArguments) -> None:
    """Check what can be checked without work.

    Raises:
        ValueError, OSError: a folder in use, no checkpoint, a tracker or a token that is missing.
    """
    args.check_output_dir()
    if args.resume_from_checkpoint:
        find_checkpoint(Path(args.output_dir), args.resume_from_checkpoint)
    if args.report_to != "none" and args.report_to not in map(str, get_available_trackers()):
        raise ValueError(f"--report_to {args.report_to} needs a package: pip install {args.report_to}.")
    if args.push_to_hub and not (args.hub_token or get_token()):
        raise ValueError("--push_to_hub needs a token: run `hf auth login`, set HF_TOKEN or give --hub_token.")


def start_accelerator(args: SequenceTrainingArguments) -> Accelerator:
    """The accelerator of the run.

    Raises:
        RuntimeError: processes that would each train alone, or a device without float64.
        ValueError: a batch that cannot be divided among them.
    """
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=f"{args.output_dir}/logs"),
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and accelerator.num_processes == 1:
        raise RuntimeError(
            f"{launched} processes were launched but each would train alone: on CPU pass --cpu to this script under "
            "torchrun; on GPUs use `accelerate launch` or torchrun with as many GPUs."
        )
    if accelerator.device.type == "mps":
        raise RuntimeError("Losses are summed in float64, which this device (mps) does not have: pass --cpu.")
    parts = accelerator.num_processes * args.gradient_accumulation_steps
    if args.train_batch_size % parts:
        raise ValueError(
            f"--train_batch_size must be a multiple of {parts}, the processes times --gradient_accumulation_steps."
        )
    return accelerator


@dataclass
class SequenceRun:
    """One training run.

    Attributes:
        arguments: all dataclasses of arguments, `args` among them.
        argv: the words of the command line; None for those of the process.
    """

    args: SequenceTrainingArguments
    arguments: tuple[Any, ...]
    accelerator: Accelerator
    argv: list[str] | None = None
    state: SequenceRunState = field(default_factory=SequenceRunState)

    def train(
        self,
        model: PreTrainedModel,
        batches: TrainingBatches,
        measure_accuracy: Callable[[], tuple[dict[str, Any], str]],
        before_step: Callable[[int], None],
    ) -> dict[str, Any]:
        """Train from the beginning or a checkpoint, then evaluate.

        Args:
            model: not wrapped, on the accelerator's device.
            measure_accuracy: evaluates the model, in evaluation mode -> metrics, and a line about them.
            before_step: see `train_sequence_model`.

        Returns:
            The metrics of the final weights.

        Raises:
            RuntimeError: training that diverged, or processes that ended with different weights.
        """
        args, accelerator, output_dir = self.args, self.accelerator, Path(self.args.output_dir)
        objective, *optimizers = accelerator.prepare(SequenceObjective(model), *make_optimizers(model, args))
        identity = run_identity(*self.arguments)
        if args.resume_from_checkpoint:
            folder = find_checkpoint(output_dir, args.resume_from_checkpoint)
            self.state = load_sequence_checkpoint(folder, identity, accelerator, model, optimizers)
            if batches.pace is not None and self.state.pace is not None:
                batches.pace.restore(self.state.pace)
            accelerator.print(f"Resumed after step {self.state.step}.")
            if self.state.step:
                before_step(self.state.step - 1)
        elif accelerator.is_main_process:
            output_dir.mkdir(parents=True, exist_ok=True)
            for checkpoint in list_checkpoints(output_dir):
                remove_checkpoint(checkpoint)
        everything = self.everything()
        accelerator.init_trackers("hf_lip", config={name: str(value) for name, value in everything.items()})
        accelerator.print(f"{num_parameters(model)} parameters, {len(batches)} steps of {args.train_batch_size}")

        def measure() -> tuple[dict[str, Any], str]:
            model.eval()
            found = measure_accuracy()
            model.train()
            return found

        metrics = train_sequence_model(
            objective, model, optimizers, batches, measure, self.state, identity, args, accelerator, before_step
        )
        if metrics is None:
            metrics, line = measure()
            accelerator.print(line)
        if len(set(gather_object([weights_sha256(model.state_dict())]))) > 1:
            raise RuntimeError("The processes ended with different weights: they did not train together.")
        return metrics

    def everything(self) -> dict[str, Any]:
        """All arguments but the token."""
        return {name: value for part in self.arguments for name, value in vars(part).items() if name != "hub_token"}

    def write(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        metrics: dict[str, Any],
        facts: dict[str, Any],
        num_steps: int,
    ) -> None:
        """Write the model, its tokenizer and results.json. To be called by the main process."""
        output_dir, state = Path(self.args.output_dir), self.state
        model.eval().save_pretrained(output_dir)
        tokenizer.save_pretrained(output_dir)
        gamma: Any = model.get_gamma() if hasattr(model, "get_gamma") else None  # type: ignore[operator]
        results = {
            **metrics,
            **facts,
            "weights_sha256": stored_weights_sha256(output_dir),
            "model_type": model.config.model_type,
            "num_parameters": num_parameters(model),
            "gamma": gamma,
            "steps": state.step,
            "stopped_early": state.step < num_steps,
            # the steps after which a curriculum went on to each larger size
            "curriculum_steps": None if state.pace is None else state.pace["entered"],
            "train_samples_seen": state.step * self.args.train_batch_size,
            "train_tokens_seen": state.tokens,
            "seconds": round(state.seconds, 3),
            "cpu_seconds": round(state.cpu_seconds, 3),
            "num_processes": self.accelerator.num_processes,
            "device": str(self.accelerator.device),
            "hardware": hardware(self.accelerator.device, model.dtype, self.args.mixed_precision),
            "command": command_line(self.argv, secret=self.args.hub_token),
            "arguments": public_value(self.everything()),
            "versions": versions(),
            "history": state.history,
        }
        write_json(output_dir / "results.json", results)

    def end(self) -> None:
        """To be called by every process, last."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.num_processes > 1:
            # gloo's thread needs the GIL to drop the last tensors; freeing the group would wait for it, GIL held
            time.sleep(2.0)
        self.accelerator.end_training()


def num_parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
