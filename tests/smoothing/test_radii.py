# SPDX-License-Identifier: Apache-2.0
import math

import mpmath
import numpy as np
import pytest

from hf_lip.smoothing import clopper_pearson_lower, mono_radius
from hf_lip.smoothing.radii import normal_quantile_lower, normal_quantile_upper, one_minus_up, two_class_radius


# lvm-rs.md 6.1: n unanimous votes, R / sigma at alpha = 0.001 and 0.01
UNANIMOUS = [
    (10, 0.002976, 0.334390),
    (100, 1.500475, 1.695319),
    (1000, 2.463263, 2.604935),
    (10_000, 3.198578, 3.313664),
    (100_000, 3.811457, 3.910510),
    (1_000_000, 4.346774, 4.434928),
]


@pytest.mark.parametrize(("n", "at_001", "at_01"), UNANIMOUS)
def test_radius_of_unanimous_votes(n, at_001, at_01):
    assert mono_radius(clopper_pearson_lower(n, n, 0.001), 1.0) == pytest.approx(at_001, abs=6e-7)
    assert mono_radius(clopper_pearson_lower(n, n, 0.01), 1.0) == pytest.approx(at_01, abs=6e-7)


@pytest.mark.parametrize(
    ("k", "expected"), [(90_000, 0.632422), (60_000, 0.120472), (100_000, 1.905728), (52_000, 0.018944)]
)
def test_radius_of_counts_at_half_sigma(k, expected):
    assert mono_radius(clopper_pearson_lower(k, 100_000, 0.001), 0.5) == pytest.approx(expected, abs=6e-7)


def test_smallest_certifying_count_has_a_tiny_radius():
    assert mono_radius(clopper_pearson_lower(50_490, 100_000, 0.001), 1.0) == pytest.approx(0.000022, abs=6e-7)


@pytest.mark.parametrize(
    ("sigma", "alpha", "lowest", "highest", "printed"),
    [
        (0.12, 0.001, 73_383, 73_409, "0.0734"),
        (0.12, 0.001, 99_981, 99_981, "0.405"),
        (0.5, 0.001, 95_234, 95_253, "0.824"),
        (0.25, 0.01, 93_630, 93_679, "0.378"),
        (0.25, 0.01, 100_000, 100_000, "0.978"),
        (0.25, 0.001, 100_000, 100_000, "0.953"),
        (0.5, 0.01, 99_997, 99_997, "1.86"),
        (1.0, 0.01, 91_279, 91_437, "1.35"),
    ],
)
def test_rows_of_cohens_logs(sigma, alpha, lowest, highest, printed):
    # lvm-rs.md 6.4: the counts that print the radius in the published logs, n = 100,000
    def text(k):
        return f"{mono_radius(clopper_pearson_lower(k, 100_000, alpha), sigma):.3}"

    assert text(lowest) == text(highest) == printed
    assert text(lowest - 1) != printed
    assert highest == 100_000 or text(highest + 1) != printed


@pytest.mark.parametrize("q", [0.49, 0.3, 0.1, 1e-3, 1e-9, 1e-15])
def test_never_above_the_exact_quantile_and_close_to_it(q):
    p = 1.0 - q
    radius = mono_radius(p, 0.25)
    with mpmath.workdps(40):
        exact = mpmath.sqrt(2) * mpmath.erfinv(2 * mpmath.mpf(p) - 1) / 4
        assert 1 - mpmath.mpf("1e-11") < radius / exact <= 1


def test_a_probability_of_at_most_half_certifies_nothing():
    assert mono_radius(0.5, 1.0) == 0.0
    assert mono_radius(0.0, 1.0) == 0.0
    assert 0.0 <= mono_radius(math.nextafter(0.5, 1.0), 1.0) < 1e-15


def test_radius_scales_with_sigma():
    assert mono_radius(0.9, 0.5) == pytest.approx(0.5 * mono_radius(0.9, 1.0), rel=1e-15)


def test_exactly_solvable_classifiers():
    # lvm-rs.md 6.2. linear, distance 0.8: at the exact probability the radius is the distance for every sigma
    for sigma, p in [(0.25, 0.99931286), (0.5, 0.94520071), (1.0, 0.78814460)]:
        assert mono_radius(p, sigma) == pytest.approx(0.8, abs=1e-6)
    # band on a line: P = 0.682689, true radius 0.969343
    assert mono_radius(0.682689492, 1.0) == pytest.approx(0.475233, abs=6e-7)


@pytest.mark.parametrize(
    ("p", "sigma", "name"),
    [
        (1.0, 1.0, "p_lower"),
        (math.nan, 1.0, "p_lower"),
        (-0.1, 1.0, "p_lower"),
        (0.9, 0.0, "sigma"),
        (0.9, -1.0, "sigma"),
        (0.9, math.inf, "sigma"),
        (0.9, math.nan, "sigma"),
    ],
)
def test_bad_input(p, sigma, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        mono_radius(p, sigma)


# two classes


@pytest.mark.parametrize(
    ("p", "q", "expected"),
    [(0.6, 0.2, 0.547484), (0.8, 0.1, 1.061586), (0.99, 0.005, 2.451089), (0.45, 0.30, 0.199370)],
)
def test_two_class_radius(p, q, expected):
    assert two_class_radius(p, q, 1.0) == pytest.approx(expected, abs=6e-7)
    assert two_class_radius(p, q, 0.25) == pytest.approx(0.25 * expected, abs=6e-7)


def test_two_class_radius_of_the_band():
    # lvm-rs.md 6.2
    assert two_class_radius(0.682689492, 0.158655254, 1.0) == pytest.approx(0.737616, abs=6e-7)


@pytest.mark.parametrize("p", [0.3, 0.499999, 0.5, 0.7, 0.9999, 1 - 1e-15])
@pytest.mark.parametrize("q", [1e-300, 1e-15, 1e-3, 0.29])
def test_two_class_radius_is_rounded_down(p, q):
    radius = two_class_radius(p, q, 0.25)
    with mpmath.workdps(400):
        exact = (mpmath.erfinv(2 * mpmath.mpf(p) - 1) - mpmath.erfinv(2 * mpmath.mpf(q) - 1)) * mpmath.sqrt(2) / 8
        assert 1 - mpmath.mpf("1e-10") < radius / exact <= 1


def test_complements_give_the_one_class_radius():
    for p in (0.6, 0.9, 0.9999):
        assert two_class_radius(p, 1 - p, 0.5) == pytest.approx(mono_radius(p, 0.5), rel=1e-10)


@pytest.mark.parametrize(("p", "q"), [(0.5, 0.5), (0.4, 0.6), (0.0, 0.5), (0.3, 1.0)])
def test_no_gap_certifies_nothing(p, q):
    assert two_class_radius(p, q, 1.0) == 0.0


def test_arrays_entry_by_entry():
    p, q = np.array([[0.2, 0.6], [0.9, 0.99999]]), np.array([0.3, 0.1])
    expected = [[two_class_radius(a, b, 0.5) for a, b in zip(row, q)] for row in p]
    assert two_class_radius(p, q, 0.5).tolist() == expected
    assert mono_radius(p, 0.5).tolist() == [[mono_radius(float(a), 0.5) for a in row] for row in p]
    assert isinstance(two_class_radius(0.6, 0.2, 1.0), float)


@pytest.mark.parametrize("p", [1e-300, 1e-9, 0.1, 0.4999999, 0.5, 0.5000001, 0.9, 1 - 1e-12])
def test_quantiles_enclose_the_exact_one(p):
    with mpmath.workdps(400):
        exact = mpmath.sqrt(2) * mpmath.erfinv(2 * mpmath.mpf(p) - 1)
        assert float(normal_quantile_lower(p)) <= exact <= float(normal_quantile_upper(p))
        assert float(normal_quantile_upper(p)) - float(normal_quantile_lower(p)) <= abs(exact) * 3e-12


def test_the_rest_is_rounded_up():
    for p in (1e-20, 0.1, 1 / 3, 0.5, 0.9999999):
        with mpmath.workdps(60):
            assert mpmath.mpf(one_minus_up(p)) >= 1 - mpmath.mpf(p)
    assert one_minus_up(0.0) == 1.0


@pytest.mark.parametrize(
    ("p", "q", "sigma", "name"),
    [
        (1.0, 0.1, 1.0, "p_lower"),
        (math.nan, 0.1, 1.0, "p_lower"),
        (0.9, 0.0, 1.0, "p_upper_other"),
        (0.9, 1.1, 1.0, "p_upper_other"),
        (0.9, math.nan, 1.0, "p_upper_other"),
        (0.9, 0.1, 0.0, "sigma"),
    ],
)
def test_bad_input_of_two_classes(p, q, sigma, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        two_class_radius(p, q, sigma)
