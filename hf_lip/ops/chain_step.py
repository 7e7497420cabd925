# SPDX-License-Identifier: Apache-2.0
"""One more token of chained attention, from the cached keys and Z of the tokens before it (chacal 2.5)."""

import torch
from torch import Tensor

from .chain_tiles import NOTHING_SEEN, has_fused_rectangle, rectangle_forward


def single_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    past_key: Tensor,
    past_chained: Tensor,
    bias: Tensor | None,
    scaling: float,
    strict: bool,
) -> tuple[Tensor, Tensor]:
    """O and Z of one token; the work is one row of ordinary attention over the past, and O(D).

    Args:
        query, key: (B, H, 1, D), value: (B, H, 1, E).
        gamma: (H,), in the dtype of the result, float32 or above. A bfloat16 cache is read as it is on the CPU, as
            ordinary attention reads it, and converted elsewhere.
        past_key, past_chained: (B, H, p, D) and (B, H, p, E), p >= 1.
        bias: None or (B, p + 1), 0 or `MASKED`: which keys are seen.
        scaling: factor of the scores.
        strict: leave the diagonal out of the solve.

    Returns:
        O and Z, (B, H, 1, E) each. Z of the past stays as it is: append key and Z.
    """
    mask = None
    if bias is not None:
        mask = bias[:, None, None, :-1]
    if not (query.dtype == past_key.dtype and has_fused_rectangle(query, past_chained)):
        past_key, past_chained = past_key.to(gamma.dtype), past_chained.to(gamma.dtype)
    past, log_sum = rectangle_forward(query.to(past_key.dtype), past_key, past_chained, scaling, mask)
    if query.dtype != gamma.dtype:
        past = past.to(gamma.dtype)
        query, key, value = query.to(gamma.dtype), key.to(gamma.dtype), value.to(gamma.dtype)
    own = torch.linalg.vecdot(query, key)
    # what the row gives to the past in all; the rest is its own
    weight = torch.add(log_sum, own, alpha=-scaling)
    if bias is None:
        weight = weight.sigmoid_().unsqueeze(-1)
    else:
        last = bias[:, None, -1:]
        unseen = (torch.maximum(log_sum, last) < NOTHING_SEEN).unsqueeze(-1)
        weight = (weight - last).sigmoid_().unsqueeze(-1).masked_fill(unseen, 1.0)
        past = past.masked_fill(unseen, 0.0)
    factor = gamma[:, None, None]
    chained = torch.addcmul(value, past, weight * factor)
    if not strict:
        chained = chained / (1.0 - factor * (1.0 - weight))
    return torch.lerp(chained, past, weight), chained
