# SPDX-License-Identifier: Apache-2.0
"""What a smoothing run samples and how it judges it."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from hf_lip.ops.simplex import ScoreMap
from hf_lip.smoothing.intervals import check_alpha, clopper_pearson_lower
from hf_lip.smoothing.lipschitz_radii import check_lipschitz
from hf_lip.smoothing.noise import check_words
from hf_lip.smoothing.radii import check_sigma


SmoothingMethod = Literal["mono", "bonferroni", "cpm", "auto", "lvm", "betting"]
Budget = Literal["fixed", "adaptive"]
SOFT_METHODS = ("lvm", "betting")

__all__ = ["SOFT_METHODS", "Budget", "SmoothingMethod", "SmoothingSettings", "check_num_samples", "samples_needed"]


@dataclass(frozen=True)
class SmoothingSettings:
    """What is sampled and how it is judged; all of it fixed before the first sample.

    Attributes:
        method: "mono", "bonferroni", "cpm" or "auto" for votes, "lvm" or "betting" for soft scores.
        sigma: standard deviation of the noise, in units of pixels in [0, 1].
        n0: samples that choose the class.
        n: samples that bound probabilities; with an adaptive budget at most so many.
        alpha: failure probability of one image's certificate.
        seed: of the noise.
        budget: "fixed", or "adaptive": stop once the radius is within `rtol` of what n samples could give, once it is
            decided whether it exceeds `target_radius`, or once neither can happen. For votes only.
        rtol: see `budget`.
        target_radius: see `budget`.
        score_map: for soft scores; fixed per model and sigma, as it defines the smoothed classifier.
        randomized: randomised Clopper-Pearson bounds, for votes with a fixed budget.
        lipschitz: proved constant of every base score, for soft scores; takes the exact radius for such scores.
        score_error: bound on what a computed score is off from the one `lipschitz` was proved for.

    Raises:
        ValueError, TypeError: a value out of range, or options that do not go together.
    """

    method: SmoothingMethod = "mono"
    sigma: float = 0.25
    n0: int = 100
    n: int = 10_000
    alpha: float = 0.001
    seed: int = 0
    budget: Budget = "fixed"
    rtol: float = 0.02
    target_radius: float | None = None
    score_map: ScoreMap = field(default_factory=ScoreMap)
    randomized: bool = False
    lipschitz: float | None = None
    score_error: float = 0.0

    def __post_init__(self) -> None:
        if self.method not in get_args(SmoothingMethod):
            raise ValueError(f"`method` must be one of {', '.join(get_args(SmoothingMethod))}, got {self.method!r}.")
        check_sigma(self.sigma)
        check_alpha(self.alpha)
        check_words(seed=self.seed)
        for name in ("n0", "n"):
            check_words(**{name: getattr(self, name)})
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        check_num_samples(self.n, self.alpha)
        self._check_budget()
        if self.soft and self.score_map.is_hard:
            raise ValueError(
                f"`method`={self.method!r} needs a soft `score_map`, such as softmax(t=1.0) or that of a calibration; "
                "for votes use bonferroni, cpm or mono."
            )
        if not self.soft and not self.score_map.is_hard:
            raise ValueError(f"`score_map` {self.score_map} needs method lvm or betting, not {self.method!r}.")
        if self.randomized and (self.soft or self.budget == "adaptive"):
            raise ValueError("`randomized` bounds are for votes with a fixed budget: use mono, bonferroni or cpm.")
        if self.lipschitz is not None:
            check_lipschitz(self.lipschitz)
            if not self.soft:
                raise ValueError(f"`lipschitz` needs soft scores (method lvm or betting), not {self.method!r}.")
        if not (math.isfinite(self.score_error) and self.score_error >= 0.0):
            raise ValueError(f"`score_error` must be finite and >= 0, got {self.score_error}.")

    def _check_budget(self) -> None:
        if self.budget not in get_args(Budget):
            raise ValueError(f"`budget` must be 'fixed' or 'adaptive', got {self.budget!r}.")
        if self.budget == "adaptive" and self.soft:
            raise ValueError(f"`budget`='adaptive' is for votes (mono, bonferroni, cpm, auto), not {self.method!r}.")
        if not 0.0 < self.rtol < 1.0:
            raise ValueError(f"`rtol` must lie strictly between 0 and 1 (0.02 is usual), got {self.rtol}.")
        if self.target_radius is not None:
            if not (math.isfinite(self.target_radius) and self.target_radius > 0.0):
                raise ValueError(f"`target_radius` must be positive and finite, got {self.target_radius}.")
            if self.budget != "adaptive":
                raise ValueError("`target_radius` needs `budget`='adaptive': a fixed budget decides nothing early.")

    @property
    def soft(self) -> bool:
        return self.method in SOFT_METHODS


def samples_needed(alpha: float) -> int:
    """Smallest n for which n unanimous votes certify: alpha**(1/n) > 1/2, so 10 for alpha = 0.001.

    Raises:
        ValueError: `alpha` outside (0, 1).
    """
    check_alpha(alpha)
    n = max(1, math.floor(-math.log2(alpha)))
    while clopper_pearson_lower(n, n, alpha) <= 0.5:
        n += 1
    return n


def check_num_samples(n: int, alpha: float) -> None:
    """Raise a `ValueError` if even `n` unanimous votes can not certify at `alpha`; it says how many are needed."""
    needed = samples_needed(alpha)
    if n < needed:
        raise ValueError(
            f"`n`={n} samples can never certify at alpha={alpha}: even unanimous votes need n >= {needed} "
            f"(alpha**(1/n) > 1/2). Use n >= {needed}; 10,000 to 100,000 are usual."
        )
