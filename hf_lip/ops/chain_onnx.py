# SPDX-License-Identifier: Apache-2.0
"""Chained attention in the operators that ONNX has, which has no triangular solve: matrix products only."""

from torch import Tensor

from .chain_naive import attention_matrix, visible


# doublings of the chains where the length is not fixed: 2^16 tokens are more than n x n matrices can hold
MOST_DOUBLINGS = 16


def products_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    scaling: float,
    strict: bool,
    bias: Tensor | None,
    segments: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """O = A Z and Z = (I - gamma A')^-1 V with n x n matrices, arguments as of `chain`, without a past.

    With D the diagonal of I - gamma A' and L = gamma D^-1 (strictly lower part of A), Z = (I - L)^-1 D^-1 V. L is
    nilpotent, so that (I - L)^-1 = (I + L)(I + L^2)(I + L^4)... ends after log2(n) factors: exact, not a truncation.
    Each row of |L| sums to |gamma| at most, so the powers do not grow.
    """
    length = query.shape[2]
    seen = visible(length, query.device, None if bias is None else bias == 0, segments)
    weights = attention_matrix(query, key, scaling, seen)
    lower = gamma[:, None, None] * weights.tril(-1)
    chained = value
    if not strict:
        diagonal = 1.0 - gamma[:, None, None] * weights.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        lower, chained = lower / diagonal, chained / diagonal
    doublings = (length - 1).bit_length() if isinstance(length, int) else MOST_DOUBLINGS
    for doubling in range(doublings):
        chained = chained + lower @ chained
        if doubling < doublings - 1:
            lower = lower @ lower
    return weights @ chained, chained


__all__ = ["products_forward"]
