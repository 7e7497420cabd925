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

from ...ops.chain import DIAGONALS
from .interface import NAME, ChainedCache, chain_settings


class ChainedConfigMixin:
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


class ChainedGenerationMixin:
    """`generate` decodes from a `ChainedCache` unless it is given a cache."""

    config: PreTrainedConfig

    def generate(self, *args, **kwargs):
        wanted = kwargs.get("use_cache")
        if kwargs.get("past_key_values") is None and (self.config.use_cache if wanted is None else wanted):
            if kwargs.get("cache_implementation") is not None:
                raise ValueError("Chained attention decodes from a `ChainedCache`: leave `cache_implementation` out.")
            kwargs["past_key_values"] = ChainedCache(self.config)
        return super().generate(*args, **kwargs)  # type: ignore[misc]


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
