# SPDX-License-Identifier: Apache-2.0
"""What in a text an output came from, over all hops of its chained layers (chacal 2.11, 7.6)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.chain_effective import resolve_rows
from .effective import EffectiveAttention, EffectiveRecorder
from .interface import NAME
from .modeling_chacal import ChacalPreTrainedModel


@dataclass(frozen=True, eq=False)
class Provenance:
    """What the attention layers of one forward pass read, for some positions of it.

    Each layer's output at a position is exactly a sum of one summand for each token, plus the bias of its output
    projection. `weights` are the factors of the tokens' values in it, `contributions` the norms of the summands. Both
    speak of one layer and of what stands at a token's place below it, which lower layers may have brought there;
    `rollout_estimate` is a heuristic for all layers together.

    Attributes:
        positions: the tokens explained, counted from the start.
        layers: the layers as they were run.
        hidden_states: the residual stream (B, n, width) below each layer.
        logits: (B, len(positions), vocabulary) of these positions; None if the model has no logits of tokens.
    """

    positions: tuple[int, ...]
    layers: tuple[EffectiveAttention, ...]
    hidden_states: tuple[Tensor, ...]
    logits: Tensor | None

    @property
    def layer_types(self) -> tuple[str, ...]:
        """`chained_attention` or `full_attention` of each layer."""
        return tuple(layer.layer_type for layer in self.layers)

    @property
    def chained_layers(self) -> tuple[int, ...]:
        """Numbers of the chained layers."""
        return tuple(index for index, kind in enumerate(self.layer_types) if kind == "chained_attention")

    def layer(self, index: int) -> EffectiveAttention:
        """Layer `index`; negative ones count from the last.

        Raises:
            ValueError: if the model does not have it.
        """
        count = len(self.layers)
        if not -count <= index < count:
            raise ValueError(f"`layer` must lie in [{-count}, {count - 1}] for {count} layers, got {index}.")
        return self.layers[index]

    def weights(self, layer: int = -1) -> Tensor:
        """Effective weights of a layer over all hops, exactly: (B, H, len(positions), n), float32 or above.

        How much of each token's value the head's output is made of. Rows sum to 1 in a `full_attention` layer and with
        `keep` or `normalize`; they are zero at padding. Heads with a negative discount have negative weights too.
        """
        return self.layer(layer).weights(list(self.positions))

    def contributions(self, layer: int = -1, *, per_head: bool = False) -> Tensor:
        """Norms of a layer's summands, in the units of the residual stream: (B, len(positions), n), or with `per_head`
        (B, H, len(positions), n) of each head's part.

        A token with a large weight and a value near zero contributes nothing, as those along a chain may. The summands
        are exact; their norms do not add up to the norm of their sum.

        Raises:
            ValueError: if the layer does not exist, or its output projection is not known.
        """
        attention, rows = self.layer(layer), list(self.positions)
        return attention.head_contributions(rows) if per_head else attention.contributions(rows)

    def rollout_estimate(self) -> Tensor:
        """Shares of all tokens of the input in the last layer's stream at the positions: (B, len(positions), n).

        A heuristic, attention rollout (Abnar and Zuidema, ACL 2020) with norms in the place of weights (Kobayashi et
        al., EMNLP 2021): each layer mixes the tokens in proportion to the norms of its summands, the residual stream
        counted with a token's own; the layers are multiplied. MLPs and norms are left out. Rows sum to 1. Below the
        last layer every row is needed: O(n^2) memory a head and O(n^3) time.
        """
        everything = list(range(self.layers[0].query.shape[2]))
        share = self._shares(len(self.layers) - 1, list(self.positions))
        for index in reversed(range(len(self.layers) - 1)):
            share = share @ self._shares(index, everything).to(share)
        return share

    def _shares(self, index: int, rows: list[int]) -> Tensor:
        norms = self.layers[index].contributions(rows, residual=self.hidden_states[index])
        sums = norms.sum(-1, keepdim=True)
        return norms / torch.where(sums == 0, torch.ones_like(sums), sums)


@torch.no_grad()
def provenance(
    model: nn.Module,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    positions: Sequence[int] = (-1,),
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
) -> Provenance:
    """What the outputs of a model at some positions were read from, over all hops: one forward pass without a cache.

    Works for the chacal family, and for every model that runs with `attn_implementation="chacal"` and hands keyword
    arguments down to its attention function, as the converted Llama, Qwen2 and GPT-2 do, with or without grouped
    heads. Layers are kept as queries, keys and values; no n x n matrix is made unless `rollout_estimate` is called.

    Args:
        model: in evaluation mode.
        input_ids: (B, n) tokens, or `inputs_embeds` (B, n, width).
        attention_mask: None, or (B, n), 0 for padding.
        positions: of the outputs, the same in every sequence; negative ones count from the end. What a language model
            says as token t + 1 it says at position t.
        position_ids: as the model takes them.

    Raises:
        ValueError: if the model has no chained attention or is in training mode, for positions that the sequence does
            not have, and whatever the model refuses.
    """
    config: Any = getattr(model, "config", None)
    ours = isinstance(model, ChacalPreTrainedModel)
    if not ours and getattr(config, "_attn_implementation", None) != NAME:
        raise ValueError(
            f"`model` is a {type(model).__name__} without chained attention: take one of the chacal family, or "
            "convert it with `hf_lip.convert_attention`."
        )
    if model.training:
        raise ValueError("`model` is in training mode, where dropout changes the answer: call `model.eval()`.")
    given = input_ids if inputs_embeds is None else inputs_embeds
    if given is None:
        raise ValueError("Pass `input_ids` or `inputs_embeds`.")
    rows = resolve_rows(list(positions), given.shape[1], "positions")
    if not rows:
        raise ValueError("`positions` is empty: ask for at least one.")
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    inputs |= {"inputs_embeds": inputs_embeds}
    recorder = EffectiveRecorder()
    outputs = model(
        **{name: value for name, value in inputs.items() if value is not None},
        use_cache=False,
        output_hidden_states=True,
        effective_recorder=recorder,
    )
    count = config.get_text_config(decoder=True).num_hidden_layers
    if sorted(recorder.layers) != list(range(count)):
        raise ValueError(
            f"`model` is a {type(model).__name__}, of whose {count} layers {len(recorder.layers)} recorded what they "
            "read: it does not hand keyword arguments down to its attention function, or not all layers call it."
        )
    logits = getattr(outputs, "logits", None)
    return Provenance(
        tuple(rows),
        tuple(recorder.layers[index] for index in range(count)),
        tuple(outputs.hidden_states[:count]),
        logits[:, rows] if logits is not None and logits.ndim == 3 else None,
    )


__all__ = ["Provenance", "provenance"]
