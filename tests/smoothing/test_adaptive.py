# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest

from hf_lip.smoothing.adaptive import AdaptivePlan, AdaptiveRule, Continue, Stop
from hf_lip.smoothing.adaptive_simulation import simulate_adaptive
from hf_lip.smoothing.intervals import clopper_pearson_lower
from hf_lip.smoothing.procedures import certify_counts
from hf_lip.smoothing.radii import mono_radius


COMMON = {"n": 20_000, "sigma": 0.5, "alpha": 0.001}


def run_rule(rule, p, seed=0):
    """Drive a rule as an engine does; (stop, votes at every look)."""
    rng, counts, seen = np.random.default_rng(seed), np.zeros(len(p), dtype=np.int64), []
    step = Continue(rule.first_look)
    while isinstance(step, Continue):
        counts = counts + rng.multinomial(step.next_look - counts.sum(), p)
        seen.append(counts)
        step = rule.update(counts)
    return step, seen


def plans():
    for selection in ([100, 0], [90, 10], [55, 45], [9, 1, 0], [40, 30, 20, 10], [1, 0], [980, 15, 5]):
        for n in (50, 1000, 20_000, 100_000):
            for options in ({}, {"rtol": 0.1}, {"method": "auto"}, {"target_radius": 0.1}, {"step": 1}):
                yield AdaptivePlan(tuple(selection), n, 0.5, 0.001, **options)


def test_levels_add_up_to_alpha_and_looks_ascend():
    for plan in plans():
        looks, levels = zip(*plan.looks)
        assert sum(levels) <= plan.alpha
        assert sum(levels) > 0.999 * plan.alpha
        assert list(looks) == sorted(set(looks))
        assert 1 <= looks[0] <= looks[-1] <= plan.n
        assert levels[-1] > 0
        assert all(look % plan.step == 0 or look == plan.n for look in looks)


def test_looks_are_fixed_by_the_selection_votes():
    # and by nothing else: two rules that see different votes agree on looks and levels
    common = {**COMMON, "n": 100_000}
    first = AdaptiveRule([90, 6, 4], **common)
    second = AdaptiveRule([90, 6, 4], **common)
    run_rule(first, [0.9, 0.06, 0.04])
    assert first.plan.looks == second.plan.looks
    assert AdaptiveRule([99, 1, 0], **common).plan.looks != first.plan.looks


@pytest.mark.parametrize("method", ["mono", "bonferroni", "cpm", "auto"])
@pytest.mark.parametrize("options", [{}, {"target_radius": 0.4}])
def test_the_decision_is_the_certificate_of_one_of_the_looks(method, options):
    rule = AdaptiveRule([90, 6, 4], method=method, **COMMON, **options)
    stop, seen = run_rule(rule, [0.9, 0.06, 0.04])
    decision, details = stop.decision, stop.decision.details
    votes = next(counts for counts in seen if counts.sum() == details["look"])
    again = certify_counts(
        rule.plan.fixed_method, [90, 6, 4], votes, sigma=0.5, alpha=dict(rule.plan.looks)[details["look"]]
    )
    assert (decision.radius, decision.p_lower, decision.p_upper_other) == (
        again.radius,
        again.p_lower,
        again.p_upper_other,
    )
    assert decision.predict == 0
    assert details["samples"] == seen[-1].sum()
    assert details["requested"] == method
    assert details["level"] <= details["alpha"] == 0.001
    # no other look has a larger radius
    for counts in seen:
        level = dict(rule.plan.looks)[int(counts.sum())]
        if level:
            other = certify_counts(rule.plan.fixed_method, [90, 6, 4], counts, sigma=0.5, alpha=level)
            assert other.radius <= decision.radius


@pytest.mark.parametrize("p", [0.6, 0.75, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("n0", [100, 1000])
def test_the_radius_is_near_that_of_all_samples(p, n0):
    n, rtol = 100_000, 0.05
    run = simulate_adaptive(np.tile([p, 1 - p], (60, 1)), n0=n0, n=n, sigma=1.0, alpha=0.001, rtol=rtol, seed=1)
    full = mono_radius(clopper_pearson_lower(round(p * n), n, 0.001), 1.0)
    right = run.candidate == 0
    assert run.radius[right].mean() > full - 1.2 * rtol * max(full, 1.0)
    assert run.samples.mean() < 0.5 * n


def test_a_smaller_tolerance_takes_more_samples():
    samples = [
        simulate_adaptive(
            np.tile([0.9, 0.1], (40, 1)), n0=400, n=100_000, sigma=1.0, alpha=0.001, rtol=rtol, seed=2
        ).samples.mean()
        for rtol in (0.2, 0.05, 0.02, 0.005)
    ]
    assert samples == sorted(samples)
    assert samples[0] < 0.03 * samples[-1]


def test_hopeless_images_stop_early():
    run = simulate_adaptive(
        np.tile([0.3, 0.25, 0.25, 0.2], (50, 1)), n0=100, n=100_000, sigma=1.0, alpha=0.001, seed=3
    )
    assert np.all(run.radius == 0.0)
    assert set(run.reason) <= {"futile", "rtol"}
    assert run.samples.mean() < 3000


@pytest.mark.parametrize(("target", "p"), [(0.5, 0.8), (1.0, 0.95), (0.2, 0.5), (2.0, 0.9), (1.0, 0.8413)])
def test_target_radius(target, p):
    runs, n = 60, 100_000
    run = simulate_adaptive(
        np.tile([p, 1 - p], (runs, 1)), n0=100, n=n, sigma=1.0, alpha=0.001, target_radius=target, seed=4
    )
    reached = mono_radius(p, 1.0) > target
    certified = run.radius >= target
    assert np.array_equal(certified, run.reason == "target")
    if abs(mono_radius(p, 1.0) - target) < 0.01:
        # right at the boundary: undecided, at most so many samples
        assert certified.mean() < 0.1
        assert run.samples.mean() > 1000
    else:
        right = run.candidate == 0
        assert certified[right].all() == reached or not reached
        assert certified.any() == reached
        assert run.samples.mean() < n / 30


def test_target_with_two_classes_needs_less_probability():
    # .45 against .275: no one-class radius at all
    p = np.tile([0.45, 0.275, 0.275], (30, 1))
    common = {"n0": 200, "n": 50_000, "sigma": 1.0, "alpha": 0.001, "target_radius": 0.15, "seed": 5}
    assert np.all(simulate_adaptive(p, method="bonferroni", **common).reason == "target")
    assert not np.any(simulate_adaptive(p, method="mono", **common).radius)


def test_the_vectorised_rule_is_the_rule():
    # paths of the simulation's plan and of rules driven one by one on the same votes
    rng = np.random.default_rng(6)
    for selection, options in [
        ([85, 10, 5], {}),
        ([60, 30, 10], {"target_radius": 0.1}),
        ([100, 0, 0], {"method": "cpm"}),
    ]:
        plan = AdaptivePlan(tuple(selection), **COMMON, **options)
        p = np.tile(np.array(selection) / 100 * 0.97 + 0.01, (20, 1))
        paths = np.cumsum(
            [rng.multinomial(b - a, p) for a, b in zip([0, *[x for x, _ in plan.looks]], [x for x, _ in plan.looks])],
            axis=0,
        )
        best, stopped = np.zeros(20), np.full(20, "", dtype="<U8")
        for place in range(len(plan.looks)):
            live = stopped == ""
            best = np.where(live, np.maximum(best, plan.step_radii(place, paths[place])), best)
            stopped = np.where(live, plan.reasons(place, paths[place], best), stopped)
        for row in range(20):
            rule = AdaptiveRule(selection, **COMMON, **options)
            for counts in paths[:, row]:
                step = rule.update(counts)
                if isinstance(step, Stop):
                    break
            assert isinstance(step, Stop)
            assert step.reason == stopped[row]
            assert step.decision.radius == best[row]


def test_without_a_certifying_look_the_rule_abstains():
    rule = AdaptiveRule([99, 1, 0, 0], **COMMON)
    assert rule.plan.looks[0][1] == 0.0
    step = rule.update([rule.first_look // 4] * 4)
    assert isinstance(step, Stop)
    assert step.reason == "futile"
    assert (step.decision.predict, step.decision.radius, step.decision.p_lower) == (-1, 0.0, 0.0)
    assert step.decision.p_upper_other == 1.0
    assert step.decision.details["samples"] == rule.first_look


def test_budget_ends_at_n():
    rule = AdaptiveRule([60, 40], n=300, sigma=1.0, alpha=0.001, target_radius=0.1)
    stop, seen = run_rule(rule, [0.56, 0.44])
    assert stop.reason in ("budget", "futile")
    assert seen[-1].sum() <= 300


# misuse


def test_votes_must_be_those_the_look_asked_for():
    rule = AdaptiveRule([90, 10], **COMMON)
    with pytest.raises(ValueError, match=f"votes of {rule.first_look} samples"):
        rule.update([rule.first_look, 1])
    step = rule.update([rule.first_look - 30, 30])
    assert isinstance(step, Continue)
    with pytest.raises(ValueError, match="must add to the votes of the look before"):
        rule.update([step.next_look - 29, 29])
    with pytest.raises(ValueError, match="must add to the votes"):
        rule.update([step.next_look - 40, 30, 10])
    stop, _ = run_rule(finished := AdaptiveRule([90, 10], **COMMON), [0.9, 0.1])
    with pytest.raises(ValueError, match="has stopped"):
        finished.update([stop.decision.details["samples"], 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": 0.0}, "`sigma`"),
        ({"alpha": 0.0}, "`alpha`"),
        ({"n": 0}, "`n`"),
        ({"step": 0}, "`step`"),
        ({"rtol": 0.0}, "`rtol`"),
        ({"rtol": math.nan}, "`rtol`"),
        ({"target_radius": 0.0}, "`target_radius` must be positive"),
        ({"target_radius": math.nan}, "`target_radius` must be positive"),
        ({"target_radius": 5.0}, "can not be certified with n=20000 .*even unanimous votes"),
        ({"selection_counts": [0, 0]}, "n0 >= 1"),
        ({"selection_counts": [3]}, "at least 2 classes"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"selection_counts": [9, 1], **COMMON, **change}
    with pytest.raises(ValueError, match=message):
        AdaptiveRule(arguments.pop("selection_counts"), **arguments)


def test_bad_simulation():
    with pytest.raises(ValueError, match="`probabilities`"):
        simulate_adaptive([[0.5, 0.6]], n0=10, n=100, sigma=1.0, alpha=0.1)
