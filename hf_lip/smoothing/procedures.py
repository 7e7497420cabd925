# SPDX-License-Identifier: Apache-2.0
"""From votes or scores under noise to a certificate: mono, bonferroni, cpm and lvm, vectorised over images.

Every procedure chooses the candidate class (and whatever else it chooses) on the n0 selection samples and bounds
probabilities on n fresh samples, so that choosing costs no risk: with probability at least 1 - alpha over the noise it
abstains, or returns the class of the smoothed classifier with a radius within which that class does not change.

mono         one lower bound at alpha, R = sigma Phi^-1(lower)                               (Cohen et al. 2019)
bonferroni   c bounds at alpha / c, two-class radius
cpm          classes in K buckets formed on the selection counts, K bounds at alpha / K      (Delattre et al. 2025)
auto         that of the three with the largest radius expected from the selection counts
lvm          soft scores, c empirical Bernstein bounds at alpha / c                           (Delattre et al. 2024)

In a two-class radius the other classes have at most min(largest upper bound, 1 - lower), as scores sum to at most 1.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_lip.smoothing.intervals import (
    bernstein_lower,
    bernstein_upper,
    check_alpha,
    clopper_pearson_lower,
    clopper_pearson_upper,
    randomized_clopper_pearson_lower,
    randomized_clopper_pearson_upper,
    uniform_of_seed,
)
from hf_lip.smoothing.lipschitz_radii import check_lipschitz, lipschitz_two_class_radius
from hf_lip.smoothing.radii import check_sigma, mono_radius, one_minus_up, two_class_radius
from hf_lip.smoothing.samples import ABSTAIN, Decision, Moments, checked_counts


CountMethod = Literal["mono", "bonferroni", "cpm", "auto"]
_FIXED: tuple[str, ...] = ("mono", "bonferroni", "cpm")
# float scores of a row may sum to 1 plus this
_SUM_SLACK = 2.0**-40

__all__ = [
    "ABSTAIN",
    "CountMethod",
    "Decision",
    "Moments",
    "certify_counts",
    "certify_counts_batch",
    "certify_moments",
    "choose_methods",
    "class_buckets",
    "expected_shares",
    "radii_of_votes",
    "votes_of_shares",
]


def certify_counts(
    method: CountMethod,
    selection_counts: ArrayLike,
    counts: ArrayLike,
    *,
    sigma: float,
    alpha: float,
    lipschitz: float | None = None,
    randomized_seed: int | Sequence[int] | None = None,
) -> Decision:
    """Certificate of one image from its votes.

    Args:
        method: "mono", "bonferroni", "cpm", or "auto", which chooses among them from `selection_counts` only.
        selection_counts: votes (c,) of the n0 >= 1 selection samples.
        counts: votes (c,) of n fresh samples.
        sigma: standard deviation of the noise, in the units of the image.
        alpha: failure probability of this certificate.
        lipschitz: must be None (or infinite): votes of an argmax jump, no constant bounds them.
        randomized_seed: takes randomised Clopper-Pearson bounds, with the one uniform number of this seed; pass
            something of the image's own, such as (seed, index), fixed before sampling.

    Raises:
        ValueError: an argument out of range, counts that are no votes, n0 = 0, a finite `lipschitz`.
    """
    seeds = None if randomized_seed is None else [randomized_seed]
    return certify_counts_batch(
        method,
        np.asarray(selection_counts)[None],
        np.asarray(counts)[None],
        sigma=sigma,
        alpha=alpha,
        lipschitz=lipschitz,
        randomized_seeds=seeds,
    )[0]


def certify_counts_batch(
    method: CountMethod,
    selection_counts: ArrayLike,
    counts: ArrayLike,
    *,
    sigma: float,
    alpha: float,
    lipschitz: float | None = None,
    randomized_seeds: Sequence[int | Sequence[int]] | None = None,
) -> list[Decision]:
    """`certify_counts` for votes (m, c) of m images at once; rows do not influence each other.

    `randomized_seeds`: one seed an image. Errors as `certify_counts`.
    """
    check_sigma(sigma)
    check_alpha(alpha)
    if method not in get_args(CountMethod):
        raise ValueError(f"`method` must be one of {', '.join(get_args(CountMethod))}, got {method!r}.")
    if lipschitz is not None:
        check_lipschitz(lipschitz)
        if np.isfinite(lipschitz):
            raise ValueError(
                f"`lipschitz`={lipschitz} does not apply to votes: an argmax jumps however smooth the logits are. "
                "Use a softmax or sparsemax score map with the methods lvm or betting."
            )
    selection = checked_counts("selection_counts", selection_counts)
    votes = checked_counts("counts", counts)
    if selection.shape != votes.shape:
        raise ValueError(f"`selection_counts` {selection.shape} and `counts` {votes.shape} must have one shape.")
    uniform = None
    if randomized_seeds is not None:
        if len(randomized_seeds) != len(votes):
            raise ValueError(f"`randomized_seeds` must hold {len(votes)} seeds, got {len(randomized_seeds)}.")
        uniform = np.array([uniform_of_seed(seed) for seed in randomized_seeds])
    chosen = choose_methods(selection, votes.sum(axis=1), alpha) if method == "auto" else np.full(len(votes), method)
    decisions: list[Decision] = [None] * len(votes)  # type: ignore[list-item]
    for name in np.unique(chosen):
        rows = np.flatnonzero(chosen == name)
        part = None if uniform is None else uniform[rows]
        bounds = _bounds_of_votes(str(name), selection[rows], votes[rows], alpha, part)
        radius = _radius(str(name), bounds, sigma)
        for place, row in enumerate(rows):
            details: dict[str, Any] = {"requested": method, "bounds": int(bounds["bounds"][place])}
            if part is not None:
                details["uniform"] = float(part[place])
            decisions[row] = _decision(
                str(name),
                int(bounds["candidate"][place]),
                float(radius[place]),
                float(bounds["lower"][place]),
                float(bounds["upper"][place]),
                details,
            )
    return decisions


def certify_moments(
    selection_moments: Moments,
    moments: Moments,
    *,
    sigma: float,
    alpha: float,
    lipschitz: float | None = None,
) -> Decision:
    """`lvm`: certificate of one image from soft scores, the corrected rule of Delattre et al., ICLR 2024.

    The score map must be fixed before sampling, the same for all images (see `calibrate`), and used for prediction
    too: it defines the smoothed classifier. Candidate from the selection moments, then the lower bound of its mean and
    the upper bounds of all others at alpha / c each (c bounds). For hard votes use `certify_counts`, whose bounds are
    exact.

    Args:
        selection_moments: of n0 >= 1 samples of the scores.
        moments: of n >= 2 fresh samples.
        sigma: standard deviation of the noise, in the units of the image.
        alpha: failure probability of this certificate.
        lipschitz: proved l2 Lipschitz constant of every class's base score (that of the logits times the score map's
            factor); takes the exact radius for such scores.

    Raises:
        ValueError: an argument out of range, moments of scores that are not in [0, 1] or sum to more than 1.
    """
    check_sigma(sigma)
    check_alpha(alpha)
    if lipschitz is not None:
        check_lipschitz(lipschitz)
    c = len(moments.sums)
    _check_moments(selection_moments, moments)
    candidate = int(selection_moments.sums.argmax())
    level = alpha / c
    lower = float(bernstein_lower(moments.mean[candidate], moments.variance[candidate], moments.n, level))
    others = np.arange(c) != candidate
    upper_each = bernstein_upper(moments.mean[others], moments.variance[others], moments.n, level)
    upper = min(float(np.max(upper_each)), one_minus_up(lower - _SUM_SLACK))
    radius = (
        two_class_radius(lower, upper, sigma)
        if lipschitz is None
        else lipschitz_two_class_radius(lower, upper, sigma, lipschitz)
    )
    details: dict[str, Any] = {"bounds": c}
    if lipschitz is not None:
        details["lipschitz"] = float(lipschitz)
    return _decision("lvm", candidate, float(radius), lower, upper, details)


def class_buckets(selection_counts: ArrayLike) -> list[list[int]]:
    """Class partitioning of Delattre et al. 2025 (CPM) for the selection votes (c,): buckets of classes.

    The two classes with most votes have buckets of their own; while the votes of all remaining classes exceed those of
    the second, the largest of them gets a bucket; what is left is one bucket, in the order of the votes.
    """
    counts = checked_counts("selection_counts", np.asarray(selection_counts)[None])
    order, singles = _partition(counts)
    classes, num = order[0].tolist(), int(singles[0])
    rest = [classes[num:]] if num < len(classes) else []
    return [[k] for k in classes[:num]] + rest


def choose_methods(selection_counts: ArrayLike, n: ArrayLike, alpha: float) -> NDArray[np.str_]:
    """For each image the one of mono, bonferroni and cpm whose radius is largest if n samples fall like the n0.

    It sees the selection votes (m, c) only, so that choosing costs no risk.
    """
    selection = checked_counts("selection_counts", selection_counts)
    votes = votes_of_shares(expected_shares(selection), n)
    radii = np.stack([radii_of_votes(name, selection, votes, 1.0, alpha) for name in _FIXED])
    chosen: NDArray[np.str_] = np.asarray(_FIXED)[radii.argmax(axis=0)]
    return chosen


def expected_shares(selection: NDArray[np.int64]) -> NDArray[np.float64]:
    """Shares (m, c) to plan with after the selection votes (m, c).

    The votes of the classes other than the candidate are drawn towards their mean, wholly where they vary no more than
    chance lets equal classes vary: the largest of many small counts says little about its class. Half a vote is spread
    over the classes, as n0 unanimous votes are no proof of unanimity.
    """
    rows, c = np.arange(len(selection)), selection.shape[1]
    candidate = selection.argmax(axis=1)
    others = selection.astype(np.float64)
    others[rows, candidate] = 0.0
    mean = others.sum(axis=1, keepdims=True) / (c - 1)
    is_other = np.arange(c) != candidate[:, None]
    variance = (np.where(is_other, others - mean, 0.0) ** 2).sum(axis=1, keepdims=True) / max(c - 2, 1)
    drawn = np.divide(mean, variance, out=np.zeros_like(mean), where=variance > 0.0).clip(max=1.0)
    shares = others + drawn * (mean - others)
    shares[rows, candidate] = selection[rows, candidate]
    shares += 0.5 / c
    return shares / shares.sum(axis=1, keepdims=True)


def votes_of_shares(shares: NDArray[np.float64], n: ArrayLike) -> NDArray[np.int64]:
    """Whole votes (m, c) that add up to n (m,) and lie within one of shares * n, for planning."""
    ends = np.floor(np.cumsum(shares, axis=1) * np.asarray(n).reshape(-1, 1) + 0.5)
    return np.diff(ends, axis=1, prepend=0.0).astype(np.int64)


def radii_of_votes(
    method: str, selection: NDArray[np.int64], votes: NDArray[np.int64], sigma: float, alpha: ArrayLike
) -> NDArray[np.float64]:
    """Radii (m,) of votes (m, c) with a level of its own for each row; `method` must not be "auto"."""
    return _radius(method, _bounds_of_votes(method, selection, votes, alpha, None), sigma)


def _bounds_of_votes(
    method: str, selection: NDArray[np.int64], votes: NDArray[np.int64], alpha: ArrayLike, uniform: Any
) -> dict[str, NDArray[Any]]:
    """Candidate, lower bound and upper bound of the others of each row, all bounds of a row at `alpha` together.

    Upper bounds grow with the count, also randomised ones with one `uniform` for all classes: the largest is that of
    the largest count.
    """
    rows = np.arange(len(votes))
    n = votes.sum(axis=1)
    candidate = selection.argmax(axis=1)
    count = votes[rows, candidate]
    others = votes.copy()
    others[rows, candidate] = 0
    if method == "mono":
        lower = _lower(count, n, alpha, uniform)
        return {"candidate": candidate, "lower": lower, "upper": one_minus_up(lower), "bounds": np.ones_like(n)}
    if method == "bonferroni":
        bounds, largest = np.full_like(n, votes.shape[1]), others.max(axis=1)
    else:
        order, singles = _partition(selection)
        bounds = singles + (singles < votes.shape[1])
        ordered = np.take_along_axis(others, order, axis=1)
        alone = np.arange(votes.shape[1]) < singles[:, None]
        largest = np.maximum(np.where(alone, ordered, 0).max(axis=1), np.where(alone, 0, ordered).sum(axis=1))
    lower = _lower(count, n, alpha / bounds, uniform)
    upper = np.minimum(_upper(largest, n, alpha / bounds, uniform), one_minus_up(lower))
    return {"candidate": candidate, "lower": lower, "upper": upper, "bounds": bounds}


def _partition(selection: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Classes of each row by falling selection votes, and how many of them have a bucket of their own."""
    order = np.argsort(-selection, axis=1, kind="stable")
    ordered = np.take_along_axis(selection, order, axis=1)
    # votes of all classes from place j on; the pool is not larger than the second at the latest when it is empty
    pool = np.concatenate(
        [np.cumsum(ordered[:, ::-1], axis=1)[:, ::-1], np.zeros((len(selection), 1), np.int64)], axis=1
    )
    singles = 2 + (pool[:, 2:] <= ordered[:, 1:2]).argmax(axis=1)
    return order, singles


def _lower(k: Any, n: Any, alpha: Any, uniform: Any) -> NDArray[np.float64]:
    if uniform is None:
        return np.asarray(clopper_pearson_lower(k, n, alpha))
    return np.asarray(randomized_clopper_pearson_lower(k, n, alpha, uniform))


def _upper(k: Any, n: Any, alpha: Any, uniform: Any) -> NDArray[np.float64]:
    if uniform is None:
        return np.asarray(clopper_pearson_upper(k, n, alpha))
    return np.asarray(randomized_clopper_pearson_upper(k, n, alpha, uniform))


def _radius(method: str, bounds: dict[str, NDArray[Any]], sigma: float) -> NDArray[np.float64]:
    if method == "mono":
        return np.asarray(mono_radius(bounds["lower"], sigma))
    return np.asarray(two_class_radius(bounds["lower"], bounds["upper"], sigma))


def _decision(
    method: str, candidate: int, radius: float, lower: float, upper: float, details: dict[str, Any]
) -> Decision:
    # a ball of radius 0 holds no image: it abstains too
    predict = candidate if radius > 0.0 else ABSTAIN
    return Decision(predict, radius, lower, upper, candidate, method, details)


def _check_moments(selection: Moments, moments: Moments) -> None:
    if len(selection.sums) != len(moments.sums):
        raise ValueError(f"`moments` has {len(moments.sums)} classes, `selection_moments` {len(selection.sums)}.")
    if len(moments.sums) < 2:
        raise ValueError("`moments` must hold at least 2 classes.")
    if selection.n < 1 or moments.n < 2:
        raise ValueError(
            f"`selection_moments` needs n0 >= 1 and `moments` n >= 2 samples, got {selection.n} and {moments.n}."
        )
    for name, part in (("selection_moments", selection), ("moments", moments)):
        if not (np.all(np.isfinite(part.sums)) and np.all(np.isfinite(part.squares)) and np.all(part.squares >= 0.0)):
            raise ValueError(f"`{name}` holds NaN, infinite or negative values: the scores were not in [0, 1].")
        if np.any(part.sums < 0.0) or part.sums.sum() > part.n * (1.0 + _SUM_SLACK):
            raise ValueError(f"The scores of `{name}` do not lie on the simplex: they must sum to at most 1.")
