# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
from scipy.special import ndtr

from hf_lip.smoothing.intervals import clopper_pearson_lower, clopper_pearson_upper
from hf_lip.smoothing.procedures import (
    certify_counts,
    certify_counts_batch,
    choose_methods,
    class_buckets,
    expected_shares,
    radii_of_votes,
    votes_of_shares,
)
from hf_lip.smoothing.samples import ABSTAIN, Decision


HALF = {"sigma": 0.5, "alpha": 0.001}
METHODS = ("mono", "bonferroni", "cpm", "auto")


def like(counts):
    """Selection votes in the proportions of the estimation votes."""
    return [max(count // 1000, 0) for count in counts]


# closed forms, lvm-rs.md 6.1


@pytest.mark.parametrize(
    ("counts", "mono", "two_class"),
    [
        ([90_000, 6000, 4000], 0.632422, 0.699125),
        ([60_000, 5000, *[4375] * 8], 0.120472, 0.464617),
        ([100_000, *[0] * 9], 1.905728, 1.869878),
        ([52_000, 47_000, 1000], 0.018944, 0.024601),
    ],
)
def test_radii_of_counts(counts, mono, two_class):
    assert certify_counts("mono", like(counts), counts, **HALF).radius == pytest.approx(mono, abs=6e-7)
    assert certify_counts("bonferroni", like(counts), counts, **HALF).radius == pytest.approx(two_class, abs=6e-7)


def test_bounds_of_counts():
    decision = certify_counts("bonferroni", [90, 6, 4], [90_000, 6000, 4000], **HALF)
    assert decision.p_lower == pytest.approx(0.89673443, abs=6e-9)
    assert decision.p_upper_other == pytest.approx(0.06259618, abs=6e-9)
    assert decision.details == {"requested": "bonferroni", "bounds": 3}
    mono = certify_counts("mono", [90, 6, 4], [90_000, 6000, 4000], **HALF)
    assert mono.p_lower == pytest.approx(0.89703650, abs=6e-9)
    assert mono.p_upper_other == pytest.approx(1 - mono.p_lower, abs=1e-15)
    flat = certify_counts("bonferroni", [60, 5], [60_000, 40_000], **HALF)
    assert flat.p_upper_other == pytest.approx(1 - flat.p_lower, abs=1e-15)


@pytest.mark.parametrize(
    ("n", "c10", "c1000"),
    [
        (10, 0, 0),
        (100, 1.3532, 1.1310),
        (1000, 2.3588, 2.2052),
        (10_000, 3.1147, 2.9931),
        (100_000, 3.7398, 3.6366),
        (1_000_000, 4.2832, 4.1922),
    ],
)
def test_unanimous_votes_with_bonferroni(n, c10, c1000):
    for c, expected in ((10, c10), (1000, c1000)):
        decision = certify_counts("bonferroni", [1] + [0] * (c - 1), [n] + [0] * (c - 1), sigma=1.0, alpha=0.001)
        assert decision.radius == pytest.approx(expected, abs=6e-5)
        assert decision.abstained == (expected == 0)


@pytest.mark.parametrize(
    ("selection", "counts", "buckets", "lower", "upper", "radius"),
    [
        (
            [62, 12, 8, 6, 4, 3, 2, 1, 1, 1],
            [60_000, 12_000, 8000, 6000, 5000, 4000, 2500, 1500, 700, 300],
            [[0], [1], [2], [3], [4, 5, 6, 7, 8, 9]],
            0.594502,
            0.143921,
            0.325503,
        ),
        (
            [95, 4, 1, *[0] * 7],
            [95_000, 4000, 500, 200, 100, 80, 60, 30, 20, 10],
            [[0], [1], [2, 3, 4, 5, 6, 7, 8, 9]],
            0.947613,
            0.042151,
            0.837098,
        ),
    ],
)
def test_class_partitioning(selection, counts, buckets, lower, upper, radius):
    assert class_buckets(selection) == buckets
    decision = certify_counts("cpm", selection, counts, **HALF)
    assert decision.details["bounds"] == len(buckets)
    assert (decision.p_lower, decision.p_upper_other) == pytest.approx((lower, upper), abs=6e-7)
    assert decision.radius == pytest.approx(radius, abs=6e-7)


def test_buckets_do_not_depend_on_the_names_of_classes():
    selection = [3, 12, 1, 62, 8, 1, 6, 1, 4, 2]
    assert class_buckets(selection) == [[3], [1], [4], [6], [8, 0, 9, 2, 5, 7]]
    counts = [4000, 12_000, 700, 60_000, 8000, 1500, 6000, 300, 5000, 2500]
    assert certify_counts("cpm", selection, counts, **HALF).radius == pytest.approx(0.325503, abs=6e-7)
    assert class_buckets([7, 3]) == [[0], [1]]
    assert class_buckets([0, 5, 0]) == [[1], [0], [2]]


def test_cpm_against_the_definition_on_random_votes():
    rng = np.random.default_rng(0)
    for _ in range(50):
        c = int(rng.integers(2, 12))
        p = rng.dirichlet(np.full(c, 0.4))
        selection, counts = rng.multinomial(60, p), rng.multinomial(5000, p)
        order = sorted(range(c), key=lambda k: -selection[k])
        buckets, pool = [[order[0]], [order[1]]], order[2:]
        while sum(selection[k] for k in pool) > selection[order[1]]:
            buckets.append([pool.pop(0)])
        buckets += [pool] if pool else []
        assert class_buckets(selection) == buckets
        level = 0.01 / len(buckets)
        lower = clopper_pearson_lower(counts[order[0]], 5000, level)
        upper = max(clopper_pearson_upper(sum(counts[k] for k in bucket), 5000, level) for bucket in buckets[1:])
        decision = certify_counts("cpm", selection, counts, sigma=1.0, alpha=0.01)
        assert decision.p_lower == lower
        assert decision.p_upper_other == pytest.approx(min(upper, 1 - lower), abs=1e-15)


# choices see the selection votes only


def test_auto_is_one_of_the_three_and_ignores_the_estimation_votes():
    for selection in ([90, 6, 4], [100, 0, 0], [40, 30, 30], [51, 49, 0]):
        chosen = set()
        for counts in ([9000, 600, 400], [3000, 4000, 3000], [10_000, 0, 0]):
            decision = certify_counts("auto", selection, counts, **HALF)
            fixed = certify_counts(decision.method, selection, counts, **HALF)
            assert decision == Decision(**{**fixed.__dict__, "details": {**fixed.details, "requested": "auto"}})
            chosen.add(decision.method)
        assert len(chosen) == 1


@pytest.mark.parametrize(
    ("p", "least"),
    [
        # lvm-rs.md 2.8 and 5.5: spread mass, two contenders, close second, rare others
        (np.r_[0.571, np.full(9, 0.429 / 9)], 0.99),
        (np.r_[0.945, np.full(9, 0.055 / 9)], 0.99),
        (np.r_[0.853, 0.138, np.full(8, 0.009 / 8)], 0.99),
        (np.r_[0.95, 0.04, np.full(998, 0.01 / 998)], 0.97),
        (np.r_[0.4, 0.1, np.full(998, 0.5 / 998)], 0.99),
        (np.r_[1 - 9e-6, np.full(9, 1e-6)], 0.97),
    ],
)
def test_auto_comes_close_to_the_best_of_the_three(p, least):
    rng = np.random.default_rng(1)
    selection, counts = rng.multinomial(100, p, 40), rng.multinomial(10_000, p, 40)
    radii = {name: radii_of_votes(name, selection, counts, 1.0, 0.001) for name in METHODS[:3]}
    chosen = choose_methods(selection, np.full(40, 10_000), 0.001)
    mean = np.mean([radii[name][row] for row, name in enumerate(chosen)])
    assert mean >= least * max(radius.mean() for radius in radii.values())


def test_planned_votes_add_up():
    rng = np.random.default_rng(2)
    shares = expected_shares(rng.multinomial(100, rng.dirichlet(np.ones(30)), 20))
    assert shares.sum(axis=1) == pytest.approx(np.ones(20))
    n = rng.integers(1, 100_000, 20)
    votes = votes_of_shares(shares, n)
    assert np.array_equal(votes.sum(axis=1), n)
    assert np.abs(votes - shares * n[:, None]).max() <= 1
    # classes that differ by chance only are taken as equal, a clear second is not
    flat = expected_shares(np.array([[60, 6, 4, 5, 5, 7, 3, 5, 5]]))[0]
    assert np.ptp(flat[1:]) < 1e-12
    assert expected_shares(np.array([[60, 30, 2, 2, 2, 2, 2]]))[0, 1] == pytest.approx(0.3, abs=0.02)


def test_the_class_is_that_of_the_selection_votes():
    for method in METHODS:
        decision = certify_counts(method, [1, 9, 0], [9000, 1000, 0], **HALF)
        assert (decision.candidate, decision.predict, decision.radius) == (1, ABSTAIN, 0.0)
        assert decision.abstained
    # the first of equals, as argmax
    assert certify_counts("mono", [5, 5], [900, 100], **HALF).candidate == 0


# properties


def test_the_batch_is_image_by_image():
    rng = np.random.default_rng(3)
    p = rng.dirichlet(np.full(6, 0.3), size=60)
    selection = np.stack([rng.multinomial(100, row) for row in p])
    counts = np.stack([rng.multinomial(int(n), row) for n, row in zip(rng.integers(50, 5000, 60), p)])
    for method in METHODS:
        batch = certify_counts_batch(method, selection, counts, **HALF)
        assert batch == [certify_counts(method, s, k, **HALF) for s, k in zip(selection, counts)]
        assert len({decision.method for decision in batch}) == (
            1 if method != "auto" else len({d.method for d in batch})
        )
    seeds = [(7, index) for index in range(60)]
    batch = certify_counts_batch("cpm", selection, counts, **HALF, randomized_seeds=seeds)
    assert batch == [
        certify_counts("cpm", s, k, **HALF, randomized_seed=seed) for s, k, seed in zip(selection, counts, seeds)
    ]


@pytest.mark.parametrize("method", METHODS)
def test_radius_scales_with_sigma_and_grows_with_votes_and_alpha(method):
    selection = [60, 25, 15]
    radius = certify_counts(method, selection, [6000, 2500, 1500], sigma=0.25, alpha=0.001).radius
    assert certify_counts(method, selection, [6000, 2500, 1500], sigma=0.5, alpha=0.001).radius == pytest.approx(
        2 * radius
    )
    assert certify_counts(method, selection, [6100, 2450, 1450], sigma=0.25, alpha=0.001).radius > radius
    assert certify_counts(method, selection, [6000, 2500, 1500], sigma=0.25, alpha=0.01).radius > radius


def test_decisions_are_plain_values():
    for decision in certify_counts_batch("auto", [[9, 1]], [[90, 10]], **HALF):
        assert type(decision.predict) is int
        assert type(decision.candidate) is int
        assert type(decision.radius) is float
        assert type(decision.p_lower) is float
        assert type(decision.method) is str
        assert all(type(value) in (int, float, str) for value in decision.details.values())


def test_randomised_bounds_belong_to_their_seed():
    arguments = ("bonferroni", [90, 6, 4], [900, 60, 40])
    plain = certify_counts(*arguments, **HALF)
    radii = [certify_counts(*arguments, **HALF, randomized_seed=(5, index)).radius for index in range(40)]
    assert radii == [certify_counts(*arguments, **HALF, randomized_seed=(5, index)).radius for index in range(40)]
    assert len(set(radii)) == 40
    assert min(radii) >= plain.radius
    # unanimous votes: never infinite, whatever the seed
    for seed in range(200):
        assert certify_counts("mono", [9, 0], [1000, 0], **HALF, randomized_seed=seed).p_lower <= 0.5 ** (1 / 1000)


# exactly solvable classifiers, lvm-rs.md 6.2


@pytest.mark.parametrize(("sigma", "p"), [(0.25, 0.99931286), (0.5, 0.94520071), (1.0, 0.78814460)])
def test_linear_classifier_of_distance_0_8(sigma, p):
    rng = np.random.default_rng(4)
    assert ndtr(0.8 / sigma) == pytest.approx(p, abs=5e-9)
    heads = rng.binomial(100_000, ndtr(0.8 / sigma), size=200)
    counts = np.stack([heads, 100_000 - heads], axis=1)
    for method in ("mono", "bonferroni"):
        decisions = certify_counts_batch(method, np.tile([9, 1], (200, 1)), counts, sigma=sigma, alpha=0.001)
        assert np.mean([decision.radius for decision in decisions]) > 0.76
        assert sum(decision.radius > 0.8 for decision in decisions) <= 2


def test_band_stays_below_the_radius_of_its_probabilities():
    # classes x < -1, [-1, 1], > 1 at 0: mono .475233, two-class .737616, true radius .969343
    inner = float(ndtr(1) - ndtr(-1))
    rng = np.random.default_rng(5)
    counts = rng.multinomial(100_000, [0.5 - inner / 2, inner, 0.5 - inner / 2], size=100)
    radii = {name: radii_of_votes(name, np.tile([16, 68, 16], (100, 1)), counts, 1.0, 0.001) for name in METHODS[:3]}
    assert 0.46 < radii["mono"].mean() < radii["mono"].max() < 0.475233
    for name in ("bonferroni", "cpm"):
        assert 0.71 < radii[name].mean() < radii[name].max() < 0.737616 < 0.969343


# bad input


@pytest.mark.parametrize(
    ("method", "selection", "counts", "change", "message"),
    [
        ("mono", [1, 0], [9, 1], {"sigma": 0.0}, "`sigma`"),
        ("mono", [1, 0], [9, 1], {"alpha": 1.0}, "`alpha`"),
        ("lvm", [1, 0], [9, 1], {}, "`method` must be one of mono, bonferroni, cpm, auto"),
        ("mono", [0, 0], [9, 1], {}, "`selection_counts` holds an image without any vote: take n0 >= 1"),
        ("mono", [1, 0], [0, 0], {}, "`counts` holds an image without any vote: take n >= 1"),
        ("mono", [1], [9], {}, "at least 2 classes"),
        ("mono", [1, 0, 0], [9, 1], {}, "must have one shape"),
        ("mono", [1, -1], [9, 1], {}, "`selection_counts` must hold numbers of votes >= 0"),
        ("mono", [1, 0], [8.5, 1.5], {}, "`counts` must hold whole numbers"),
        ("mono", [1, 0], [math.nan, 1], {}, "`counts` must hold whole numbers"),
        ("mono", [1, 0], [math.inf, 1], {}, "`counts` must hold"),
        ("mono", [1, 0], [9, 1], {"lipschitz": 1.0}, "`lipschitz`=1.0 does not apply to votes"),
        ("mono", [1, 0], [9, 1], {"lipschitz": -1.0}, "`lipschitz`"),
    ],
)
def test_bad_votes(method, selection, counts, change, message):
    with pytest.raises(ValueError, match=message):
        certify_counts(method, selection, counts, **{**HALF, **change})


def test_an_infinite_constant_is_none_at_all():
    assert certify_counts("mono", [9, 1], [90, 10], **HALF, lipschitz=math.inf) == certify_counts(
        "mono", [9, 1], [90, 10], **HALF
    )


def test_seeds_must_match_the_images():
    with pytest.raises(ValueError, match="`randomized_seeds` must hold 2 seeds, got 1"):
        certify_counts_batch("mono", [[1, 0]] * 2, [[9, 1]] * 2, **HALF, randomized_seeds=[3])
