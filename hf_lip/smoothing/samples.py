# SPDX-License-Identifier: Apache-2.0
"""What the procedures of randomized smoothing take and return: votes, moments of scores, decisions."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


ABSTAIN = -1

__all__ = ["ABSTAIN", "Decision", "Moments", "checked_counts", "checked_scores"]


@dataclass(frozen=True)
class Decision:
    """One image's certificate.

    Attributes:
        predict: certified class, or -1 (`ABSTAIN`).
        radius: l2 radius in the units of sigma, 0.0 on abstention; the ball is open.
        p_lower: lower bound of the mean score (the probability, for votes) of `candidate`.
        p_upper_other: upper bound of that of every other class; both hold together with probability 1 - alpha.
        candidate: class chosen on the selection samples.
        method: procedure whose bounds these are, such as "mono", never "auto".
        details: numbers of the procedure, ready for JSON.
    """

    predict: int
    radius: float
    p_lower: float
    p_upper_other: float
    candidate: int
    method: str
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def abstained(self) -> bool:
        return self.predict == ABSTAIN


@dataclass(frozen=True)
class Moments:
    """Running first and second moments of scores, float64: what soft certificates need of n x c scores.

    Attributes:
        n: number of samples.
        sums: (c,) sum of the scores of every class.
        squares: (c,) sum of squared deviations from the mean.
    """

    n: int
    sums: NDArray[np.float64]
    squares: NDArray[np.float64]

    @classmethod
    def empty(cls, num_classes: int) -> "Moments":
        """No samples yet."""
        return cls(0, np.zeros(num_classes), np.zeros(num_classes))

    @classmethod
    def from_scores(cls, scores: ArrayLike) -> "Moments":
        """Moments of scores (B, c) in [0, 1]; a `ValueError` for any other value, NaN included."""
        values = checked_scores(scores)
        if len(values) == 0:
            return cls.empty(values.shape[1])
        sums = values.sum(axis=0)
        return cls(len(values), sums, ((values - sums / len(values)) ** 2).sum(axis=0))

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both samples together (Chan, Golub and LeVeque 1983); works for batches of one and of none.

        Raises:
            ValueError: different numbers of classes.
        """
        if len(self.sums) != len(other.sums):
            raise ValueError(f"Moments of {len(self.sums)} and {len(other.sums)} classes can not be merged.")
        if self.n == 0 or other.n == 0:
            return other if self.n == 0 else self
        n = self.n + other.n
        gap = self.mean - other.mean
        squares = self.squares + other.squares + gap * gap * (self.n * other.n / n)
        return Moments(n, self.sums + other.sums, squares)

    @property
    def mean(self) -> NDArray[np.float64]:
        """(c,) sample means."""
        return self.sums / max(self.n, 1)

    @property
    def variance(self) -> NDArray[np.float64]:
        """(c,) unbiased sample variances.

        Raises:
            ValueError: fewer than two samples.
        """
        if self.n < 2:
            raise ValueError(f"A sample variance needs at least 2 samples, got n={self.n}: draw more.")
        return self.squares / (self.n - 1)


def checked_counts(name: str, counts: ArrayLike) -> NDArray[np.int64]:
    """Votes (m, c) as int64.

    Raises:
        ValueError: no rows of at least two classes, negative or fractional counts, NaN, an image without votes.
    """
    values = np.asarray(counts)
    if values.ndim != 2 or values.shape[1] < 2:
        raise ValueError(f"`{name}` must hold the votes of at least 2 classes for every image, got {values.shape}.")
    if values.dtype.kind not in "iu" and not (values.dtype.kind == "f" and np.all(values == np.floor(values))):
        raise ValueError(f"`{name}` must hold whole numbers of votes, got {values}.")
    if np.any(values < 0) or not np.all(np.isfinite(values)):
        raise ValueError(f"`{name}` must hold numbers of votes >= 0, got {values}.")
    result = values.astype(np.int64)
    if np.any(result.sum(axis=1) == 0):
        remedy = "take n0 >= 1, 100 is usual" if name == "selection_counts" else "take n >= 1"
        raise ValueError(f"`{name}` holds an image without any vote: {remedy}.")
    return result


def checked_scores(scores: ArrayLike) -> NDArray[np.float64]:
    """Scores (B, c) as float64.

    Raises:
        ValueError: fewer than two classes, a score outside [0, 1] or NaN.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] < 2:
        raise ValueError(f"`scores` must have shape (B, c) with at least 2 classes, got {values.shape}.")
    if not np.all((values >= 0.0) & (values <= 1.0)):
        raise ValueError("`scores` must lie in [0, 1] without NaN: apply a score map to the logits, in float64.")
    return values
