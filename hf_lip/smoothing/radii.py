# SPDX-License-Identifier: Apache-2.0
"""Certified l2 radii of smoothed classifiers from bounds on class probabilities."""

import math

from scipy.special import ndtr, ndtri


# relative deflation that covers the errors of the normal quantile (some units in the last place) and the product
_RADIUS_SLACK = 1e-12

__all__ = ["check_sigma", "mono_radius"]


def mono_radius(p_lower: float, sigma: float) -> float:
    """R = sigma * Phi^-1(p_lower), the one-class l2 radius of Cohen, Rosenfeld and Kolter 2019, rounded down.

    The quantile is taken at q = 1 - p_lower, exact in floating point for p_lower >= 1/2, where Phi^-1(1 - q) would
    lose all digits. 0.0, which certifies nothing, for p_lower <= 1/2.

    Args:
        p_lower: lower bound of the probability of the predicted class under noise, in [0, 1).
        sigma: standard deviation of the noise, in units of pixels in [0, 1].

    Raises:
        ValueError: `sigma` not positive and finite; `p_lower` outside [0, 1) or NaN. At p_lower = 1 the radius would
            be infinite, which no finite number of samples supports.
    """
    check_sigma(sigma)
    if not 0.0 <= p_lower < 1.0:
        raise ValueError(f"`p_lower` must lie in [0, 1), got {p_lower}: no sample proves a probability of 1.")
    if p_lower <= 0.5:
        return 0.0
    q = 1.0 - p_lower
    quantile = -float(ndtri(q)) * (1.0 - _RADIUS_SLACK)
    # P(N(0, 1) > quantile) below q would mean a quantile that is too large
    while quantile > 0.0 and float(ndtr(-quantile)) < q:
        quantile *= 1.0 - 1e-10
    return max(0.0, sigma * quantile)


def check_sigma(sigma: float) -> None:
    """Raise a `ValueError` unless `sigma` is a positive finite standard deviation."""
    if not (math.isfinite(sigma) and sigma > 0.0):
        raise ValueError(f"`sigma` must be a positive number (noise in units of pixels in [0, 1]), got {sigma}.")
