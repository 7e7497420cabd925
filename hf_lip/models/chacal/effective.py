# SPDX-License-Identifier: Apache-2.0
"""Attention layers of one forward pass as the linear maps of their values that they were; provenance reads them.

A layer's output is, before the bias of its output projection W_O, exactly the sum of one summand for each token j,
sum over heads h of R_tj^h W_O^h v_j^h, with R the effective weights over all hops (chacal 2.11).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.chain_effective import effective_product, one_hot_rows, resolve_rows


OUTPUT_PROJECTIONS = ("o_proj", "c_proj")
# floats of a chunk of summands
CHUNK = 2**24
PAST_REMEDY = "run the whole sequence in one call, with `use_cache=False`"


@dataclass(frozen=True, eq=False)
class EffectiveAttention:
    """One layer, as it was run: O(n D) memory a head, as its cache. Nothing is differentiable.

    Attributes:
        module: the attention module, for its output projection.
        layer_type: `chained_attention` or `full_attention`.
        query, key, value: (B, H, n, D), (B, H_kv, n, D) and (B, H_kv, n, E), rotated where the model does so.
        gamma: (H,); 0 in `full_attention`.
        scaling, strict, normalize, bias, segments: as in `hf_lip.ops.chain.chain`.
    """

    module: nn.Module
    layer_type: str
    query: Tensor
    key: Tensor
    value: Tensor
    gamma: Tensor
    scaling: float
    strict: bool
    normalize: bool
    bias: Tensor | None
    segments: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.query.dtype, torch.float32)

    @torch.no_grad()
    def weights(self, rows: list[int]) -> Tensor:
        """Effective weights of the tokens `rows`, counted from the start: (B, H, len(rows), n)."""
        return effective_product(
            one_hot_rows(rows, self.query, self.dtype),
            self.query.detach(),
            self.key.detach(),
            self.gamma.detach(),
            scaling=self.scaling,
            strict=self.strict,
            normalize=self.normalize,
            bias=self.bias,
            segments=self.segments,
        )

    @torch.no_grad()
    def projected_values(self) -> Tensor:
        """W_O^h v_j^h of every token and head: (B, H, n, width).

        Raises:
            ValueError: if the module's output projection has another name than those known here.
        """
        project: Any = next(
            (getattr(self.module, name) for name in OUTPUT_PROJECTIONS if hasattr(self.module, name)), None
        )
        if project is None:
            raise ValueError(
                f"{type(self.module).__name__} has no {' or '.join(OUTPUT_PROJECTIONS)}, so what its output is made "
                "of is not known; its effective weights are."
            )
        heads = self.query.shape[1]
        value = self.value.repeat_interleave(heads // self.value.shape[1], 1)
        batch, _, length, size = value.shape
        nothing: Tensor = project(value.new_zeros(1, 1, heads * size))
        parts = []
        for head in range(heads):
            alone = value.new_zeros(batch, length, heads, size)
            alone[:, :, head] = value[:, head]
            # the difference leaves the bias out; calling the module works for any kind of linear layer
            parts.append((project(alone.flatten(2)) - nothing).to(self.dtype))
        return torch.stack(parts, 1)

    @torch.no_grad()
    def head_contributions(self, rows: list[int]) -> Tensor:
        """Norms of each head's part of the summands, |R_tj^h| ||W_O^h v_j^h||: (B, H, len(rows), n)."""
        return self.weights(rows).abs() * torch.linalg.vector_norm(self.projected_values(), dim=-1).unsqueeze(2)

    @torch.no_grad()
    def contributions(self, rows: list[int], residual: Tensor | None = None) -> Tensor:
        """Norms of the summands of all heads together: (B, len(rows), n).

        Args:
            rows: tokens, counted from the start.
            residual: None, or the stream (B, n, width) beside the layer, added to each row's own summand.
        """
        weights, values = self.weights(rows), self.projected_values()
        step = max(1, CHUNK // max(1, values.shape[0] * values.shape[2] * values.shape[3]))
        parts = []
        for start in range(0, len(rows), step):
            chosen = rows[start : start + step]
            summands = torch.einsum("bhrj,bhjw->brjw", weights[:, :, start : start + step], values)
            if residual is not None:
                summands[:, range(len(chosen)), chosen] += residual[:, chosen].to(summands)
            parts.append(torch.linalg.vector_norm(summands, dim=-1))
        return torch.cat(parts, 1)


@dataclass
class EffectiveRecorder:
    """Passed to a model as `effective_recorder`, it is filled by the layers of that forward pass, by their number."""

    layers: dict[int, EffectiveAttention] = field(default_factory=dict)

    def record(self, layer_idx: int, attention: EffectiveAttention) -> None:
        self.layers[layer_idx] = attention


def asked_rows(asked: Any, length: int) -> list[int] | None:
    """The rows that `output_effective_weights` asks for, from the start; None if it asks for none.

    Raises:
        ValueError: for what is neither a boolean nor a list of the positions of a sequence.
    """
    if asked is None or asked is False:
        return None
    if asked is True:
        return list(range(length))
    if not isinstance(asked, (list, tuple, range)):
        raise ValueError(f"`output_effective_weights` must be True or a list of positions, got {asked!r}.")
    return resolve_rows(list(asked), length, "output_effective_weights") or None


__all__ = ["EffectiveAttention", "EffectiveRecorder", "asked_rows"]
