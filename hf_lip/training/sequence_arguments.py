# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF009  (`option` returns `dataclasses.field`)
"""Command-line arguments that the scripts for sequence models share, as dataclasses for `HfArgumentParser`.

What can be refused without looking at data is refused here: every dataclass raises ValueError when it is made.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from .arguments import option, require


# may change when a run is continued: they do not change its weights
FREE_ON_RESUME = (
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "max_train_seconds", "report_to", "cpu"),
    *(
        "eval_steps",
        "eval_stride",
        "eval_batch_size",
        "eval_samples",
        "eval_seed",
        "eval_generate",
        "max_eval_tokens",
        "logging_steps",
        "num_workers",
    ),
    *("checkpointing_steps", "checkpoints_total_limit", "push_to_hub", "hub_model_id", "hub_token"),
)

# shorthands of `--layer_types` and `--attention`
LAYER_TYPES = {"full": "full_attention", "softmax": "full_attention", "chained": "chained_attention"}
# fields of ChacalConfig that no other architecture has
CHAIN_FIELDS = ("attention", "layer_types", "gamma", "gamma_learnable", "diagonal", "normalize", "use_rope")

__all__ = ["SequenceModelArguments", "SequenceTrainingArguments", "run_identity"]


@dataclass
class SequenceModelArguments:
    """What to train: a checkpoint, or an architecture from scratch. What is not given is left to the configuration."""

    model_name_or_path: str | None = option(None, "Start from this checkpoint; the architecture is then its own.")
    model_type: str = option("chacal", "From scratch: chacal, or any causal language model of transformers.")
    config_overrides: list[str] | None = option(
        None, "From scratch: name=value pairs for the configuration, the values in JSON: hidden_act=gelu."
    )
    num_hidden_layers: int | None = option(None, "Layers. Default: as many as --layer_types, else 1.")
    hidden_size: int = option(64, "Width of the residual stream.")
    num_attention_heads: int = option(1, "Heads.")
    intermediate_size: int | None = option(None, "Width of the gated MLP. Default: 4 times hidden_size.")
    attention: Literal["softmax", "chained"] | None = option(
        None, "chacal: attention of all layers. chained: also to convert an ordinary checkpoint, from discount 0."
    )
    layer_types: list[str] | None = option(None, "chacal: 'full' or 'chained' for each layer: full chained.")
    gamma: list[float] | None = option(
        None, "Discount of the chains, one number or one for each layer; also of a converted checkpoint."
    )
    gamma_warmup_steps: int = option(
        0, "Steps over which the discount moves to --gamma: from 0, or a checkpoint's own."
    )
    gamma_learnable: bool = option(
        False, "Train one discount for each head, started at --gamma; also of a converted checkpoint."
    )
    diagonal: Literal["strict", "keep"] | None = option(None, "chacal, or while converting: diagonal of the solve.")
    normalize: bool = option(False, "chacal, or while converting: divide by the row sums of the operator.")
    use_rope: bool | None = option(None, "chacal: rotary positions. Default: false for dense chains.")
    tie_word_embeddings: bool = option(False, "One matrix for input and output tokens.")
    max_position_embeddings: int | None = option(None, "Longest sequence with positions.")
    initializer_range: float | None = option(None, "Standard deviation of the initial weights.")

    def __post_init__(self) -> None:
        require(self, "num_hidden_layers hidden_size num_attention_heads intermediate_size", "> 0")
        require(self, "max_position_embeddings initializer_range", "> 0")
        require(self, "gamma_warmup_steps", ">= 0")
        if self.gamma_warmup_steps and self.gamma is None:
            raise ValueError("--gamma_warmup_steps needs the discount to move to: give --gamma.")
        if self.gamma_warmup_steps and self.gamma_learnable:
            raise ValueError("--gamma_warmup_steps and --gamma_learnable exclude each other: one of them sets it.")
        if self.model_name_or_path is not None:
            kept = ["model_name_or_path", "gamma", "gamma_warmup_steps", "gamma_learnable"]
            if self.attention == "chained":
                kept += ["attention", "diagonal", "normalize"]
            defaults = {entry.name: entry.default for entry in fields(self)}
            changed = [name for name, value in vars(self).items() if value != defaults[name] and name not in kept]
            if changed:
                raise ValueError(
                    f"--{changed[0]} cannot change the architecture of the checkpoint --model_name_or_path."
                )
        for name in self.layer_types or []:
            if name not in LAYER_TYPES:
                raise ValueError(f"--layer_types must be words of {', '.join(LAYER_TYPES)}, got {name!r}.")
        if self.layer_types and self.attention:
            raise ValueError("--layer_types and --attention exclude each other.")
        if self.layer_types and self.num_hidden_layers not in (None, len(self.layer_types)):
            raise ValueError(
                f"--num_hidden_layers is {self.num_hidden_layers} and --layer_types has {len(self.layer_types)} words."
            )
        if self.gamma is not None and not self.model_name_or_path and len(self.gamma) not in (1, self.num_layers):
            raise ValueError(f"--gamma must be one number or {self.num_layers}, one for each layer.")
        if self.model_type != "chacal":
            given = [name for name in CHAIN_FIELDS if getattr(self, name) not in (None, False)]
            if given:
                raise ValueError(f"--{given[0]} is an option of --model_type chacal, not of {self.model_type}.")
        self.overrides()

    @property
    def num_layers(self) -> int:
        """Layers of a model from scratch."""
        return self.num_hidden_layers or len(self.layer_types or [0])

    def overrides(self) -> dict[str, Any]:
        """--config_overrides as a dictionary; a value that is not JSON is taken as a string.

        Raises:
            ValueError: a word without a name and an equals sign.
        """
        return named_values("config_overrides", self.config_overrides)


@dataclass
class SequenceTrainingArguments:
    output_dir: str = option("runs/sequence-model", "Everything is written here.")
    overwrite_output_dir: bool = option(False, "Write into a folder that is not empty; its checkpoints are deleted.")
    resume_from_checkpoint: str | None = option(None, "'latest', or a checkpoint folder inside output_dir.")
    seed: int = option(0, "Fixes the initial weights and the training data with their order.")
    max_steps: int | None = option(None, "Optimiser steps; the schedules run over exactly these. Default: 1500.")
    num_train_epochs: int | None = option(None, "In place of --max_steps, where the training data end.")
    max_train_seconds: float | None = option(None, "Stop hard after this time and save; the schedules do not adapt.")
    train_batch_size: int = option(64, "Sequences of one optimiser step, over all processes and micro-batches.")
    eval_batch_size: int = option(64, "Sequences of one evaluation batch on each process.")
    gradient_accumulation_steps: int = option(
        1, "Micro-batches into which a process divides its share of a step, by length."
    )
    learning_rate: float = option(2e-3, "Peak of the schedule (AdamW).")
    muon_learning_rate: float | None = option(
        None,
        "The same of the matrices of the layers, to train them with Muon in place of AdamW, in the scale of AdamW's "
        "rates. Default: AdamW for all.",
    )
    gamma_learning_rate: float | None = option(
        None,
        "The same of learnt discounts (--gamma_learnable), which move as far as all steps together. "
        "Default: learning_rate.",
    )
    adam_betas: list[float] = option([0.9, 0.999], "Decay of AdamW's averages.")
    weight_decay: float = option(0.01, "Of matrices; vectors (norms, biases, discounts) have none.")
    lr_schedule: Literal["cosine", "linear", "constant", "stable_decay"] = option(
        "cosine", "After the warm-up. stable_decay: constant, then linearly to 0 over the last quarter."
    )
    warmup_steps: int = option(100, "Steps over which the learning rate grows from 0.")
    max_grad_norm: float = option(1.0, "Clip the gradient to this norm; 0 for no clipping.")
    mixed_precision: Literal["no", "bf16"] = option("no", "Autocast in training. Evaluation is in float32.")
    cpu: bool = option(False, "Train on CPU; needed for several CPU processes.")
    eval_steps: int | None = option(None, "Evaluate after every so many steps. Default: at the end only.")
    logging_steps: int = option(50, "Steps between log entries and checks that the weights are finite.")
    checkpointing_steps: int | None = option(None, "Steps between checkpoints. Default: no checkpoints.")
    checkpoints_total_limit: int = option(2, "Checkpoints to keep.")
    num_workers: int = option(0, "Processes that make the batches ahead of time.")
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = option("none", "Tracker.")
    push_to_hub: bool = option(False, "Upload the finished model, in one commit.")
    hub_model_id: str | None = option(None, "Repository on the Hub. Default: the name of output_dir.")
    hub_token: str | None = option(None, "Default: the token of `hf auth login`.")

    def __post_init__(self) -> None:
        require(self, "max_steps num_train_epochs train_batch_size eval_batch_size gradient_accumulation_steps", "> 0")
        require(self, "learning_rate muon_learning_rate gamma_learning_rate max_train_seconds", "> 0")
        require(self, "eval_steps logging_steps checkpointing_steps", "> 0")
        require(self, "checkpoints_total_limit", "> 0")
        require(self, "weight_decay warmup_steps max_grad_norm num_workers", ">= 0")
        require(self, "adam_betas", "in [0, 1)")
        if len(self.adam_betas) != 2:
            raise ValueError(f"--adam_betas must be two numbers, got {self.adam_betas}.")
        if self.max_steps is not None and self.num_train_epochs is not None:
            raise ValueError("--max_steps and --num_train_epochs exclude each other.")

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

    def num_steps(self, steps_per_epoch: int | None) -> int:
        """Optimiser steps of the run.

        Raises:
            ValueError: epochs of data that have no end.
        """
        if self.num_train_epochs is None:
            return self.max_steps or 1500
        if steps_per_epoch is None:
            raise ValueError("--num_train_epochs needs data that end: give --max_steps for generated data or streams.")
        return self.num_train_epochs * steps_per_epoch


def named_values(name: str, words: list[str] | None) -> dict[str, Any]:
    """name=value words as a dictionary; a value that is not JSON is taken as a string.

    Raises:
        ValueError: a word without a name and an equals sign.
    """
    found = {}
    for word in words or []:
        key, equals, value = word.partition("=")
        if not (key and equals):
            raise ValueError(f"--{name} takes name=value pairs, got {word!r}.")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found


def run_identity(*arguments: Any) -> dict[str, Any]:
    """The arguments that fix the weights of a run; its continuation must have the same."""
    everything = {name: value for part in arguments for name, value in vars(part).items()}
    return {name: value for name, value in everything.items() if name not in FREE_ON_RESUME}
