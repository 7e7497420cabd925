# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch

from hf_lip.ops.simplex import ScoreMap
from hf_lip.smoothing.calibration import calibrate, calibration_radii, score_map_grid
from hf_lip.smoothing.procedures import certify_moments
from hf_lip.smoothing.samples import Moments


HALF = {"sigma": 0.5, "alpha": 0.001}


def logits(images, draws, seed=0, gap=2.0, noise=1.0):
    generator = torch.Generator().manual_seed(seed)
    values = noise * torch.randn(images, draws, 4, generator=generator, dtype=torch.float64)
    values[..., 1] += gap
    return values


def test_grid():
    grid = score_map_grid(5)
    assert [m.kind for m in grid] == ["softmax"] * 5 + ["sparsemax"] * 5
    assert [m.inverse_temperature for m in grid[:5]] == pytest.approx([0.1, 0.4729, 2.236, 10.57, 50.0])
    assert len(score_map_grid()) == 50
    assert all(ScoreMap.parse(str(m)) == m for m in score_map_grid())


def test_the_map_has_the_largest_mean_radius():
    values, grid = logits(6, 200), score_map_grid(7)
    radii = calibration_radii(values, **HALF, n=5000, grid=grid)
    assert radii.shape == (14, 6)
    chosen = calibrate(values, **HALF, n=5000, grid=grid)
    assert chosen == grid[int(radii.mean(axis=1).argmax())]
    assert 0.0 < radii.mean(axis=1).min() < radii.mean(axis=1).max()


def test_radii_are_those_of_n_samples_with_these_moments():
    values = logits(3, 400)
    score_map = ScoreMap("sparsemax", 1.0)
    (radii,) = calibration_radii(values, **HALF, n=10_000, grid=[score_map])
    for row, radius in zip(values, radii):
        moments = Moments.from_scores(score_map.apply(row).numpy())
        scaled = Moments(10_000, moments.mean * 10_000, moments.variance * 9999)
        assert radius == pytest.approx(certify_moments(moments, scaled, **HALF).radius, rel=1e-6)


def test_temperature_follows_the_scale_of_the_logits():
    # t times logits is all that a map sees: logits ten times as large need a tenth of t
    first = calibrate(logits(20, 200), **HALF, n=5000, grid=[ScoreMap("sparsemax", t) for t in (0.5, 1.0, 2.0)])
    second = calibrate(10 * logits(20, 200), **HALF, n=5000, grid=[ScoreMap("sparsemax", t) for t in (0.05, 0.1, 0.2)])
    assert second.inverse_temperature == pytest.approx(first.inverse_temperature / 10)


def test_hard_votes_can_be_compared():
    grid = [ScoreMap("hardmax"), ScoreMap("softmax", 0.01)]
    radii = calibration_radii(logits(4, 300), **HALF, n=10_000, grid=grid)
    # a nearly flat softmax certifies next to nothing
    assert np.all(radii[0] > radii[1])
    assert calibrate(logits(4, 300), **HALF, n=10_000, grid=grid) == grid[0]


def test_labels_make_it_the_certified_radius_of_right_classes():
    values = logits(4, 100)
    right = calibration_radii(values, **HALF, n=5000, labels=[1, 1, 1, 1], grid=score_map_grid(3))
    mixed = calibration_radii(values, **HALF, n=5000, labels=[1, 0, 1, 3], grid=score_map_grid(3))
    assert np.array_equal(right, calibration_radii(values, **HALF, n=5000, grid=score_map_grid(3)))
    assert np.array_equal(mixed, right * np.array([1, 0, 1, 0]))


def test_low_precision_logits_and_arrays():
    values = logits(2, 50)
    single = calibrate(values.float(), **HALF, n=1000, grid=score_map_grid(4))
    assert single == calibrate(values.float().numpy(), **HALF, n=1000, grid=score_map_grid(4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score_logits": torch.zeros(3, 4)}, r"\(m, k, c\)"),
        ({"score_logits": torch.zeros(0, 4, 3)}, "m >= 1"),
        ({"score_logits": torch.zeros(2, 1, 3)}, "k >= 2"),
        ({"score_logits": torch.full((2, 5, 3), math.nan)}, "`logits` has NaN"),
        ({"sigma": 0.0}, "`sigma`"),
        ({"alpha": 0.0}, "`alpha`"),
        ({"n": 1}, "`n`"),
        ({"grid": ()}, "`grid`"),
        ({"labels": [1, 2, 3]}, "`labels`"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        calibrate(**{"score_logits": logits(2, 5), **HALF, "n": 100, **change})
    with pytest.raises(ValueError, match="`num_temperatures`"):
        score_map_grid(1)
