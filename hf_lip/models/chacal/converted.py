# SPDX-License-Identifier: Apache-2.0
"""Llama, Qwen2 and GPT-2 with chained attention: the choice and its discount stay in the checkpoint.

    config = ChacalLlamaConfig(**LlamaConfig.from_pretrained(folder).to_dict() | {"chain_gamma": 0.0})
    model = ChacalLlamaForCausalLM.from_pretrained(folder, config=config)

has the weights of an ordinary checkpoint and, at `chain_gamma=0`, its logits. With `chain_gamma_learnable` the
discounts are trained from there, one for each head.
"""

from typing import Any

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.utils import logging

from ...ops.chain import DIAGONALS
from ..hub_model import PushableModel
from ..shim import InstalledSettings
from .gamma_chacal import MISSING_GAMMA, ChacalGamma, check_learnable, spread_gamma
from .inputs_chacal import checked
from .interface import CACHE_REMEDY, NAME, ChainedCache


logger = logging.get_logger(__name__)

ATTENTION = (LlamaAttention, Qwen2Attention, GPT2Attention)


class ChainedConfigMixin(InstalledSettings):
    """Fields `chain_gamma` (a number, or for each layer a number or one for each head), `chain_gamma_learnable`
    (train one discount for each head, started there), `chain_diagonal`, `chain_normalize`, checked when the config is
    made; the attention implementation is chosen by the class."""

    def set_up_chain(self, kwargs: dict[str, Any]) -> None:
        kwargs.setdefault("attn_implementation", NAME)

    def spread_gamma(self, gamma: Any) -> list[list[float]]:
        """One discount for each layer and head, from what `chain_gamma` may be.

        Raises:
            ValueError: if the lengths do not fit or a discount is outside its range.
        """
        config: Any = self
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        return spread_gamma(gamma, layers, heads, config.chain_diagonal, config.chain_normalize, "chain_gamma")

    def check_chain(self) -> None:
        """Raise ValueError unless the fields fit each other."""
        config: Any = self
        if config.chain_diagonal not in DIAGONALS:
            raise ValueError(f"`chain_diagonal` must be one of {', '.join(DIAGONALS)}, got {config.chain_diagonal!r}.")
        for values in self.spread_gamma(config.chain_gamma):
            if config.chain_gamma_learnable:
                check_learnable(values, "chain_gamma")


class ChacalLlamaConfig(ChainedConfigMixin, LlamaConfig):
    model_type = "chacal_llama"

    chain_gamma: int | float | list | tuple = 0.0
    chain_gamma_learnable: bool = False
    chain_diagonal: str = "strict"
    chain_normalize: bool = False

    def __post_init__(self, **kwargs):
        self.set_up_chain(kwargs)
        super().__post_init__(**kwargs)
        self.check_chain()


class ChacalQwen2Config(ChainedConfigMixin, Qwen2Config):
    model_type = "chacal_qwen2"

    chain_gamma: int | float | list | tuple = 0.0
    chain_gamma_learnable: bool = False
    chain_diagonal: str = "strict"
    chain_normalize: bool = False

    def __post_init__(self, **kwargs):
        self.set_up_chain(kwargs)
        super().__post_init__(**kwargs)
        self.check_chain()


class ChacalGPT2Config(ChainedConfigMixin, GPT2Config):
    model_type = "chacal_gpt2"

    chain_gamma: int | float | list | tuple = 0.0
    chain_gamma_learnable: bool = False
    chain_diagonal: str = "strict"
    chain_normalize: bool = False

    def __post_init__(self, **kwargs):
        self.set_up_chain(kwargs)
        super().__post_init__(**kwargs)
        self.check_chain()


class ChainedGenerationMixin(PushableModel):
    """`generate` decodes from a `ChainedCache` unless it is given a cache, or the attention was made ordinary.

    With `chain_gamma_learnable` each attention module has its discounts as `gamma`, named as in the chacal family.
    """

    config: PreTrainedConfig
    _keys_to_ignore_on_load_missing: Any = [MISSING_GAMMA]  # noqa: RUF012
    # its static cache is read up to the last token, which is another length every time
    _can_compile_fullgraph = False

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        # by the name of GPT-2's class transformers does not know it, and says so at the first loss
        self.loss_type = "ForCausalLM"
        if self.config._attn_implementation != NAME:
            logger.warning(
                f'{type(self).__name__} has `attn_implementation="{self.config._attn_implementation}"`, which is '
                f'ordinary attention: `chain_gamma` has no effect. Leave the argument out, or pass "{NAME}".'
            )
        settings: Any = self.config
        if settings.chain_gamma_learnable:
            spread = settings.spread_gamma(settings.chain_gamma)
            for index, attention in self.attention_modules().items():
                gamma = ChacalGamma(spread[index], True, settings.chain_diagonal)
                gamma.reset_parameters()
                attention.gamma = gamma

    def attention_modules(self) -> dict[int, nn.Module]:
        """The self-attention modules, by the number of their layer."""
        model: Any = self
        return {
            module.layer_idx: module
            for module in model.modules()
            if isinstance(module, ATTENTION) and not getattr(module, "is_cross_attention", False)
        }

    def initialize_weights(self) -> None:
        """As in transformers, where the base model inside, which knows nothing of discounts, has its own turn."""
        super().initialize_weights()  # type: ignore[misc]
        for attention in self.attention_modules().values():
            gamma = getattr(attention, "gamma", None)
            if isinstance(gamma, ChacalGamma):
                gamma.reset_parameters()  # leaves those that were loaded

    @torch.no_grad()
    def get_gamma(self) -> list[list[float]]:
        """Discounts as they are now, for each layer and head."""
        settings: Any = self.config
        spread = settings.spread_gamma(settings.chain_gamma)
        if settings.chain_gamma_learnable:
            for index, attention in self.attention_modules().items():
                gamma: Any = attention.gamma
                spread[index] = gamma(gamma.weight.device)[0].tolist()
        return spread

    def set_gamma(self, gamma: Any) -> None:
        """Set the discounts, as `config.chain_gamma`, in the model and in its config: a saved model keeps them.

        Raises:
            ValueError: if a discount is outside its range or the lengths do not fit.
        """
        settings: Any = self.config
        before, spread = settings.chain_gamma, settings.spread_gamma(gamma)
        settings.chain_gamma = list(gamma) if isinstance(gamma, tuple) else gamma
        try:
            settings.check_chain()
        except ValueError:
            settings.chain_gamma = before
            raise
        if settings.chain_gamma_learnable:
            for index, attention in self.attention_modules().items():
                found: Any = attention.gamma
                found.set(spread[index])

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
    forward = checked(LlamaForCausalLM.forward, CACHE_REMEDY)


class ChacalQwen2ForCausalLM(ChainedGenerationMixin, Qwen2ForCausalLM):
    """Qwen2 with chained attention in every layer; sliding windows are refused."""

    config: ChacalQwen2Config
    config_class = ChacalQwen2Config
    forward = checked(Qwen2ForCausalLM.forward, CACHE_REMEDY)


class ChacalGPT2LMHeadModel(ChainedGenerationMixin, GPT2LMHeadModel):
    """GPT-2 with chained attention in every layer."""

    config: ChacalGPT2Config
    config_class = ChacalGPT2Config
    forward = checked(GPT2LMHeadModel.forward, CACHE_REMEDY)


__all__ = [
    "ChacalGPT2Config",
    "ChacalGPT2LMHeadModel",
    "ChacalLlamaConfig",
    "ChacalLlamaForCausalLM",
    "ChacalQwen2Config",
    "ChacalQwen2ForCausalLM",
]
