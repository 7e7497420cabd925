# SPDX-License-Identifier: Apache-2.0
"""What the chained layers of one forward pass may see, from a padding mask and a cache. No n x n mask is made."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from ...ops.chain import key_bias
from .attention import ChainContext
from .configuration_chacal import ChacalConfig


def chain_context(
    attention_mask: Tensor | dict[str, Any] | None,
    cache: Cache | None,
    segments: Tensor | None,
    inputs_embeds: Tensor,
) -> ChainContext:
    """The context of a forward pass over (B, n) new tokens.

    Args:
        attention_mask: None, (B, past + n), or for each type of layer what `create_masks` returned, or the context.
        cache: None, or the cache before this pass.
        segments: None or (B, n).
        inputs_embeds: (B, n, width).

    Raises:
        ValueError: for a mask of another shape, or one without any token in a sequence.
    """
    batch, length = inputs_embeds.shape[:2]
    if isinstance(attention_mask, dict):
        bias = attention_mask["chained_attention"]
        if isinstance(bias, ChainContext):
            return bias
        return ChainContext(0 if bias is None else bias.shape[1] - length, bias, segments)
    static = isinstance(cache, Cache) and cache.is_compileable
    if static and torch.compiler.is_compiling():
        bias = static_bias(attention_mask, cache, batch, length, inputs_embeds.device)
        return ChainContext(bias.shape[1] - length, bias, segments)
    past = 0 if cache is None else int(cache.get_seq_length())
    if attention_mask is None:
        return ChainContext(past, None, segments)
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] != past + length:
        raise ValueError(
            f"`attention_mask` must have shape ({batch}, {past + length}), 0 for padding, one column for each cached "
            f"and new token, got {tuple(attention_mask.shape)}: chained attention takes no other masks."
        )
    mask = attention_mask.to(inputs_embeds.device).bool()
    if mask.device.type == "cpu" and not torch.compiler.is_compiling():
        tokens = mask.any(1)
        if not tokens.all():
            raise ValueError(
                f"`attention_mask` of sequence {int(tokens.int().argmin())} is 0 everywhere: it has no token to "
                "attend to. Leave the sequence out, or give it a token."
            )
        if mask.all():
            return ChainContext(past, None, segments)
    return ChainContext(past, key_bias(mask, torch.float32), segments)


def static_bias(attention_mask: Tensor | None, cache: Cache, batch: int, length: int, device: torch.device) -> Tensor:
    """(B, capacity + n): which slots of a static cache, and which new tokens, are seen."""
    capacity = cache.get_max_length()
    seen = cache.get_seq_length()
    slots = torch.arange(capacity, device=device)
    if attention_mask is None:
        mask = torch.ones(batch, capacity, dtype=torch.bool, device=device)
    else:
        mask = F.pad(attention_mask.to(device).bool(), (0, capacity - attention_mask.shape[1]))
    new = mask.index_select(1, torch.arange(length, device=device) + seen)
    return key_bias(torch.cat([mask & (slots < seen), new], 1), torch.float32)


def create_masks(
    config: ChacalConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    cache: Cache | None,
    position_ids: Tensor | None,
) -> dict[str, Tensor | None]:
    """One mask for each type of layer, for `generate` with a static cache."""
    masks: dict[str, Any] = {}
    if "full_attention" in config.layer_types:
        masks["full_attention"] = create_causal_mask(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=position_ids,
        )
    if "chained_attention" in config.layer_types:
        batch, length = inputs_embeds.shape[:2]
        if not isinstance(cache, Cache) or int(cache.get_seq_length()) == 0:
            # nothing cached: the empty slots need not be read
            masks["chained_attention"] = (
                None if attention_mask is None else key_bias(attention_mask[:, :length], torch.float32)
            )
        else:
            masks["chained_attention"] = static_bias(attention_mask, cache, batch, length, inputs_embeds.device)
    return masks
