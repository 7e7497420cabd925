# SPDX-License-Identifier: Apache-2.0
"""Exact l2 radii of a smoothed classifier whose base scores have a proved Lipschitz constant.

Of the scores in [0, 1] that are L-Lipschitz in l2 and have mean p under N(0, sigma^2 I), a ramp of width 1/L has the
lowest mean at every distance. At distance R from its centre the smoothed ramp is

    m(R) = average over u in [-1, 1] of Phi((R + u h) / sigma),  h = 1 / (2L),

and z(p), the inverse of m, replaces sigma * Phi^-1(p) in Cohen's radii; z = -s0 - h for the ramp's foot s0 of Delattre
et al. 2025, arXiv 2504.02412. L -> infinity gives Cohen's radii back. Only a proved L certifies.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import erf, erfcx, ndtr

from hf_lip.smoothing.radii import check_sigma, checked_bounds, mono_radius, two_class_radius


# the tail of a smoothed ramp is computed to a relative error below this
_RAMP_SLACK = 1e-11
# 1/(2L) below this share of sigma: quadrature over the ramp, as the closed form would lose its digits
_NARROW = 0.5
_WIDEST = 1e4
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)

__all__ = ["lipschitz_mono_radius", "lipschitz_two_class_radius", "smoothed_lipschitz_constant"]


def lipschitz_mono_radius(p_lower: ArrayLike, sigma: float, lipschitz: float) -> Any:
    """z(p_lower), the one-class radius: no other class can reach 1/2 closer than that. Rounded down.

    At least Cohen's radius for every finite `lipschitz`; 0.0, which certifies nothing, for p_lower <= 1/2.

    Args:
        p_lower: lower bound of the mean score of the predicted class under noise, in [0, 1); any shape.
        sigma: standard deviation of the noise, in the units of the image.
        lipschitz: proved l2 Lipschitz constant of the base score of every class, before smoothing; infinity where
            none is known.

    Returns:
        A float for a scalar, else a float64 array.

    Raises:
        ValueError: `sigma` or `lipschitz` not positive, `p_lower` out of range or NaN.
    """
    check_lipschitz(lipschitz)
    cohen = np.asarray(mono_radius(p_lower, sigma))
    if not math.isinf(lipschitz):
        p = np.asarray(p_lower, dtype=np.float64)
        z = _ramp_distance(np.where(p > 0.5, 1.0 - p, 0.5), sigma, lipschitz, side=-1.0)
        cohen = np.where(p > 0.5, np.maximum(z, cohen), 0.0)
    return float(cohen) if cohen.ndim == 0 else cohen


def lipschitz_two_class_radius(p_lower: ArrayLike, p_upper_other: ArrayLike, sigma: float, lipschitz: float) -> Any:
    """(z(p_lower) - z(p_upper_other)) / 2, the two-class radius (s0(p_B) - s0(p_A)) / 2. Rounded down.

    Arguments and errors as `lipschitz_mono_radius`; `p_upper_other`, in (0, 1], bounds the mean score of every other
    class. 0.0, which certifies nothing, unless p_lower > p_upper_other.
    """
    check_lipschitz(lipschitz)
    cohen = np.asarray(two_class_radius(p_lower, p_upper_other, sigma))
    if not math.isinf(lipschitz):
        lower, upper = checked_bounds(p_lower, p_upper_other)
        apart = lower > upper
        a, b = np.where(apart, lower, 0.5), np.where(apart, upper, 0.5)
        # z is odd about 1/2: taken at the smaller tail and signed. The first is rounded down, the second up
        z_a = np.where(
            a < 0.5,
            -_ramp_distance(a, sigma, lipschitz, side=1.0),
            _ramp_distance(1.0 - a, sigma, lipschitz, side=-1.0),
        )
        z_b = np.where(
            b < 0.5,
            -_ramp_distance(b, sigma, lipschitz, side=-1.0),
            _ramp_distance(1.0 - b, sigma, lipschitz, side=1.0),
        )
        gap = (z_a - z_b) - 1e-15 * (np.abs(z_a) + np.abs(z_b))
        cohen = np.where(apart, np.maximum(0.5 * gap, cohen), 0.0)
    return float(cohen) if cohen.ndim == 0 else cohen


def smoothed_lipschitz_constant(lipschitz: float, sigma: float, score_range: float = 1.0) -> float:
    """L erf(r / (2 sqrt(2) L sigma)), an upper bound, attained by a ramp, of the constant of a smoothed score.

    The base score is `lipschitz`-Lipschitz with values in an interval of length `score_range`; at most
    min(L, r / (sigma sqrt(2 pi))). Delattre et al., ICLR 2024, whose released helper has r / (sqrt(2) L sigma).

    Raises:
        ValueError: an argument that is not positive.
    """
    check_sigma(sigma)
    check_lipschitz(lipschitz)
    if not (math.isfinite(score_range) and score_range > 0.0):
        raise ValueError(f"`score_range` must be positive and finite, got {score_range}.")
    limit = score_range / (sigma * math.sqrt(2.0 * math.pi))
    x = score_range / (2.0 * math.sqrt(2.0) * lipschitz * sigma)
    # 2 x / sqrt(pi) is above erf(x): where L is so large that x underflows, the limit is the bound
    constant = limit if x < 1e-150 else lipschitz * float(erf(x))
    return min(constant * (1.0 + 1e-13), limit * (1.0 + 1e-13), lipschitz)


def check_lipschitz(lipschitz: float) -> None:
    """Raise a `ValueError` unless `lipschitz` is a positive constant (or infinity)."""
    if not lipschitz > 0.0:
        raise ValueError(f"`lipschitz` must be a proved constant > 0 (or infinity), got {lipschitz}.")


def _ramp_distance(tail: NDArray[np.float64], sigma: float, lipschitz: float, side: float) -> NDArray[np.float64]:
    """z with 1 - m(z) = `tail`, tail in (0, 1/2], bisected; side -1: never above the exact z, side +1: never below."""
    # a larger constant is valid too, and keeps the digits of a ramp that is far wider than the noise
    half = min(0.5 / (lipschitz * sigma), _WIDEST)
    # 1 - m(z) <= 1 - Phi(z - half): beyond 40 + half every float tail is passed
    low = np.zeros_like(tail)
    high = np.full_like(tail, 41.0 + half)
    target = tail * (1.0 - side * _RAMP_SLACK)
    for _ in range(200):
        middle = 0.5 * (low + high)
        # 1 - m decreases in z: a tail that is still too large means that z lies further out
        further = _ramp_tail(middle, half) >= target
        low, high = np.where(further, middle, low), np.where(further, high, middle)
        if np.all((high - low) <= 2.0**-52 * high):
            break
    return (low if side < 0.0 else high) * sigma * (1.0 + side * 1e-15)


def _ramp_tail(z: NDArray[np.float64], half: float) -> NDArray[np.float64]:
    """1 - m(z) for z >= 0, both in units of sigma: the mean of Phi(-z - u half) over u in [-1, 1]."""
    if half < _NARROW:
        points = -z[..., None] - half * _NODES
        result: NDArray[np.float64] = ndtr(points) @ (0.5 * _WEIGHTS)
        return result
    # integral of Phi(-t): the normal loss phi(t) - t Phi(-t), decreasing and positive
    return (_normal_loss(z - half) - _normal_loss(z + half)) / (2.0 * half)


def _normal_loss(t: NDArray[np.float64]) -> NDArray[np.float64]:
    """phi(t) - t Phi(-t), without cancellation for t <= 0 and with Mills' ratio for t > 0."""
    density = np.exp(-0.5 * t * t) / math.sqrt(2.0 * math.pi)
    negative = density - t * ndtr(-t)
    x = np.maximum(t, 0.0)
    # phi (1 - x M) with Mills' ratio M = Phi(-x) / phi(x); for large x the asymptotic series of 1 - x M
    mills = math.sqrt(0.5 * math.pi) * erfcx(x / math.sqrt(2.0))
    y = 1.0 / np.maximum(x, 1.0) ** 2
    series = y * (1 - 3 * y * (1 - 5 * y * (1 - 7 * y * (1 - 9 * y * (1 - 11 * y * (1 - 13 * y))))))
    positive = density * np.where(x > 20.0, series, 1.0 - x * mills)
    return np.where(t > 0.0, positive, negative)
