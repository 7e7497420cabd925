# SPDX-License-Identifier: Apache-2.0
"""The score map of soft certificates, chosen once per model and sigma on data of its own.

The map defines the smoothed classifier, so it must not depend on the image that is certified: Delattre et al., ICLR
2024, evaluate 204 maps per image on the estimation samples and keep the best, which no stated confidence covers.
Calibration images must not be among those that are certified, nor their noise be used again.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from hf_lip.ops.simplex import ScoreMap
from hf_lip.smoothing.intervals import bernstein_lower, bernstein_upper, check_alpha
from hf_lip.smoothing.procedures import radii_of_votes, votes_of_shares
from hf_lip.smoothing.radii import check_sigma, one_minus_up, two_class_radius


__all__ = ["calibrate", "calibration_radii", "score_map_grid"]


def score_map_grid(num_temperatures: int = 25) -> tuple[ScoreMap, ...]:
    """softmax and sparsemax at geometric inverse temperatures from 0.1 to 50 (the released grid is linear, 0.1 to 50).

    Raises:
        ValueError: fewer than two temperatures.
    """
    if num_temperatures < 2:
        raise ValueError(f"`num_temperatures` must be at least 2, got {num_temperatures}.")
    values = [float(f"{t:.4g}") for t in np.geomspace(0.1, 50.0, num_temperatures)]
    return tuple(ScoreMap(kind, t) for kind in ("softmax", "sparsemax") for t in values)


def calibrate(
    score_logits: Any,
    sigma: float,
    alpha: float,
    n: int,
    *,
    labels: ArrayLike | None = None,
    grid: Sequence[ScoreMap] | None = None,
) -> ScoreMap:
    """The map of the grid with the largest mean radius on the calibration images; the first of equals.

    Arguments and errors as `calibration_radii`. With hardmax in the grid it is compared too; its procedure is
    `bonferroni`, on votes.
    """
    maps = score_map_grid() if grid is None else tuple(grid)
    radii = calibration_radii(score_logits, sigma, alpha, n, labels=labels, grid=maps)
    return maps[int(radii.mean(axis=1).argmax())]


def calibration_radii(
    score_logits: Any,
    sigma: float,
    alpha: float,
    n: int,
    *,
    labels: ArrayLike | None = None,
    grid: Sequence[ScoreMap] | None = None,
) -> NDArray[np.float64]:
    """Radii (maps, m) that n samples are expected to give, an estimate: moments of k draws put into the n-sample rule.

    Args:
        score_logits: (m, k, c) finite logits of m calibration images under k >= 2 draws of noise each.
        sigma: standard deviation of the noise, in the units of the image.
        alpha: failure probability that certificates will have.
        n: estimation samples that certificates will have.
        labels: (m,) classes; with them a radius of a wrong class counts as 0, so that the mean is the ACR.
        grid: maps to compare, by default `score_map_grid()`; hardmax stands for votes with the bonferroni procedure.

    Raises:
        ValueError: logits of another shape or not finite, labels of another shape, an empty grid, a number out of
            range.
    """
    check_sigma(sigma)
    check_alpha(alpha)
    maps = score_map_grid() if grid is None else tuple(grid)
    logits = torch.as_tensor(score_logits)
    if logits.ndim != 3 or logits.shape[0] < 1 or logits.shape[1] < 2 or logits.shape[2] < 2:
        raise ValueError(
            f"`score_logits` must have shape (m, k, c) with m >= 1, k >= 2 and c >= 2, got {tuple(logits.shape)}."
        )
    if n < 2 or not maps:
        raise ValueError(f"`n` must be at least 2 (got {n}) and `grid` must not be empty.")
    right: NDArray[np.int64] | None = None
    if labels is not None:
        right = np.asarray(labels).astype(np.int64)
        if right.shape != (len(logits),):
            raise ValueError(f"`labels` must have shape ({len(logits)},), got {right.shape}.")
    return np.stack([_expected_radii(logits, score_map, sigma, alpha, n, right) for score_map in maps])


def _expected_radii(
    logits: torch.Tensor, score_map: ScoreMap, sigma: float, alpha: float, n: int, labels: NDArray[np.int64] | None
) -> NDArray[np.float64]:
    scores = score_map.apply(logits).cpu()
    mean, variance = scores.mean(dim=1).numpy(), scores.var(dim=1).numpy()
    rows = np.arange(len(mean))
    candidate = mean.argmax(axis=1)
    if score_map.is_hard:
        votes = votes_of_shares(mean, np.full(len(mean), n))
        radii = radii_of_votes("bonferroni", (mean * logits.shape[1]).round().astype(np.int64), votes, sigma, alpha)
    else:
        level = alpha / mean.shape[1]
        lower = bernstein_lower(mean[rows, candidate], variance[rows, candidate], n, level)
        upper = bernstein_upper(mean, variance, n, level)
        upper[rows, candidate] = 0.0
        radii = two_class_radius(lower, np.minimum(upper.max(axis=1), one_minus_up(lower)), sigma)
    wrong = np.zeros(len(mean), dtype=bool) if labels is None else candidate != labels
    return np.where(wrong, 0.0, radii)
