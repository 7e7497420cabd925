# SPDX-License-Identifier: Apache-2.0
import math

import mpmath
import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.special import ndtr

from hf_lip.smoothing.lipschitz_radii import (
    lipschitz_mono_radius,
    lipschitz_two_class_radius,
    smoothed_lipschitz_constant,
)
from hf_lip.smoothing.radii import mono_radius, two_class_radius


# lvm-rs.md 2.4: sigma, L, then for p = 0.75, 0.9, 0.99: Cohen / exact / margin over the constant of the smoothed score
TABLE = [
    (0.25, 0.5, "0.169 0.502 0.500", "0.320 0.839 0.800", "0.582 1.255 0.980"),
    (0.25, 1.0, "0.169 0.275 0.262", "0.320 0.499 0.419", "0.582 0.840 0.513"),
    (0.25, 2.0, "0.169 0.197 0.183", "0.320 0.372 0.293", "0.582 0.666 0.359"),
    (0.5, 1.0, "0.337 0.393 0.366", "0.641 0.743 0.586", "1.163 1.331 0.718"),
    (1.0, 1.0, "0.674 0.703 0.653", "1.282 1.334 1.045", "2.326 2.420 1.280"),
    (1.0, 5.0, "0.674 0.676 0.628", "1.282 1.284 1.004", "2.326 2.330 1.230"),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"sigma={row[0]},L={row[1]}")
def test_radii_of_the_table(row):
    sigma, lipschitz, *texts = row
    for p, text in zip((0.75, 0.9, 0.99), texts):
        radii = (
            mono_radius(p, sigma),
            lipschitz_mono_radius(p, sigma, lipschitz),
            (p - 0.5) / smoothed_lipschitz_constant(lipschitz, sigma),
        )
        assert " ".join(f"{radius:.3f}" for radius in radii) == text


def ramp_mean(z, sigma, lipschitz):
    """Mean, in 40 digits, of the ramp of slope L under noise at distance z from its centre: an integral of Phi."""
    z, sigma, lipschitz = map(mpmath.mpf, (z, sigma, lipschitz))
    half = 1 / (2 * lipschitz)

    def antiderivative(t):
        return t * mpmath.ncdf(t / sigma) + sigma * mpmath.npdf(t / sigma)

    return lipschitz * (antiderivative(z + half) - antiderivative(z - half))


SETTINGS = [
    (0.25, 0.1),
    (0.25, 1.0),
    (0.5, 3.9),
    (0.5, 4.1),
    (1.0, 0.01),
    (1.0, 1.0),
    (1.0, 50.0),
    (0.12, 1e4),
    (2.0, 1e-3),
]


@pytest.mark.parametrize(("sigma", "lipschitz"), SETTINGS)
@pytest.mark.parametrize("p", [0.500001, 0.6, 0.9, 0.999, 0.99993, 1 - 1e-9, 1 - 1e-14])
def test_never_above_the_exact_radius_and_close_to_it(sigma, lipschitz, p):
    radius = lipschitz_mono_radius(p, sigma, lipschitz)
    with mpmath.workdps(60):
        # at the radius the tail has not fallen below that of p, and hardly differs from it
        tail = 1 - ramp_mean(radius, sigma, lipschitz)
        assert 1 <= tail / (1 - mpmath.mpf(p)) < 1 + mpmath.mpf("1e-9")


@pytest.mark.parametrize(("sigma", "lipschitz"), SETTINGS)
@pytest.mark.parametrize(("p", "q"), [(0.4, 0.1), (0.45, 0.44), (0.9, 0.05), (0.999, 1e-5), (0.7, 0.6), (0.3, 1e-12)])
def test_two_class_radius_is_rounded_down(sigma, lipschitz, p, q):
    radius = lipschitz_two_class_radius(p, q, sigma, lipschitz)

    def inverse(value):
        start = float(lipschitz_mono_radius(max(value, 1 - value), sigma, lipschitz))
        start = start if value >= 0.5 else -start
        return mpmath.findroot(
            lambda z: ramp_mean(z, sigma, lipschitz) - mpmath.mpf(value), (start, start + 1e-9 * sigma)
        )

    with mpmath.workdps(50):
        exact = (inverse(p) - inverse(q)) / 2
        assert 1 - mpmath.mpf("1e-6") < radius / exact <= 1


def test_the_closed_form_in_terms_of_the_ramps_foot():
    # p = 1 - L int_{s0}^{s0 + 1/L} Phi(t / sigma) dt, R = -s0 - 1 / (2L)
    sigma, lipschitz, p = 0.5, 1.0, 0.9
    foot = -float(lipschitz_mono_radius(p, sigma, lipschitz)) - 0.5 / lipschitz
    t = np.linspace(foot, foot + 1 / lipschitz, 20_001)
    assert 1 - lipschitz * np.trapezoid(ndtr(t / sigma), t) == pytest.approx(p, abs=1e-8)


@pytest.mark.parametrize("sigma", [0.25, 1.0])
def test_at_least_cohens_radius_decreasing_in_the_constant_with_its_limit(sigma):
    p = np.array([0.51, 0.6, 0.9, 0.99, 0.99993])
    previous = np.full(5, np.inf)
    for lipschitz in (1e-3, 0.1, 0.5, 1.0, 3.0, 8.0, 30.0, 1e3, 1e6, math.inf):
        radius = lipschitz_mono_radius(p, sigma, lipschitz)
        assert np.all(radius <= previous)
        assert np.all(radius >= mono_radius(p, sigma))
        previous = radius
    assert np.array_equal(previous, mono_radius(p, sigma))
    assert lipschitz_mono_radius(p, sigma, 1e6) == pytest.approx(mono_radius(p, sigma), rel=1e-8)
    assert lipschitz_two_class_radius(0.45, 0.3, sigma, 1e7) == pytest.approx(
        two_class_radius(0.45, 0.3, sigma), rel=1e-8
    )


def test_two_class_radius_of_complements_is_the_one_class_radius():
    for p in (0.6, 0.9, 0.999):
        two = lipschitz_two_class_radius(p, 1 - p, 0.5, 1.0)
        assert two == pytest.approx(lipschitz_mono_radius(p, 0.5, 1.0), rel=1e-9)


def test_wide_ramps_have_the_deterministic_radius():
    # noise far narrower than the ramp: the margin over 2L of the base itself
    assert lipschitz_two_class_radius(0.8, 0.1, 1e-3, 0.5) == pytest.approx(0.7 / (2 * 0.5), rel=1e-4)
    assert lipschitz_mono_radius(0.8, 1e-3, 0.5) == pytest.approx(0.3 / 0.5, rel=1e-4)


@pytest.mark.parametrize(("sigma", "lipschitz", "p", "distance"), [(0.5, 1.0, 0.9, 0.5), (1.0, 1.0, 0.75, 0.7)])
def test_no_lipschitz_function_does_worse_by_linear_programming(sigma, lipschitz, p, distance):
    # h on a grid, values in [0, 1], slope at most L, mean p at 0: the least mean at the distance
    x = np.linspace(-6 * sigma, 6 * sigma + distance, 900)
    step = x[1] - x[0]

    def weights(centre):
        density = np.exp(-0.5 * ((x - centre) / sigma) ** 2)
        return density / density.sum()

    slopes = np.eye(len(x))[1:] - np.eye(len(x))[:-1]
    program = linprog(
        weights(distance),
        A_ub=np.concatenate([slopes, -slopes]),
        b_ub=np.full(2 * len(slopes), lipschitz * step),
        A_eq=weights(0.0)[None],
        b_eq=[p],
        bounds=(0, 1),
    )
    centre = float(lipschitz_mono_radius(p, sigma, lipschitz))
    assert program.fun == pytest.approx(float(ramp_mean(centre - distance, sigma, lipschitz)), abs=5e-5)


def test_a_ramp_loses_its_class_exactly_at_the_radius():
    # the score clip(1/2 + L (d - t), 0, 1) of a linear base: true radius d
    for sigma, lipschitz, distance in [(0.25, 1.0, 0.5), (0.5, 2.0, 0.3), (1.0, 1.0, 0.8)]:
        p = float(ramp_mean(distance, sigma, lipschitz))
        radius = lipschitz_mono_radius(p, sigma, lipschitz)
        assert radius == pytest.approx(distance, rel=1e-8)
        assert mono_radius(p, sigma) < radius


# the constant of the smoothed score


@pytest.mark.parametrize(
    ("lipschitz", "sigma", "expected"), [(1, 1, 0.382925), (1, 0.25, 0.954500), (5, 0.25, 1.554217)]
)
def test_smoothed_constants_of_the_spec(lipschitz, sigma, expected):
    assert smoothed_lipschitz_constant(lipschitz, sigma) == pytest.approx(expected, abs=6e-7)


@pytest.mark.parametrize("sigma", [0.25, 1.0])
@pytest.mark.parametrize("lipschitz", [0.1, 1.0, 10.0, 1000.0])
def test_the_smoothed_constant_is_attained_by_a_ramp(lipschitz, sigma):
    step = 1e-3 * min(sigma, 1 / lipschitz)
    with mpmath.workdps(40):
        slope = (ramp_mean(step, sigma, lipschitz) - ramp_mean(-step, sigma, lipschitz)) / (2 * step)
    constant = smoothed_lipschitz_constant(lipschitz, sigma)
    assert float(slope) == pytest.approx(constant, rel=1e-5)
    assert float(slope) <= constant


def test_limits_of_the_smoothed_constant():
    assert smoothed_lipschitz_constant(1e-9, 1.0) == 1e-9
    limit = 1 / (0.5 * math.sqrt(2 * math.pi))
    for lipschitz in (1e9, 1e200, math.inf):
        assert limit <= smoothed_lipschitz_constant(lipschitz, 0.5) <= limit * (1 + 1e-9)
    # a simplex-valued map, of diameter sqrt(2): 1 / (sigma sqrt(pi))
    assert smoothed_lipschitz_constant(math.inf, 0.5, math.sqrt(2)) == pytest.approx(1 / (0.5 * math.sqrt(math.pi)))


# bad input


@pytest.mark.parametrize("lipschitz", [0.0, -1.0, math.nan])
def test_bad_constants(lipschitz):
    for call in (
        lambda: lipschitz_mono_radius(0.9, 1.0, lipschitz),
        lambda: lipschitz_two_class_radius(0.9, 0.1, 1.0, lipschitz),
        lambda: smoothed_lipschitz_constant(lipschitz, 1.0),
    ):
        with pytest.raises(ValueError, match="`lipschitz`"):
            call()


def test_nothing_is_certified_below_one_half_or_without_a_gap():
    assert lipschitz_mono_radius(np.array([0.0, 0.3, 0.5]), 1.0, 1.0).tolist() == [0.0, 0.0, 0.0]
    assert lipschitz_two_class_radius(0.4, 0.4, 1.0, 1.0) == 0.0
    assert lipschitz_two_class_radius(0.4, 1.0, 1.0, 1.0) == 0.0
    assert isinstance(lipschitz_mono_radius(0.9, 1.0, 1.0), float)


@pytest.mark.parametrize(("p", "name"), [(1.0, "p_lower"), (math.nan, "p_lower")])
def test_bad_probabilities(p, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        lipschitz_mono_radius(p, 1.0, 1.0)
    with pytest.raises(ValueError, match=f"`{name}`"):
        lipschitz_two_class_radius(p, 0.1, 1.0, 1.0)
    with pytest.raises(ValueError, match="`p_upper_other`"):
        lipschitz_two_class_radius(0.9, 0.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="`score_range`"):
        smoothed_lipschitz_constant(1.0, 1.0, 0.0)
