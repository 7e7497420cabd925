# SPDX-License-Identifier: Apache-2.0
"""The training loop of sequence models: steps, schedule, evaluation, checkpoints, the time limit."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.tracking_tokenizer import IGNORED
from ..models.chacal.gamma_chacal import ChacalGamma
from .run_clock import RunClock
from .schedules import constant, cosine, linear, stable_decay, with_warmup
from .sequence_arguments import SequenceTrainingArguments
from .sequence_checkpoints import SequenceRunState, save_sequence_checkpoint
from .sequence_objective import next_tokens
from .sequence_pace import Pace
from .sequence_questions import Batch


if TYPE_CHECKING:
    from accelerate import Accelerator

DIVERGED = (
    "Training has diverged: NaN or infinite loss or weights at step {}. Lower --learning_rate, set --max_grad_norm or "
    "use --mixed_precision no. The checkpoints written so far are finite."
)
SCHEDULES = {"cosine": cosine, "linear": linear, "constant": constant, "stable_decay": stable_decay}

__all__ = ["TrainingBatches", "make_optimizers", "train_sequence_model"]


class TrainingBatches(Protocol):
    """What a run trains on; `pace` is told the loss of every step, if it is not None."""

    pace: Pace | None

    def __len__(self) -> int:
        """Steps of the run."""

    def from_step(
        self, step: int, position: dict[str, int] | None, num_workers: int
    ) -> Iterator[tuple[list[Batch], dict[str, int] | None]]:
        """From `step` on, for every step the micro-batches of this process and the position after it.

        Args:
            position: that of the step before, None at the start.
        """


def make_optimizers(model: torch.nn.Module, args: SequenceTrainingArguments) -> list[torch.optim.Optimizer]:
    """AdamW with weight decay on matrices only, and a rate of their own for learnt discounts; with
    `muon_learning_rate` Muon for the matrices of the layers. `peak` of a group is its largest rate.

    Source: Jordan et al. 2024 (Muon), with the step size of Liu et al. 2025, which makes its rates comparable to
    AdamW's.

    Raises:
        ValueError: `gamma_learning_rate` is given and no discount is learnt.
    """
    learnt = [module.weight for module in model.modules() if isinstance(module, ChacalGamma)]
    gammas = [parameter for parameter in learnt if parameter is not None and parameter.requires_grad]
    if args.gamma_learning_rate is not None and not gammas:
        raise ValueError(
            "--gamma_learning_rate is of learnt discounts, which this model has not: see --gamma_learnable."
        )
    known = {id(parameter) for parameter in gammas}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in known]
    matrices, others = ([entry for entry in trained if (entry.dim() >= 2) is large] for large in (True, False))
    orthogonal: list[torch.nn.Parameter] = []
    if args.muon_learning_rate is not None:
        # rows of words are looked up, not multiplied: Muon is not for them, nor for the head that may be tied to them
        tables = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
        heads = [getattr(model, "get_output_embeddings", lambda: None)()]
        words = {id(entry) for entry in (*tables, *(head.weight for head in heads if head is not None))}
        orthogonal = [entry for entry in matrices if entry.dim() == 2 and id(entry) not in words]
        chosen = {id(entry) for entry in orthogonal}
        matrices = [entry for entry in matrices if id(entry) not in chosen]
    peak = args.learning_rate
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": args.weight_decay, "peak": peak},
        {"params": others, "weight_decay": 0.0, "peak": peak},
        {"params": gammas, "weight_decay": 0.0, "peak": args.gamma_learning_rate or peak},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (args.adam_betas[0], args.adam_betas[1])
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=peak, betas=betas, fused=True)]
    if orthogonal:
        group = {"params": orthogonal, "weight_decay": args.weight_decay, "peak": args.muon_learning_rate}
        optimizers.append(torch.optim.Muon([group], lr=peak, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def train_sequence_model(
    objective: torch.nn.Module,
    model: PreTrainedModel,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: TrainingBatches,
    measure_accuracy: Callable[[], tuple[dict[str, Any], str]],
    state: SequenceRunState,
    identity: dict[str, Any],
    args: SequenceTrainingArguments,
    accelerator: "Accelerator",
    before_step: Callable[[int], None] = lambda step: None,
) -> dict[str, Any] | None:
    """Train from `state.step` to the end or to the time limit, keeping `state` up to date.

    Args:
        objective: the prepared `SequenceObjective` of `model`.
        measure_accuracy: evaluates the model; returns metrics and a line about them.
        identity: the arguments that fix the weights of the run, for the checkpoints.
        before_step: called with the number of the step, from 0, such as to set the discount of the chains.

    Returns:
        The metrics of the final weights, or None if the last step was not evaluated.

    Raises:
        RuntimeError: the loss or the weights are not finite.
    """
    num_steps, output_dir = len(batches), Path(args.output_dir)
    warmup_share = min(args.warmup_steps / num_steps, 1.0)
    clock = RunClock(accelerator, state.seconds, state.cpu_seconds)
    device, processes = accelerator.device, accelerator.num_processes
    # of this process; the sum over the processes is the state's
    loss_sum = torch.tensor(state.loss_sum / processes, dtype=torch.float64, device=device)

    def finite() -> bool:
        return all(bool(parameter.isfinite().all()) for parameter in model.parameters())

    def measure() -> float:
        """Bring `state` up to date; the mean loss since the last history entry."""
        state.loss_sum = accelerator.reduce(loss_sum, reduction="sum").item()
        state.seconds, state.cpu_seconds = clock.seconds(), clock.cpu_seconds()
        if not (math.isfinite(state.loss_sum) and finite()):
            raise RuntimeError(DIVERGED.format(state.step))
        return state.loss_sum / max(state.loss_steps, 1)

    def save() -> None:
        keep = args.checkpoints_total_limit
        save_sequence_checkpoint(output_dir, state, identity, accelerator, model, optimizers, keep=keep)

    objective.train()
    bar = tqdm(total=num_steps, initial=state.step, desc="training", disable=not accelerator.is_main_process)
    steps = batches.from_step(state.step, state.position, args.num_workers)
    metrics: dict[str, Any] | None = None
    while state.step < num_steps:
        # one clock decides for all processes
        limit = args.max_train_seconds
        if limit is not None and broadcast_object_list([clock.seconds() > limit])[0]:
            measure()
            save()
            accelerator.print(f"Stopped after {state.seconds:.0f} s at step {state.step} of {num_steps}.")
            break
        drawn, state.position = next(steps)
        parts = [{name: tensor.to(device) for name, tensor in part.items()} for part in drawn]
        # a mean over all tokens of the step, whichever micro-batch or process they are in
        counts = torch.stack([(next_tokens(part) != IGNORED).sum() for part in parts])
        num_labels: Tensor = accelerator.reduce(counts.sum(), reduction="sum").clamp(min=1)
        # the middle of the step: no step is lost to a rate of 0 at either end
        progress = (state.step + 0.5) / num_steps
        factor = with_warmup(SCHEDULES[args.lr_schedule], progress, share=warmup_share)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * factor
        before_step(state.step)
        # what dropout draws depends on the seed, the step and the process alone
        torch.manual_seed((args.seed * 1_000_003 + state.step) * 1009 + accelerator.process_index)
        step_loss = torch.zeros_like(loss_sum)
        try:
            for place, part in enumerate(parts):
                last = place == len(parts) - 1
                with accelerator.no_sync(objective) if not last else nullcontext():
                    loss = objective(part, num_labels)
                    # gradients are averaged over the processes: their sum is wanted
                    accelerator.backward(loss * processes)
                step_loss += loss.detach()
        except (ValueError, torch.linalg.LinAlgError) as error:
            if finite():
                raise
            raise RuntimeError(DIVERGED.format(state.step)) from error
        loss_sum += step_loss
        state.step += 1
        state.loss_steps += 1
        state.tokens += int(num_labels)
        if batches.pace is not None:
            batches.pace.after_step(state.step, num_steps, accelerator.reduce(step_loss, reduction="sum").item())
            state.pace = batches.pace.state()
        logs = state.step % args.logging_steps == 0
        if logs or args.max_grad_norm > 0:
            grad_norm = accelerator.clip_grad_norm_(objective.parameters(), args.max_grad_norm or math.inf)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        bar.update()

        if logs:
            mean_loss = measure()
            bar.set_postfix(loss=f"{mean_loss:.4f}", lr=f"{args.learning_rate * factor:.2e}")
            log = {"loss": mean_loss, "learning_rate": args.learning_rate * factor, "grad_norm": float(grad_norm)}
            accelerator.log({f"train/{name}": value for name, value in log.items()}, step=state.step)
        at_end = state.step == num_steps
        if at_end or (args.eval_steps is not None and state.step % args.eval_steps == 0):
            entry: dict[str, Any] = {"step": state.step, "loss": measure()}
            metrics, line = measure_accuracy()
            accelerator.log({f"eval/{name}": value for name, value in _numbers(metrics)}, step=state.step)
            measure()
            state.history.append({**entry, **metrics, "seconds": round(state.seconds, 3)})
            loss_sum.zero_()
            state.loss_sum, state.loss_steps = 0.0, 0
            if accelerator.is_main_process:
                shown = f"step {state.step}/{num_steps}  loss {entry['loss']:.4f}  {line}  {state.seconds:.0f} s"
                tqdm.write(shown)
        if args.checkpointing_steps is not None and (state.step % args.checkpointing_steps == 0 or at_end):
            measure()
            save()
    bar.close()
    return metrics if state.step == num_steps else None


def _numbers(metrics: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """The metrics that are one number, by path; accuracies by depth are left to results.json."""
    found: list[tuple[str, float]] = []
    for name, value in metrics.items():
        if isinstance(value, dict) and not name.startswith("by_"):
            found += _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            found.append((f"{prefix}{name}", value))
    return found
