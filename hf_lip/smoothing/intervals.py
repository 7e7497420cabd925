# SPDX-License-Identifier: Apache-2.0
"""Exact one-sided confidence bounds of a binomial proportion (Clopper and Pearson 1934), sound under float rounding.

Only these intervals keep their level at every (n, p); normal, Wilson and Jeffreys intervals do not.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import betainc, betaincinv


# relative part of alpha that is given away so that the errors of the beta functions, below 1e-11, can not overstate
_LEVEL_SLACK = 1e-9

__all__ = ["clopper_pearson_lower", "clopper_pearson_upper"]


def clopper_pearson_lower(k: ArrayLike, n: ArrayLike, alpha: float) -> Any:
    """Largest p, up to rounding downwards, with P(Binomial(n, p) >= k) <= alpha: a lower bound at level 1 - alpha.

    It is the alpha-quantile of Beta(k, n - k + 1), lowered until the tail P(Binomial(n, p) >= k) computed at the
    result itself is at most alpha. 0 for k = 0.

    Args:
        k: number of successes, integers in 0..n; any shape.
        n: number of trials, integers >= 1; broadcast with `k`.
        alpha: one-sided failure probability in (0, 1).

    Returns:
        A float for scalars, else a float64 array.

    Raises:
        ValueError: `k`, `n` or `alpha` out of range, or counts that are no integers.
    """
    successes, trials = _validated(k, n, alpha)
    level = alpha * (1.0 - _LEVEL_SLACK)
    positive = successes > 0
    # k = 0 has no beta quantile: a dummy keeps the call defined, its bound is 0
    a = np.where(positive, successes, 1.0)
    b = np.where(positive, trials - successes + 1.0, 1.0)
    bound = np.where(positive, betaincinv(a, b, level), 0.0)
    for slack in (0.0, 1e-15, 1e-13, 1e-11, 1e-9, 1e-6, 1e-3):
        candidate = bound * (1.0 - slack)
        # NaN compares false, so that a quantile that could not be computed ends as the trivial bound 0
        holds = betainc(a, b, candidate) <= alpha * (1.0 - 0.5 * _LEVEL_SLACK)
        if np.all(holds | ~positive):
            break
    result = np.where(positive & holds, candidate, 0.0)
    return float(result) if result.ndim == 0 else result


def clopper_pearson_upper(k: ArrayLike, n: ArrayLike, alpha: float) -> Any:
    """Smallest p, up to rounding upwards, with P(Binomial(n, p) <= k) <= alpha: an upper bound at level 1 - alpha.

    By symmetry 1 - lower(n - k, n, alpha). 1 for k = n. Arguments and errors as `clopper_pearson_lower`.
    """
    successes, trials = _validated(k, n, alpha)
    lower = np.asarray(clopper_pearson_lower(trials - successes, trials, alpha))
    result = np.where(lower > 0.0, np.minimum(np.nextafter(1.0 - lower, 2.0), 1.0), 1.0)
    return float(result) if result.ndim == 0 else result


def _validated(k: ArrayLike, n: ArrayLike, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    check_alpha(alpha)
    successes, trials = np.broadcast_arrays(np.asarray(k, dtype=np.float64), np.asarray(n, dtype=np.float64))
    if np.any(trials < 1) or np.any(trials != np.floor(trials)) or not np.all(np.isfinite(trials)):
        raise ValueError(f"`n` must hold integers >= 1, got {trials}.")
    if np.any(successes != np.floor(successes)) or not np.all((successes >= 0) & (successes <= trials)):
        raise ValueError(f"`k` must hold integers in 0..n, got k={successes}, n={trials}.")
    return successes, trials


def check_alpha(alpha: float) -> None:
    """Raise a `ValueError` unless `alpha` is a failure probability strictly between 0 and 1."""
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"`alpha` must lie strictly between 0 and 1 (0.001 is usual), got {alpha}.")
