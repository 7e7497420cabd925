# SPDX-License-Identifier: Apache-2.0
"""Losses that trade clean accuracy for certified margin in 1-Lipschitz classifiers.

Logits are (B, K) and are taken to float32; labels are (B,) int64; every loss is a mean over the batch.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


__all__ = ["emma_loss", "margin_cross_entropy", "multi_margin_loss", "pairwise_row_distances"]


def margin_cross_entropy(logits: Tensor, labels: Tensor, *, offset: float, temperature: float) -> Tensor:
    """T * cross_entropy((f - offset * onehot(y)) / T, y): an image is fitted once its margin exceeds the offset.

    Without an offset a 1-Lipschitz network gains nothing from a margin beyond a few T; the offset is the dial between
    clean and certified accuracy. The factor T keeps the gradient's scale.

    Source: AOL (Prach and Lampert, ECCV 2022) and SLL (Araujo et al., ICLR 2023, 3 sqrt(2) / 2 and 1/4); Prach et al.
    (CVPR 2024) take 2 sqrt(2) * 36/255 and 1/4.

    Raises:
        ValueError: `offset` negative, `temperature` not positive, or shapes that do not match.
    """
    logits = _checked_logits(logits, labels)
    if offset < 0:
        raise ValueError(f"`offset` must be >= 0, got {offset}.")
    if temperature <= 0:
        raise ValueError(f"`temperature` must be > 0, got {temperature}.")
    shifted = logits - offset * F.one_hot(labels, logits.shape[-1])
    return temperature * F.cross_entropy(shifted / temperature, labels)


def multi_margin_loss(logits: Tensor, labels: Tensor, *, margin: float = 0.7) -> Tensor:
    """Multi-class hinge: mean over j != y of max(0, margin - f_y + f_j), divided by K as in `torch.nn`.

    Source: CPL (Meunier et al., ICML 2022), margin 0.7 on raw logits.

    Raises:
        ValueError: `margin` not positive, or shapes that do not match.
    """
    logits = _checked_logits(logits, labels)
    if margin <= 0:
        raise ValueError(f"`margin` must be > 0, got {margin}.")
    return F.multi_margin_loss(logits, labels, margin=margin)


def emma_loss(
    logits: Tensor,
    labels: Tensor,
    pair_constants: Tensor,
    *,
    epsilon: float,
    temperature: float = 1.0,
) -> Tensor:
    """Efficient margin maximisation: each wrong class is pushed only as far as it still threatens the image.

    Every logit j != y is raised by eps_j * L_jy, the most it can gain on f_y within a ball of radius eps_j, where
    eps_j = clip((f_y - f_j) / L_jy, epsilon / 100, epsilon) is a constant for the gradient; then T * cross-entropy at
    temperature T. The published form has T = 1, for networks whose logits are not confined to constant 1.

    Source: LiResNet (Hu et al., NeurIPS 2023).

    Args:
        pair_constants: (K, K), L_jy: l2 Lipschitz constant of f_j - f_y, that is the feature constant times
            `pairwise_row_distances` of the head. May require grad.
        epsilon: radius to defend, l2, pixels in [0, 1].

    Raises:
        ValueError: `epsilon` or `temperature` not positive, or shapes that do not match.
    """
    logits = _checked_logits(logits, labels)
    if epsilon <= 0:
        raise ValueError(f"`epsilon` must be > 0, got {epsilon}.")
    if temperature <= 0:
        raise ValueError(f"`temperature` must be > 0, got {temperature}.")
    if pair_constants.shape != (logits.shape[-1], logits.shape[-1]):
        raise ValueError(
            f"`pair_constants` must have shape {(logits.shape[-1],) * 2}, got {tuple(pair_constants.shape)}."
        )
    constants = pair_constants.float()[labels]
    with torch.no_grad():
        gaps = logits.gather(1, labels[:, None]) - logits
        # the label's own column is 0 / 0; its constant is 0, so any finite radius leaves the logit as it is
        radii = (gaps / constants.clamp_min(torch.finfo(torch.float32).tiny)).clamp(0.01 * epsilon, epsilon)
    return temperature * F.cross_entropy((logits + radii * constants) / temperature, labels)


def pairwise_row_distances(rows: Tensor) -> Tensor:
    """l2 distances (K, K) between the rows (K, d) of a linear head, differentiable, with zero gradient at distance 0.

    f_i - f_j = (w_i - w_j) . features + const has the features' Lipschitz constant times this distance. An estimate in
    float32 for training; certificates use `ops.certified_row_distances`.
    """
    if rows.ndim != 2:
        raise ValueError(f"`rows` must be a matrix (classes, features), got shape {tuple(rows.shape)}.")
    rows = rows.float()
    # the matrix-product form loses the small distances to cancellation
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")


def _checked_logits(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"`logits` must be (batch, classes) and `labels` (batch,), got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}."
        )
    return logits.float()
