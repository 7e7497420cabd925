# SPDX-License-Identifier: Apache-2.0
"""Chained attention from its definition, with n x n matrices: the reference of the tests and of small audits."""

import torch
from torch import Tensor

from .chain_tiles import MASKED


def visible(
    length: int, device: torch.device, key_mask: Tensor | None = None, segment_ids: Tensor | None = None
) -> Tensor:
    """(B or 1, 1, n, n) True where row t may see column j: causal, not padding, of the same packed sequence."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril_()[None, None]
    if key_mask is not None:
        seen = seen & key_mask[:, None, None, :].bool()
    if segment_ids is not None:
        number = sequence_numbers(segment_ids)
        seen = seen & (number[:, None, :, None] == number[:, None, None, :])
    return seen


def sequence_numbers(segment_ids: Tensor) -> Tensor:
    """(B, n) numbers that grow by one wherever `segment_ids` changes: an id that comes back is a new sequence."""
    new = segment_ids[:, 1:] != segment_ids[:, :-1]
    return torch.cat([torch.zeros_like(segment_ids[:, :1]), new.to(segment_ids.dtype).cumsum(1)], 1)


def attention_matrix(query: Tensor, key: Tensor, scaling: float, seen: Tensor) -> Tensor:
    """Softmax weights A (B, H, n, n) of the scores where `seen`; rows that see nothing are zero."""
    scores = (query @ key.mT * scaling).masked_fill(~seen, MASKED)
    return scores.softmax(-1) * seen


def chain_system(weights: Tensor, gamma: Tensor, strict: bool) -> Tensor:
    """I - gamma A', with A' the strictly lower part of A, or A itself: (B, H, n, n)."""
    inner = weights.tril(-1) if strict else weights
    return torch.eye(weights.shape[-1], dtype=weights.dtype, device=weights.device) - gamma[:, None, None] * inner


def naive_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    scaling: float,
    strict: bool,
    key_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """O = A Z and Z = (I - gamma A')^-1 V by one triangular solve, differentiable by autograd (chacal 2.1, 2.2)."""
    weights = attention_matrix(query, key, scaling, visible(query.shape[2], query.device, key_mask, segment_ids))
    chained = torch.linalg.solve_triangular(chain_system(weights, gamma, strict), value, upper=False)
    return weights @ chained, chained
