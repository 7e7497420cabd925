# SPDX-License-Identifier: Apache-2.0
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hf_lip.metrics import (
    STANDARD_RADII,
    abstention_rate,
    average_certified_radius,
    certification_metrics,
    certified_accuracy,
    certified_accuracy_curve,
    certified_accuracy_envelope,
    compute_certification_metrics,
    metric_path,
    probability_distribution,
)


NAN = float("nan")
RADII = [0.5, 0.2, 0.9, 0.0, 0.0]
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


def test_all_figures_of_a_table():
    predictions, references, radii = [3, 1, -1, 2], [3, 1, 0, 1], [0.5, 0.2, 0.0, 0.9]
    assert certification_metrics(predictions, references, radii, {"0.1": 0.1, "0.2": 0.2}) == {
        "clean_accuracy": 0.5,
        "certified_accuracy_at_0.1": 0.5,
        "certified_accuracy_at_0.2": 0.25,
        "average_certified_radius": pytest.approx(0.175),
        "abstention_rate": 0.25,
    }
    standard = {f"certified_accuracy_at_{name}" for name in STANDARD_RADII}
    assert standard < set(certification_metrics(predictions, references, radii))


def outputs(predictions, label_ids):
    return SimpleNamespace(predictions=predictions, label_ids=label_ids)


def test_compute_metrics_reads_the_outputs_of_a_certified_model():
    logits = np.eye(3)[[0, 2, 1]]
    figures = compute_certification_metrics(outputs((logits, np.array([0.5, 0.2, 0.9]), np.ones(1)), [0, 2, 2]))
    assert figures == certification_metrics([0, 2, 1], [0, 2, 2], [0.5, 0.2, 0.9])


def test_folders_of_the_modules():
    for name in ("certified_accuracy", "average_certified_radius", "entity_tracking_exact_match"):
        assert (Path(metric_path(name)) / f"{name}.py").is_file()
    with pytest.raises(ValueError, match=r"Unknown metric 'accuracy': .* average_certified_radius, certified_"):
        metric_path("accuracy")


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
        (lambda: certified_accuracy([0.1, NAN], [True, False], 0.1), "got nan at entry 1"),
        (lambda: certified_accuracy([0.1], [NAN], 0.1), "`correct` must hold True or False, got nan"),
        (lambda: certified_accuracy([0.1], [7], 0.1), "`correct` must hold True or False, got 7"),
        (lambda: average_certified_radius([NAN], [True]), "got nan at entry 0"),
        (lambda: certified_accuracy([-0.1], [True], 0.1), "finite and >= 0"),
        (lambda: average_certified_radius([float("inf")], [True]), "finite and >= 0"),
        (lambda: certified_accuracy([0.1], [True], -1.0), "`eps`"),
        (lambda: certified_accuracy([0.1], [True], float("nan")), "`eps`"),
        (lambda: certified_accuracy_curve([0.1], [True], []), "`eps`"),
        (lambda: abstention_rate([]), "empty"),
        (lambda: abstention_rate([NAN]), "`abstained` must hold True or False"),
        (lambda: certification_metrics([], [], []), "empty"),
        (lambda: certification_metrics([1, 2], [1], [0.1]), "`predictions` and `references` must be equally long"),
        (lambda: certification_metrics([1, 2], [1, 2], [0.1]), "`radii` and `correct` must be equally long"),
        (lambda: certification_metrics([1, NAN], [1, 2], [0.1, 0.2]), "`predictions` has nan at entry 1"),
        (lambda: certification_metrics([1], ["one"], [0.1]), "`references` has one at entry 0"),
        (lambda: certification_metrics([1], [-1], [0.1]), "`references` holds -1"),
        (lambda: certification_metrics([0.5], [1], [0.1]), "`predictions` has 0.5"),
        (lambda: certification_metrics([1], [1], [NAN]), "got nan at entry 0"),
        (lambda: compute_certification_metrics(outputs(np.eye(3), [0, 1, 2])), "hold no radii"),
        (lambda: compute_certification_metrics(outputs((np.full((1, 2), NAN), np.ones(1)), [0])), "without NaN"),
        (lambda: compute_certification_metrics(outputs((np.eye(2), np.ones(2)), [0])), "equally long"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
