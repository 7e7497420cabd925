# SPDX-License-Identifier: Apache-2.0
"""Adaptive sampling: stop as soon as more samples are not worth it, at a total error of at most alpha.

The looks n_1 < n_2 < ... <= n at which a certificate may be issued and their levels a_1 + a_2 + ... <= alpha are fixed
by the n0 selection samples. Given those, Clopper-Pearson bounds of look j on the first n_j estimation samples fail
with probability at most a_j, so that with probability at least 1 - alpha the bounds of *all* looks hold: a confidence
sequence. The certificate that is returned is one of theirs, whenever and for whatever reason sampling stops: its error
is at most alpha. Looks between them, at which no certificate is issued, can only stop in vain and need no level.

What is spent where is planned with the posterior of the candidate's probability after the selection samples. A larger
n0 (1,000 for n = 100,000) plans better; it costs no risk either way.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv

from hf_lip.smoothing.intervals import check_alpha, clopper_pearson_upper
from hf_lip.smoothing.procedures import (
    CountMethod,
    certify_counts,
    choose_methods,
    expected_shares,
    radii_of_votes,
    votes_of_shares,
)
from hf_lip.smoothing.radii import check_sigma
from hf_lip.smoothing.samples import ABSTAIN, Decision, checked_counts


# rtol: the planned look, sized for this quantile of the posterior, takes this share of alpha; the rest is for looks
# that grow by this factor up to n
_PLANNED_QUANTILE, _PLANNED_SHARE, _RESERVE_GROWTH = 0.85, 0.95, 3.0
# share of rtol that is aimed at, as stops that came too early take the rest
_AIM = 0.8
# standard errors by which an estimate must fall short before sampling is futile
_FUTILE_ERRORS = 2.0
# target radius: looks grow by this factor; levels are even but for this weight near the looks expected to decide
_GROWTH, _PILOT_WEIGHT = 1.3, 5.0
_FUTILE_LEVEL = 0.002
# the sum of the levels stays below alpha in floats
_SHARE_SLACK = 1e-12

__all__ = ["AdaptivePlan", "AdaptiveRule", "Continue", "Stop"]


@dataclass(frozen=True)
class Continue:
    """Draw until there are `next_look` estimation samples in all, then call `update` again."""

    next_look: int


@dataclass(frozen=True)
class Stop:
    """No more samples.

    Attributes:
        reason: "rtol" (n samples would hardly give more), "target" (the target radius is certified), "futile" (more
            samples would hardly certify what is asked) or "budget" (the last look).
        decision: the certificate; its details hold the samples drawn, and the look and level of its bounds.
    """

    reason: str
    decision: Decision


@dataclass(frozen=True)
class AdaptivePlan:
    """Looks and levels for one image, fixed by its selection samples; shared by all images with the same ones.

    Attributes:
        selection_counts: votes (c,) of the n0 >= 1 selection samples.
        n: most estimation samples to draw.
        sigma: standard deviation of the noise, in the units of the image.
        alpha: failure probability of the image's certificate, all looks together.
        method: "mono", "bonferroni", "cpm", or "auto", which chooses among them from the selection counts.
        rtol: sampling stops when the radius is within rtol * max(radius, sigma) of the one that n samples at a single
            look would be expected to give.
        target_radius: if given, sampling stops when this radius is certified, or hardly can be; `rtol` has no part.
        step: looks are multiples of it (and n); it does not depend on batches, so that results do not either.

    Raises:
        ValueError: an argument out of range; a target radius that n unanimous votes do not reach.
    """

    selection_counts: tuple[int, ...]
    n: int
    sigma: float
    alpha: float
    method: CountMethod = "mono"
    rtol: float = 0.02
    target_radius: float | None = None
    step: int = 64

    def __post_init__(self) -> None:
        check_sigma(self.sigma)
        check_alpha(self.alpha)
        checked_counts("selection_counts", np.asarray(self.selection_counts)[None])
        for name, value in (("n", self.n), ("step", self.step)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if not 0.0 < self.rtol < 1.0:
            raise ValueError(f"`rtol` must lie strictly between 0 and 1 (0.02 is usual), got {self.rtol}.")
        if self.target_radius is not None:
            if not self.target_radius > 0.0:
                raise ValueError(f"`target_radius` must be positive, got {self.target_radius}.")
            # the final look has at least this level
            share = 1.0 / (len(self._geometric_looks) * (1.0 + _PILOT_WEIGHT))
            largest = float(self._radii(self._shares(np.array([1.0])), [self.n], share)[0])
            if self.target_radius > largest:
                raise ValueError(
                    f"`target_radius`={self.target_radius} can not be certified with n={self.n} samples at "
                    f"sigma={self.sigma}, alpha={self.alpha}: even unanimous votes may give {largest:.4g} only. "
                    "Raise n or sigma."
                )

    @cached_property
    def candidate(self) -> int:
        """Class chosen on the selection samples."""
        return int(np.argmax(self.selection_counts))

    @cached_property
    def fixed_method(self) -> str:
        """`method`, or what "auto" chose."""
        if self.method != "auto":
            return self.method
        return str(choose_methods(np.asarray(self.selection_counts)[None], self.n, self.alpha)[0])

    @cached_property
    def looks(self) -> tuple[tuple[int, float], ...]:
        """(samples, level) in ascending order; level 0.0 for looks that may stop but issue no certificate."""
        level = self.alpha * (1.0 - _SHARE_SLACK)
        shares = self._rtol_shares() if self.target_radius is None else self._target_shares()
        return tuple((look, level * share) for look, share in sorted(shares.items()))

    def step_radii(self, place: int, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        """Radii (m,) that look number `place` certifies for votes (m, c) of images with this plan; 0 where none."""
        level = self.looks[place][1]
        if level == 0.0:
            return np.zeros(len(counts))
        selection = np.broadcast_to(np.asarray(self.selection_counts, dtype=np.int64), counts.shape)
        return radii_of_votes(self.fixed_method, selection, counts, self.sigma, level)

    def reasons(self, place: int, counts: NDArray[np.int64], best: NDArray[np.float64]) -> NDArray[np.str_]:
        """Why to stop after look number `place`, "" to go on.

        Args:
            counts: votes (m, c) so far of images with this plan.
            best: (m,) largest radius of the looks so far.
        """
        if self.target_radius is None:
            reasons = self._rtol_reasons(place, counts, best)
        else:
            futile = self._hopeful_radii(counts) < self.target_radius
            reasons = np.where(best >= self.target_radius, "target", np.where(futile, "futile", ""))
        if place == len(self.looks) - 1:
            reasons = np.where(reasons == "", "budget", reasons)
        return reasons

    def _rtol_reasons(self, place: int, counts: NDArray[np.int64], best: NDArray[np.float64]) -> NDArray[np.str_]:
        look, level = self.looks[place]
        share = counts[:, self.candidate] / look
        full = self._radii(self._shares(share, counts), np.full(len(counts), self.n), 1.0)
        error = np.sqrt((share * (1.0 - share) + 1.0 / look) / look)
        hopeful = np.minimum(share + _FUTILE_ERRORS * error, 1.0)
        most = self._radii(self._shares(hopeful, counts), np.full(len(counts), self.n), 1.0)
        done = most - best <= self._tolerance(0.0)
        if level > 0.0:
            tolerance = self._tolerance(full)
            later = [
                self._radii(self._shares(share, counts), np.full(len(counts), samples), next_level / self.alpha)
                for samples, next_level in self.looks[place + 1 :]
                if next_level > 0.0
            ]
            ahead = np.max([best, *later], axis=0)
            done |= (best >= full - tolerance) | (ahead <= best + tolerance)
        return np.where(done, np.where(best > 0.0, "rtol", "futile"), "")

    def _tolerance(self, radius: ArrayLike) -> Any:
        return _AIM * self.rtol * np.maximum(radius, self.sigma)

    def _rtol_shares(self) -> dict[int, float]:
        """One look where the posterior expects a radius within rtol, and later ones for when it was wrong."""
        grid = self._rounded(np.geomspace(self.step, self.n, 160))
        expected = np.repeat(self._shares(self._posterior([_PLANNED_QUANTILE])), len(grid), axis=0)
        full = float(self._radii(expected[:1], [self.n], 1.0)[0])
        enough = self._radii(expected, grid, _PLANNED_SHARE) >= full - self._tolerance(full)
        planned = int(grid[int(enough.argmax())]) if enough.any() else self.n
        shares = {planned: 1.0}
        # a reserve that is hardly larger is not worth its share
        if planned * 1.3 < self.n:
            powers = _RESERVE_GROWTH ** np.arange(1, max(1, math.ceil(math.log(self.n / planned, _RESERVE_GROWTH))))
            reserve = self._rounded([look for look in planned * powers if look * 1.3 < self.n] + [self.n])
            shares = {planned: _PLANNED_SHARE, **dict.fromkeys(reserve, (1.0 - _PLANNED_SHARE) / len(reserve))}
        # between these, looks that may only stop
        doublings = range(2, max(2, int(math.log2(max(max(shares) / self.step, 1.0))) + 1))
        return {**dict.fromkeys(self._rounded(self.step * 2.0 ** np.array(doublings)), 0.0), **shares}

    def _target_shares(self) -> dict[int, float]:
        """Geometric looks; more of alpha where the posterior expects the target to be reached."""
        looks = self._geometric_looks
        weights = np.ones(len(looks))
        quantiles = [0.1, 0.3, 0.5, 0.7, 0.9]
        for share in self._posterior(quantiles):
            shares = np.repeat(self._shares(np.array([share])), len(looks), axis=0)
            reached = self._radii(shares, looks, 1.0 / 3.0) >= (self.target_radius or 0.0)
            place = int(reached.argmax()) if reached.any() else len(looks) - 1
            distance = np.arange(len(looks)) - place
            weights += _PILOT_WEIGHT * len(looks) / len(quantiles) * _kernel(distance)
        weights /= weights.sum()
        return dict(zip(looks, weights.tolist()))

    @cached_property
    def _geometric_looks(self) -> list[int]:
        count = max(1, int(np.log(max(self.n / self.step, 1.0)) / np.log(_GROWTH)) + 1)
        return self._rounded(self.n / _GROWTH ** np.arange(count)[::-1])

    def _rounded(self, looks: Iterable[float]) -> list[int]:
        """Multiples of `step`, upwards, at most n."""
        return sorted({min(self.n, int(np.ceil(look / self.step - 1e-9)) * self.step) for look in looks})

    def _posterior(self, quantiles: Sequence[float]) -> NDArray[np.float64]:
        """Quantiles of the candidate's probability after the selection samples (Jeffreys' prior)."""
        n0, k = sum(self.selection_counts), self.selection_counts[self.candidate]
        return np.asarray(betaincinv(k + 0.5, n0 - k + 0.5, np.asarray(quantiles)))

    def _shares(self, candidate_share: NDArray[np.float64], counts: ArrayLike | None = None) -> NDArray[np.float64]:
        """Shares (m, c) of the votes: `candidate_share` (m,), the rest in proportion to `counts` and the selection."""
        selection = np.asarray(self.selection_counts)
        known = expected_shares(selection[None]) * selection.sum()
        others = np.repeat(known, len(candidate_share), axis=0) + (0.0 if counts is None else np.asarray(counts))
        others[:, self.candidate] = 0.0
        shares = others / others.sum(axis=1, keepdims=True) * (1.0 - candidate_share[:, None])
        shares[:, self.candidate] = candidate_share
        return shares

    def _radii(self, shares: NDArray[np.float64], samples: ArrayLike, level_share: ArrayLike) -> NDArray[np.float64]:
        """Radii (m,) expected of `samples` (m,) votes with these shares (m, c) at these shares of alpha."""
        votes = votes_of_shares(shares, np.asarray(samples))
        selection = np.broadcast_to(np.asarray(self.selection_counts, dtype=np.int64), votes.shape)
        return radii_of_votes(self.fixed_method, selection, votes, self.sigma, np.asarray(level_share) * self.alpha)

    def _hopeful_radii(self, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        """Radii (m,) that n samples would give if the candidate's probability were at an upper bound."""
        look = counts.sum(axis=1)
        share = np.asarray(clopper_pearson_upper(counts[:, self.candidate], look, _FUTILE_LEVEL))
        return self._radii(self._shares(share, counts), np.full(len(counts), self.n), 1.0)


class AdaptiveRule:
    """Decides after each look whether to go on; one image's plan and what it has seen.

        rule = AdaptiveRule(selection_counts, n=100_000, sigma=0.25, alpha=0.001)
        step = Continue(rule.first_look)
        while isinstance(step, Continue):
            counts += votes of the next (step.next_look - counts.sum()) samples
            step = rule.update(counts)
        step.decision

    The error of `step.decision` is at most alpha: see the module. Arguments and errors as `AdaptivePlan`.
    """

    def __init__(
        self,
        selection_counts: ArrayLike,
        *,
        n: int,
        sigma: float,
        alpha: float,
        method: CountMethod = "mono",
        rtol: float = 0.02,
        target_radius: float | None = None,
        step: int = 64,
    ) -> None:
        selection = checked_counts("selection_counts", np.asarray(selection_counts)[None])[0]
        self.plan = AdaptivePlan(
            tuple(selection.tolist()), n, sigma, alpha, method, rtol=rtol, target_radius=target_radius, step=step
        )
        self._place = 0
        self._last = np.zeros(len(selection), dtype=np.int64)
        self._best: tuple[float, int, NDArray[np.int64]] | None = None
        self._stopped = False

    @property
    def first_look(self) -> int:
        """Estimation samples to draw before the first `update`."""
        return self.plan.looks[0][0]

    def update(self, counts: ArrayLike) -> Stop | Continue:
        """What to do after a look.

        Args:
            counts: votes (c,) of all estimation samples so far, as many as the look asked for.

        Raises:
            ValueError: another number of samples, votes that got fewer, or a rule that has stopped already.
        """
        votes = checked_counts("counts", np.asarray(counts)[None])
        look, level = self.plan.looks[self._place]
        if self._stopped:
            raise ValueError("This rule has stopped: make a new `AdaptiveRule` for a new image.")
        if int(votes.sum()) != look:
            raise ValueError(f"`counts` must hold the votes of {look} samples at this look, got {int(votes.sum())}.")
        if votes.shape[1] != len(self._last) or np.any(votes[0] < self._last):
            raise ValueError(f"`counts` must add to the votes of the look before, {self._last}, got {votes[0]}.")
        self._last = votes[0]
        radius = float(self.plan.step_radii(self._place, votes)[0])
        if level > 0.0 and (self._best is None or radius > self._best[0]):
            self._best = (radius, self._place, votes[0])
        best = 0.0 if self._best is None else self._best[0]
        reason = str(self.plan.reasons(self._place, votes, np.array([best]))[0])
        self._place += 1
        if not reason:
            return Continue(self.plan.looks[self._place][0])
        self._stopped = True
        return Stop(reason, self._decision(look))

    def _decision(self, samples: int) -> Decision:
        plan = self.plan
        spent: dict[str, Any] = {"requested": plan.method, "samples": samples, "alpha": plan.alpha}
        if self._best is None:
            # stopped before any look that certifies
            return Decision(ABSTAIN, 0.0, 0.0, 1.0, plan.candidate, plan.fixed_method, spent)
        _, place, votes = self._best
        look, level = plan.looks[place]
        method: Any = plan.fixed_method
        decision = certify_counts(method, plan.selection_counts, votes, sigma=plan.sigma, alpha=level)
        return replace(decision, details={**decision.details, **spent, "look": look, "level": level})


def _kernel(distance: NDArray[np.int64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = np.exp(-0.5 * distance.astype(np.float64) ** 2)
    return result
