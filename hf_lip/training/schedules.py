# SPDX-License-Identifier: Apache-2.0
"""Schedules as functions of training progress in [0, 1].

Progress is the share of optimiser steps done, so a schedule knows neither batch sizes nor the number of processes and
needs no state: the value at a step is the same before and after a resume.
"""

import math
from collections.abc import Callable


__all__ = [
    "LEARNING_RATE_SCHEDULES",
    "constant",
    "cosine",
    "linear",
    "linear_ramp",
    "one_cycle",
    "stable_decay",
    "triangular",
    "with_warmup",
]


def triangular(progress: float) -> float:
    """Factor on the peak rate: 0 -> 1 at 2/5 of training, -> 1/20 at 4/5, -> 0 at the end, linear in between.

    Source: the piecewise schedule of CPL (ICML 2022) and SLL (ICLR 2023).
    """
    progress = _checked(progress)
    return _interpolate(progress, (0.0, 0.4, 0.8, 1.0), (0.0, 1.0, 0.05, 0.0))


def one_cycle(progress: float, *, warmup_share: float = 0.3, start: float = 1 / 25, end: float = 4e-6) -> float:
    """Factor on the peak rate: cosine from `start` up to 1 at `warmup_share`, then cosine down to `end`.

    Source: Smith and Topin 2019 in the form and with the default constants of `torch.optim.lr_scheduler.OneCycleLR`;
    the momentum is not cycled.
    """
    progress = _checked(progress)
    if not 0.0 < warmup_share < 1.0:
        raise ValueError(f"`warmup_share` must lie in (0, 1), got {warmup_share}.")
    if progress < warmup_share:
        low, phase = start, 1.0 - progress / warmup_share
    else:
        low, phase = end, (progress - warmup_share) / (1.0 - warmup_share)
    return low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * phase))


def cosine(progress: float) -> float:
    """Factor on the peak rate: half a cosine from 1 to 0."""
    return 0.5 * (1.0 + math.cos(math.pi * _checked(progress)))


def linear(progress: float) -> float:
    """Factor on the peak rate: linearly from 1 to 0."""
    return 1.0 - _checked(progress)


def with_warmup(schedule: Callable[[float], float], progress: float, *, share: float) -> float:
    """Linearly from 0 to the schedule's start over the first `share` of training, then the schedule over the rest.

    Source: the schedules with warm-up of transformers.
    """
    progress = _checked(progress)
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"`share` must lie in [0, 1], got {share}.")
    if progress < share:
        return schedule(0.0) * progress / share
    return schedule((progress - share) / (1.0 - share) if share < 1.0 else 0.0)


def constant(progress: float) -> float:
    """Factor 1 throughout."""
    _checked(progress)
    return 1.0


def stable_decay(progress: float) -> float:
    """Factor 1, then linearly to 0 over the last quarter: for data that change in the course of training.

    Source: Hu et al. 2024 (warm-up, stable, decay).
    """
    return _interpolate(_checked(progress), (0.0, 0.75, 1.0), (1.0, 1.0, 0.0))


LEARNING_RATE_SCHEDULES: dict[str, Callable[[float], float]] = {
    "piecewise": triangular,
    "one_cycle": one_cycle,
    "constant": constant,
}


def linear_ramp(progress: float, start: float, end: float, *, share: float = 0.5) -> float:
    """From `start` linearly to `end` over the first `share` of training, then `end`; EMMA's radius grows this way."""
    progress = _checked(progress)
    if not 0.0 < share <= 1.0:
        raise ValueError(f"`share` must lie in (0, 1], got {share}.")
    return _interpolate(min(progress, share), (0.0, share), (start, end))


def _interpolate(x: float, xs: tuple[float, ...], ys: tuple[float, ...]) -> float:
    for x0, x1, y0, y1 in zip(xs, xs[1:], ys, ys[1:]):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return ys[-1]


def _checked(progress: float) -> float:
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"`progress` must lie in [0, 1], got {progress}.")
    return float(progress)
