# SPDX-License-Identifier: Apache-2.0
"""Arguments of chained attention: what is refused, and the forms in which the passes want them."""

import torch
from torch import Tensor

from .chain_tiles import MASKED


DIAGONALS = ("strict", "keep")
CHUNK_SIZE = 128


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


def check_names(**choices: tuple[str, tuple[str, ...]]) -> None:
    """Raise ValueError unless each value is one of those allowed: name=(value, allowed)."""
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}.")


def check_shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor | None,
    past_chained: Tensor | None,
    key_mask: Tensor | None,
    segment_ids: Tensor | None,
    chunk_size: int,
    past_seen: Tensor | None = None,
) -> None:
    """Raise ValueError unless the shapes are those that `chained_attention` documents."""
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
    if key_mask is not None and key_mask.shape != (batch, past + length):
        raise ValueError(f"`key_mask` must have shape ({batch}, {past + length}), got {tuple(key_mask.shape)}.")
    if segment_ids is not None and segment_ids.shape != (batch, length):
        raise ValueError(f"`segment_ids` must have shape ({batch}, {length}), got {tuple(segment_ids.shape)}.")
    if past_seen is not None and (past_key is None or past_seen.shape != (batch, length)):
        raise ValueError(
            f"`past_seen` must have shape ({batch}, {length}) and come with a past, got {tuple(past_seen.shape)}."
        )
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}.")


__all__ = [
    "CHUNK_SIZE",
    "DIAGONALS",
    "check_finite",
    "check_gamma",
    "check_names",
    "check_shapes",
    "gamma_per_head",
    "gamma_range",
    "key_bias",
]
