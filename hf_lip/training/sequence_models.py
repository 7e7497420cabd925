# SPDX-License-Identifier: Apache-2.0
"""The causal language model that a script trains, from its arguments."""

from collections.abc import Callable
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..models.chacal.configuration_chacal import ChacalConfig
from ..models.chacal.convert import CONVERTED, chained_config_of
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
    add_tokens: bool = False,
) -> PreTrainedModel:
    """The model in float32, from a checkpoint or from scratch; the caller has set the seed.

    Args:
        vocab_size: tokens of the data.
        longest: tokens of the longest sequence, of training and evaluation.
        special_tokens: `pad_token_id`, `bos_token_id` and `eos_token_id` of a new configuration.
        use_rope: where `--use_rope` is not given.
        add_tokens: give a checkpoint the tokens it lacks, with embeddings drawn like those that it has.

    Raises:
        ValueError: a checkpoint with fewer tokens or positions than the data need, or an unknown field.
    """
    model: Any
    if arguments.model_name_or_path is not None:
        model = _pretrained(arguments)
        if model.config.vocab_size < vocab_size and add_tokens:
            model.resize_token_embeddings(vocab_size)
        elif model.config.vocab_size < vocab_size:
            raise ValueError(
                f"--model_name_or_path has {model.config.vocab_size} tokens and the data {vocab_size}: take the "
                "checkpoint's own tokenizer, or train from scratch."
            )
        _check_positions(model.config, longest, "--model_name_or_path")
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


def _pretrained(arguments: SequenceModelArguments) -> Any:
    """The checkpoint `--model_name_or_path`, its attention converted where `--attention chained` asks for it.

    Raises:
        ValueError: options for chained attention with a checkpoint that has none, or has it already.
    """
    path: Any = arguments.model_name_or_path
    config: Any = AutoConfig.from_pretrained(path)
    learnable = next((name for name in ("gamma_learnable", "chain_gamma_learnable") if hasattr(config, name)), None)
    if arguments.attention == "chained":
        if learnable is not None:
            raise ValueError(
                f"--attention chained converts a checkpoint, and --model_name_or_path is a {config.model_type}, which "
                "has chained attention: leave it out, with --diagonal and --normalize."
            )
        if config.model_type not in CONVERTED:
            raise ValueError(
                f"--attention chained: --model_name_or_path is a {config.model_type}; attention can be converted for "
                f"{', '.join(sorted(CONVERTED))}."
            )
        model_class = CONVERTED[config.model_type][1]
        config = chained_config_of(
            config,
            gamma=0.0,
            gamma_learnable=arguments.gamma_learnable,
            diagonal=arguments.diagonal or "strict",
            normalize=arguments.normalize,
        )
        return model_class.from_pretrained(path, config=config, dtype="float32")
    if learnable is None and (arguments.gamma is not None or arguments.gamma_learnable):
        raise ValueError(
            f"--{'gamma_learnable' if arguments.gamma is None else 'gamma'} is for chained attention, and "
            f"--model_name_or_path is a {config.model_type}: convert it with --attention chained, or once and for all "
            "with `hf-lip convert-attention`."
        )
    settings = {learnable: True} if learnable is not None and arguments.gamma_learnable else {}
    return AutoModelForCausalLM.from_pretrained(path, dtype="float32", **settings)


def gamma_schedule(model: Any, arguments: SequenceModelArguments) -> Callable[[int], None]:
    """Sets the discount before step i, from 0: linearly from where the model is now to `--gamma`, which it reaches
    with step `--gamma_warmup_steps`; a model from scratch starts at 0. Without these steps `--gamma` is set here.

    Raises:
        ValueError: a discount out of range, lengths that do not fit, heads with different discounts, or discounts
            that are trained.
    """
    if arguments.gamma is None or not (arguments.gamma_warmup_steps or arguments.model_name_or_path):
        return lambda step: None
    layers, num_steps = model.config.num_hidden_layers, arguments.gamma_warmup_steps
    goal = arguments.gamma * layers if len(arguments.gamma) == 1 else arguments.gamma
    if len(goal) != layers:
        raise ValueError(f"--gamma must be one number or {layers}, one for each layer of the model.")
    if not num_steps:
        model.set_gamma(list(goal))
        return lambda step: None
    if any(getattr(model.config, name, False) for name in ("gamma_learnable", "chain_gamma_learnable")):
        raise ValueError("--gamma_warmup_steps: the checkpoint trains its discounts, they can not be scheduled.")
    start = [0.0] * layers
    if arguments.model_name_or_path:
        entries = model.get_gamma()
        if any(len(set(entry)) > 1 for entry in entries):
            raise ValueError("--gamma moves one discount for each layer, and the checkpoint has one for each head.")
        start = [entry[0] for entry in entries]

    def set_gamma(step: int) -> None:
        part = min((step + 1) / num_steps, 1.0)
        model.set_gamma([last if part == 1.0 else first + part * (last - first) for first, last in zip(start, goal)])

    set_gamma(num_steps)
    return set_gamma


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
