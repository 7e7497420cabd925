# SPDX-License-Identifier: Apache-2.0
"""Chained attention in other architectures, those built on the attention interface: `attn_implementation="chacal"`.

The discount is the config field `chain_gamma`; `chain_diagonal` and `chain_normalize` are optional. With
`chain_gamma_learnable` it is read from the module's `gamma` instead, which the classes of converted.py have. The
function and its mask function are registered together, by `register_attention`. Decoding needs a `ChainedCache`, which
keeps Z with one head for each query head; with any other cache the second call raises.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import find_packed_sequence_indices

from ...ops.chain import DIAGONALS, chain, check_gamma, gamma_per_head, key_bias, row_normalized, with_ones
from ...ops.chain_triton import can_use_triton
from .effective import PAST_REMEDY, EffectiveAttention, EffectiveRecorder
from .memory_chacal import TokenMemory


NAME = "chacal"
CACHE_REMEDY = "Pass `past_key_values=ChainedCache(model.config)`, or `use_cache=False`."


class ChainedCacheLayer(DynamicLayer):
    """Keys as in the base class, and Z, which the attention function appends once it has solved for it.

    Args:
        max_cache_len: None to grow with the sequence; or tokens to make room for at once, and the most it will hold.
    """

    def __init__(self, max_cache_len: int | None = None):
        super().__init__()
        self.max_cache_len = max_cache_len
        self._memory = {name: TokenMemory(max_cache_len) for name in ("keys", "values")}

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """All keys, and the new values only, marked with this layer for the attention function.

        Raises:
            ValueError: if the keys it holds are those of another model or batch, or it has no room.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self.extended("keys", key_states)
        value_states.chained_layer = self  # type: ignore[attr-defined]
        return self.keys, value_states

    def append(self, chained: Tensor) -> None:
        """Add Z (B, H, n, E) of the new tokens."""
        self.values = self.extended("values", chained)

    def extended(self, name: str, new: Tensor) -> Tensor:
        """What is held, `keys` or `values`, and the new tokens' (B, heads, n, features) after it."""
        held: Tensor = getattr(self, name)
        count = 0 if held.numel() == 0 else held.shape[2]
        if count and (held.shape[:2] != new.shape[:2] or held.shape[3] != new.shape[3]):
            raise ValueError(
                f"The cache holds {name} of shape {tuple(held.shape)}, which tokens of shape {tuple(new.shape)} "
                f"cannot follow: it belongs to another model or batch. {CACHE_REMEDY}"
            )
        total = count + new.shape[2]
        if self.max_cache_len is not None and total > self.max_cache_len:
            raise ValueError(
                f"The cache has room for {self.max_cache_len} tokens, not for {total}: make a larger one."
            )
        return self._memory[name].extended(held, new)

    def reset(self) -> None:
        for memory in self._memory.values():
            memory.clear()
        # dropped: older releases of the base class keep the length and write zeros
        self.keys = self.values = None
        self.is_initialized = False
        super().reset()

    def get_max_length(self) -> int:
        return -1 if self.max_cache_len is None else self.max_cache_len


class ChainedCache(Cache):
    """Cache of keys and Z for models with `attn_implementation="chacal"`, with or without grouped heads.

    Args:
        config: the model's config.
        max_cache_len: None for a cache that grows. A number for a static one, for decoding without gradients: its
            memory is allocated at once, for so many tokens, which must not be exceeded.
    """

    def __init__(self, config: PreTrainedConfig, max_cache_len: int | None = None):
        if max_cache_len is not None and max_cache_len < 1:
            raise ValueError(f"`max_cache_len` must be at least 1, got {max_cache_len}.")
        layers = config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(layers=[ChainedCacheLayer(max_cache_len) for _ in range(layers)])

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        if layer_idx >= len(self.layers):
            raise ValueError(f"The cache has {len(self.layers)} layers, the model has more. {CACHE_REMEDY}")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


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


def layer_gamma(module: nn.Module, values: list[float], device: torch.device) -> Tensor:
    """Discounts (H,), float32: those that the module trains where its config says so, `values` otherwise.

    Raises:
        ValueError: if they are to be trained and the module has none.
    """
    settings: Any = module
    if not getattr(settings.config, "chain_gamma_learnable", False):
        return gamma_per_head(torch.tensor(values), len(values), torch.float32, device)
    if not hasattr(settings, "gamma"):
        raise ValueError(
            f"`chain_gamma_learnable` is set, but {type(module).__name__} has no discounts to train: use "
            "ChacalLlamaForCausalLM, ChacalQwen2ForCausalLM or ChacalGPT2LMHeadModel, or set it to False."
        )
    return settings.gamma(device)[0]


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
    gamma = layer_gamma(module, values, query.device)
    segments = None
    positions = kwargs.get("position_ids")
    if attention_mask is None and not past and positions is not None:
        segments = find_packed_sequence_indices(positions.expand(query.shape[0], -1))
    bias = key_bias(attention_mask, torch.float32)
    scaling = value.shape[-1] ** -0.5 if scaling is None else scaling
    recorder: EffectiveRecorder | None = kwargs.get("effective_recorder")
    if recorder is not None:
        if past:
            raise ValueError(f"Provenance needs the queries of all tokens, not those after a past: {PAST_REMEDY}.")
        strict = diagonal == "strict"
        attention = EffectiveAttention(
            module, "chained_attention", query, key, value, gamma, scaling, strict, normalize, bias, segments
        )
        recorder.record(settings.layer_idx, attention)
    size, dtype = value.shape[-1], query.dtype
    past_key, past_chained = None, None
    if layer is not None and past:
        past_key, past_chained = key[:, :, :past], layer.values
    key = key[:, :, past:]
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
        bias,
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
        raise ValueError(
            "Chained attention cannot decode from a static or sliding cache of values. Pass "
            "`past_key_values=ChainedCache(model.config, max_cache_len=...)`."
        )
    if attention_mask is None:
        return None
    mask = attention_mask[:, -kv_length:].bool()
    if mask.device.type == "cpu" and not torch.compiler.is_compiling():
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
