# SPDX-License-Identifier: Apache-2.0
"""Decoders with chained attention: base model, causal language model, sequence and token classifiers."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, find_packed_sequence_indices
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..hub_model import PushableModel
from .attention import ChacalAttention, ChainContext
from .cache_chacal import check_cache
from .configuration_chacal import ChacalConfig
from .gamma_chacal import MISSING_GAMMA, ChacalGamma
from .inputs_chacal import check_positions, check_values
from .masks_chacal import chain_context, create_masks


@dataclass
class ChacalModelOutputWithPast(BaseModelOutputWithPast):
    """As the base class, and `effective_weights`: None, or of each layer (B, H, rows asked for, n)."""

    effective_weights: tuple[Tensor, ...] | None = None


@dataclass
class ChacalCausalLMOutputWithPast(CausalLMOutputWithPast):
    """As the base class, and `effective_weights`: None, or of each layer (B, H, rows asked for, n)."""

    effective_weights: tuple[Tensor, ...] | None = None


class ChacalDecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: ChacalConfig, layer_idx: int):
        super().__init__()
        self.self_attn = ChacalAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        chain_context: ChainContext | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        attended, *_ = self.self_attn(
            self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            chain_context=chain_context,
            position_embeddings=position_embeddings,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


class ChacalPreTrainedModel(PushableModel, PreTrainedModel):
    config: ChacalConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChacalDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keys_to_ignore_on_load_missing = [MISSING_GAMMA]  # noqa: RUF012
    # of the full_attention layers; chained ones choose their backend by the device
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": ChacalDecoderLayer,
        "attentions": ChacalAttention,
        "effective_weights": OutputRecorder(ChacalAttention, index=2),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ChacalGamma):
            module.reset_parameters()

    def chained_layers(self) -> dict[int, ChacalAttention]:
        """The attention modules of the chained layers, by the number of their layer."""
        return {
            module.layer_idx: module
            for module in self.modules()
            if isinstance(module, ChacalAttention) and module.layer_type == "chained_attention"
        }

    @torch.no_grad()
    def get_gamma(self) -> list[list[float]]:
        """Discounts as they are now, for each layer and head; of ordinary layers what the config says."""
        spread = self.config.spread_gamma(self.config.gamma)
        for index, attention in self.chained_layers().items():
            gamma = attention.gamma
            spread[index] = list(gamma.values) if gamma.weight is None else gamma(gamma.weight.device)[0].tolist()
        return spread

    def set_gamma(self, gamma: Any) -> None:
        """Set the discounts, as `config.gamma`, in the model and in its config: a saved model keeps them.

        Raises:
            ValueError: if a discount is outside its range or the lengths do not fit.
        """
        before, spread = self.config.gamma, self.config.spread_gamma(gamma)
        self.config.gamma = gamma if isinstance(gamma, (int, float)) else spread
        try:
            self.config.validate_gamma()
        except ValueError:
            self.config.gamma = before
            raise
        for index, attention in self.chained_layers().items():
            attention.gamma.set(spread[index])

    @staticmethod
    def create_masks_for_generate(
        config: ChacalConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        position_ids: Tensor | None = None,
        **kwargs,
    ) -> dict[str, Tensor | None]:
        """Masks of both kinds of layers for a static cache, of shapes that do not change from token to token."""
        return create_masks(config, inputs_embeds, attention_mask, past_key_values, position_ids)


class ChacalModel(ChacalPreTrainedModel):
    """Tokens (B, n) -> `last_hidden_state` (B, n, hidden_size), with keys and Z for decoding."""

    def __init__(self, config: ChacalConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(ChacalDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        rope_config: Any = config  # has the fields it reads
        self.rotary_emb = LlamaRotaryEmbedding(rope_config) if config.use_rope else None
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> ChacalModelOutputWithPast:
        """
        Args:
            input_ids: (B, n) tokens, or `inputs_embeds` (B, n, hidden_size).
            attention_mask: (B, past + n), 0 for padding on either side; or for each type of layer what
                `create_masks_for_generate` returns: of `chained_attention` also a `ChainContext`, for several
                sequences that continue from one cache.
            position_ids: (B or 1, n). Without a mask and a cache, a position that does not follow the one before it
                starts a new packed sequence, which sees nothing of the others.
            past_key_values: a cache of earlier tokens, with this config's layers.
            use_cache: return the cache; `config.use_cache` if None.
            output_effective_weights: a list of positions: return, of every layer, how much of the value of each token
                the output of these is made of, over all hops (chacal 2.11), exactly and without an n x n matrix; True
                for all of them, which is one. Not with a past.

        Raises:
            ValueError: on unknown tokens, embeddings that are not finite, a sequence without any token, more positions
                than the config has, a mask or cache that does not fit. Values are not checked in compiled graphs, and
                tokens and masks on the CPU only.
            TypeError: if the cache is of another kind.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        # not `vocab_size`, which resizing the embeddings of a model around this one leaves as it was
        check_values(self.embed_tokens.num_embeddings, input_ids, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch, length = inputs_embeds.shape[:2]
        if past_key_values is not None:
            check_cache(past_key_values, self.config, batch)
        elif use_cache:
            past_key_values = DynamicCache(config=self.config)
        segments = None
        if position_ids is None:
            # a static cache gives its live counter, which the layers are about to move
            seen = 0 if past_key_values is None else past_key_values.get_seq_length() + 0
            position_ids = (torch.arange(length, device=inputs_embeds.device) + seen).unsqueeze(0)
        elif attention_mask is None and (past_key_values is None or self.is_empty(past_key_values)):
            segments = find_packed_sequence_indices(position_ids.expand(batch, -1))
        if self.rotary_emb is not None and not torch.compiler.is_compiling() and position_ids.device.type == "cpu":
            check_positions(self.config, int(position_ids.max()))
        context: ChainContext | None = None
        full_mask: Any = None
        if isinstance(attention_mask, dict):
            full_mask = attention_mask.get("full_attention")
        elif "full_attention" in self.config.layer_types:
            full_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values if segments is None else None,
                position_ids=position_ids,
            )
        wanted = kwargs.get("output_effective_weights") or kwargs.get("effective_recorder") is not None
        if wanted and isinstance(attention_mask, dict):
            raise ValueError("Effective weights need an `attention_mask` of shape (B, n), not one for each layer.")
        if "chained_attention" in self.config.layer_types or wanted:
            context = chain_context(attention_mask, past_key_values, segments, inputs_embeds)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids) if self.rotary_emb is not None else None
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=full_mask,
                chain_context=context,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                position_ids=position_ids,
                use_cache=use_cache,
                **kwargs,
            )
        return ChacalModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )

    @staticmethod
    def is_empty(cache: Cache) -> bool:
        return not torch.compiler.is_compiling() and int(cache.get_seq_length()) == 0


class ChacalForCausalLM(ChacalPreTrainedModel, GenerationMixin):
    """Language model: `logits` (B, n, vocab_size), the next-token loss where `labels` are given, `generate`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: ChacalConfig):
        super().__init__(config)
        self.model = ChacalModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> ChacalCausalLMOutputWithPast:
        """As `ChacalModel.forward`; `labels` (B, n) are the tokens themselves, -100 where there is no loss."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return ChacalCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            effective_weights=outputs.effective_weights,
        )


class ChacalForSequenceClassification(GenericForSequenceClassification, ChacalPreTrainedModel):
    """Classifier of whole sequences: `logits` (B, num_labels) from the last token that is no padding."""


class ChacalForTokenClassification(GenericForTokenClassification, ChacalPreTrainedModel):
    """Classifier of tokens: `logits` (B, n, num_labels)."""


__all__ = [
    "ChacalForCausalLM",
    "ChacalForSequenceClassification",
    "ChacalForTokenClassification",
    "ChacalModel",
    "ChacalPreTrainedModel",
]
