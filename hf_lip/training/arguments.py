# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF009  (`option` returns `dataclasses.field`)
"""Command-line arguments of the training scripts, as dataclasses for `HfArgumentParser`.

What can be refused without looking at data is refused here: every dataclass raises ValueError when it is made.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


# may change when a run is continued: they do not change its weights
FREE_ON_RESUME = (
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "max_train_seconds", "report_to"),
    *("eval_epochs", "eval_split", "eval_batch_size", "max_eval_samples", "logging_steps"),
    *("checkpointing_steps", "checkpoints_total_limit", "push_to_hub", "hub_model_id", "hub_token"),
)

# of the Lipschitz family's configuration alone
LIPSCHITZ_FIELDS = (
    *("size", "block_type", "depths", "hidden_sizes", "downsample_factors", "downsample_type", "kernel_size"),
    *("padding_mode", "conv_hidden_size", "pool_size", "dense_size", "num_dense_layers", "dense_hidden_size"),
    *("hidden_act", "activation", "num_iterations", "initial_bias", "head_type"),
)
CIFAR_RESNET_FIELDS = ("depth", "width_multiplier")

__all__ = ["DataArguments", "ModelArguments", "NoiseArguments", "TrainingArguments", "run_identity"]


def option(default: Any, text: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def require(arguments: Any, names: str, condition: str) -> None:
    """Raise unless the numbers called `names` (None passes) fulfil `condition`: '> 0', '>= 0' or 'in [0, 1)'."""
    holds = {"> 0": lambda x: x > 0, ">= 0": lambda x: x >= 0, "in [0, 1)": lambda x: 0 <= x < 1}[condition]
    for name in names.split():
        value = getattr(arguments, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not (holds(number) and math.isfinite(number)):
                raise ValueError(f"--{name} must be {condition}, got {number}.")


@dataclass
class DataArguments:
    dataset: str = option("digits", "'digits', a folder of parquet files or images, or a data set of the Hub.")
    dataset_config: str | None = option(None, "Configuration of a Hub data set.")
    image_column: str | None = option(None, "Column of the images; found by itself where there is one.")
    label_column: str | None = option(None, "Column of the labels; found by itself where there is one.")
    train_split: str = option("train", "Split to train on.")
    eval_split: str = option("test", "Split of the final evaluation.")
    validation_share: float = option(
        0.0, "Share of the training images held out: evaluated after each epoch in place of eval_split."
    )
    max_train_samples: int | None = option(None, "Train on a random part of this many images.")
    max_eval_samples: int | None = option(None, "Evaluate on a random part of this many images.")
    crop_padding: int | None = option(None, "Largest shift of the random crop. Default: size // 8, 0 for digits.")
    crop_padding_mode: Literal["zeros", "reflect"] = option("zeros", "What the random crop finds outside the image.")
    horizontal_flip: bool | None = option(None, "Mirror half of the images. Default: true, false for digits.")

    def __post_init__(self) -> None:
        require(self, "max_train_samples max_eval_samples", "> 0")
        require(self, "crop_padding", ">= 0")
        require(self, "validation_share", "in [0, 1)")

    def augmentation(self, image_size: int) -> dict[str, Any]:
        """Keyword arguments of `ImageBatches`, the defaults resolved: digits lose by shifts and mirrors."""
        plain = self.dataset == "digits"
        return {
            "crop_padding": (0 if plain else image_size // 8) if self.crop_padding is None else self.crop_padding,
            "crop_padding_mode": self.crop_padding_mode,
            "horizontal_flip": not plain if self.horizontal_flip is None else self.horizontal_flip,
        }


@dataclass
class ModelArguments:
    """What to train: a checkpoint, or an architecture from scratch. Fields of the configuration that are not given
    come from --size, else from the configuration's defaults."""

    model_name_or_path: str | None = option(None, "Start from this checkpoint; the architecture is then its own.")
    ignore_mismatched_sizes: bool = option(False, "Give that checkpoint a new head where its classes are others.")
    architecture: str | None = option(
        None,
        "From scratch: lipschitz_vision (default), cifar_resnet, or any model type of transformers.",
    )
    config_name: str | None = option(None, "From scratch, with the configuration of this folder or Hub repository.")
    config_overrides: list[str] | None = option(
        None, "From scratch: name=value pairs for the configuration, the values in JSON: hidden_sizes=[16,32]."
    )
    depth: int | None = option(None, "cifar_resnet: layers, 6 n + 2. Default: 20.")
    width_multiplier: float | None = option(None, "cifar_resnet: factor on the 16, 32 and 64 channels. Default: 1.")
    size: str | None = option(None, "A named size: tiny, cpl-s to cpl-xl, sll-s to sll-xl.")
    block_type: Literal["cpl", "sll", "aol", "sr"] | None = option(None, "Layer of every block.")
    image_size: int | None = option(None, "Height and width of the images. Default: those of the first image.")
    num_channels: int | None = option(None, "Channels of the images. Default: those of the first image.")
    depths: list[int] | None = option(None, "Convolutional blocks of each stage.")
    hidden_sizes: list[int] | None = option(None, "Channels of each stage.")
    downsample_factors: list[int] | None = option(None, "Downsampling at the start of each stage.")
    downsample_type: Literal["pool", "unshuffle"] | None = option(None, "How to downsample.")
    kernel_size: int | None = option(None, "Of the convolutions; odd.")
    padding_mode: Literal["zeros", "circular"] | None = option(None, "Of the convolutions.")
    conv_hidden_size: int | None = option(None, "Hidden channels of a residual conv block; 0: as wide as the stage.")
    pool_size: int | None = option(None, "Sum pooling before the dense part.")
    dense_size: int | None = option(None, "Width of the dense part; 0: the flattened size.")
    num_dense_layers: int | None = option(None, "Dense blocks.")
    dense_hidden_size: int | None = option(None, "Hidden units of a residual dense block; 0: as wide as the block.")
    hidden_act: Literal["relu", "leaky_relu", "tanh", "sigmoid", "softplus"] | None = option(
        None, "Activation inside residual blocks."
    )
    activation: Literal["maxmin", "householder", "relu"] | None = option(None, "Activation after every block.")
    num_iterations: int | None = option(None, "Gram iterations of the rescaling.")
    initial_bias: float | None = option(None, "Start of residual blocks, orthonormal; -0.5 lets 1,000 layers train.")
    head_type: Literal["lln", "spectral", "truncation"] | None = option(None, "Last layer.")
    image_mean: list[float] | None = option(None, "Per channel. Default: measured on the training images.")
    image_std: list[float] | None = option(
        None,
        "Per channel. Default: measured; 1 for the Lipschitz family, where less multiplies the constant by 1/std.",
    )

    def __post_init__(self) -> None:
        given = [name for name, value in vars(self).items() if value is not None and value is not False]
        if self.model_name_or_path is not None:
            changes = [name for name in given if name not in ("model_name_or_path", "ignore_mismatched_sizes")]
            # a checkpoint whose processor resizes can be fed with images of any size
            changes = [name for name in changes if name != "image_size"]
            if changes:
                raise ValueError(
                    f"--{changes[0]} cannot change the architecture of the checkpoint --model_name_or_path."
                )
        elif self.ignore_mismatched_sizes:
            raise ValueError("--ignore_mismatched_sizes is for a checkpoint: give --model_name_or_path.")
        if self.config_name is not None and self.architecture is not None:
            raise ValueError(
                "--config_name and --architecture exclude each other: the configuration has its own type."
            )
        foreign = self.config_name is not None or self.architecture not in (None, "lipschitz_vision")
        wrong = [name for name in given if name in LIPSCHITZ_FIELDS] if foreign else []
        if self.architecture != "cifar_resnet":
            wrong += [name for name in given if name in CIFAR_RESNET_FIELDS]
        if wrong:
            raise ValueError(
                f"--{wrong[0]} is no option of --architecture {self.architecture or 'lipschitz_vision'}: set fields "
                "of its configuration with --config_overrides name=value."
            )
        self.overrides()
        require(self, "image_size num_channels pool_size num_iterations kernel_size image_std", "> 0")
        require(self, "depth width_multiplier", "> 0")
        require(self, "depths conv_hidden_size dense_size num_dense_layers dense_hidden_size", ">= 0")

    def config_fields(self) -> dict[str, Any]:
        """The fields of a Lipschitz configuration that were given; 0 stands for 'as wide as ...', None there."""
        names = (*LIPSCHITZ_FIELDS, "image_size", "num_channels", "image_mean", "image_std")
        given = {name: getattr(self, name) for name in names if name != "size"}
        given = {name: value for name, value in given.items() if value is not None}
        return {name: None if name.endswith("_size") and value == 0 else value for name, value in given.items()}

    def overrides(self) -> dict[str, Any]:
        """--config_overrides as a dictionary; a value that is not JSON is taken as a string.

        Raises:
            ValueError: a word without a name and an equals sign.
        """
        found = {}
        for word in self.config_overrides or []:
            name, equals, value = word.partition("=")
            if not (name and equals):
                raise ValueError(f"--config_overrides takes name=value pairs, got {word!r}.")
            try:
                found[name] = json.loads(value)
            except json.JSONDecodeError:
                found[name] = value
        return found


@dataclass
class NoiseArguments:
    """Gaussian noise on the pixels in [0, 1], fresh for each image and step: a base for randomized smoothing."""

    noise_sd: float = option(0.0, "Standard deviation of the noise; 0 trains without.")
    noise_method: Literal["gaussian", "consistency", "smoothadv"] = option(
        "gaussian", "Noise alone; the same prediction asked of several noisy copies; attacks on the smoothed network."
    )
    noise_copies: int | None = option(None, "Noisy copies of an image a step. Default: 1, 2 for the other methods.")
    consistency_weight: float = option(
        10.0, "consistency: weight of the divergence from the mean prediction (lambda)."
    )
    entropy_weight: float = option(0.5, "consistency: weight of the entropy of the mean prediction (eta).")
    attack_epsilon: float = option(0.25, "smoothadv: radius of the attack, l2.")
    attack_steps: int = option(2, "smoothadv: gradient steps of the attack.")
    attack_warmup: float = option(0.1, "smoothadv: share of training over which the radius grows from 0.")

    def __post_init__(self) -> None:
        require(self, "noise_sd consistency_weight entropy_weight", ">= 0")
        require(self, "noise_copies attack_epsilon attack_steps", "> 0")
        require(self, "attack_warmup", "in [0, 1)")
        if self.noise_sd == 0 and (self.noise_method != "gaussian" or (self.noise_copies or 1) > 1):
            raise ValueError("--noise_method and --noise_copies need noise: give --noise_sd.")
        if self.noise_method == "consistency" and self.copies < 2:
            raise ValueError("--noise_method consistency compares copies: --noise_copies must be at least 2.")

    @property
    def copies(self) -> int:
        """Noisy copies of each image, the default resolved."""
        if self.noise_copies is not None:
            return self.noise_copies
        return 1 if self.noise_method == "gaussian" else 2


@dataclass
class TrainingArguments:
    output_dir: str = option("runs/image-classifier", "Everything is written here.")
    overwrite_output_dir: bool = option(False, "Write into a folder that is not empty; its checkpoints are deleted.")
    resume_from_checkpoint: str | None = option(None, "'latest', or a checkpoint folder inside output_dir.")
    seed: int = option(0, "Fixes the initial weights, the order of the images and the augmentation.")
    num_train_epochs: int = option(40, "Defines the schedules: they run over exactly this many epochs.")
    max_train_seconds: float | None = option(None, "Stop hard after this time and save; the schedules do not adapt.")
    train_batch_size: int = option(64, "Images of one optimiser step, over all processes together.")
    eval_batch_size: int = option(256, "Images of one evaluation batch on each process.")
    loss: Literal["xent", "hinge", "emma"] = option("xent", "Offset cross-entropy, multi-class hinge, or EMMA.")
    offset: float | None = option(
        None, "xent: margin asked for. Default: 2 sqrt(2) 36/255 for the Lipschitz family, else 0."
    )
    temperature: float | None = option(
        None, "xent, emma: temperature of the cross-entropy. Default: 0.25 for the Lipschitz family, else 1."
    )
    margin: float = option(0.7, "hinge: margin asked for.")
    epsilon: float = option(108 / 255, "emma: radius to defend, grown to from 1/30 of it. Default: 108/255.")
    optimizer: Literal["adam", "sgd"] = option("adam", "Adam, or SGD with momentum.")
    learning_rate: float = option(0.01, "Peak of the schedule. SLL was published with 0.01, CPL with 0.001.")
    adam_betas: list[float] = option([0.5, 0.9], "SLL was published with these, CPL with 0.9 0.999.")
    momentum: float = option(0.9, "sgd: momentum.")
    weight_decay: float = option(0.0, "l2 penalty on all parameters.")
    lr_schedule: Literal["piecewise", "one_cycle", "constant"] = option(
        "piecewise", "piecewise: from 0 to the peak at 2/5 of training, 1/20 of it at 4/5, 0 at the end."
    )
    max_grad_norm: float | None = option(None, "Clip the gradient to this norm.")
    ema_decay: float | None = option(None, "Evaluate and save the moving average of the weights with this decay.")
    mixed_precision: Literal["no", "bf16", "fp16"] = option(
        "no", "Autocast in training. Evaluation is in float64 for the Lipschitz family, else in float32."
    )
    channels_last: bool | None = option(
        None, "Memory format of weights and images. Default: true, false for the Lipschitz family."
    )
    lipschitz_penalty: float = option(0.0, "Weight of the penalty on the layers' spectral norms; 0 for none.")
    lipschitz_target: float = option(1.0, "Norm up to which a layer costs nothing.")
    lipschitz_iterations: int = option(6, "Gram iterations of the penalty's bounds.")
    cpu: bool = option(False, "Train on CPU; needed for several CPU processes.")
    eval_epochs: int = option(1, "Evaluate after every so many epochs, and at the end.")
    logging_steps: int = option(20, "Steps between log entries and checks that the loss is finite.")
    checkpointing_steps: str | None = option(None, "A number of steps, or 'epoch'. Default: no checkpoints.")
    checkpoints_total_limit: int = option(2, "Checkpoints to keep.")
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = option("none", "Tracker.")
    push_to_hub: bool = option(False, "Upload the finished model, in one commit.")
    hub_model_id: str | None = option(None, "Repository on the Hub. Default: the name of output_dir.")
    hub_token: str | None = option(None, "Default: the token of `hf auth login`.")

    def __post_init__(self) -> None:
        require(self, "num_train_epochs train_batch_size eval_batch_size eval_epochs logging_steps", "> 0")
        require(self, "learning_rate temperature margin epsilon max_grad_norm max_train_seconds", "> 0")
        require(self, "checkpoints_total_limit lipschitz_target lipschitz_iterations", "> 0")
        require(self, "offset weight_decay lipschitz_penalty", ">= 0")
        require(self, "momentum ema_decay adam_betas", "in [0, 1)")
        if len(self.adam_betas) != 2:
            raise ValueError(f"--adam_betas must be two numbers, got {self.adam_betas}.")
        steps = self.checkpointing_steps
        if steps is not None and steps != "epoch" and not (steps.isdecimal() and int(steps) > 0):
            raise ValueError(f"--checkpointing_steps must be a number of steps > 0 or 'epoch', got {steps!r}.")

    def resolve(self, certified: bool) -> None:
        """Fill in the defaults that depend on the family: 1-Lipschitz networks need a margin and a low temperature,
        ordinary ones get plain cross-entropy.

        Raises:
            ValueError: a loss that this family does not have.
        """
        if self.loss == "emma" and not certified:
            raise ValueError("--loss emma needs the per-pair constants of a Lipschitz network: use xent or hinge.")
        if self.lipschitz_penalty > 0 and certified:
            raise ValueError(
                "--lipschitz_penalty is for ordinary networks: the layers of the Lipschitz family have norm 1 already."
            )
        if self.offset is None:
            self.offset = 2 * math.sqrt(2) * 36 / 255 if certified else 0.0
        if self.temperature is None:
            self.temperature = 0.25 if certified else 1.0
        if self.channels_last is None:
            self.channels_last = not certified

    def checkpoint_interval(self, steps_per_epoch: int) -> int | None:
        """Steps from one checkpoint to the next, None for no checkpoints."""
        if self.checkpointing_steps is None:
            return None
        return steps_per_epoch if self.checkpointing_steps == "epoch" else int(self.checkpointing_steps)

    def check_output_dir(self) -> None:
        """Raise FileExistsError rather than mix two runs in one folder."""
        path = Path(self.output_dir)
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"--output_dir {self.output_dir!r} is a file: name a folder.")
        if self.resume_from_checkpoint or self.overwrite_output_dir or not path.exists():
            return
        if any(path.iterdir()):
            raise FileExistsError(
                f"--output_dir {self.output_dir!r} is not empty: choose another folder, continue the run in it with "
                "--resume_from_checkpoint latest, or give it up with --overwrite_output_dir."
            )


def run_identity(*arguments: Any) -> dict[str, Any]:
    """The arguments that fix the weights of a run; its continuation must have the same."""
    everything = {name: value for part in arguments for name, value in vars(part).items()}
    return {name: value for name, value in everything.items() if name not in FREE_ON_RESUME}
