# SPDX-License-Identifier: Apache-2.0
"""Train an image classifier with Accelerate: certified 1-Lipschitz networks (CPL, SLL, AOL, SR), or any other one.

scikit-learn's digits, a minute on a laptop:

    python scripts/train_image_classifier.py --dataset digits --output_dir runs/digits --cpu \
        --block_type sll --depths 0 --hidden_sizes 1 --pool_size 1 \
        --dense_size 256 --num_dense_layers 3 --dense_hidden_size 256 --offset 0.5 --num_train_epochs 40

A folder of parquet files or of images, or a data set of the Hub, with a named size, on every GPU of the machine:

    accelerate launch scripts/train_image_classifier.py --dataset uoft-cs/cifar10 --output_dir runs/sll-s \
        --size sll-s --num_train_epochs 200 --train_batch_size 256 --mixed_precision bf16 --ema_decay 0.999

A base classifier for randomized smoothing: a checkpoint trained on with Gaussian noise, or from scratch; any image
classifier of transformers, here with a penalty on the spectral norms of its layers. Noise is in units of pixels in
[0, 1]; resizing and normalisation by the image processor come after it:

    python scripts/train_image_classifier.py --dataset uoft-cs/cifar10 --output_dir runs/resnet110-sd025 \
        --architecture cifar_resnet --depth 110 --noise_sd 0.25 --noise_method consistency \
        --optimizer sgd --learning_rate 0.1 --lr_schedule one_cycle --weight_decay 1e-4 --mixed_precision bf16
    python scripts/train_image_classifier.py --dataset uoft-cs/cifar10 --output_dir runs/resnet --noise_sd 0.25 \
        --architecture resnet --config_overrides 'hidden_sizes=[64,128]' 'depths=[2,2]' layer_type=basic \
        embedding_size=32 --lipschitz_penalty 1e-3
    python scripts/train_image_classifier.py --model_name_or_path microsoft/resnet-18 --ignore_mismatched_sizes ...

Two processes on CPU (`accelerate launch --cpu --num_processes 2` would start one); interrupted and taken up again:

    torchrun --standalone --nproc-per-node 2 scripts/train_image_classifier.py --cpu --checkpointing_steps epoch ...
    torchrun --standalone --nproc-per-node 2 scripts/train_image_classifier.py --cpu --checkpointing_steps epoch ... \
        --resume_from_checkpoint latest

Published recipes (offset is the dial between clean accuracy and certified accuracy at large radii):

    SLL          --loss xent --offset 2.1213 --learning_rate 0.01 --adam_betas 0.5 0.9
    CPL          --loss hinge --margin 0.7 --learning_rate 0.001 --adam_betas 0.9 0.999
    AOL          --loss xent --offset 1.4142
    Prach 2024   --loss xent --offset 0.3993 --optimizer sgd --lr_schedule one_cycle --weight_decay 1e-4
    Cohen 2019   --noise_sd 0.25 --optimizer sgd --learning_rate 0.1 --weight_decay 1e-4
    consistency  --noise_sd 0.5 --noise_method consistency --consistency_weight 10 --entropy_weight 0.5
    SmoothAdv    --noise_sd 0.25 --noise_method smoothadv --attack_epsilon 1 --attack_steps 10 --noise_copies 4

Written to --output_dir: the model (with its certificate where it has one), its image processor, results.json,
checkpoint-<step> folders.
"""

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration, gather_object, set_seed
from huggingface_hub import get_token
from torch.utils.data import DataLoader, TensorDataset
from transformers import HfArgumentParser

from hf_lip.checkpoints.stored_weights import stored_weights_sha256
from hf_lip.data import image_to_tensor, load_image_dataset
from hf_lip.hub import push_folder, require_pushable
from hf_lip.models.certificate import weights_sha256
from hf_lip.pipelines.transforms import pixel_transform
from hf_lip.spectral.regularizer import LipschitzRegularizer
from hf_lip.training import EvaluationCopy, ImageBatches
from hf_lip.training.arguments import DataArguments, ModelArguments, NoiseArguments, TrainingArguments, run_identity
from hf_lip.training.checkpoints import RunState, load_checkpoint
from hf_lip.training.evaluation import average_statistics, describe, evaluate
from hf_lip.training.loop import make_optimizer, train_model
from hf_lip.training.models import plan_model, save_model
from hf_lip.training.objective import Objective
from hf_lip.training.run_folder import find_checkpoint, list_checkpoints, remove_checkpoint, write_json
from hf_lip.training.run_record import command_line, hardware, public_value, versions
from hf_lip.training.splits import Split, read_split


Arguments = tuple[DataArguments, ModelArguments, NoiseArguments, TrainingArguments]


def repository(args: TrainingArguments) -> str:
    """What --push_to_hub pushes to."""
    return args.hub_model_id or Path(args.output_dir).resolve().name


def parse_arguments(argv: list[str] | None) -> Arguments:
    """Parse and check whatever can be checked without work; exits with a usage message otherwise."""
    kinds: Any = (DataArguments, ModelArguments, NoiseArguments, TrainingArguments)
    parser = HfArgumentParser(kinds, description=(__doc__ or "").split("\n")[0])
    try:
        data, model, noise, args = parser.parse_args_into_dataclasses(argv)
        args.check_output_dir()
        if args.resume_from_checkpoint:
            find_checkpoint(Path(args.output_dir), args.resume_from_checkpoint)
        if args.report_to != "none" and args.report_to not in map(str, get_available_trackers()):
            raise ValueError(f"--report_to {args.report_to} needs a package: pip install {args.report_to}.")
        if args.push_to_hub:
            if not (args.hub_token or get_token()):
                raise ValueError("--push_to_hub needs a token: run `hf auth login`, set HF_TOKEN or give --hub_token.")
            require_pushable(repository(args), args.hub_token)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return data, model, noise, args


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
        raise RuntimeError("Evaluation needs float64, which this device (mps) does not have: pass --cpu.")
    if args.train_batch_size % accelerator.num_processes:
        raise ValueError(f"--train_batch_size must be a multiple of {accelerator.num_processes}, the processes.")
    return accelerator


def prepare_data_and_model(
    data: DataArguments, model_args: ModelArguments, args: TrainingArguments, accelerator: Accelerator
) -> tuple[Split, Split, Split, Any, Any]:
    """Images to train on, to evaluate after each epoch, to evaluate at the end; model and image processor."""
    columns = {"image_column": data.image_column, "label_column": data.label_column, "name": data.dataset_config}
    with accelerator.main_process_first():
        train_data = load_image_dataset(data.dataset, data.train_split, **columns)
        eval_data = load_image_dataset(data.dataset, data.eval_split, **columns)
    first_image = image_to_tensor(train_data[0]["image"])
    plan = plan_model(model_args, train_data.features["label"].names, tuple(first_image.shape))
    read = partial(
        read_split,
        names=plan.names,
        num_channels=plan.num_channels,
        image_size=plan.image_size,
        resize=plan.resize,
        seed=args.seed,
        progress=accelerator.is_main_process,
    )
    train, test = read(train_data, limit=data.max_train_samples), read(eval_data, limit=data.max_eval_samples)
    monitored = test
    if data.validation_share:
        monitored, train = train.hold_out(data.validation_share, args.seed)
    return train, monitored, test, *plan.finish(train)


def write_results(
    output_dir: Path,
    model: Any,
    metrics: dict[str, Any],
    state: RunState,
    batches: ImageBatches,
    arguments: dict[str, Any],
    command: str,
    num_processes: int,
) -> None:
    seen = state.step * batches.batch_size
    results = {
        **metrics,
        "weights_sha256": stored_weights_sha256(output_dir),
        "model_type": model.config.model_type,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "epochs": state.step / batches.steps_per_epoch,
        "stopped_early": state.step < arguments["num_train_epochs"] * batches.steps_per_epoch,
        "steps": state.step,
        "train_samples": len(batches.images),
        "train_samples_seen": seen,
        "train_samples_per_second": round(seen / max(state.seconds, 1e-9), 1),
        "seconds": round(state.seconds, 3),
        "cpu_seconds": round(state.cpu_seconds, 3),
        "num_processes": num_processes,
        "device": str(batches.images.device),
        "hardware": hardware(batches.images.device, model.dtype, arguments["mixed_precision"]),
        "command": command,
        "arguments": public_value(arguments),
        "versions": versions(),
        "history": state.history,
    }
    write_json(output_dir / "results.json", results)


def main(argv: list[str] | None = None) -> None:
    data, model_args, noise, args = parse_arguments(argv)
    accelerator = start_accelerator(args)
    set_seed(args.seed)
    train, monitored, test, model, image_processor = prepare_data_and_model(data, model_args, args, accelerator)
    args.resolve(certified=hasattr(model, "certify"))
    transform = pixel_transform(image_processor)
    batches = ImageBatches(
        train.images.to(accelerator.device),
        train.labels.to(accelerator.device),
        batch_size=args.train_batch_size,
        seed=args.seed,
        **data.augmentation(train.images.shape[-1]),
    )
    parts = [TensorDataset(split.images, split.labels, torch.arange(len(split.labels))) for split in (monitored, test)]
    loaders = [DataLoader(part, batch_size=args.eval_batch_size) for part in parts]
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    model.to(accelerator.device, memory_format=memory_format)
    evaluated = EvaluationCopy(model, args.ema_decay)
    model, optimizer, eval_loader, test_loader = accelerator.prepare(model, make_optimizer(model, args), *loaders)
    plain_model = accelerator.unwrap_model(model)
    example = transform(torch.zeros(1, *train.images.shape[1:], device=accelerator.device))
    penalty = None
    if args.lipschitz_penalty > 0:
        target, iterations = args.lipschitz_target, args.lipschitz_iterations
        penalty = LipschitzRegularizer(plain_model, example_inputs=example, target=target, num_iterations=iterations)
    shares = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
    objective = Objective(model, plain_model, transform, args, noise, penalty=penalty, **shares)

    def measure_accuracy(copy: Any, loader: DataLoader = eval_loader) -> dict[str, Any]:
        average_statistics(copy, accelerator)
        sd = noise.noise_sd
        return evaluate(copy, loader, accelerator, transform, noise_sd=sd, seed=args.seed, memory_format=memory_format)

    output_dir = Path(args.output_dir)
    arguments = {**vars(data), **vars(model_args), **vars(noise), **vars(args)}
    del arguments["hub_token"]
    identity = run_identity(data, model_args, noise, args)
    state = RunState()
    if args.resume_from_checkpoint:
        folder = find_checkpoint(output_dir, args.resume_from_checkpoint)
        state = load_checkpoint(folder, identity, accelerator, evaluated, penalty)
        accelerator.print(f"Resumed after step {state.step}.")
    elif accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        for checkpoint in list_checkpoints(output_dir):
            remove_checkpoint(checkpoint)
    accelerator.init_trackers("hf_lip", config={name: str(value) for name, value in arguments.items()})
    accelerator.print(f"{len(train.labels)} training images, {len(test.labels)} for the final evaluation")
    train_model(objective, optimizer, batches, measure_accuracy, evaluated, state, identity, args, accelerator)

    final_model = evaluated.refresh(plain_model)
    metrics = measure_accuracy(final_model, test_loader)
    if len(set(gather_object([weights_sha256(final_model.state_dict())]))) > 1:
        raise RuntimeError("The processes ended with different weights: they did not train together.")
    if penalty is not None:
        metrics["layer_norm_estimates"] = LipschitzRegularizer(final_model, example_inputs=example).norm_estimates()
    accelerator.print(f"{data.eval_split}: {describe(metrics)}")
    if accelerator.is_main_process:
        command = command_line(argv, secret=args.hub_token)
        save_model(final_model, image_processor, output_dir)
        write_results(output_dir, final_model, metrics, state, batches, arguments, command, accelerator.num_processes)
        if args.push_to_hub:
            certified = "a certified" if hasattr(final_model, "certify") else "an"
            message = f"Upload {certified} image classifier"
            report = push_folder(output_dir, repository(args), token=args.hub_token, commit_message=message)
            accelerator.print(f"Pushed {report.url}")
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        # gloo's thread needs the GIL to drop the last tensors; freeing the group would wait for it with the GIL held
        time.sleep(2.0)
    accelerator.end_training()


if __name__ == "__main__":
    main()
