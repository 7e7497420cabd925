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

from .chain_autograd import ChainedAttentionFunction
from .chain_blocked import Layout, blocked_backward, blocked_forward
from .chain_naive import attention_matrix, chain_system, naive_forward, sequence_numbers, visible
from .chain_step import single_step
from .chain_tiles import MASKED
from .chain_triton import can_use_triton


DIAGONALS = ("strict", "keep")
BACKENDS = ("auto", "torch", "triton")
CHUNK_SIZE = 64


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


def gamma_range(diagonal: str, normalize: bool) -> tuple[float, float, bool, bool]:
    """Lowest and highest discount, and whether each of the two is allowed itself.

    `keep`: [0, 1). `strict`: the solve is a finite sum for every gamma; [-1, 1) keeps Z from growing, and 1 is allowed
    with `normalize`, where the vanishing factor 1 - gamma cancels. With a negative discount a token subtracts what it
    has read, and -1 could make a row sum vanish, so `normalize` excludes it.
    """
    if diagonal == "keep":
        return 0.0, 1.0, True, False
    return -1.0, 1.0, not normalize, normalize


def check_gamma(gamma: float | Tensor, diagonal: str, normalize: bool = False, name: str = "gamma") -> None:
    """Raise ValueError unless every discount is in its range, which depends on the diagonal."""
    low, high, with_low, with_high = gamma_range(diagonal, normalize)
    values = gamma.detach().double().flatten().tolist() if isinstance(gamma, Tensor) else [float(gamma)]
    for value in values:
        # written so that NaN fails too
        if not ((low < value or (with_low and value == low)) and (value < high or (with_high and value == high))):
            interval = f"{'[' if with_low else '('}{low:g}, {high:g}{']' if with_high else ')'}"
            hint = " (a discount of 1 needs `normalize=True`)" if value == 1.0 and diagonal == "strict" else ""
            raise ValueError(
                f"`{name}` must lie in {interval} for `diagonal`={diagonal!r} and `normalize`={normalize}, got "
                f"{value}{hint}."
            )


def check_finite(**tensors: Tensor) -> None:
    """Raise ValueError if a tensor holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all():
            raise ValueError(
                f"`{name}` holds NaN or infinite values: chained attention would spread them to every row."
            )


def gamma_per_head(gamma: float | Tensor, heads: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(H,) discounts from one number or one for each head."""
    values = torch.as_tensor(gamma, dtype=dtype, device=device)
    if values.ndim > 1 or (values.ndim == 1 and values.shape[0] not in (1, heads)):
        raise ValueError(f"`gamma` must be a number or have shape ({heads},), got {tuple(values.shape)}.")
    return values.expand(heads)


def key_bias(key_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """0 for keys that are seen and a large negative number for padding, from 1 and 0 or booleans: same shape."""
    if key_mask is None:
        return None
    return torch.zeros(key_mask.shape, dtype=dtype, device=key_mask.device).masked_fill_(~key_mask.bool(), MASKED)


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
        segments: None or (B, n), numbers of packed sequences that never decrease; not together with a past.
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
    if past_key is not None and past_chained is not None and length == 1 and not torch.is_grad_enabled():
        return single_step(query, key, value, gamma, past_key, past_chained, bias, scaling, strict)
    if not triton:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if past_key is not None and past_chained is not None:
        past_key, past_chained = past_key.to(query.dtype), past_chained.to(dtype)
    return ChainedAttentionFunction.apply(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        gamma,
        past_key,
        past_chained,
        bias,
        segments,
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
        segment_ids: (B, n) integers: a new packed sequence starts wherever the id changes. Not with a past.
        past_key, past_chained: `key` and `chained` of earlier calls, joined along the tokens, for n further tokens.
        chunk_size: rows solved at a time; 64 and 128 are fastest.
        backend: `torch`, `triton` (CUDA, or Triton's interpreter), or `auto`: Triton on CUDA where it is installed.

    Raises:
        ValueError: for a gamma outside its range, NaN or infinite inputs, shapes that do not fit, unknown names. The
            values are not checked in compiled graphs.
        RuntimeError: if `backend` is `triton` and it cannot be used.
    """
    _check_names(diagonal=(diagonal, DIAGONALS), backend=(backend, BACKENDS))
    _check_shapes(query, key, value, past_key, past_chained, key_mask, segment_ids, chunk_size)
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
        scaling=scaling,
        strict=diagonal == "strict",
        block=chunk_size,
        triton=can_use_triton(query, value, required=backend == "triton") and backend != "torch",
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
    _check_names(diagonal=(diagonal, DIAGONALS))
    _check_shapes(query, key, value, None, None, key_mask, segment_ids, 1)
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


@torch.no_grad()
def effective_weights(
    query: Tensor,
    key: Tensor,
    gamma: float | Tensor,
    rows: list[int],
    *,
    diagonal: str = "strict",
    normalize: bool = False,
    scaling: float | None = None,
    key_mask: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """Rows of (1 - gamma) A (I - gamma A')^-1: how much of each value, over all hops, an output is made of.

    One transposed solve for up to D rows at a time (chacal 2.11), in float32 or above and without an n x n matrix.

    Args:
        query, key: (B, H, n, D) and (B, H_kv, n, D).
        rows: tokens whose outputs are to be explained; negative ones count from the end. The rest as in
            `chained_attention`.

    Returns:
        (B, H, len(rows), n). Rows sum to 1 with `keep` or `normalize`.
    """
    _check_names(diagonal=(diagonal, DIAGONALS))
    _check_shapes(query, key, key, None, None, key_mask, None, chunk_size)
    check_gamma(gamma, diagonal, normalize)
    check_finite(query=query, key=key)
    batch, heads, length, size = query.shape
    if any(not -length <= row < length for row in rows):
        raise ValueError(f"`rows` must lie in [{-length}, {length - 1}] for {length} tokens, got {rows}.")
    dtype = torch.promote_types(query.dtype, torch.float32)
    query = query.to(dtype).contiguous()
    key = key.to(dtype).repeat_interleave(heads // key.shape[1], 1)
    discounts = gamma_per_head(gamma, heads, dtype, query.device)
    scaling = size**-0.5 if scaling is None else scaling
    layout = Layout(0, key_bias(key_mask, dtype), None)
    shared = (discounts, None, None, layout, scaling, diagonal == "strict", chunk_size)
    output, chained, log_sum, tiles = blocked_forward(query, key, torch.zeros_like(query), *shared)
    found = []
    for start in range(0, len(rows), size):
        chosen = [row % length for row in rows[start : start + size]]
        grad = torch.zeros_like(query)
        grad[:, :, chosen, range(len(chosen))] = 1.0
        grad_value = blocked_backward(grad, None, query, key, chained, output, log_sum, tiles, *shared)[2]
        found.append(grad_value[..., : len(chosen)].mT)
    weights = torch.cat(found, 2) if found else query.new_zeros(batch, heads, 0, length)
    if normalize:
        sums = weights.sum(-1, keepdim=True)
        return weights / torch.where(sums == 0, torch.ones_like(sums), sums)
    return weights * (1.0 - discounts)[:, None, None]


def _check_names(**choices: tuple[str, tuple[str, ...]]) -> None:
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}.")


def _check_shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor | None,
    past_chained: Tensor | None,
    key_mask: Tensor | None,
    segment_ids: Tensor | None,
    chunk_size: int,
) -> None:
    if any(tensor.ndim != 4 for tensor in (query, key, value)):
        raise ValueError("`query`, `key` and `value` must have shape (batch, heads, tokens, features).")
    if 0 in query.shape or 0 in value.shape:
        raise ValueError(f"`query` is empty, shape {tuple(query.shape)}: pass at least one token.")
    batch, heads, length, size = query.shape
    kv_heads = key.shape[1]
    if key.shape != (batch, kv_heads, length, size) or value.shape[:3] != key.shape[:3] or heads % kv_heads:
        raise ValueError(
            f"`query` {tuple(query.shape)}, `key` {tuple(key.shape)} and `value` {tuple(value.shape)} do not fit: "
            "same batch and tokens, as many features in query and key, query heads a multiple of the key heads."
        )
    if (past_key is None) != (past_chained is None):
        raise ValueError("`past_key` and `past_chained` must be given together.")
    past = 0
    if past_key is not None and past_chained is not None:
        past = past_key.shape[2]
        if past_key.shape[:2] != (batch, kv_heads) or past_chained.shape[:3] != (batch, heads, past):
            raise ValueError(
                f"`past_key` {tuple(past_key.shape)} and `past_chained` {tuple(past_chained.shape)} must have shapes "
                f"({batch}, {kv_heads}, p, features) and ({batch}, {heads}, p, features): Z has one head a query head."
            )
        if segment_ids is not None:
            raise ValueError("`segment_ids` cannot be combined with a past: continue packed sequences one by one.")
    if key_mask is not None and key_mask.shape != (batch, past + length):
        raise ValueError(f"`key_mask` must have shape ({batch}, {past + length}), got {tuple(key_mask.shape)}.")
    if segment_ids is not None and segment_ids.shape != (batch, length):
        raise ValueError(f"`segment_ids` must have shape ({batch}, {length}), got {tuple(segment_ids.shape)}.")
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}.")


__all__ = [
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
