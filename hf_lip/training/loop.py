# SPDX-License-Identifier: Apache-2.0
"""The training loop: steps, schedules, evaluation after epochs, checkpoints, the time limit."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from .arguments import TrainingArguments
from .augment import ImageBatches
from .averaging import EvaluationCopy
from .checkpoints import RunState, save_checkpoint
from .evaluation import describe
from .objective import Objective
from .run_clock import RunClock
from .schedules import LEARNING_RATE_SCHEDULES


if TYPE_CHECKING:
    from accelerate import Accelerator

DIVERGED = (
    "Training has diverged: NaN or infinite loss or weights at step {}. Lower --learning_rate, set --max_grad_norm or "
    "use --mixed_precision no. The checkpoints written so far are finite."
)

__all__ = ["make_optimizer", "train_model"]


def make_optimizer(model: torch.nn.Module, args: TrainingArguments) -> torch.optim.Optimizer:
    shared: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    if args.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=args.momentum, **shared)
    return torch.optim.Adam(model.parameters(), betas=(args.adam_betas[0], args.adam_betas[1]), **shared)


def train_model(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batches: ImageBatches,
    measure_accuracy: Callable[[Any], dict[str, Any]],
    evaluated: EvaluationCopy,
    state: RunState,
    identity: dict[str, Any],
    args: TrainingArguments,
    accelerator: "Accelerator",
) -> None:
    """Train from `state.step` to the end or to the time limit, keeping `state` up to date.

    Args:
        measure_accuracy: evaluates a model in evaluation mode; called after epochs with the evaluated copy.
        identity: the arguments that fix the weights of the run, for the checkpoints.

    Raises:
        RuntimeError: the loss or the weights are not finite.
    """
    steps_per_epoch = batches.steps_per_epoch
    total_steps = args.num_train_epochs * steps_per_epoch
    interval = args.checkpoint_interval(steps_per_epoch)
    model, plain_model = objective.model, objective.plain_model
    clock = RunClock(accelerator, state.seconds, state.cpu_seconds)
    loss_sum = torch.tensor(state.loss_sum, dtype=torch.float64, device=accelerator.device)

    def measure() -> float:
        """Bring `state` up to date; the mean loss of the epoch so far."""
        state.loss_sum = accelerator.reduce(loss_sum, reduction="mean").item()
        state.seconds, state.cpu_seconds = clock.seconds(), clock.cpu_seconds()
        if not (math.isfinite(state.loss_sum) and all(p.isfinite().all() for p in plain_model.parameters())):
            raise RuntimeError(DIVERGED.format(state.step))
        return state.loss_sum / ((state.step - 1) % steps_per_epoch + 1)

    def save() -> None:
        options: dict[str, Any] = {"keep": args.checkpoints_total_limit, "penalty": objective.penalty}
        save_checkpoint(Path(args.output_dir), state, identity, accelerator, evaluated, **options)

    model.train()
    bar = tqdm(total=total_steps, initial=state.step, desc="training", disable=not accelerator.is_main_process)
    while state.step < total_steps:
        # one clock decides for all processes
        limit = args.max_train_seconds
        if limit is not None and broadcast_object_list([clock.seconds() > limit])[0]:
            measure()
            save()
            accelerator.print(f"Stopped after {state.seconds:.0f} s at step {state.step} of {total_steps}.")
            break
        epoch, position = divmod(state.step, steps_per_epoch)
        images, labels = batches.batch(
            epoch, position, process_index=accelerator.process_index, num_processes=accelerator.num_processes
        )
        # the middle of the step's share of training: no step is lost to a rate of 0 at either end
        progress = (state.step + 0.5) / total_steps
        learning_rate = args.learning_rate * LEARNING_RATE_SCHEDULES[args.lr_schedule](progress)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        try:
            loss = objective(images, labels, step=state.step, progress=progress)
        except torch.linalg.LinAlgError as error:
            raise RuntimeError(DIVERGED.format(state.step)) from error
        accelerator.backward(loss)
        state.step += 1
        loss_sum += loss.detach()
        logs = state.step % args.logging_steps == 0
        if logs or args.max_grad_norm is not None:
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        evaluated.update(plain_model, state.step - 1)
        bar.update()

        if logs:
            mean_loss = measure()
            bar.set_postfix(loss=f"{mean_loss:.4f}", lr=f"{learning_rate:.2e}")
            log = {"loss": mean_loss, "learning_rate": learning_rate, "grad_norm": float(grad_norm)}
            accelerator.log({f"train/{name}": value for name, value in log.items()}, step=state.step)
        if position == steps_per_epoch - 1:
            entry: dict[str, Any] = {"epoch": epoch + 1, "step": state.step, "loss": measure()}
            line = f"epoch {epoch + 1}/{args.num_train_epochs}  loss {entry['loss']:.4f}"
            if (epoch + 1) % args.eval_epochs == 0 or state.step == total_steps:
                metrics = measure_accuracy(evaluated.refresh(plain_model))
                shown = {name: value for name, value in metrics.items() if name.endswith("accuracy")}
                shown |= shown.pop("certified_accuracy", {})
                accelerator.log({f"eval/{name}": value for name, value in shown.items()}, step=state.step)
                entry |= metrics
                line += f"  {describe(metrics)}"
            state.history.append({**entry, "seconds": round(state.seconds, 3)})
            loss_sum.zero_()
            if accelerator.is_main_process:
                tqdm.write(f"{line}  {state.seconds:.0f} s")
        if interval is not None and (state.step % interval == 0 or state.step == total_steps):
            measure()
            save()
    bar.close()
