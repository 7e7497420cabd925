# SPDX-License-Identifier: Apache-2.0
"""PREDICT with abstention: the class of the smoothed classifier, wrong with probability at most alpha.

Cohen, Rosenfeld and Kolter 2019, section 3.2.2 (after Hung and Fithian 2019). To be used with the score map and the
precision of the certificates: another map is another smoothed classifier.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betainc

from hf_lip.smoothing.intervals import bernstein_lower, bernstein_upper, check_alpha
from hf_lip.smoothing.samples import ABSTAIN, Moments, checked_counts


# relative part of alpha that is given away to the errors of the beta function
_LEVEL_SLACK = 1e-9

__all__ = ["predict_counts", "predict_counts_batch", "predict_moments"]


def predict_counts(counts: ArrayLike, alpha: float) -> int:
    """The class with most of the votes `counts` (c,), or -1 (abstain).

    Abstains unless the two-sided binomial test of the two largest counts against 1/2 has a p-value of at most alpha.

    Raises:
        ValueError: counts that are no votes of at least two classes, `alpha` out of range.
    """
    return int(predict_counts_batch(np.asarray(counts)[None], alpha)[0])


def predict_counts_batch(counts: ArrayLike, alpha: float) -> NDArray[np.int64]:
    """`predict_counts` for the votes (m, c) of m images: classes (m,), -1 for abstentions."""
    check_alpha(alpha)
    votes = checked_counts("counts", counts)
    winner = votes.argmax(axis=1)
    second, first = np.sort(votes, axis=1)[:, -2:].T
    # 2 P(Binomial(first + second, 1/2) >= first), which is the two-sided p-value; first > second or it is 1
    p_value = np.where(first > second, 2.0 * betainc(np.maximum(first, 1), second + 1.0, 0.5), 1.0)
    return np.where(p_value * (1.0 + _LEVEL_SLACK) <= alpha, winner, ABSTAIN)


def predict_moments(moments: Moments, alpha: float) -> int:
    """The class with the largest mean score, or -1 (abstain), for soft score maps.

    Empirical Bernstein bounds at alpha / c: the class is returned if its lower bound exceeds the upper bounds of all
    others. To return k where the true winner is g, either the lower bound of a class other than g or the upper bound
    of g must fail: c events in all.

    Raises:
        ValueError: `alpha` out of range, fewer than two samples.
    """
    check_alpha(alpha)
    level = alpha / len(moments.sums)
    mean, variance = moments.mean, moments.variance
    lower = np.asarray(bernstein_lower(mean, variance, moments.n, level))
    upper = np.asarray(bernstein_upper(mean, variance, moments.n, level))
    winner = int(mean.argmax())
    return winner if lower[winner] > np.delete(upper, winner).max() else ABSTAIN
