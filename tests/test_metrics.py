# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from hf_lip.metrics import (
    STANDARD_RADII,
    abstention_rate,
    average_certified_radius,
    certified_accuracy,
    certified_accuracy_curve,
    certified_accuracy_envelope,
    evaluate_metric,
    probability_distribution,
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


def test_envelope_is_the_best_run_at_every_radius():
    runs = {0.25: ([0.1, 0.3, 0.5], [True, True, True]), 1.0: ([0.0, 2.0, 0.4], [True, True, False])}
    eps, accuracy, names = certified_accuracy_envelope(runs)
    assert eps.tolist() == [0.0, 0.1, 0.3, 0.5, 2.0]
    assert accuracy.tolist() == pytest.approx([1.0, 2 / 3, 1 / 3, 1 / 3, 0.0])
    # ties go to the first
    assert names == [0.25, 0.25, 0.25, 1.0, 0.25]
    grid, accuracy, names = certified_accuracy_envelope(runs, [1.0])
    assert (grid.tolist(), accuracy.tolist(), names) == ([1.0], [1 / 3], [1.0])


def test_distribution_of_probabilities():
    result = probability_distribution([0.0, 0.04, 0.5, 0.99, 1.0], num_bins=10)
    assert result["edges"] == pytest.approx(np.linspace(0, 1, 11).tolist())
    assert result["shares"] == pytest.approx([0.4, 0, 0, 0, 0, 0.2, 0, 0, 0, 0.4])
    assert result["quantiles"]["0.5"] == 0.5
    assert list(result["quantiles"]) == [f"0.{tenth}" for tenth in range(1, 10)]


def test_as_a_metric_of_evaluate():
    rng = np.random.default_rng(0)
    predictions, references = rng.integers(-1, 3, 40), rng.integers(0, 3, 40)
    radii = np.where(predictions == -1, 0.0, rng.exponential(0.5, 40))
    metric = evaluate_metric({"0.1": 0.1, "1.0": 1.0})
    for part in (slice(0, 25), slice(25, 40)):
        metric.add_batch(predictions=predictions[part], references=references[part], radii=radii[part])
    correct = predictions == references
    assert metric.compute() == pytest.approx(
        {
            "clean_accuracy": correct.mean(),
            "certified_accuracy_at_0.1": certified_accuracy(radii, correct, 0.1),
            "certified_accuracy_at_1.0": certified_accuracy(radii, correct, 1.0),
            "average_certified_radius": average_certified_radius(radii, correct),
            "abstention_rate": np.mean(predictions == -1),
        }
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: certified_accuracy_envelope({}), "`runs` must hold runs"),
        (lambda: certified_accuracy_envelope({1: ([0.1], [True]), 2: ([0.1] * 2, [True] * 2)}), "{1: 1, 2: 2}"),
        (lambda: probability_distribution([]), "`p_lower`"),
        (lambda: probability_distribution([1.5]), "`p_lower`"),
        (lambda: probability_distribution([float("nan")]), "`p_lower`"),
        (lambda: probability_distribution([0.5], num_bins=0), "`num_bins`"),
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
