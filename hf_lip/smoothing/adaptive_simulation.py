# SPDX-License-Identifier: Apache-2.0
"""What adaptive sampling would have cost, and certified, for images whose class probabilities are known."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_lip.smoothing.adaptive import AdaptivePlan
from hf_lip.smoothing.procedures import CountMethod


__all__ = ["AdaptiveSimulation", "simulate_adaptive"]


@dataclass(frozen=True)
class AdaptiveSimulation:
    """One simulated run of each of m images.

    Attributes:
        candidate: (m,) class chosen on the selection samples.
        radius: (m,) certified radius, 0 for abstentions, in the units of sigma.
        samples: (m,) estimation samples drawn.
        reason: (m,) why sampling stopped.
        furthest: (m,) largest radius of all looks, also of those after the stop: no rule for stopping errs more often
            than this exceeds the true radius.
    """

    candidate: NDArray[np.int64]
    radius: NDArray[np.float64]
    samples: NDArray[np.int64]
    reason: NDArray[np.str_]
    furthest: NDArray[np.float64]


def simulate_adaptive(
    probabilities: ArrayLike,
    *,
    n0: int,
    n: int,
    sigma: float,
    alpha: float,
    method: CountMethod = "mono",
    rtol: float = 0.02,
    target_radius: float | None = None,
    step: int = 64,
    seed: int = 0,
) -> AdaptiveSimulation:
    """Draws selection and estimation votes of images with `probabilities` (m, c) and applies `AdaptiveRule`'s rule.

    Images with the same selection votes are simulated together. Other arguments and errors as `AdaptivePlan`.

    Raises:
        ValueError: probabilities that do not sum to 1.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim != 2 or np.any(p < 0.0) or not np.allclose(p.sum(axis=1), 1.0):
        raise ValueError("`probabilities` must hold one distribution over the classes a row.")
    generator = np.random.default_rng(seed)
    selection = generator.multinomial(n0, p)
    m = len(p)
    result = AdaptiveSimulation(
        selection.argmax(axis=1),
        np.zeros(m),
        np.zeros(m, dtype=np.int64),
        np.full(m, "", dtype="<U8"),
        np.zeros(m),
    )
    kinds, kind_of = np.unique(selection, axis=0, return_inverse=True)
    for kind, votes in enumerate(kinds):
        plan = AdaptivePlan(
            tuple(votes.tolist()), n, sigma, alpha, method, rtol=rtol, target_radius=target_radius, step=step
        )
        _simulate(plan, p, np.flatnonzero(kind_of.reshape(-1) == kind), generator, result)
    return result


def _simulate(
    plan: AdaptivePlan,
    p: NDArray[np.float64],
    rows: NDArray[np.int64],
    generator: np.random.Generator,
    result: AdaptiveSimulation,
) -> None:
    counts = np.zeros((len(rows), p.shape[1]), dtype=np.int64)
    running = np.ones(len(rows), dtype=bool)
    drawn = 0
    for place, (look, _) in enumerate(plan.looks):
        counts += generator.multinomial(look - drawn, p[rows])
        drawn = look
        radii = plan.step_radii(place, counts)
        result.furthest[rows] = np.maximum(result.furthest[rows], radii)
        live = rows[running]
        if not len(live):
            continue
        result.radius[live] = np.maximum(result.radius[live], radii[running])
        reasons = plan.reasons(place, counts[running], result.radius[live])
        result.samples[live] = look
        result.reason[live] = reasons
        running[np.flatnonzero(running)[reasons != ""]] = False
