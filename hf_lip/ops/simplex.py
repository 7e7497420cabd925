# SPDX-License-Identifier: Apache-2.0
"""Maps from logits to scores on the probability simplex: softmax, sparsemax and hardmax, and their Lipschitz factors.

Logits are multiplied by the inverse temperature t, so that t -> infinity is the hard vote (Delattre et al., ICLR 2024;
sparsemax: Martins and Astudillo, ICML 2016). Scores are float64 and scaled by 1 - (c + 8) 2**-52, so that the exact
sum of the floats in a row is at most 1: smoothing certificates rest on that.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor


ScoreKind = Literal["hardmax", "softmax", "sparsemax"]
_TEXT = re.compile(r"(hardmax|softmax|sparsemax)(?:\(t=([^)]+)\))?")

__all__ = ["ScoreKind", "ScoreMap", "sparsemax_scores"]


@dataclass(frozen=True)
class ScoreMap:
    """One fixed map from logits to scores.

    Attributes:
        kind: "hardmax" (all mass on the first largest logit), "softmax" or "sparsemax".
        inverse_temperature: t > 0, by which logits are multiplied; it has no effect on hardmax.

    Raises:
        ValueError: an unknown kind, or t outside 1e-30 to 1e30.
    """

    kind: ScoreKind = "hardmax"
    inverse_temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(ScoreKind):
            raise ValueError(f"`kind` must be one of {', '.join(get_args(ScoreKind))}, got {self.kind!r}.")
        _check_temperatures((self.inverse_temperature,))

    def __str__(self) -> str:
        return self.kind if self.kind == "hardmax" else f"{self.kind}(t={self.inverse_temperature!r})"

    @classmethod
    def parse(cls, text: str) -> "ScoreMap":
        """The map that `str` wrote, such as "softmax(t=2.5)"; a `ValueError` for anything else."""
        match = _TEXT.fullmatch(text.strip())
        if match is None or (match[2] is None) != (match[1] == "hardmax"):
            raise ValueError(f"{text!r} is no score map: write hardmax, softmax(t=2.5) or sparsemax(t=2.5).")
        kind: Any = match[1]
        return cls(kind) if match[2] is None else cls(kind, float(match[2]))

    @property
    def is_hard(self) -> bool:
        """True for 0/1 votes, for which counts and Clopper-Pearson bounds are to be used."""
        return self.kind == "hardmax"

    def apply(self, logits: Tensor) -> Tensor:
        """Scores (..., c) float64 in [0, 1] of `logits` (..., c), on their device, or the CPU if it has no float64.

        Raises:
            ValueError: NaN or infinite logits.
        """
        z = _float64(logits)
        if self.kind == "hardmax":
            return torch.zeros_like(z).scatter_(-1, z.argmax(dim=-1, keepdim=True), 1.0)
        if self.kind == "sparsemax":
            return sparsemax_scores(z, (self.inverse_temperature,))[0]
        return _scaled(torch.softmax(_shifted(z) * self.inverse_temperature, dim=-1))

    def lipschitz_factor(self, num_classes: int) -> float:
        """Upper bound of the l2 gradient norm of every class score with respect to the logits, rounded up.

        softmax: t p_k sqrt((1 - p_k)^2 + sum_j p_j^2) is largest at p = (1/2, 1/2, 0, ...): t sqrt(2) / 4. sparsemax:
        t sqrt(1 - 1/|S|) for the support S, at most t sqrt(1 - 1/c). hardmax: infinite (the limit t -> infinity).
        The base score is L-Lipschitz for L = this factor * the l2 -> l2 constant of the logits.

        Raises:
            ValueError: fewer than two classes.
        """
        if num_classes < 2:
            raise ValueError(f"`num_classes` must be at least 2, got {num_classes}.")
        if self.kind == "hardmax":
            return math.inf
        slope = math.sqrt(2.0) / 4.0 if self.kind == "softmax" else math.sqrt(1.0 - 1.0 / num_classes)
        return self.inverse_temperature * slope * (1.0 + 2.0**-48)


def sparsemax_scores(logits: Tensor, inverse_temperatures: Sequence[float]) -> Tensor:
    """Sparsemax of t * logits for all t at once: (T, ..., c) float64.

    The logits are sorted and summed once: with descending z and S_k = z_1 + ... + z_k, the support of t z is the
    largest k with 1/t + k z_k > S_k, and the threshold is (S_k - 1/t) / k.

    Args:
        logits: (..., c), finite.
        inverse_temperatures: T positive numbers.

    Raises:
        ValueError: NaN or infinite logits, or a temperature outside 1e-30 to 1e30.
    """
    _check_temperatures(inverse_temperatures)
    z = _shifted(_float64(logits))
    descending = z.sort(dim=-1, descending=True).values
    sums = descending.cumsum(dim=-1)
    rank = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
    # room in the support that a temperature must fill: non-decreasing in k, so that support = entries below 1/t
    room = sums - rank * descending
    scores = z.new_empty((len(inverse_temperatures), *z.shape))
    for row, t in zip(scores, inverse_temperatures):
        support = (room < 1.0 / t).sum(dim=-1, keepdim=True)
        threshold = (sums.gather(-1, support - 1) - 1.0 / t) / support
        torch.clamp((z - threshold).mul_(t), 0.0, 1.0, out=row)
        # the threshold is off by a rounding of 1/t and of the sums: rows are put back on the simplex
        row /= row.sum(dim=-1, keepdim=True)
    return _scaled(scores)


def _check_temperatures(inverse_temperatures: Sequence[float]) -> None:
    if not all(1e-30 <= t <= 1e30 for t in inverse_temperatures):
        raise ValueError(f"`inverse_temperature` must lie between 1e-30 and 1e30, got {list(inverse_temperatures)}.")


def _float64(logits: Tensor) -> Tensor:
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"`logits` must have shape (..., num_classes), got {tuple(logits.shape)}.")
    # Apple's devices have no float64
    source = logits.cpu() if logits.device.type == "mps" else logits
    z = source.detach().to(torch.float64)
    if not torch.isfinite(z).all():
        raise ValueError("`logits` has NaN or infinite values, whose scores mean nothing: check the classifier.")
    return z


def _shifted(z: Tensor) -> Tensor:
    # largest logit at 0, so that t * z can not overflow upwards; what lies this far below has score 0 at every t
    return (z - z.amax(dim=-1, keepdim=True)).clamp_(min=-1e60)


def _scaled(scores: Tensor) -> Tensor:
    # c additions and a division are off by at most (c + 2) half units; one row then sums to at most 1 exactly
    return scores * (1.0 - (scores.shape[-1] + 8) * 2.0**-52)
