# SPDX-License-Identifier: Apache-2.0
"""What a language model with chained attention refuses before it runs. Nothing is checked in compiled graphs."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from ...ops.chain import check_finite


def check_values(known: int, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
    """Raise ValueError on an empty input, on tokens, if on the CPU, not below `known`, on embeddings not finite."""
    given = input_ids if inputs_embeds is None else inputs_embeds
    if given is None:
        return
    if 0 in given.shape[:2]:
        raise ValueError(f"The input is empty, shape {tuple(given.shape)}: pass at least one token.")
    if torch.compiler.is_compiling():
        return
    if inputs_embeds is not None:
        check_finite(inputs_embeds=inputs_embeds)
    elif given.device.type == "cpu":
        low, high = int(given.min()), int(given.max())
        if low < 0 or high >= known:
            raise ValueError(
                f"`input_ids` must lie in [0, {known - 1}], got [{low}, {high}]: does the tokenizer "
                "belong to another model?"
            )


def check_positions(config: PreTrainedConfig, last: int) -> None:
    """Raise ValueError if position `last` is beyond those that a model has, stretched rotary ones included."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "dynamic":  # grows with the sequence
        return
    trained = config.max_position_embeddings
    stretched = rope.get("factor", 1.0) * rope.get("original_max_position_embeddings", trained)
    limit = max(trained, int(stretched))
    if last >= limit:
        raise ValueError(
            f"The sequence reaches position {last}, but by `max_position_embeddings` and `rope_parameters` the model "
            f"has {limit}: shorten it, or train a model with more positions."
        )


def checked(forward: Callable, cache_remedy: str) -> Callable:
    """The `forward` of a language model of transformers, with the checks of this module before it.

    Raises:
        ValueError: on unknown tokens, embeddings that are not finite, more positions than the model has.
        TypeError: if `past_key_values` is no cache.
    """
    signature = inspect.signature(forward)

    @functools.wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            given = signature.bind_partial(self, *args, **kwargs).arguments
            input_ids, inputs_embeds = given.get("input_ids"), given.get("inputs_embeds")
            check_values(self.get_input_embeddings().num_embeddings, input_ids, inputs_embeds)
            past, positions = given.get("past_key_values"), given.get("position_ids")
            if past is not None and not isinstance(past, Cache):
                raise TypeError(
                    f"`past_key_values` must be a transformers `Cache`, got {type(past).__name__}. {cache_remedy}"
                )
            tokens = input_ids if inputs_embeds is None else inputs_embeds
            if positions is None and tokens is not None:
                seen = 0 if past is None else int(past.get_seq_length())
                check_positions(self.config, seen + tokens.shape[1] - 1)
            elif positions is not None and positions.device.type == "cpu" and positions.numel():
                check_positions(self.config, int(positions.max()))
        return forward(self, *args, **kwargs)

    return run


__all__ = ["check_positions", "check_values", "checked"]
