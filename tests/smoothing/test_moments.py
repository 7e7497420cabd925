# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch
from scipy.special import ndtri

from hf_lip.ops.simplex import ScoreMap
from hf_lip.smoothing.lipschitz_radii import lipschitz_two_class_radius
from hf_lip.smoothing.procedures import certify_moments
from hf_lip.smoothing.samples import Moments


HALF = {"sigma": 0.5, "alpha": 0.001}


def soft_scores(n, seed=0, shift=2.0):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((n, 5)) + np.array([shift, 0.5, 0, 0, 0])
    return ScoreMap("softmax", 1.5).apply(torch.from_numpy(logits)).numpy()


def test_lvm_follows_the_corrected_rule():
    scores = soft_scores(5000)
    moments = Moments.from_scores(scores)
    decision = certify_moments(Moments.from_scores(soft_scores(100, seed=1)), moments, sigma=0.5, alpha=0.001)
    level, mean, variance = 0.001 / 5, scores.mean(axis=0), scores.var(axis=0, ddof=1)
    width = np.sqrt(2 * variance * math.log(2 / level) / 5000) + 7 * math.log(2 / level) / (3 * 4999)
    assert decision.p_lower == pytest.approx(mean[0] - width[0], abs=1e-9)
    assert decision.p_upper_other == pytest.approx((mean + width)[1:].max(), abs=1e-9)
    expected = 0.25 * (ndtri(decision.p_lower) - ndtri(decision.p_upper_other))
    assert decision.radius == pytest.approx(expected, rel=1e-9)
    assert (decision.predict, decision.method, decision.details) == (0, "lvm", {"bounds": 5})


def test_the_rest_of_the_candidate_bounds_the_others():
    # two classes of one sum: the lower bound of one is an upper bound of the other
    moments = Moments(1000, np.array([950.0, 50.0]), np.array([20.0, 20.0]))
    decision = certify_moments(moments, moments, sigma=1.0, alpha=0.001)
    assert decision.p_upper_other == pytest.approx(1 - decision.p_lower, abs=1e-11)


@pytest.mark.parametrize("sizes", [[1000], [1, 999], [999, 1], [333, 333, 334], [1] * 1000, [0, 500, 0, 500]])
def test_merged_moments_are_those_of_all_scores(sizes):
    # n % batch == 1 and batches of none included
    scores = soft_scores(1000)
    merged = Moments.empty(5)
    for part in np.split(scores, np.cumsum(sizes)[:-1]):
        merged = merged.merge(Moments.from_scores(part))
    assert merged.n == 1000
    assert merged.mean == pytest.approx(scores.mean(axis=0), rel=1e-13)
    assert merged.variance == pytest.approx(scores.var(axis=0, ddof=1), rel=1e-11)


def test_variances_far_below_the_mean_survive():
    # lvm-rs.md 5.3: E[x^2] - E[x]^2 in float32 would be negative here
    rng = np.random.default_rng(7)
    score = 0.9999 + 1e-5 * rng.standard_normal(10_000).clip(-3, 3)
    scores = np.stack([score, 1 - score], axis=1)
    merged = Moments.empty(2)
    for part in np.array_split(scores, 77):
        merged = merged.merge(Moments.from_scores(part))
    assert merged.variance == pytest.approx(scores.var(axis=0, ddof=1), rel=1e-6)


def test_saturated_soft_scores_stay_finite():
    ones = Moments.from_scores(np.tile([1.0, 0.0], (100_000, 1)))
    decision = certify_moments(ones, ones, sigma=1.0, alpha=0.001 * 2)
    assert decision.radius == pytest.approx(3.5717, abs=6e-5)
    assert decision.p_lower < 1


def test_overlapping_bounds_abstain():
    even = Moments.from_scores(np.tile([0.5, 0.5], (1000, 1)))
    decision = certify_moments(even, even, sigma=1.0, alpha=0.001)
    assert decision.abstained
    assert decision.radius == 0.0


def test_ramp_scores_reach_their_lipschitz_radius():
    # scores clip(1/2 + L t, 0, 1) of t = distance + sigma z and their complement: the true radius is the distance
    sigma, lipschitz, distance = 0.5, 1.0, 0.4
    rng = np.random.default_rng(6)
    for _ in range(20):
        score = np.clip(0.5 + lipschitz * (distance + sigma * rng.standard_normal(20_000)), 0, 1)
        moments = Moments.from_scores(np.stack([score, 1 - score], axis=1))
        selection = Moments(1, np.array([1.0, 0.0]), np.zeros(2))
        aware = certify_moments(selection, moments, sigma=sigma, alpha=0.001, lipschitz=lipschitz)
        plain = certify_moments(selection, moments, sigma=sigma, alpha=0.001)
        assert 0.9 * distance < aware.radius < distance
        assert plain.radius < aware.radius
        assert aware.details["lipschitz"] == 1.0
        assert aware.radius == lipschitz_two_class_radius(aware.p_lower, aware.p_upper_other, sigma, lipschitz)


# bad input


@pytest.mark.parametrize("scores", [[[0.5, math.nan]], [[0.5, 1.5]], [[-0.1, 0.5]], [0.5, 0.5], [[1.0]]])
def test_bad_scores(scores):
    with pytest.raises(ValueError, match="`scores` must"):
        Moments.from_scores(scores)


def test_bad_moments():
    good = Moments.from_scores(soft_scores(50))
    for selection, moments, message in [
        (Moments.empty(5), good, "n0 >= 1"),
        (good, Moments.from_scores(soft_scores(1)), "n >= 2"),
        (good, Moments.empty(4), "classes"),
        (good, Moments(50, np.full(5, 20.0), np.ones(5)), "simplex"),
        (good, Moments(50, np.full(5, np.nan), np.ones(5)), "NaN"),
        (good, Moments(50, np.full(5, 1.0), -np.ones(5)), "negative"),
        (Moments(1, np.ones(1), np.zeros(1)), Moments(2, np.ones(1), np.zeros(1)), "at least 2 classes"),
    ]:
        with pytest.raises(ValueError, match=message):
            certify_moments(selection, moments, **HALF)
    for change in ({"sigma": -1.0}, {"alpha": 0.0}, {"lipschitz": 0.0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            certify_moments(good, good, **{**HALF, **change})
    with pytest.raises(ValueError, match="can not be merged"):
        good.merge(Moments(3, np.ones(2), np.zeros(2)))
    with pytest.raises(ValueError, match="at least 2 samples"):
        _ = Moments.from_scores(soft_scores(1)).variance
