# SPDX-License-Identifier: Apache-2.0
"""One-sided confidence bounds of a mean in [0, 1] at any sample size, sound under float rounding.

Votes (0/1): Clopper and Pearson 1934; of the usual binomial intervals only this one keeps its level at every (n, p).
Soft scores: Hoeffding, and the empirical Bernstein bound of Maurer and Pontil 2009; betting bounds are in `betting`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betainc, betaincinv
from scipy.stats import binom


# relative part of alpha that is given away so that the errors of the beta functions, below 1e-11, can not overstate
_LEVEL_SLACK = 1e-9
# a mean of n floats in [0, 1] and what is computed from it are off by less than n times this
_MEAN_SLACK = 2.0**-51

__all__ = [
    "bernstein_lower",
    "bernstein_upper",
    "check_alpha",
    "clopper_pearson_lower",
    "clopper_pearson_upper",
    "dataset_lower_bound",
    "hoeffding_lower",
    "randomized_clopper_pearson_lower",
    "randomized_clopper_pearson_upper",
    "uniform_of_seed",
]


def clopper_pearson_lower(k: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> Any:
    """Largest p, up to rounding downwards, with P(Binomial(n, p) >= k) <= alpha: a lower bound at level 1 - alpha.

    It is the alpha-quantile of Beta(k, n - k + 1), lowered until the tail P(Binomial(n, p) >= k) computed at the
    result itself is at most alpha. 0 for k = 0.

    Args:
        k: number of successes, integers in 0..n; any shape.
        n: number of trials, integers >= 1; broadcast with `k`.
        alpha: one-sided failure probability in (0, 1); broadcast with `k`.

    Returns:
        A float for scalars, else a float64 array.

    Raises:
        ValueError: `k`, `n` or `alpha` out of range, or counts that are no integers.
    """
    successes, trials, level = _validated(k, n, alpha)
    positive = successes > 0
    # k = 0 has no beta quantile: a dummy keeps the call defined, its bound is 0
    a = np.where(positive, successes, 1.0)
    b = np.where(positive, trials - successes + 1.0, 1.0)
    quantile = betaincinv(a, b, level * (1.0 - _LEVEL_SLACK))
    result = np.zeros_like(quantile)
    open_entries = positive
    # entry by entry, so that no bound depends on what else is in the array
    for slack in (0.0, 1e-15, 1e-13, 1e-11, 1e-9, 1e-6, 1e-3):
        candidate = quantile * (1.0 - slack)
        # NaN compares false, so that a quantile that could not be computed leaves the trivial bound 0
        holds = open_entries & (betainc(a, b, candidate) <= level * (1.0 - 0.5 * _LEVEL_SLACK))
        result = np.where(holds, candidate, result)
        open_entries = open_entries & ~holds
        if not open_entries.any():
            break
    return float(result) if result.ndim == 0 else result


def clopper_pearson_upper(k: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> Any:
    """Smallest p, up to rounding upwards, with P(Binomial(n, p) <= k) <= alpha: an upper bound at level 1 - alpha.

    By symmetry 1 - lower(n - k, n, alpha). 1 for k = n. Arguments and errors as `clopper_pearson_lower`.
    """
    successes, trials, level = _validated(k, n, alpha)
    return _mirrored(np.asarray(clopper_pearson_lower(trials - successes, trials, level)))


def randomized_clopper_pearson_lower(k: ArrayLike, n: ArrayLike, alpha: ArrayLike, uniform: ArrayLike) -> Any:
    """Randomised Clopper-Pearson lower bound: larger than the plain one, its error is exactly alpha (Stevens 1950).

    The p with (1 - u) P(X > k) + u P(X >= k) = alpha for X ~ Binomial(n, p), rounded down; between the plain bounds of
    k and of k + 1. Where it would reach 1 (k = n and u <= alpha) it would make a radius infinite: it is cut at
    2**(-1/n), the median of what n unanimous votes say, which only lowers it.

    Args:
        k: number of successes, integers in 0..n; any shape.
        n: number of trials, integers >= 1; broadcast with `k`.
        alpha: one-sided failure probability in (0, 1); broadcast with `k`.
        uniform: u in [0, 1), drawn uniformly and independently of the votes, once: see `uniform_of_seed`.

    Returns:
        A float for scalars, else a float64 array.

    Raises:
        ValueError: as `clopper_pearson_lower`; `uniform` out of range.
    """
    successes, trials, level = _validated(k, n, alpha)
    u = np.asarray(uniform, dtype=np.float64)
    if not np.all((u >= 0.0) & (u < 1.0)):
        raise ValueError(f"`uniform` must lie in [0, 1), got {uniform!r}.")
    successes, trials, level, u = np.broadcast_arrays(successes, trials, level, u)
    low = np.asarray(clopper_pearson_lower(successes, trials, level), dtype=np.float64)
    more = np.minimum(successes + 1.0, trials)
    cap = 2.0 ** (-1.0 / trials) * (1.0 - 1e-15)
    high = np.where(successes < trials, clopper_pearson_lower(more, trials, level), cap)
    # only a plain bound that is already beyond the cut (alpha > 1/2) lies above `high`
    high = np.maximum(high, low)
    target = level * (1.0 - _LEVEL_SLACK)
    for _ in range(60):
        middle = 0.5 * (low + high)
        holds = _randomized_tail(successes, trials, middle, u) <= target
        low, high = np.where(holds, middle, low), np.where(holds, high, middle)
    return float(low) if low.ndim == 0 else low


def randomized_clopper_pearson_upper(k: ArrayLike, n: ArrayLike, alpha: ArrayLike, uniform: ArrayLike) -> Any:
    """Mirror image of `randomized_clopper_pearson_lower`: 1 - lower(n - k), rounded up."""
    successes, trials, level = _validated(k, n, alpha)
    return _mirrored(np.asarray(randomized_clopper_pearson_lower(trials - successes, trials, level, uniform)))


def uniform_of_seed(seed: int | Sequence[int]) -> float:
    """The one u in [0, 1) that belongs to a seed, such as (seed of the run, image index): it can not be re-rolled.

    Raises:
        ValueError: a negative number.
    """
    return float(np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed))).random())


def hoeffding_lower(mean: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> Any:
    """mean - sqrt(ln(1/alpha) / (2n)), cut at 0: lower bound of a mean of scores in [0, 1] (Hoeffding 1963)."""
    m, _, trials, level = _validated_moments(mean, 0.0, n, alpha, least=1)
    return _cut(m - np.sqrt(np.log(1.0 / level) / (2.0 * trials)) - _MEAN_SLACK * trials)


def bernstein_lower(mean: ArrayLike, variance: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> Any:
    """m - sqrt(2 v ln(2/alpha) / n) - 7 ln(2/alpha) / (3(n - 1)), cut at 0 (Maurer and Pontil 2009, theorem 4).

    A lower bound at level 1 - alpha of the mean of n independent scores in [0, 1].

    Args:
        mean: sample mean m; any shape.
        variance: unbiased sample variance v >= 0; broadcast with `mean`.
        n: number of samples, at least 2.
        alpha: one-sided failure probability in (0, 1).

    Returns:
        A float for scalars, else a float64 array.

    Raises:
        ValueError: an argument out of range or NaN.
    """
    m, v, trials, level = _validated_moments(mean, variance, n, alpha, least=2)
    log = np.log(2.0 / level)
    slack = _MEAN_SLACK * trials
    # squares are off in proportion, and by the square of what the mean is off
    widest = v * (1.0 + slack) + slack * slack
    return _cut(m - np.sqrt(2.0 * widest * log / trials) - 7.0 * log / (3.0 * (trials - 1.0)) - slack)


def bernstein_upper(mean: ArrayLike, variance: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> Any:
    """Mirror image of `bernstein_lower`: 1 - lower(1 - mean), rounded up and cut at 1."""
    m = np.asarray(mean, dtype=np.float64)
    return _mirrored(np.asarray(bernstein_lower(1.0 - m, variance, n, alpha)))


def dataset_lower_bound(accuracy: ArrayLike, num_images: int, alpha: float, rho: float = 0.001) -> Any:
    """What a certified accuracy proves of the whole list of images, with probability at least 1 - rho.

    accuracy - q / N, cut at 0, where q is the exact (1 - rho)-quantile of Binomial(N, alpha): more than q certificates
    are wrong with probability at most rho, if each is wrong, independently, with probability at most alpha. Instead of
    q / N the released code of Cohen et al. 2019 has alpha + sqrt(alpha (1 - alpha) ln(1/rho) / N) + ln(1/rho) / (3N),
    which is larger for 500 images, but lacks a factor of 2 in the root and fails for many.

    Args:
        accuracy: fraction of the images that are certified and correct, in [0, 1]; any shape, such as a curve. At
            one radius at a time: the bounds of several radii hold together with probability 1 - their number * rho.
        num_images: N, all images of the list.
        alpha: failure probability of one certificate.
        rho: failure probability of this bound.

    Returns:
        A float for a scalar, else a float64 array.

    Raises:
        ValueError: an argument out of range or NaN.
    """
    check_alpha(alpha)
    if not 0.0 < rho < 1.0:
        raise ValueError(f"`rho` must lie strictly between 0 and 1 (0.001 is usual), got {rho}.")
    if num_images < 1:
        raise ValueError(f"`num_images` must be at least 1, got {num_images}.")
    values = np.asarray(accuracy, dtype=np.float64)
    if not np.all((values >= 0.0) & (values <= 1.0)):
        raise ValueError(f"`accuracy` must lie in [0, 1], got {accuracy!r}.")
    # a quantile at a level that is smaller by the error of the binomial tail is never too small
    wrong = float(binom.isf(rho * (1.0 - _LEVEL_SLACK), num_images, alpha))
    return _cut(values - wrong / num_images * (1.0 + 1e-15))


def check_alpha(alpha: ArrayLike) -> None:
    """Raise a `ValueError` unless `alpha` is a failure probability strictly between 0 and 1."""
    values = np.asarray(alpha, dtype=np.float64)
    if not np.all((values > 0.0) & (values < 1.0)):
        raise ValueError(f"`alpha` must lie strictly between 0 and 1 (0.001 is usual), got {alpha!r}.")


def _randomized_tail(k: Any, n: Any, p: Any, u: Any) -> Any:
    # P(X >= j) = I_p(j, n - j + 1); it is 1 for j = 0 and 0 for j = n + 1
    at_least = np.where(k > 0, betainc(np.maximum(k, 1.0), n - k + 1.0, p), 1.0)
    more = np.where(k < n, betainc(k + 1.0, np.maximum(n - k, 1.0), p), 0.0)
    return (1.0 - u) * more + u * at_least


def _mirrored(lower: NDArray[np.float64]) -> Any:
    result = np.where(lower > 0.0, np.minimum(np.nextafter(1.0 - lower, 2.0), 1.0), 1.0)
    return float(result) if result.ndim == 0 else result


def _cut(bound: NDArray[np.float64]) -> Any:
    # a mean of 1 without variance leaves the additive term, so that the bound stays below 1
    result = np.maximum(bound, 0.0)
    return float(result) if np.ndim(result) == 0 else result


def _validated(k: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> tuple[Any, Any, Any]:
    check_alpha(alpha)
    successes, trials, level = np.broadcast_arrays(
        np.asarray(k, dtype=np.float64), np.asarray(n, dtype=np.float64), np.asarray(alpha, dtype=np.float64)
    )
    if np.any(trials < 1) or np.any(trials != np.floor(trials)) or not np.all(np.isfinite(trials)):
        raise ValueError(f"`n` must hold integers >= 1, got {trials}.")
    if np.any(successes != np.floor(successes)) or not np.all((successes >= 0) & (successes <= trials)):
        raise ValueError(f"`k` must hold integers in 0..n, got k={successes}, n={trials}.")
    return successes, trials, level


def _validated_moments(mean: ArrayLike, variance: ArrayLike, n: ArrayLike, alpha: ArrayLike, *, least: int) -> Any:
    check_alpha(alpha)
    m, v, trials, level = np.broadcast_arrays(
        *(np.asarray(value, dtype=np.float64) for value in (mean, variance, n, alpha))
    )
    # the float mean of n ones may exceed 1 by rounding
    if not np.all((m >= -_MEAN_SLACK * trials) & (m <= 1.0 + _MEAN_SLACK * trials)):
        raise ValueError(f"`mean` must lie in [0, 1], got {mean!r}: scores must be in [0, 1].")
    if not np.all((v >= 0.0) & np.isfinite(v)):
        raise ValueError(f"`variance` must be >= 0 and finite, got {variance!r}.")
    if not np.all((trials >= least) & (trials == np.floor(trials)) & np.isfinite(trials)):
        raise ValueError(f"`n` must hold integers >= {least}, got {n!r}.")
    return m, v, trials, level
