# SPDX-License-Identifier: Apache-2.0
"""The attention module of chacal: chained or ordinary, by its layer's type."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from ...ops.chain import attention_matrix, chain, row_normalized, with_ones
from ...ops.chain_triton import can_use_triton
from .configuration_chacal import ChacalConfig
from .effective import PAST_REMEDY, EffectiveAttention, EffectiveRecorder, asked_rows
from .gamma_chacal import ChacalGamma


@dataclass(frozen=True)
class ChainContext:
    """What every chained layer of one forward pass shares.

    Attributes:
        past: columns of the cache to read, 0 for none. A static cache is read whole in compiled graphs.
        bias: None or (B, past + n), 0 for keys that are seen, a large negative number for others.
        segments: None or (B, n), numbers of packed sequences, each of which continues from the cache.
        past_seen: None or (B, n), how many columns of the cache a token sees.
    """

    past: int
    bias: Tensor | None = None
    segments: Tensor | None = None
    past_seen: Tensor | None = None


class ChacalAttention(nn.Module):
    """Multi-head attention with projections named as in Llama.

    In a `chained_attention` layer the cache holds keys and Z. The second output is the one-hop softmax weights, with
    `attn_implementation="eager"` only; the third the effective weights of the rows asked for.
    """

    def __init__(self, config: ChacalConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.layer_type = config.layer_types[layer_idx]
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, width, bias=bias)
        if self.layer_type == "chained_attention":
            self.gamma = ChacalGamma(config.gamma_of_layer(layer_idx), config.gamma_learnable, config.diagonal)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        chain_context: ChainContext | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        output_effective_weights: bool | list[int] = False,
        effective_recorder: EffectiveRecorder | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(B, n, width) -> (B, n, width), the one-hop weights (B, H, n, past + n or slots of a static cache) or None,
        and the effective weights (B, H, rows asked for, n) or None."""
        shape = hidden_states.shape[:-1]
        query, key, value = (
            project(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if position_embeddings is not None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        effective = None
        if output_effective_weights or effective_recorder is not None:
            attention = self.effective_attention(query, key, value, chain_context)
            rows = asked_rows(output_effective_weights, query.shape[2])
            effective = None if rows is None else attention.weights(rows)
            if effective_recorder is not None:
                effective_recorder.record(self.layer_idx, attention)
        if self.layer_type == "chained_attention":
            output, weights = self.chained(query, key, value, chain_context, past_key_values)
        else:
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, self.layer_idx)
            attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
            dropout = self.attention_dropout if self.training else 0.0
            output, weights = attend(
                self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
            )
        return self.o_proj(output.reshape(*shape, -1)), weights, effective

    def effective_attention(
        self, query: Tensor, key: Tensor, value: Tensor, context: ChainContext
    ) -> EffectiveAttention:
        """This layer as the linear map of its values that it is in this forward pass."""
        if context.past:
            raise ValueError(
                "Effective weights need the queries of all tokens, and a cache holds none of those before: "
                f"{PAST_REMEDY}."
            )
        chained = self.layer_type == "chained_attention"
        gamma = self.gamma(query.device)[0] if chained else query.new_zeros(query.shape[1], dtype=torch.float32)
        return EffectiveAttention(
            self,
            self.layer_type,
            query,
            key,
            value,
            gamma,
            scaling=self.scaling,
            strict=self.config.diagonal == "strict",
            normalize=self.config.normalize and chained,
            bias=context.bias,
            segments=context.segments,
        )

    def chained(
        self, query: Tensor, key: Tensor, value: Tensor, context: ChainContext, past_key_values: Cache | None
    ) -> tuple[Tensor, Tensor | None]:
        """Y (B, n, H, E) and the one-hop weights or None; writes keys and Z into the cache."""
        config, dtype, past_key, past_chained = self.config, query.dtype, None, None
        gamma, prefactor = self.gamma(query.device)
        if config.normalize:
            query, key, value = with_ones(query, key, value)
        if past_key_values is not None and context.past:
            layer: Any = past_key_values.layers[self.layer_idx]
            past_key = layer.keys[:, :, : context.past].to(query.device)
            past_chained = layer.values[:, :, : context.past].to(query.device)
        output, chained = chain(
            query,
            key,
            value,
            gamma,
            past_key,
            past_chained,
            context.bias,
            context.segments,
            context.past_seen,
            scaling=self.scaling,
            strict=config.diagonal == "strict",
            block=config.chunk_size,
            triton=can_use_triton(query, value, context.past_seen),
        )
        if past_key_values is not None:
            # Z of `keep` can be many times larger than V, and its rounding with it (chacal 2.5)
            past_key_values.update(key, chained.to(dtype) if config.diagonal == "strict" else chained, self.layer_idx)
        if config.normalize:
            output = row_normalized(output, self.head_dim)
        else:
            output = output * prefactor
        weights = None
        if config._attn_implementation == "eager":
            weights = self.one_hop_weights(query, key, past_key, context).to(dtype)
            if past_key_values is not None and past_key_values.is_compileable:
                weights = self.at_slots(weights, past_key_values.layers[self.layer_idx])
        return output.to(dtype).transpose(1, 2), weights

    def one_hop_weights(self, query: Tensor, key: Tensor, past_key: Tensor | None, context: ChainContext) -> Tensor:
        """The softmax matrix A, rows of the new tokens: (B, H, n, past + n)."""
        keys = key if past_key is None else torch.cat([past_key, key], 2)
        keys = keys.repeat_interleave(self.num_key_value_groups, 1)
        length, total = query.shape[2], keys.shape[2]
        seen = torch.ones(length, total, dtype=torch.bool, device=query.device).tril_(total - length)[None, None]
        if context.bias is not None:
            seen = seen & (context.bias[:, None, None, :] == 0)
        if context.segments is not None:
            same = context.segments[:, None, :, None] == context.segments[:, None, None, :]
            seen = seen & F.pad(same, (total - length, 0), value=True)
        if context.past_seen is not None:
            before = torch.arange(total, device=query.device) < context.past_seen[:, None, :, None]
            before[..., total - length :] = True
            seen = seen & before
        return attention_matrix(query.float(), keys.float(), self.scaling, seen)

    @staticmethod
    def at_slots(weights: Tensor, layer: Any) -> Tensor:
        """One-hop weights with one column for each slot of a static cache, as other layers return them: those of the
        new tokens, which come last, where the tokens were written."""
        length = weights.shape[2]
        past = weights.shape[3] - length
        slots = torch.arange(length, device=weights.device) + (layer.cumulative_length - length)
        columns = F.pad(weights[..., :past], (0, layer.max_cache_len - past))
        return columns.index_copy(3, slots, weights[..., past:])


__all__ = ["ChacalAttention", "ChainContext"]
