# SPDX-License-Identifier: Apache-2.0
"""Train a certified 1-Lipschitz image classifier (CPL, SLL, AOL or SR) with Accelerate.

scikit-learn's digits, a minute on a laptop:

    python scripts/train_image_classifier.py --dataset digits --output_dir runs/digits --cpu \
        --block_type sll --depths 0 --hidden_sizes 1 --pool_size 1 \
        --dense_size 256 --num_dense_layers 3 --dense_hidden_size 256 --offset 0.5 --num_train_epochs 40

A folder of parquet files or of images, or a data set of the Hub, with a named size, on every GPU of the machine:

    accelerate launch scripts/train_image_classifier.py --dataset uoft-cs/cifar10 --output_dir runs/sll-s \
        --size sll-s --num_train_epochs 200 --train_batch_size 256 --mixed_precision bf16 --ema_decay 0.999

Two processes on CPU (`accelerate launch --cpu --num_processes 2` would start one); interrupted and taken up again:

    torchrun --standalone --nproc-per-node 2 scripts/train_image_classifier.py --cpu --checkpointing_steps epoch ...
    torchrun --standalone --nproc-per-node 2 scripts/train_image_classifier.py --cpu --checkpointing_steps epoch ... \
        --resume_from_checkpoint latest

Published recipes (offset is the dial between clean accuracy and certified accuracy at large radii):

    SLL         --loss xent --offset 2.1213 --learning_rate 0.01 --adam_betas 0.5 0.9
    CPL         --loss hinge --margin 0.7 --learning_rate 0.001 --adam_betas 0.9 0.999
    AOL         --loss xent --offset 1.4142
    Prach 2024  --loss xent --offset 0.3993 --optimizer sgd --lr_schedule one_cycle --weight_decay 1e-4

Written to --output_dir: the model with its certificate, its image processor, results.json, checkpoint-<step> folders.
"""

import math
import os
import platform
import shlex
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration, broadcast_object_list, gather_object, set_seed
from huggingface_hub import HfApi, get_token
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from hf_lip import LipschitzVisionConfig, LipschitzVisionForImageClassification, LipschitzVisionImageProcessor
from hf_lip.data import image_to_tensor, load_image_dataset
from hf_lip.metrics import STANDARD_RADII, average_certified_radius, certified_accuracy
from hf_lip.models.certificate import weights_sha256
from hf_lip.training import (
    LEARNING_RATE_SCHEDULES,
    EvaluationCopy,
    ImageBatches,
    emma_loss,
    linear_ramp,
    margin_cross_entropy,
    multi_margin_loss,
    pairwise_row_distances,
    to_float_pixels,
)
from hf_lip.training.arguments import DataArguments, ModelArguments, TrainingArguments, run_identity
from hf_lip.training.checkpoints import RunState, load_checkpoint, save_checkpoint
from hf_lip.training.run_folder import find_checkpoint, list_checkpoints, remove_checkpoint, write_json
from hf_lip.training.splits import Split, read_split


# what a push leaves at home: optimiser states and logs
PRIVATE = ["checkpoint-*", ".checkpoint-*", "logs/*"]
DIVERGED = (
    "Training has diverged: NaN or infinite loss or weights at step {}. Lower --learning_rate, set --max_grad_norm or "
    "use --mixed_precision no. The checkpoints written so far are finite."
)


def parse_arguments(argv: list[str] | None) -> tuple[DataArguments, ModelArguments, TrainingArguments]:
    """Parse and check whatever can be checked without work; exits with a usage message otherwise."""
    kinds: Any = (DataArguments, ModelArguments, TrainingArguments)
    parser = HfArgumentParser(kinds, description=(__doc__ or "").split("\n")[0])
    try:
        data, model, args = parser.parse_args_into_dataclasses(argv)
        args.check_output_dir()
        if args.resume_from_checkpoint:
            find_checkpoint(Path(args.output_dir), args.resume_from_checkpoint)
        if args.report_to != "none" and args.report_to not in map(str, get_available_trackers()):
            raise ValueError(f"--report_to {args.report_to} needs a package: pip install {args.report_to}.")
        if args.push_to_hub:
            if not (args.hub_token or get_token()):
                raise ValueError("--push_to_hub needs a token: run `hf auth login`, set HF_TOKEN or give --hub_token.")
            HfApi(token=args.hub_token).whoami()
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return data, model, args


def start_accelerator(args: TrainingArguments) -> Accelerator:
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
        raise RuntimeError("Certificates need float64, which this device (mps) does not have: pass --cpu.")
    if args.train_batch_size % accelerator.num_processes:
        raise ValueError(f"--train_batch_size must be a multiple of {accelerator.num_processes}, the processes.")
    return accelerator


def prepare_data_and_model(
    data: DataArguments, model_args: ModelArguments, args: TrainingArguments, accelerator: Accelerator
) -> tuple[Split, Split, Split, LipschitzVisionForImageClassification]:
    """Images to train on, to evaluate after each epoch, to evaluate at the end; the model to train."""
    columns = {"image_column": data.image_column, "label_column": data.label_column, "name": data.dataset_config}
    with accelerator.main_process_first():
        train_data = load_image_dataset(data.dataset, data.train_split, **columns)
        eval_data = load_image_dataset(data.dataset, data.eval_split, **columns)
    fields = model_args.config_fields()
    if model_args.model_name_or_path is not None:
        model = LipschitzVisionForImageClassification.from_pretrained(model_args.model_name_or_path)
        config = model.config
        resize = True
    else:
        model = None
        channels, height, width = image_to_tensor(train_data[0]["image"]).shape
        if "image_size" not in fields and height != width:
            raise ValueError(f"The first image is {height}x{width}, not square: give --image_size to resize.")
        resize = "image_size" in fields or "num_channels" in fields
        names = dict(enumerate(train_data.features["label"].names))
        labels = {"id2label": names, "label2id": {name: label for label, name in names.items()}}
        fields = {"image_size": height, "num_channels": channels, **labels, **fields}
        size = model_args.size
        config = LipschitzVisionConfig(**fields) if size is None else LipschitzVisionConfig.from_size(size, **fields)

    read = partial(
        read_split,
        names=[config.id2label[label] for label in range(config.num_labels)],
        num_channels=config.num_channels,
        image_size=config.image_size,
        resize=resize,
        seed=args.seed,
        progress=accelerator.is_main_process,
    )
    train, test = read(train_data, limit=data.max_train_samples), read(eval_data, limit=data.max_eval_samples)
    monitored = test
    if data.validation_share:
        monitored, train = train.hold_out(data.validation_share, args.seed)
    if model is None:
        if model_args.image_mean is None:
            config.image_mean = train.channel_means()
        model = LipschitzVisionForImageClassification(config)
    return train, monitored, test, model


def make_optimizer(model: torch.nn.Module, args: TrainingArguments) -> torch.optim.Optimizer:
    shared: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    if args.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=args.momentum, **shared)
    return torch.optim.Adam(model.parameters(), betas=(args.adam_betas[0], args.adam_betas[1]), **shared)


def training_loss(
    logits: Tensor,
    labels: Tensor,
    model: LipschitzVisionForImageClassification,
    args: TrainingArguments,
    progress: float,
) -> Tensor:
    if args.loss == "hinge":
        return multi_margin_loss(logits, labels, margin=args.margin)
    if args.loss == "xent":
        return margin_cross_entropy(logits, labels, offset=args.offset, temperature=args.temperature)
    # the features are 1-Lipschitz but for the division by the standard deviation
    distances = pairwise_row_distances(model.classifier.effective_weight())
    constants = distances.to(logits.device) / min(model.config.image_std or [1.0])
    epsilon = linear_ramp(progress, args.epsilon / 30, args.epsilon)
    return emma_loss(logits, labels, constants, epsilon=epsilon, temperature=args.temperature)


@torch.no_grad()
def evaluate(
    model: LipschitzVisionForImageClassification, loader: DataLoader, accelerator: Accelerator
) -> dict[str, Any]:
    """Accuracy and certified accuracy; logits and radii come from the model's float64 evaluation."""
    radii, correct = [], []
    constant = float("nan")
    for images, labels in tqdm(loader, desc="evaluating", leave=False, disable=not accelerator.is_main_process):
        output = model(pixel_values=to_float_pixels(images))
        constant = float(output.lipschitz_constant)
        batch = accelerator.gather_for_metrics((output.certified_radius, output.logits.argmax(dim=-1) == labels))
        radii.append(batch[0].cpu())
        correct.append(batch[1].cpu())
    radius, right = torch.cat(radii).numpy(), torch.cat(correct).numpy()
    return {
        "eval_samples": len(right),
        "clean_accuracy": float(right.mean()),
        "certified_accuracy": {name: certified_accuracy(radius, right, eps) for name, eps in STANDARD_RADII.items()},
        "average_certified_radius": average_certified_radius(radius, right),
        "lipschitz_constant": constant,
    }


def describe(metrics: dict[str, Any]) -> str:
    certified = "  ".join(f"{100 * share:.2f} at {name}" for name, share in metrics["certified_accuracy"].items())
    return f"clean {100 * metrics['clean_accuracy']:.2f} %  certified {certified}"


def train_model(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: ImageBatches,
    eval_loader: DataLoader,
    evaluated: EvaluationCopy,
    state: RunState,
    identity: dict[str, Any],
    args: TrainingArguments,
    accelerator: Accelerator,
) -> None:
    """Train from `state.step` to the end or to the time limit, keeping `state` up to date."""
    steps_per_epoch = batches.steps_per_epoch
    total_steps = args.num_train_epochs * steps_per_epoch
    interval = args.checkpoint_interval(steps_per_epoch)
    plain_model = accelerator.unwrap_model(model)
    started, cpu_started = time.perf_counter() - state.seconds, time.process_time() - state.cpu_seconds
    loss_sum = torch.tensor(state.loss_sum, dtype=torch.float64, device=accelerator.device)

    def measure() -> float:
        """Bring `state` up to date; the mean loss of the epoch so far."""
        state.loss_sum = accelerator.reduce(loss_sum, reduction="mean").item()
        state.seconds, state.cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        if not (math.isfinite(state.loss_sum) and all(p.isfinite().all() for p in plain_model.parameters())):
            raise RuntimeError(DIVERGED.format(state.step))
        return state.loss_sum / ((state.step - 1) % steps_per_epoch + 1)

    def save() -> None:
        keep = args.checkpoints_total_limit
        save_checkpoint(Path(args.output_dir), state, identity, accelerator, evaluated, keep=keep)

    model.train()
    bar = tqdm(total=total_steps, initial=state.step, desc="training", disable=not accelerator.is_main_process)
    while state.step < total_steps:
        # one clock decides for all processes
        limit = args.max_train_seconds
        if limit is not None and broadcast_object_list([time.perf_counter() - started > limit])[0]:
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
            loss = training_loss(model(pixel_values=images).logits, labels, plain_model, args, progress)
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
                metrics = evaluate(evaluated.refresh(plain_model), eval_loader, accelerator)
                log = {"clean_accuracy": metrics["clean_accuracy"], **metrics["certified_accuracy"]}
                accelerator.log({f"eval/{name}": value for name, value in log.items()}, step=state.step)
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


def write_results(
    output_dir: Path,
    model: LipschitzVisionForImageClassification,
    metrics: dict[str, Any],
    state: RunState,
    batches: ImageBatches,
    arguments: dict[str, Any],
    command: str,
    num_processes: int,
) -> None:
    """The model with its certificate, its image processor and results.json."""
    model.save_pretrained(output_dir)
    size = {"height": model.config.image_size, "width": model.config.image_size}
    options: dict[str, Any] = {"size": size, "num_channels": model.config.num_channels}
    LipschitzVisionImageProcessor(**options).save_pretrained(output_dir)
    packages = ("torch", "transformers", "accelerate", "datasets", "safetensors")
    results = {
        **metrics,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "epochs": state.step / batches.steps_per_epoch,
        "stopped_early": state.step < arguments["num_train_epochs"] * batches.steps_per_epoch,
        "steps": state.step,
        "train_samples": len(batches.images),
        "train_samples_seen": state.step * batches.batch_size,
        "seconds": round(state.seconds, 3),
        "cpu_seconds": round(state.cpu_seconds, 3),
        "num_processes": num_processes,
        "device": str(batches.images.device),
        "command": command,
        "arguments": arguments,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "history": state.history,
    }
    write_json(output_dir / "results.json", results)


def main(argv: list[str] | None = None) -> None:
    data, model_args, args = parse_arguments(argv)
    accelerator = start_accelerator(args)
    set_seed(args.seed)
    train, monitored, test, model = prepare_data_and_model(data, model_args, args, accelerator)
    batches = ImageBatches(
        train.images.to(accelerator.device),
        train.labels.to(accelerator.device),
        batch_size=args.train_batch_size,
        seed=args.seed,
        **data.augmentation(model.config.image_size),
    )
    parts = [TensorDataset(split.images, split.labels) for split in (monitored, test)]
    loaders = [DataLoader(part, batch_size=args.eval_batch_size) for part in parts]
    model.to(accelerator.device)
    evaluated = EvaluationCopy(model, args.ema_decay)
    model, optimizer, eval_loader, test_loader = accelerator.prepare(model, make_optimizer(model, args), *loaders)

    output_dir = Path(args.output_dir)
    arguments = {**vars(data), **vars(model_args), **vars(args)}
    del arguments["hub_token"]
    identity = run_identity(data, model_args, args)
    state = RunState()
    if args.resume_from_checkpoint:
        folder = find_checkpoint(output_dir, args.resume_from_checkpoint)
        state = load_checkpoint(folder, identity, accelerator, evaluated)
        accelerator.print(f"Resumed after step {state.step}.")
    elif accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        for checkpoint in list_checkpoints(output_dir):
            remove_checkpoint(checkpoint)
    accelerator.init_trackers("hf_lip", config={name: str(value) for name, value in arguments.items()})
    accelerator.print(f"{len(train.labels)} training images, {len(test.labels)} for the final evaluation")
    train_model(model, optimizer, batches, eval_loader, evaluated, state, identity, args, accelerator)

    final_model = evaluated.refresh(accelerator.unwrap_model(model))
    if len(set(gather_object([weights_sha256(final_model.state_dict())]))) > 1:
        raise RuntimeError("The processes ended with different weights: they did not train together.")
    metrics = evaluate(final_model, test_loader, accelerator)
    accelerator.print(f"{data.eval_split}: {describe(metrics)}  constant {metrics['lipschitz_constant']:.6g}")
    if accelerator.is_main_process:
        words = [Path(sys.argv[0]).name, *(sys.argv[1:] if argv is None else argv)]
        command = shlex.join(word.replace(args.hub_token, "***") if args.hub_token else word for word in words)
        write_results(output_dir, final_model, metrics, state, batches, arguments, command, accelerator.num_processes)
        if args.push_to_hub:
            api = HfApi(token=args.hub_token)
            repo = api.create_repo(args.hub_model_id or output_dir.resolve().name, exist_ok=True).repo_id
            message = "Upload a certified image classifier"
            api.upload_folder(repo_id=repo, folder_path=output_dir, ignore_patterns=PRIVATE, commit_message=message)
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        # gloo's thread needs the GIL to drop the last tensors; freeing the group would wait for it with the GIL held
        time.sleep(2.0)
    accelerator.end_training()


if __name__ == "__main__":
    main()
