# SPDX-License-Identifier: Apache-2.0
"""Llama, Qwen2 and GPT-2 with chained attention: the choice and its discount stay in the checkpoint.

    config = ChacalLlamaConfig(**LlamaConfig.from_pretrained(folder).to_dict() | {"chain_gamma": 0.0})
    model = ChacalLlamaForCausalLM.from_pretrained(folder, config=config)

has the weights of an ordinary checkpoint and, at `chain_gamma=0`, its logits.
"""

from typing import Any

from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils import logging

from ...ops.chain import DIAGONALS
from ..hub_model import PushableModel
from ..shim import InstalledSettings
from .interface import NAME, ChainedCache, chain_settings


logger = logging.get_logger(__name__)


class ChainedConfigMixin(InstalledSettings):
    """Fields `chain_gamma` (a number, or for each layer a number or one for each head), `chain_diagonal`,
    `chain_normalize`, checked when the config is made; the attention implementation is chosen by the class."""

    def set_up_chain(self, kwargs: dict[str, Any]) -> None:
        kwargs.setdefault("attn_implementation", NAME)

    def check_chain(self) -> None:
        config: Any = self
        if config.chain_diagonal not in DIAGONALS:
            raise ValueError(f"`chain_diagonal` must be one of {', '.join(DIAGONALS)}, got {config.chain_diagonal!r}.")
        layers = config.num_hidden_layers
        if isinstance(config.chain_gamma, (list, tuple)) and len(config.chain_gamma) != layers:
            raise ValueError(f"`chain_gamma` needs one entry for each of {layers} layers.")
        for layer_idx in range(layers):
            chain_settings(config, layer_idx, config.num_attention_heads)


class ChacalLlamaConfig(ChainedConfigMixin, LlamaConfig):
    model_type = "chacal_llama"

    chain_gamma: int | float | list | tuple = 0.0
    chain_diagonal: str = "strict"
    chain_normalize: bool = False

    def __post_init__(self, **kwargs):
        self.set_up_chain(kwargs)
        super().__post_init__(**kwargs)
        self.check_chain()


class ChacalQwen2Config(ChainedConfigMixin, Qwen2Config):
    model_type = "chacal_qwen2"

    chain_gamma: int | float | list | tuple = 0.0
    chain_diagonal: str = "strict"
    chain_normalize: bool = False

    def __post_init__(self, **kwargs):
        self.set_up_chain(kwargs)
        super().__post_init__(**kwargs)
        self.check_chain()


class ChacalGPT2Config(ChainedConfigMixin, GPT2Config):
    model_type = "chacal_gpt2"

    chain_gamma: int | float | list | tuple = 0.0
    chain_diagonal: str = "strict"
    chain_normalize: bool = False

    def __post_init__(self, **kwargs):
        self.set_up_chain(kwargs)
        super().__post_init__(**kwargs)
        self.check_chain()


class ChainedGenerationMixin(PushableModel):
    """`generate` decodes from a `ChainedCache` unless it is given a cache, or the attention was made ordinary."""

    config: PreTrainedConfig
    # its static cache is read up to the last token, which is another length every time
    _can_compile_fullgraph = False

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if self.config._attn_implementation != NAME:
            logger.warning(
                f'{type(self).__name__} has `attn_implementation="{self.config._attn_implementation}"`, which is '
                f'ordinary attention: `chain_gamma` has no effect. Leave the argument out, or pass "{NAME}".'
            )

    def generate(self, *args, **kwargs):
        wanted = kwargs.get("use_cache")
        chained = self.config._attn_implementation == NAME
        if chained and kwargs.get("past_key_values") is None and (self.config.use_cache if wanted is None else wanted):
            kwargs["past_key_values"] = ChainedCache(self.config, self.static_length(args, kwargs))
            kwargs.pop("cache_implementation", None)
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def static_length(self, args: tuple, kwargs: dict[str, Any]) -> int | None:
        """Tokens that a static cache needs for these arguments of `generate`; None where a growing one is asked for.

        Raises:
            ValueError: for another implementation, or a static one without a length.
        """
        implementation = kwargs.get("cache_implementation")
        if implementation in (None, "dynamic"):
            return None
        if implementation != "static":
            raise ValueError(
                'Chained attention decodes from a `ChainedCache`: `cache_implementation` must be "dynamic" or '
                f'"static", got {implementation!r}.'
            )
        settings = kwargs.get("generation_config") or self.generation_config  # type: ignore[attr-defined]
        new, total = (kwargs.get(name, getattr(settings, name)) for name in ("max_new_tokens", "max_length"))
        names = ("inputs", "input_ids", "inputs_embeds")
        given = next((tensor for tensor in (*args[:1], *map(kwargs.get, names)) if tensor is not None), None)
        length = 1 if given is None else given.shape[1]
        if new is None and total is None:
            raise ValueError(
                '`cache_implementation="static"` needs to know how much to allocate: pass `max_new_tokens`.'
            )
        return length + new if new is not None else total


class ChacalLlamaForCausalLM(ChainedGenerationMixin, LlamaForCausalLM):
    """Llama with chained attention in every layer."""

    config: ChacalLlamaConfig
    config_class = ChacalLlamaConfig


class ChacalQwen2ForCausalLM(ChainedGenerationMixin, Qwen2ForCausalLM):
    """Qwen2 with chained attention in every layer; sliding windows are refused."""

    config: ChacalQwen2Config
    config_class = ChacalQwen2Config


class ChacalGPT2LMHeadModel(ChainedGenerationMixin, GPT2LMHeadModel):
    """GPT-2 with chained attention in every layer."""

    config: ChacalGPT2Config
    config_class = ChacalGPT2Config


__all__ = [
    "ChacalGPT2Config",
    "ChacalGPT2LMHeadModel",
    "ChacalLlamaConfig",
    "ChacalLlamaForCausalLM",
    "ChacalQwen2Config",
    "ChacalQwen2ForCausalLM",
]
