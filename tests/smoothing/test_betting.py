# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
from scipy.special import ndtri

from hf_lip.smoothing.betting import BettingAccumulator, BettingLowerBound, betting_lower, certify_betting
from hf_lip.smoothing.intervals import bernstein_lower, clopper_pearson_lower
from hf_lip.smoothing.lipschitz_radii import lipschitz_two_class_radius
from hf_lip.smoothing.procedures import certify_moments
from hf_lip.smoothing.radii import two_class_radius
from hf_lip.smoothing.samples import Moments


HALF = {"sigma": 0.5, "alpha": 0.001}


def radius(p):
    return -ndtri(1 - p)


def simplex_scores(n, seed=0, concentration=(40.0, 6.0, 2.0, 1.0, 1.0)):
    scores = np.random.default_rng(seed).dirichlet(concentration, n)
    return scores * (1 - 1e-14)


# against the bounds of lvm-rs.md 5.2, n = 10,000, alpha = .001: radius / sigma by the bets of Waudby-Smith and Ramdas
# and by Bernstein


@pytest.mark.parametrize(("a", "published", "bernstein"), [(9, 1.2645, 1.2537), (99, 2.2785, 2.2533)])
def test_beta_scores(a, published, bernstein):
    rng = np.random.default_rng(0)
    ours, theirs = [], []
    for _ in range(8):
        scores = rng.beta(a, 1, 10_000)
        ours.append(radius(betting_lower(scores, 0.001)))
        theirs.append(radius(bernstein_lower(scores.mean(), scores.var(ddof=1), 10_000, 0.001)))
    assert np.mean(theirs) == pytest.approx(bernstein, abs=5e-3)
    assert np.mean(ours) > published - 2e-3
    assert np.all(np.array(ours) > np.array(theirs))
    # and below that of the exact mean
    assert np.all(np.array(ours) < radius(a / (a + 1)))


def test_all_ones():
    # Bernstein 2.9158, published bets 2.9925, Clopper-Pearson for votes 3.1986
    assert 3.1 < radius(betting_lower(np.ones(10_000), 0.001)) < 3.1986
    assert 3.73 < radius(betting_lower(np.ones(100_000), 0.001)) < 3.811457


@pytest.mark.parametrize("p", [0.6, 0.9, 0.99])
def test_votes_come_close_to_clopper_pearson(p):
    rng = np.random.default_rng(1)
    n = 10_000
    votes = rng.permutation((np.arange(n) < p * n).astype(float))
    lower, exact = betting_lower(votes, 0.001), clopper_pearson_lower(round(p * n), n, 0.001)
    bernstein = bernstein_lower(p, p * (1 - p), n, 0.001)
    assert bernstein < lower < p
    assert lower > exact - 0.35 * (p - exact)


# the capital


def test_the_capital_is_that_of_the_bets_in_the_text():
    # an independent computation with the accumulator's own grid, bet by bet
    rng = np.random.default_rng(2)
    n, alpha = 500, 0.01
    scores = rng.beta(8, 2, n)
    bound = BettingLowerBound(n, alpha)
    bound.update(scores)
    grid, placing, block = bound._grid, bound._placing, bound._block
    goal = math.log(1 / alpha)
    first_kept = None
    for place, m in enumerate(grid):
        capital, reached = 0.0, False
        for start in range(placing, n, block):
            seen = scores[:start]
            variance = (((seen - seen.mean()) ** 2).sum() + 0.25) / (start + 1)
            bet = 0.0 if reached else math.sqrt(2 * max(goal - capital, 0) / (variance * (n - start)))
            bet = min(bet, 0.8 / m)
            capital += sum(math.log1p(bet * (x - m)) for x in scores[start : start + block])
            reached |= capital >= goal + 1e-8
        if not reached:
            first_kept = place
            break
    assert bound.bound() == (grid[first_kept - 1] if first_kept else 0.0)
    assert 0.7 < bound.bound() < scores.mean()


@pytest.mark.parametrize("sizes", [[2000], [1] * 2000, [700, 1299, 1], [33, 1967], [0, 2000, 0]])
def test_portions_do_not_matter(sizes):
    scores = np.random.default_rng(3).beta(5, 2, 2000)
    bound = BettingLowerBound(2000, 0.01)
    for part in np.split(scores, np.cumsum(sizes)[:-1]):
        bound.update(part)
    assert bound.bound() == betting_lower(scores, 0.01)


def test_the_bound_may_be_read_at_any_time():
    scores = np.random.default_rng(4).beta(50, 2, 4000)
    bound, seen = BettingLowerBound(4000, 0.001), []
    for part in np.split(scores, 20):
        bound.update(part)
        seen.append(bound.bound())
    assert seen == sorted(seen)
    assert seen[0] < seen[-1] == betting_lower(scores, 0.001)
    assert seen[-1] < 50 / 52


@pytest.mark.parametrize("n", [1, 2, 3, 10, 33, 100])
def test_few_samples(n):
    assert 0.0 <= betting_lower(np.ones(n), 0.05) <= 0.05 ** (1 / n)
    assert betting_lower(np.zeros(n), 0.05) == 0.0


@pytest.mark.parametrize(
    "scores", [np.full(3000, 1e-9), np.full(3000, 0.5), np.tile([0.0, 1.0], 1500), np.full(3000, 1 - 1e-12)]
)
def test_degenerate_scores(scores):
    lower = betting_lower(scores, 0.001)
    assert math.isfinite(lower)
    assert 0.0 <= lower < scores.mean()


def test_memory_does_not_grow():
    bound = BettingLowerBound(50_000, 0.001)
    for part in np.split(np.random.default_rng(5).beta(9, 1, 50_000), 100):
        bound.update(part)
        assert sum(len(piece) for piece in bound._pending) < 1500
    assert len(bound._grid) < 300


# certificates


def test_certificate_of_soft_scores():
    selection, scores = simplex_scores(100, seed=6), simplex_scores(20_000, seed=7)
    decision = certify_betting(selection, scores, **HALF)
    lvm = certify_moments(Moments.from_scores(selection), Moments.from_scores(scores), **HALF)
    assert (decision.predict, decision.method) == (0, "betting")
    assert decision.p_lower < 0.8 < 1
    assert decision.p_upper_other > 0.12
    assert decision.radius == two_class_radius(decision.p_lower, decision.p_upper_other, 0.5)
    # one sharp bound less for each class that was pooled, and sharper bounds
    assert decision.radius > lvm.radius
    assert decision.radius < 0.25 * (ndtri(0.8) - ndtri(0.12))
    assert 3 <= decision.details["bounds"] <= 5
    assert decision.details["samples"] == 20_000


def test_streaming_a_certificate():
    selection, scores = simplex_scores(50, seed=8), simplex_scores(3001, seed=9)
    whole = certify_betting(selection, scores, **HALF)
    for size in (1000, 64, 3000):
        accumulator = BettingAccumulator(selection, n=3001, **HALF)
        for start in range(0, 3001, size):
            accumulator.update(scores[start : start + size])
        assert accumulator.decision() == whole


def test_the_design_is_chosen_on_the_selection_scores():
    selection = simplex_scores(100, seed=10)
    designs = set()
    for seed in range(5):
        other = simplex_scores(2000, seed=seed, concentration=(1, 1, 9, 1, 1))
        decision = certify_betting(selection, other, **HALF)
        designs.add((decision.candidate, decision.details["bounds"]))
        assert decision.abstained
    assert len(designs) == 1
    # nothing but the candidate: one bound, at the full alpha
    sure = np.tile([1.0, *[0.0] * 9], (100, 1))
    assert certify_betting(sure, np.tile([1.0, *[0.0] * 9], (3000, 1)), **HALF).details["bounds"] == 1
    two = simplex_scores(100, concentration=(8, 2))
    assert certify_betting(two, simplex_scores(3000, concentration=(8, 2)), **HALF).details["bounds"] == 1


def test_a_proved_constant_gives_the_larger_radius():
    selection, scores = simplex_scores(100, seed=11), simplex_scores(5000, seed=12)
    plain = certify_betting(selection, scores, **HALF)
    aware = certify_betting(selection, scores, **HALF, lipschitz=0.5)
    assert aware.radius > plain.radius
    assert aware.radius == lipschitz_two_class_radius(aware.p_lower, aware.p_upper_other, 0.5, 0.5)
    assert aware.details["lipschitz"] == 0.5


# bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": 0.0}, "`sigma`"),
        ({"alpha": 1.5}, "`alpha`"),
        ({"lipschitz": 0.0}, "`lipschitz`"),
        ({"n": 1}, "`n` must be at least 2"),
        ({"selection_scores": np.zeros((0, 3))}, "n0 >= 1"),
        ({"selection_scores": np.full((2, 3), np.nan)}, "`scores` must lie"),
        ({"selection_scores": np.full((2, 3), 0.5)}, "sum to at most 1"),
        ({"selection_scores": np.ones((2, 1))}, "at least 2 classes"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"selection_scores": np.full((2, 3), 0.3), "n": 100, **HALF, **change}
    with pytest.raises(ValueError, match=message):
        BettingAccumulator(arguments.pop("selection_scores"), **arguments)


def test_bad_scores():
    accumulator = BettingAccumulator(np.full((2, 3), 0.3), n=10, **HALF)
    for scores, message in [
        (np.full((2, 3), -0.1), "`scores` must lie"),
        (np.full((2, 3), 0.9), "sum to at most 1"),
        (np.full((2, 4), 0.2), "3 classes, got 4"),
        (np.full((11, 3), 0.3), "planned for n=10"),
    ]:
        with pytest.raises(ValueError, match=message):
            accumulator.update(scores)
    for scores in ([0.5, 1.1], [math.nan]):
        with pytest.raises(ValueError, match="`scores`"):
            betting_lower(scores, 0.1)
    with pytest.raises(ValueError, match="`n`"):
        betting_lower([], 0.1)
