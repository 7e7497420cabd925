# SPDX-License-Identifier: Apache-2.0
"""Chained attention in other architectures, those built on the attention interface: `attn_implementation="chacal"`.

The discount is the config field `chain_gamma`; `chain_diagonal` and `chain_normalize` are optional. The function and
its mask function are registered together, by `register_attention`. Decoding needs a `ChainedCache`, which keeps Z with
one head for each query head; with any other cache the second call raises.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import find_packed_sequence_indices

from ...ops.chain import DIAGONALS, chain, check_gamma, gamma_per_head, key_bias, row_normalized, with_ones
from ...ops.chain_triton import can_use_triton


NAME = "chacal"
CACHE_REMEDY = "Pass `past_key_values=ChainedCache(model.config)`, or `use_cache=False`."


class ChainedCacheLayer(DynamicLayer):
    """Keys as in the base class, and Z, which the attention function appends once it has solved for it."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """All keys, and the new values only, marked with this layer for the attention function."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        value_states.chained_layer = self  # type: ignore[attr-defined]
        return self.keys, value_states

    def append(self, chained: Tensor) -> None:
        """Add Z (B, H, n, E) of the new tokens."""
        self.values = torch.cat([self.values, chained], dim=-2)


class ChainedCache(Cache):
    """Cache of keys and Z for models with `attn_implementation="chacal"`, with or without grouped heads.

    Args:
        config: the model's config.
    """

    def __init__(self, config: PreTrainedConfig):
        layers = config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(layers=[ChainedCacheLayer() for _ in range(layers)])


def chain_settings(config: PreTrainedConfig, layer_idx: int, heads: int) -> tuple[list[float], str, bool]:
    """Discounts for each head, diagonal and normalisation of a layer, from the fields of its config.

    Raises:
        ValueError: if a field is missing or out of range.
    """
    gamma = getattr(config, "chain_gamma", None)
    if gamma is None:
        raise ValueError(
            '`attn_implementation="chacal"` needs the discount in the config: set `config.chain_gamma` (0 is ordinary '
            "attention), a number or one for each layer."
        )
    diagonal = getattr(config, "chain_diagonal", "strict")
    normalize = getattr(config, "chain_normalize", False)
    if diagonal not in DIAGONALS:
        raise ValueError(f"`chain_diagonal` must be one of {', '.join(DIAGONALS)}, got {diagonal!r}.")
    entry = gamma[layer_idx] if isinstance(gamma, (list, tuple)) else gamma
    values = list(entry) if isinstance(entry, (list, tuple)) else [entry] * heads
    if len(values) != heads:
        raise ValueError(f"`chain_gamma` of layer {layer_idx} needs one entry for each of {heads} heads.")
    for value in values:
        check_gamma(value, diagonal, normalize, name="chain_gamma")
    return [float(value) for value in values], diagonal, normalize


def chained_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What the attention interface calls. Attention dropout is left out: it would break the discount (chacal 2.3).

    Args:
        query: (B, H, n, D).
        key: (B, H_kv, past + n, D).
        value: (B, H_kv, n, D), from a `ChainedCache` or without a cache.
        attention_mask: (B, past + n) or None, from `chained_mask`.

    Raises:
        ValueError: if the cache cannot hold Z, the layer is not causal or has a window, or settings are missing.
    """
    settings: Any = module
    heads, length = query.shape[1], query.shape[2]
    if not getattr(settings, "is_causal", True) or getattr(settings, "is_cross_attention", False):
        raise ValueError(f"{type(module).__name__} is not causal self-attention: chained attention needs it to be.")
    if kwargs.get("sliding_window") is not None:
        raise ValueError("Chained attention follows chains through all tokens and has no sliding window.")
    layer: ChainedCacheLayer | None = getattr(value, "chained_layer", None)
    past = key.shape[2] - length
    if layer is None and past:
        raise ValueError(f"The cache in use holds values, but chained attention needs Z. {CACHE_REMEDY}")
    values, diagonal, normalize = chain_settings(settings.config, settings.layer_idx, heads)
    gamma = gamma_per_head(torch.tensor(values), heads, torch.float32, query.device)
    segments = None
    positions = kwargs.get("position_ids")
    if attention_mask is None and not past and positions is not None:
        segments = find_packed_sequence_indices(positions.expand(query.shape[0], -1))
    size, dtype = value.shape[-1], query.dtype
    past_key, past_chained = None, None
    if layer is not None and past:
        past_key, past_chained = key[:, :, :past], layer.values
    key = key[:, :, past:]
    scaling = size**-0.5 if scaling is None else scaling
    if normalize:
        query, key, value = with_ones(query, key, value)
        if past_key is not None:
            past_key = torch.nn.functional.pad(past_key, (0, query.shape[-1] - past_key.shape[-1]))
    output, chained = chain(
        query,
        key,
        value,
        gamma,
        past_key,
        past_chained,
        key_bias(attention_mask, torch.float32),
        segments,
        scaling=scaling,
        strict=diagonal == "strict",
        triton=can_use_triton(query, value),
    )
    if layer is not None:
        layer.append(chained.to(dtype) if diagonal == "strict" else chained)
    output = row_normalized(output, size) if normalize else output * (1.0 - gamma)[:, None, None]
    return output.to(dtype).transpose(1, 2).contiguous(), None


def chained_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The padding mask (B, past + n) itself, None if all is seen: the attention function knows order and packing.

    Raises:
        ValueError: for caches of a fixed size or with a window, and for sequences without any token.
    """
    if kv_offset or kv_length != int(q_offset) + q_length:
        raise ValueError(f"Chained attention cannot decode from a static or sliding cache here. {CACHE_REMEDY}")
    if attention_mask is None:
        return None
    mask = attention_mask[:, -kv_length:].bool()
    if mask.device.type == "cpu":
        if not mask.any(1).all():
            raise ValueError("`attention_mask` of a sequence is 0 everywhere: it has no token to attend to.")
        if mask.all():
            return None
    return mask


def register_attention() -> None:
    """Register function and mask under the name "chacal". Without the mask function padding would be ignored."""
    AttentionInterface.register(NAME, chained_attention_forward)
    AttentionMaskInterface.register(NAME, chained_mask)


__all__ = ["ChainedCache", "ChainedCacheLayer", "chained_attention_forward", "chained_mask", "register_attention"]
