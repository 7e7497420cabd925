# SPDX-License-Identifier: Apache-2.0
"""The causal language model that a script trains, from its arguments."""

from collections.abc import Callable
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..models.chacal.configuration_chacal import ChacalConfig
from ..models.chacal.modeling_chacal import ChacalForCausalLM
from .sequence_arguments import LAYER_TYPES, SequenceModelArguments


__all__ = ["build_model", "gamma_schedule"]


def build_model(
    arguments: SequenceModelArguments,
    vocab_size: int,
    longest: int,
    special_tokens: dict[str, int | None],
    *,
    use_rope: bool,
) -> PreTrainedModel:
    """The model in float32, from a checkpoint or from scratch; the caller has set the seed.

    Args:
        vocab_size: tokens of the data.
        longest: tokens of the longest sequence, of training and evaluation.
        special_tokens: `pad_token_id`, `bos_token_id` and `eos_token_id` of a new configuration.
        use_rope: where `--use_rope` is not given.

    Raises:
        ValueError: a checkpoint with fewer tokens or positions than the data need, or an unknown field.
    """
    model: Any
    if arguments.model_name_or_path is not None:
        model = AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path, dtype="float32")
        if model.config.vocab_size < vocab_size:
            raise ValueError(
                f"--model_name_or_path has {model.config.vocab_size} tokens and the data {vocab_size}: take the "
                "checkpoint's own tokenizer, or train from scratch."
            )
        _check_positions(model.config, longest, "--model_name_or_path")
        if arguments.gamma is not None and _gamma_of(model) is None:
            raise ValueError(
                f"--gamma is for chained attention, and --model_name_or_path is a {model.config.model_type}: convert "
                "it first with `hf-lip convert-attention`."
            )
        return model
    layers = arguments.num_layers
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": arguments.hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": arguments.num_attention_heads,
        "intermediate_size": arguments.intermediate_size or 4 * arguments.hidden_size,
        "tie_word_embeddings": arguments.tie_word_embeddings,
        **special_tokens,
    }
    for name in ("max_position_embeddings", "initializer_range"):
        if getattr(arguments, name) is not None:
            fields[name] = getattr(arguments, name)
    overrides = arguments.overrides()
    if arguments.model_type == "chacal":
        fields |= _chain_fields(arguments, layers, use_rope)
        _check_names(overrides, ChacalConfig())
        config: Any = ChacalConfig(**{**fields, **overrides})
        model = ChacalForCausalLM(config)
    else:
        _check_names(overrides, AutoConfig.for_model(arguments.model_type))
        config = AutoConfig.for_model(arguments.model_type, **{**fields, **overrides})
        model = AutoModelForCausalLM.from_config(config)
    _check_positions(config, longest, "--max_position_embeddings")
    return model


def gamma_schedule(model: Any, arguments: SequenceModelArguments) -> Callable[[int], None]:
    """Sets the discount before step i, from 0: linearly from where the model is now to `--gamma`, which it reaches
    with step `--gamma_warmup_steps`; a model from scratch starts at 0. Without these steps `--gamma` is set here.

    Raises:
        ValueError: a discount out of range, lengths that do not fit, or discounts that are trained.
    """
    if arguments.gamma is None or not (arguments.gamma_warmup_steps or arguments.model_name_or_path):
        return lambda step: None
    layers, num_steps = model.config.num_hidden_layers, arguments.gamma_warmup_steps
    goal = arguments.gamma * layers if len(arguments.gamma) == 1 else arguments.gamma
    if num_steps and getattr(model.config, "gamma_learnable", False):
        raise ValueError("--gamma_warmup_steps: the checkpoint trains its discounts, they can not be scheduled.")
    start = _gamma_of(model) if arguments.model_name_or_path else [0.0] * layers
    if start is None or len(goal) != layers:
        raise ValueError(f"--gamma must be one number or {layers}, one for each layer of the model.")

    def set_gamma(step: int) -> None:
        part = min((step + 1) / num_steps, 1.0) if num_steps else 1.0
        values = [last if part == 1.0 else first + part * (last - first) for first, last in zip(start, goal)]
        if hasattr(model, "set_gamma"):
            model.set_gamma(values)
        else:
            model.config.chain_gamma = values
            model.config.check_chain()

    set_gamma(num_steps)
    return set_gamma if num_steps else lambda step: None


def _gamma_of(model: Any) -> list[float] | None:
    """One discount for each layer; None for ordinary attention.

    Raises:
        ValueError: heads with different discounts.
    """
    if hasattr(model, "get_gamma"):
        entries = model.get_gamma()
    else:
        gamma = getattr(model.config, "chain_gamma", None)
        if gamma is None:
            return None
        entries = list(gamma) if isinstance(gamma, (list, tuple)) else [gamma] * model.config.num_hidden_layers
    if any(len(set(entry)) > 1 for entry in entries if isinstance(entry, (list, tuple))):
        raise ValueError("--gamma moves one discount for each layer, and the checkpoint has one for each head.")
    return [entry[0] if isinstance(entry, (list, tuple)) else entry for entry in entries]


def _chain_fields(arguments: SequenceModelArguments, layers: int, use_rope: bool) -> dict[str, Any]:
    words = arguments.layer_types or [arguments.attention or "chained"] * layers
    fields: dict[str, Any] = {
        "layer_types": [LAYER_TYPES[word] for word in words],
        "use_rope": use_rope if arguments.use_rope is None else arguments.use_rope,
        "gamma_learnable": arguments.gamma_learnable,
        "normalize": arguments.normalize,
    }
    if arguments.gamma is not None:
        fields["gamma"] = arguments.gamma[0] if len(arguments.gamma) == 1 else list(arguments.gamma)
    if arguments.diagonal is not None:
        fields["diagonal"] = arguments.diagonal
    return fields


def _check_names(overrides: dict[str, Any], config: Any) -> None:
    unknown = [name for name in overrides if not hasattr(config, name)]
    if unknown:
        raise ValueError(
            f"--config_overrides {unknown[0]}: the configuration of {config.model_type} has no such field."
        )


def _check_positions(config: Any, longest: int, argument: str) -> None:
    positions = getattr(config, "max_position_embeddings", None)
    if getattr(config, "use_rope", True) and positions is not None and longest > positions:
        raise ValueError(
            f"The longest sequence has {longest} tokens and {argument} gives {positions} positions: make the samples "
            "shorter, or the model longer."
        )
