# SPDX-License-Identifier: Apache-2.0
"""Cache layers of chained attention: keys, and Z in the place of the values.

Subclassing registers them with transformers under the layer type, so `DynamicCache(config=...)`,
`StaticCache(config=...)` and all that `generate` builds use them. Z has one head for each query head, keys one
for each key head.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from .configuration_chacal import ChacalConfig
from .memory_chacal import TokenMemory


class ChainedDynamicLayer(DynamicLayer):
    """Grows with the sequence. Z never changes once written: cropping and reordering are those of the base class."""

    _layer_type = "chained_attention"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._memory = {"keys": TokenMemory(), "values": TokenMemory()}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._memory["keys"].extended(self.keys, key_states)
        self.values = self._memory["values"].extended(self.values, value_states)
        return self.keys, self.values

    def reset(self) -> None:
        for memory in self._memory.values():
            memory.clear()
        # dropped: older releases of the base class keep the length and write zeros
        self.keys = self.values = None
        self.is_initialized = False
        super().reset()


class ChainedStaticLayer(StaticLayer):
    """Keys (B, H_kv, capacity, D) and Z (B, H, capacity, E), written in place."""

    _layer_type = "chained_attention"
    supports_early_init = False  # it would give Z the heads of the keys

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        batch, heads, _, size = value_states.shape
        self.values = torch.zeros(
            (batch, heads, self.max_cache_len, size), dtype=value_states.dtype, device=self.device
        )
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.values)


def check_cache(cache: Cache, config: ChacalConfig, batch: int) -> None:
    """Raise unless `cache` can hold, and holds nothing but, what a model of this config writes.

    Raises:
        TypeError: if it is no `Cache`, or its layers are of another kind.
        ValueError: if its sizes are those of another model or batch.
    """
    if not isinstance(cache, Cache):
        raise TypeError(f"`past_key_values` must be a transformers `Cache`, got {type(cache).__name__}.")
    remedy = "Pass `DynamicCache(config=model.config)` or `StaticCache(config=model.config, max_cache_len=...)`."
    if len(cache.layers) != config.num_hidden_layers:
        raise ValueError(
            f"`past_key_values` has {len(cache.layers)} layers where the model has {config.num_hidden_layers}. "
            f"{remedy}"
        )
    for index, (any_layer, kind) in enumerate(zip(cache.layers, config.layer_types)):
        layer: Any = any_layer
        chained = isinstance(layer, (ChainedDynamicLayer, ChainedStaticLayer))
        plain = type(layer) in (DynamicLayer, StaticLayer)
        if not (chained if kind == "chained_attention" else plain):
            raise TypeError(
                f"Layer {index} of `past_key_values` is a {type(layer).__name__}, which cannot serve {kind}: it would "
                f"give wrong numbers. {remedy}"
            )
        if layer.keys is None or layer.keys.numel() == 0:
            continue
        heads = config.num_attention_heads if chained else config.num_key_value_heads
        found = (layer.keys.shape[0], layer.keys.shape[1], layer.values.shape[1])
        if found != (batch, config.num_key_value_heads, heads):
            raise ValueError(
                f"Layer {index} of `past_key_values` holds batch, key heads, value heads = {found}, but this model "
                f"and input need {(batch, config.num_key_value_heads, heads)}: it belongs to another model or batch."
            )
        size = cached_size(config) if chained else config.head_dim
        if layer.values.shape[-1] != size or layer.keys.shape[-1] != size:
            raise ValueError(
                f"Layer {index} of `past_key_values` holds {layer.keys.shape[-1]} features a head, but this model "
                f"needs {size}: it belongs to another model."
            )


def cached_size(config: ChacalConfig) -> int:
    """Features a cached head has: with `normalize` the row sums come with it."""
    return config.head_dim + 8 - config.head_dim % 8 if config.normalize else config.head_dim


__all__ = ["ChainedDynamicLayer", "ChainedStaticLayer", "check_cache"]
