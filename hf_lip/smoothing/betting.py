# SPDX-License-Identifier: Apache-2.0
"""Betting bounds for soft scores: certificates that come close to the central limit theorem at a proved level.

To test "the mean is at most m" one bets on every score x in [0, 1]: the capital is multiplied by 1 + b (x - m), where
the bet b in [0, 1/m) is fixed by what came before. If the mean is at most m the capital is a non-negative
supermartingale from 1 and reaches 1/alpha with probability at most alpha (Ville 1939; Waudby-Smith and Ramdas 2024,
arXiv 2010.09686). On a grid of m the bound is the largest grid point up to which *all* points are rejected: to exceed
the true mean it would have to reject the first grid point at or above it, one test, at level alpha.

Bets aim at 1/alpha in the rounds that are left (STaR bets, Voracek and Orabona 2025, arXiv 2505.22422),
b = sqrt(2 ln(1 / (alpha K)) / (variance * rounds left)) for capital K, with a variance from the scores before. The
first scores bet nothing: they place the grid. Bets change from block to block; blocks depend on n only, so that
results do not depend on how the scores arrive.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri

from hf_lip.smoothing.intervals import check_alpha
from hf_lip.smoothing.lipschitz_radii import check_lipschitz, lipschitz_two_class_radius
from hf_lip.smoothing.radii import check_sigma, one_minus_up, two_class_radius
from hf_lip.smoothing.samples import ABSTAIN, Decision, Moments, checked_scores


# bets stop short of 1/m by this factor: larger gains more from scores of 1, and loses more from one that drops to 0
_LARGEST_BET = 0.8
# share of the samples that place the grid, at least so many; blocks of constant bets; grid points near the bound
_PLACING_SHARE, _PLACING_LEAST = 0.02, 32
_NUM_BLOCKS, _LARGEST_BLOCK = 400, 256
_COARSE_POINTS, _FINE_POINTS = 12, 200
# a sum of squares that is added to the observed one: a drop that has not been seen yet
_PRIOR_SQUARES = 0.25
# buckets of classes with a bound of their own
_MOST_BOUNDS = 8
# float scores of a row may sum to 1 plus this
_SUM_SLACK = 2.0**-40

__all__ = ["BettingAccumulator", "BettingLowerBound", "betting_lower", "certify_betting"]


class BettingLowerBound:
    """Lower bound at level 1 - alpha of the mean of scores in [0, 1] that arrive in any portions; memory O(1).

    Args:
        n: samples the bets are planned for.
        alpha: one-sided failure probability.

    Raises:
        ValueError: `n` below 1, `alpha` out of range.
    """

    def __init__(self, n: int, alpha: float) -> None:
        check_alpha(alpha)
        if n < 1:
            raise ValueError(f"`n` must be at least 1, got {n}.")
        self.n, self.alpha = n, alpha
        # reached only by more than what rounding adds to the logarithm of the capital
        self._goal = math.log(1.0 / alpha)
        self._slack = 1e-9 + 1e-14 * n
        self._placing = min(n - 1, max(_PLACING_LEAST, int(n * _PLACING_SHARE)))
        self._block = min(_LARGEST_BLOCK, max(8, (n - self._placing) // _NUM_BLOCKS))
        self._seen = 0
        self._pending: list[NDArray[np.float64]] = []
        self._moments = Moments.empty(1)
        self._grid = np.zeros(0)
        self._log_capital = np.zeros(0)
        self._rejected = np.zeros(0, dtype=bool)

    def update(self, scores: NDArray[np.float64]) -> None:
        """Take scores (B,) in [0, 1], checked by the caller.

        Raises:
            ValueError: more than n scores in all.
        """
        if self._seen + len(scores) > self.n:
            raise ValueError(f"The bets were planned for n={self.n} samples, got {self._seen + len(scores)}.")
        self._seen += len(scores)
        self._pending.append(np.array(scores, dtype=np.float64))
        waiting = np.concatenate(self._pending)
        while len(waiting) and len(waiting) >= self._next_size():
            size = self._next_size()
            self._take(waiting[:size])
            waiting = waiting[size:]
        self._pending = [waiting]

    def bound(self) -> float:
        """The bound by the blocks that are complete; valid at any time, planned for n samples."""
        first_kept = int(np.argmin(self._rejected)) if not self._rejected.all() else len(self._rejected)
        return float(self._grid[first_kept - 1]) if first_kept else 0.0

    def _next_size(self) -> int:
        done = self._moments.n
        return self._placing if done < self._placing else min(self._block, self.n - done)

    def _take(self, scores: NDArray[np.float64]) -> None:
        if self._moments.n >= self._placing:
            if not len(self._grid):
                self._place_grid()
            self._bet(scores)
        mean = scores.mean()
        self._moments = self._moments.merge(
            Moments(len(scores), np.array([scores.sum()]), np.array([((scores - mean) ** 2).sum()]))
        )

    def _bet(self, scores: NDArray[np.float64]) -> None:
        left = self.n - self._moments.n
        missing = np.maximum(self._goal - self._log_capital, 0.0)
        bets = np.minimum(np.sqrt(2.0 * missing / (self._variance() * left)), _LARGEST_BET / self._grid)
        bets[self._rejected] = 0.0
        # a block has at most 256 factors of at least 0.2: no underflow
        factors = bets[:, None] * (scores - self._grid[:, None])
        factors += 1.0
        self._log_capital += np.log(np.multiply.reduce(factors, axis=1))
        self._rejected |= self._log_capital >= self._goal + self._slack

    def _place_grid(self) -> None:
        """Grid on the scale of radii, Phi^-1(m): fine where the bound is expected, coarse below."""
        left = self.n - self._moments.n
        mean = float(np.clip(self._moments.mean[0], 0.0, 1.0)) if self._moments.n else 0.5
        variance, seen = self._variance(), max(self._moments.n, 1)
        error = 5.0 * math.sqrt(variance / seen)
        low = mean - error - math.sqrt(4.0 * variance * self._goal / left) - 2.0 * self._goal / left
        spread = float(self._moments.squares[0]) / seen
        # not even scores of 1 from here on prove more than alpha^(1/left)
        high = min(mean + error - math.sqrt(spread * self._goal / left), self.alpha ** (1.0 / left))
        low = min(max(low, 0.02), 0.99)
        high = max(high, 0.5 * (1.0 + low)) if high <= low else high
        points = np.linspace(ndtri(low), -ndtri(1.0 - high), _FINE_POINTS)
        coarse = np.linspace(ndtri(0.01), ndtri(low), _COARSE_POINTS, endpoint=False)
        self._grid = np.unique(ndtr(np.concatenate([coarse, points])))
        self._log_capital = np.zeros(len(self._grid))
        self._rejected = np.zeros(len(self._grid), dtype=bool)

    def _variance(self) -> float:
        return (float(self._moments.squares[0]) + _PRIOR_SQUARES) / (self._moments.n + 1)


class BettingAccumulator:
    """`betting`: the certificate of one image from soft scores that are streamed.

    What is bounded is chosen on the selection scores, as in `cpm`: the candidate alone (one class, alpha), or the
    candidate and K - 1 buckets of the other classes, the largest alone and the rest in one, at alpha / K each: what
    has the largest radius expected. The score map must be fixed before sampling: see `certify_moments`.

    Args:
        selection_scores: (n0, c) scores of the n0 >= 1 selection samples.
        n: number of estimation samples that will come.
        sigma: standard deviation of the noise, in the units of the image.
        alpha: failure probability of this certificate.
        lipschitz: proved l2 Lipschitz constant of every class's base score; takes the exact radius for such scores.

    Raises:
        ValueError: an argument out of range, no selection sample, scores that are not on the simplex.
    """

    def __init__(
        self, selection_scores: Any, *, n: int, sigma: float, alpha: float, lipschitz: float | None = None
    ) -> None:
        check_sigma(sigma)
        check_alpha(alpha)
        if lipschitz is not None:
            check_lipschitz(lipschitz)
        if n < 2:
            raise ValueError(f"`n` must be at least 2, got {n}.")
        selection = _on_simplex(selection_scores)
        if len(selection) == 0:
            raise ValueError("`selection_scores` is empty: take n0 >= 1 selection samples, 100 is usual.")
        self.n, self.sigma, self.alpha, self.lipschitz = n, sigma, alpha, lipschitz
        self._order = np.argsort(-selection.sum(axis=0), kind="stable")
        self.candidate = int(self._order[0])
        self.num_bounds = self._choose(selection)
        self._bounds = [BettingLowerBound(n, alpha / self.num_bounds) for _ in range(self.num_bounds)]
        self._samples = 0

    def update(self, scores: Any) -> None:
        """Take scores (B, c) of the next estimation samples, an array or a tensor on the CPU.

        Raises:
            ValueError: scores that are not on the simplex, another number of classes, more than n samples.
        """
        values = _on_simplex(scores)
        if values.shape[1] != len(self._order):
            raise ValueError(f"`scores` must have {len(self._order)} classes, got {values.shape[1]}.")
        for bound, stream in zip(self._bounds, _streams(values, self._order, self.num_bounds).T):
            bound.update(stream)
        self._samples += len(values)

    def decision(self) -> Decision:
        """The certificate by what has come so far: valid at any time, and best after n samples."""
        lower = self._bounds[0].bound()
        rest = one_minus_up(lower - _SUM_SLACK)
        others = [one_minus_up(bound.bound() - _SUM_SLACK) for bound in self._bounds[1:]]
        upper = min(rest, max(others)) if others else rest
        radius = float(self._radius(lower, upper))
        details: dict[str, Any] = {"bounds": self.num_bounds, "samples": self._samples}
        if self.lipschitz is not None:
            details["lipschitz"] = float(self.lipschitz)
        predict = self.candidate if radius > 0.0 else ABSTAIN
        return Decision(predict, radius, lower, upper, self.candidate, "betting", details)

    def _radius(self, lower: ArrayLike, upper: ArrayLike) -> Any:
        if self.lipschitz is None:
            return two_class_radius(lower, upper, self.sigma)
        return lipschitz_two_class_radius(lower, upper, self.sigma, self.lipschitz)

    def _choose(self, selection: NDArray[np.float64]) -> int:
        """Number of bounds with the largest radius expected; 2 is left out, as the rest of the candidate is known."""
        c = selection.shape[1]
        best, chosen = -1.0, 1
        for bounds in (1, *range(3, min(c, _MOST_BOUNDS) + 1)):
            streams = _streams(selection, self._order, bounds)
            mean = streams.mean(axis=0)
            variance = (((streams - mean) ** 2).sum(axis=0) + _PRIOR_SQUARES) / (len(streams) + 1)
            goal = math.log(bounds / self.alpha)
            lower = np.clip(mean - np.sqrt(2.0 * variance * goal / self.n) - goal / self.n, 0.0, 1.0 - 1e-12)
            rest = one_minus_up(lower[0])
            upper = min(rest, one_minus_up(lower[1:].min())) if bounds > 1 else rest
            radius = float(self._radius(lower[0], upper))
            if radius > best:
                best, chosen = radius, bounds
        return chosen


def betting_lower(scores: ArrayLike, alpha: float) -> float:
    """Lower bound at level 1 - alpha of the mean of independent scores (n,) in [0, 1], in the order given.

    Raises:
        ValueError: no score, one outside [0, 1] or NaN, `alpha` out of range.
    """
    values = np.asarray(scores, dtype=np.float64).reshape(-1)
    if not np.all((values >= 0.0) & (values <= 1.0)):
        raise ValueError("`scores` must lie in [0, 1] without NaN.")
    bound = BettingLowerBound(len(values), alpha)
    bound.update(values)
    return bound.bound()


def certify_betting(
    selection_scores: Any, scores: Any, *, sigma: float, alpha: float, lipschitz: float | None = None
) -> Decision:
    """`BettingAccumulator` for scores (n, c) that are all there; the same arguments and errors."""
    values = _on_simplex(scores)
    accumulator = BettingAccumulator(selection_scores, n=len(values), sigma=sigma, alpha=alpha, lipschitz=lipschitz)
    accumulator.update(values)
    return accumulator.decision()


def _on_simplex(scores: Any) -> NDArray[np.float64]:
    values = checked_scores(scores)
    if np.any(values.sum(axis=1) > 1.0 + _SUM_SLACK):
        raise ValueError("The scores of a sample must sum to at most 1: apply a score map to the logits, in float64.")
    return values


def _streams(scores: NDArray[np.float64], order: NDArray[np.int64], bounds: int) -> NDArray[np.float64]:
    """(B, bounds) scores to be bounded from below: the candidate's, and 1 - those of the buckets of other classes."""
    ordered = scores[:, order[: bounds - 1]] if bounds > 1 else scores[:, order[:1]]
    if bounds == 1:
        return ordered
    pooled = scores[:, order[bounds - 1 :]].sum(axis=1, keepdims=True)
    others = np.concatenate([ordered[:, 1:], pooled], axis=1)
    return np.concatenate([ordered[:, :1], np.clip(1.0 - others, 0.0, 1.0)], axis=1)
