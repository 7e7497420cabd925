# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from hf_lip.metrics import (
    STANDARD_RADII,
    abstention_rate,
    average_certified_radius,
    certified_accuracy,
    certified_accuracy_curve,
)


RADII = [0.5, 0.2, 0.9, 0.0, float("nan")]
CORRECT = [True, True, False, False, True]


def test_hand_computed_values():
    # correct with a radius: 0.5 and 0.2 of five images
    assert certified_accuracy(RADII, CORRECT, 0.0) == 0.4
    assert certified_accuracy(RADII, CORRECT, 0.3) == 0.2
    assert average_certified_radius(RADII, CORRECT) == pytest.approx(0.14)
    assert abstention_rate([True, False, False, False]) == 0.25


def test_a_ball_is_open_at_its_radius():
    assert certified_accuracy([0.5], [True], 0.5) == 0.0
    assert certified_accuracy([np.nextafter(0.5, 1.0)], [True], 0.5) == 1.0
    assert certified_accuracy([0.0], [True], 0.0) == 0.0


def test_nan_radius_is_never_certified():
    assert certified_accuracy([float("nan")], [True], 0.0) == 0.0


def test_standard_radii():
    assert STANDARD_RADII == {"36/255": 36 / 255, "72/255": 72 / 255, "108/255": 108 / 255, "1.0": 1.0}


def test_curve_has_the_corners_of_the_step_function():
    eps, accuracy = certified_accuracy_curve(RADII, CORRECT)
    assert eps.tolist() == [0.0, 0.2, 0.5]
    assert accuracy.tolist() == [0.4, 0.2, 0.0]


def test_curve_equals_the_accuracy_at_any_radius():
    rng = np.random.default_rng(0)
    radii, correct = rng.exponential(0.3, 200), rng.random(200) < 0.8
    grid = np.concatenate([rng.random(50), radii[:20]])
    eps, accuracy = certified_accuracy_curve(radii, correct, grid)
    assert np.array_equal(eps, grid)
    assert accuracy.tolist() == [certified_accuracy(radii, correct, value) for value in grid]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: certified_accuracy([], [], 0.1), "`radii` is empty"),
        (lambda: certified_accuracy([0.1], [True, False], 0.1), "equally long"),
        (lambda: certified_accuracy([-0.1], [True], 0.1), "finite and >= 0"),
        (lambda: average_certified_radius([float("inf")], [True]), "finite and >= 0"),
        (lambda: certified_accuracy([0.1], [True], -1.0), "`eps`"),
        (lambda: certified_accuracy([0.1], [True], float("nan")), "`eps`"),
        (lambda: certified_accuracy_curve([0.1], [True], []), "`eps`"),
        (lambda: abstention_rate([]), "empty"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
