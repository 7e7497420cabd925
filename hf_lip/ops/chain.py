# SPDX-License-Identifier: Apache-2.0
"""Chained attention: softmax attention followed along chains of any length in one layer.

Fagnou, Caillon, Delattre, Allauzen, "Chain and Causal Attention for Efficient Entity Tracking", EMNLP 2024, eq. 5:

    Y = (1 - gamma) A (I - gamma A')^-1 V

with A the causal softmax attention and A' its strictly lower part (`diagonal="strict"`) or A itself (`"keep"`). With
Z = (I - gamma A')^-1 V, Z of a token depends on earlier tokens only and never changes: keys and Z are all a
decoder has to cache. gamma = 0 is ordinary attention.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .chain_arguments import (
    CHUNK_SIZE,
    DIAGONALS,
    check_finite,
    check_gamma,
    check_names,
    check_shapes,
    gamma_per_head,
    key_bias,
)
from .chain_autograd import ChainedAttentionFunction
from .chain_effective import effective_weights
from .chain_naive import attention_matrix, chain_system, naive_forward, sequence_numbers, visible
from .chain_onnx import products_forward
from .chain_step import single_step
from .chain_triton import can_use_triton


BACKENDS = ("auto", "torch", "triton")


class ChainedAttention(NamedTuple):
    """What `chained_attention` returns.

    Attributes:
        output: Y (B, H, n, E), in the dtype of the query.
        key: (B, H_kv, n, D), to be cached; with `normalize` it is padded by zeros.
        chained: Z (B, H, n, E), to be cached; with `normalize` it carries the row sums. float32 or float64.
    """

    output: Tensor
    key: Tensor
    chained: Tensor


def with_ones(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query and key padded by zeros, and value by a column of ones and zeros, to a common multiple of 8 features.

    The extra column of Z and of O then holds the row sums, by which `row_normalized` divides.
    """
    size = max(query.shape[-1], value.shape[-1] + 1)
    size += -size % 8
    ones = F.pad(value.new_ones(*value.shape[:-1], 1), (0, size - value.shape[-1] - 1))
    pad = (0, size - query.shape[-1])
    return F.pad(query, pad), F.pad(key, pad), torch.cat([value, ones], -1)


def row_normalized(output: Tensor, size: int) -> Tensor:
    """The first `size` features divided by the row sums of the operator; rows that see nothing stay zero."""
    sums = output[..., size : size + 1]
    return output[..., :size] / torch.where(sums == 0, torch.ones_like(sums), sums)


def chain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    past_key: Tensor | None = None,
    past_chained: Tensor | None = None,
    bias: Tensor | None = None,
    segments: Tensor | None = None,
    past_seen: Tensor | None = None,
    *,
    scaling: float,
    strict: bool,
    block: int = CHUNK_SIZE,
    triton: bool = False,
) -> tuple[Tensor, Tensor]:
    """O = A Z and Z without any check: what layers call. Computed in float32 or above.

    Args:
        query: (B, H, n, D); key, value: (B, H_kv, n, D) and (B, H_kv, n, E) with H a multiple of H_kv.
        gamma: (H,).
        past_key, past_chained: (B, H_kv, p, D) and (B, H, p, E) of earlier tokens, or None.
        bias: None or (B, p + n), see `key_bias`.
        segments: None or (B, n), numbers of packed sequences that never decrease; with a past, each continues from it.
        past_seen: None or (B, n), how many of the earlier tokens each token sees; not with `triton`.
        scaling: factor of the scores.
        strict: leave the diagonal out of the solve.
        block: rows of a tile.
        triton: use the Triton kernels.

    Returns:
        O and Z, both (B, H, n, E), float32 or float64.
    """
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    if gamma.dtype != dtype:
        gamma = gamma.to(dtype)
    if bias is not None:
        hidden = (bias[:, -length:] < 0)[:, None, :, None]
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
        bias = bias.to(dtype)
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        past_key = None if past_key is None else past_key.repeat_interleave(groups, 1)
    alone = length == 1 and past_seen is None and not torch.is_grad_enabled()
    if past_key is not None and past_chained is not None and alone:
        return single_step(query, key, value, gamma, past_key, past_chained, bias, scaling, strict)
    if not triton:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if past_key is not None and past_chained is not None:
        past_key, past_chained = past_key.to(query.dtype), past_chained.to(dtype)
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        if past_key is not None:
            raise ValueError("`past_key_values` with more than one new token can not be exported to ONNX.")
        return products_forward(query, key, value, gamma, scaling, strict, bias, segments)
    return ChainedAttentionFunction.apply(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        gamma,
        past_key,
        past_chained,
        bias,
        segments,
        past_seen,
        scaling,
        strict,
        block,
        triton,
    )


def chained_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: float | Tensor,
    *,
    diagonal: str = "strict",
    normalize: bool = False,
    scaling: float | None = None,
    key_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    past_key: Tensor | None = None,
    past_chained: Tensor | None = None,
    past_seen: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
    backend: str = "auto",
) -> ChainedAttention:
    """Chained attention with memory O(n (D + chunk_size)), forward and backward; one or more new tokens with a past.

    Args:
        query: (B, H, n, D).
        key, value: (B, H_kv, n, D) and (B, H_kv, n, E); H is a multiple of H_kv.
        gamma: discount, a number or (H,) one per head, differentiable; `strict`: [-1, 1), `keep`: [0, 1).
        diagonal: `strict` solves with the strictly lower part of A, `keep` with A.
        normalize: divide by the row sums of the operator in place of multiplying by 1 - gamma (`keep`: the same).
        scaling: factor of the scores, D^-1/2 if None.
        key_mask: (B, p + n), 0 or False for padding. Rows that see no key give zeros.
        segment_ids: (B, n) integers: a new packed sequence starts wherever the id changes. With a past, every one of
            them continues from it: many questions on one text.
        past_key, past_chained: `key` and `chained` of earlier calls, joined along the tokens, for n further tokens.
        past_seen: (B, n) integers: of the p earlier tokens each token sees the first so many; all if None.
        chunk_size: rows solved at a time; 128 is fastest on CPUs.
        backend: `torch`, `triton` (CUDA, or Triton's interpreter), or `auto`: Triton on CUDA where it is installed.

    Raises:
        ValueError: for a gamma outside its range, NaN or infinite inputs, shapes that do not fit, unknown names. The
            values are not checked in compiled graphs.
        RuntimeError: if `backend` is `triton` and it cannot be used.
    """
    check_names(diagonal=(diagonal, DIAGONALS), backend=(backend, BACKENDS))
    check_shapes(query, key, value, past_key, past_chained, key_mask, segment_ids, chunk_size, past_seen)
    if not torch.compiler.is_compiling():
        check_gamma(gamma, diagonal, normalize)
        check_finite(query=query, key=key, value=value)
    dtype = torch.promote_types(query.dtype, torch.float32)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    discounts = gamma_per_head(gamma, query.shape[1], dtype, query.device)
    size = value.shape[-1]
    inner_query = query
    if normalize:
        inner_query, key, value = with_ones(query, key, value)
        if past_key is not None and past_key.shape[-1] != key.shape[-1]:
            raise ValueError("`past_key` must come from a call with `normalize=True`, as `key` of its result.")
    segments = None if segment_ids is None else sequence_numbers(segment_ids)
    output, chained = chain(
        inner_query,
        key,
        value,
        discounts,
        past_key,
        past_chained,
        key_bias(key_mask, dtype),
        segments,
        past_seen,
        scaling=scaling,
        strict=diagonal == "strict",
        block=chunk_size,
        triton=can_use_triton(query, value, past_seen, required=backend == "triton") and backend != "torch",
    )
    output = row_normalized(output, size) if normalize else output * (1.0 - discounts)[:, None, None]
    return ChainedAttention(output.to(query.dtype), key, chained)


def naive_chained_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: float | Tensor,
    *,
    diagonal: str = "strict",
    normalize: bool = False,
    scaling: float | None = None,
    key_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> Tensor:
    """Y as `chained_attention` returns it, from the definition with n x n matrices, in the dtype of the inputs."""
    check_names(diagonal=(diagonal, DIAGONALS))
    check_shapes(query, key, value, None, None, key_mask, segment_ids, 1)
    check_gamma(gamma, diagonal, normalize)
    check_finite(query=query, key=key, value=value)
    heads, size = query.shape[1], value.shape[-1]
    groups = heads // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    discounts = gamma_per_head(gamma, heads, query.dtype, query.device)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if normalize:
        value = torch.cat([value, torch.ones_like(value[..., :1])], -1)
    output, _ = naive_forward(query, key, value, discounts, scaling, diagonal == "strict", key_mask, segment_ids)
    return row_normalized(output, size) if normalize else output * (1.0 - discounts)[:, None, None]


__all__ = [
    "DIAGONALS",
    "ChainedAttention",
    "attention_matrix",
    "chain",
    "chain_system",
    "chained_attention",
    "check_finite",
    "check_gamma",
    "effective_weights",
    "gamma_per_head",
    "key_bias",
    "naive_chained_attention",
    "row_normalized",
    "visible",
    "with_ones",
]
