# SPDX-License-Identifier: Apache-2.0
"""Certified l2 radii of smoothed classifiers from bounds on class probabilities, rounded downwards.

They hold for hard votes (Cohen, Rosenfeld and Kolter 2019, theorem 1) and for any scores in [0, 1] that sum to at most
1 (Salman et al. 2019, lemma 2: Phi^-1 of a smoothed score is 1/sigma-Lipschitz).
"""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri


# the normal quantile is right to some units in the last place, 1e-15 of its size; this covers sums and products too
_QUANTILE_SLACK = 1e-12

__all__ = [
    "check_sigma",
    "checked_bounds",
    "mono_radius",
    "normal_quantile_lower",
    "normal_quantile_upper",
    "one_minus_up",
    "two_class_radius",
]


def mono_radius(p_lower: ArrayLike, sigma: float) -> Any:
    """R = sigma * Phi^-1(p_lower), the one-class l2 radius of Cohen, Rosenfeld and Kolter 2019, rounded down.

    The quantile is taken at q = 1 - p_lower, exact in floating point for p_lower >= 1/2, where Phi^-1(1 - q) would
    lose all digits. 0.0, which certifies nothing, for p_lower <= 1/2.

    Args:
        p_lower: lower bound of the probability of the predicted class under noise, in [0, 1); any shape.
        sigma: standard deviation of the noise, in units of pixels in [0, 1].

    Returns:
        A float for a scalar, else a float64 array.

    Raises:
        ValueError: `sigma` not positive and finite; `p_lower` outside [0, 1) or NaN. At p_lower = 1 the radius would
            be infinite, which no finite number of samples supports.
    """
    check_sigma(sigma)
    p = np.asarray(p_lower, dtype=np.float64)
    if not np.all((p >= 0.0) & (p < 1.0)):
        raise ValueError(f"`p_lower` must lie in [0, 1), got {p_lower!r}: no sample proves a probability of 1.")
    radius = np.where(p > 0.5, np.maximum(sigma * normal_quantile_lower(np.maximum(p, 0.5)), 0.0), 0.0)
    return float(radius) if radius.ndim == 0 else radius


def two_class_radius(p_lower: ArrayLike, p_upper_other: ArrayLike, sigma: float) -> Any:
    """R = sigma / 2 * (Phi^-1(p_lower) - Phi^-1(p_upper_other)), Cohen et al. 2019, theorem 1, rounded down.

    0.0, which certifies nothing, unless p_lower > p_upper_other.

    Args:
        p_lower: lower bound of the probability of the predicted class under noise, in [0, 1); any shape.
        p_upper_other: upper bound of the probability of every other class, in (0, 1]; broadcast with `p_lower`.
        sigma: standard deviation of the noise, in units of pixels in [0, 1].

    Returns:
        A float for scalars, else a float64 array.

    Raises:
        ValueError: `sigma` not positive and finite; a probability out of range or NaN.
    """
    check_sigma(sigma)
    lower, upper = checked_bounds(p_lower, p_upper_other)
    apart = lower > upper
    # a dummy pair keeps the quantiles finite where nothing is certified
    gap = normal_quantile_lower(np.where(apart, lower, 0.5)) - normal_quantile_upper(np.where(apart, upper, 0.5))
    radius = np.where(apart, np.maximum(0.5 * sigma * gap, 0.0), 0.0)
    return float(radius) if radius.ndim == 0 else radius


def normal_quantile_lower(p: ArrayLike) -> NDArray[np.float64]:
    """Phi^-1(p), never above the exact value, for p in (0, 1); below it by less than 2e-12 of its size."""
    quantile = _normal_quantile(np.asarray(p, dtype=np.float64))
    return quantile - _QUANTILE_SLACK * np.abs(quantile)


def normal_quantile_upper(p: ArrayLike) -> NDArray[np.float64]:
    """Phi^-1(p), never below the exact value, for p in (0, 1); above it by less than 2e-12 of its size."""
    quantile = _normal_quantile(np.asarray(p, dtype=np.float64))
    return quantile + _QUANTILE_SLACK * np.abs(quantile)


def _normal_quantile(p: NDArray[np.float64]) -> NDArray[np.float64]:
    # taken at the smaller tail, which keeps its digits: 1 - p is exact for p >= 1/2
    below = p < 0.5
    magnitude = -ndtri(np.where(below, p, 1.0 - p))
    result: NDArray[np.float64] = np.where(below, -magnitude, magnitude)
    return result


def one_minus_up(p: ArrayLike) -> Any:
    """1 - p rounded upwards and cut at 1: what is left for all other classes when one has at least p."""
    result = np.minimum(np.nextafter(1.0 - np.asarray(p, dtype=np.float64), 2.0), 1.0)
    return float(result) if result.ndim == 0 else result


def checked_bounds(p_lower: ArrayLike, p_upper_other: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both bounds as float64 arrays of one shape; a `ValueError` unless in [0, 1) and (0, 1]."""
    lower, upper = np.broadcast_arrays(
        np.asarray(p_lower, dtype=np.float64), np.asarray(p_upper_other, dtype=np.float64)
    )
    if not np.all((lower >= 0.0) & (lower < 1.0)):
        raise ValueError(f"`p_lower` must lie in [0, 1), got {p_lower!r}: no sample proves a probability of 1.")
    if not np.all((upper > 0.0) & (upper <= 1.0)):
        raise ValueError(f"`p_upper_other` must lie in (0, 1], got {p_upper_other!r}: no sample proves 0.")
    return lower, upper


def check_sigma(sigma: float) -> None:
    """Raise a `ValueError` unless `sigma` is a positive finite standard deviation."""
    if not (math.isfinite(sigma) and sigma > 0.0):
        raise ValueError(f"`sigma` must be a positive number (noise in units of pixels in [0, 1]), got {sigma}.")
