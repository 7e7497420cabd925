# SPDX-License-Identifier: Apache-2.0
"""The operator of chained attention itself: how much of each value, over all hops, an output is made of (chacal 2.11).

(1 - gamma) A (I - gamma A')^-1, or with its rows divided by their sums, is never formed: a product from the left is
one transposed solve, which the blocked backward pass does for as many rows at a time as it has features.
"""

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
from .chain_blocked import Layout, blocked_backward, blocked_forward
from .chain_naive import sequence_numbers


# rows solved at a time where more are asked for than a head has features
WIDTH = 64


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
    segment_ids: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """Rows of (1 - gamma) A (I - gamma A')^-1: how much of each value, over all hops, an output is made of.

    In float32 or above, and without an n x n matrix.

    Args:
        query, key: (B, H, n, D) and (B, H_kv, n, D).
        rows: tokens whose outputs are to be explained; negative ones count from the end. The rest as in
            `chained_attention`.

    Returns:
        (B, H, len(rows), n). Rows sum to 1 with `keep` or `normalize`; those that see no key are zero.

    Raises:
        ValueError: as `chained_attention`, and for rows that the sequence does not have.
    """
    check_names(diagonal=(diagonal, DIAGONALS))
    check_shapes(query, key, key, None, None, key_mask, segment_ids, chunk_size)
    check_gamma(gamma, diagonal, normalize)
    check_finite(query=query, key=key)
    chosen = resolve_rows(rows, query.shape[2])
    dtype = torch.promote_types(query.dtype, torch.float32)
    return effective_product(
        one_hot_rows(chosen, query, dtype),
        query,
        key,
        gamma_per_head(gamma, query.shape[1], dtype, query.device),
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        strict=diagonal == "strict",
        normalize=normalize,
        bias=key_bias(key_mask, dtype),
        segments=None if segment_ids is None else sequence_numbers(segment_ids),
        block=chunk_size,
    )


def resolve_rows(rows: list[int], length: int, name: str = "rows") -> list[int]:
    """The rows counted from the start.

    Raises:
        ValueError: if a row is no integer, or a sequence of `length` tokens does not have it.
    """
    if any(isinstance(row, bool) or not isinstance(row, int) or not -length <= row < length for row in rows):
        raise ValueError(f"`{name}` must be integers in [{-length}, {length - 1}] for {length} tokens, got {rows}.")
    return [row % length for row in rows]


def one_hot_rows(rows: list[int], query: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, len(rows), n): the rows of the identity that pick `rows` of an operator."""
    batch, heads, length, _ = query.shape
    picked = F.one_hot(torch.tensor(rows, dtype=torch.int64, device=query.device), length).to(dtype)
    return picked.expand(batch, heads, len(rows), length)


@torch.no_grad()
def effective_product(
    left: Tensor,
    query: Tensor,
    key: Tensor,
    gamma: Tensor,
    *,
    scaling: float,
    strict: bool,
    normalize: bool,
    bias: Tensor | None = None,
    segments: Tensor | None = None,
    block: int = CHUNK_SIZE,
) -> Tensor:
    """`left` (B, H, R, n) times the operator, without any check: (B, H, R, n), float32 or above.

    Args:
        query: (B, H, n, D); key: (B, H_kv, n, D).
        gamma: (H,). The rest as in `chain`.
        normalize: of the operator with its rows divided by their sums, in place of the factor 1 - gamma.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    gamma = gamma.to(dtype)
    width = max(query.shape[-1], min(WIDTH, left.shape[2]))
    groups = query.shape[1] // key.shape[1]
    query, key = (F.pad(tensor.to(dtype), (0, width - tensor.shape[-1])) for tensor in (query, key))
    query, key = query.contiguous(), key.repeat_interleave(groups, 1).contiguous()
    shared = (gamma, None, None, Layout(0, bias, segments), scaling, strict, block)
    # a value of ones gives the row sums; the solves below do not depend on the values
    output, chained, log_sum, tiles = blocked_forward(query, key, torch.ones_like(query), *shared)
    if normalize:
        sums = output[..., 0].unsqueeze(2)
        left = left / torch.where(sums == 0, torch.ones_like(sums), sums)
    else:
        left = left * (1.0 - gamma)[:, None, None]
    parts = []
    for part in left.split(width, 2):
        grad = F.pad(part.to(dtype).mT, (0, width - part.shape[2])).contiguous()
        solved = blocked_backward(grad, None, query, key, chained, output, log_sum, tiles, *shared)[2]
        parts.append(solved[..., : part.shape[2]].mT)
    return torch.cat(parts, 2) if parts else left


__all__ = ["effective_product", "effective_weights", "one_hot_rows", "resolve_rows"]
