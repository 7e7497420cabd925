# SPDX-License-Identifier: Apache-2.0
"""Metrics of certified classification as plain functions on arrays, in float64.

`radii` (N,) are certified l2 radii in pixels of [0, 1] (NaN: no certificate), `correct` (N,) says whether the
prediction is the label. An abstention is passed as `correct = False` and radius 0, as in Cohen et al. 2019.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray


# the radii at which deterministic certificates are compared since Trockman and Kolter 2021
STANDARD_RADII: dict[str, float] = {"36/255": 36 / 255, "72/255": 72 / 255, "108/255": 108 / 255, "1.0": 1.0}

__all__ = [
    "STANDARD_RADII",
    "abstention_rate",
    "average_certified_radius",
    "certified_accuracy",
    "certified_accuracy_curve",
]


def certified_accuracy(radii: ArrayLike, correct: ArrayLike, eps: float) -> float:
    """Fraction of all images that are `correct` with `radii > eps`, strictly: a ball is open at its radius.

    At `eps = 0` an image with radius exactly 0 does not count; clean accuracy is the mean of `correct`. A NaN radius
    counts as not certified.

    Raises:
        ValueError: empty or unequal arrays, negative or infinite radii, `eps` negative or not finite.
    """
    radius, right = _validated(radii, correct)
    threshold = float(eps)
    if not np.isfinite(threshold) or threshold < 0:
        raise ValueError(f"`eps` must be a finite radius >= 0 (l2, pixels in [0, 1]), got {eps}.")
    # a comparison with NaN is False: no certificate
    return float(np.mean(right & (radius > threshold)))


def certified_accuracy_curve(
    radii: ArrayLike, correct: ArrayLike, eps: ArrayLike | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Certified accuracy as a function of the radius.

    Args:
        eps: radii (M,) at which to evaluate; by default the exact corners of the step function, that is 0 and every
            distinct radius of a correct image.

    Returns:
        `(eps, accuracy)`, both (M,) float64.

    Raises:
        ValueError: as `certified_accuracy`.
    """
    radius, right = _validated(radii, correct)
    certified = np.sort(radius[right & ~np.isnan(radius)])
    if eps is None:
        grid = np.unique(np.concatenate([[0.0], certified]))
    else:
        grid = np.asarray(eps, dtype=np.float64).reshape(-1)
        if grid.size == 0 or not np.all(np.isfinite(grid)) or np.any(grid < 0):
            raise ValueError("`eps` must hold finite radii >= 0 (l2, pixels in [0, 1]) and not be empty.")
    above = certified.size - np.searchsorted(certified, grid, side="right")
    return grid, above / radius.size


def average_certified_radius(radii: ArrayLike, correct: ArrayLike) -> float:
    """ACR of Zhai et al. 2020: mean over all images of radius * 1[correct]; a NaN radius counts as 0.

    Raises:
        ValueError: as `certified_accuracy`.
    """
    radius, right = _validated(radii, correct)
    return float(np.mean(np.where(right & ~np.isnan(radius), radius, 0.0)))


def abstention_rate(abstained: ArrayLike) -> float:
    """Fraction of images on which the certifier abstained; `abstained` (N,) holds booleans.

    Raises:
        ValueError: empty array.
    """
    flags = np.asarray(abstained).reshape(-1).astype(bool)
    if flags.size == 0:
        raise ValueError("`abstained` is empty: certify at least one image.")
    return float(np.mean(flags))


def _validated(radii: ArrayLike, correct: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    radius = np.asarray(radii, dtype=np.float64).reshape(-1)
    right = np.asarray(correct).reshape(-1)
    if radius.size == 0:
        raise ValueError("`radii` is empty: certify at least one image.")
    if right.size != radius.size:
        raise ValueError(f"`radii` and `correct` must be equally long, got {radius.size} and {right.size}.")
    if np.any(radius < 0) or np.any(np.isinf(radius)):
        raise ValueError("`radii` must be finite and >= 0; give abstentions radius 0 and `correct = False`.")
    return radius, right.astype(bool)
