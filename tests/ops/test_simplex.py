# SPDX-License-Identifier: Apache-2.0
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from hf_lip.ops.simplex import ScoreMap, sparsemax_scores


TEMPERATURES = (0.1, 0.7, 1.0, 3.0, 50.0, 1e7)


def logits(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def project_on_simplex(z):
    """Euclidean projection by bisection on the threshold."""
    low, high = z.min() - 1.0, z.max()
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if np.maximum(z - middle, 0.0).sum() > 1.0 else (low, middle)
    return np.maximum(z - high, 0.0)


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_sparsemax_is_the_projection_for_every_temperature_at_once(classes):
    z = logits(20, classes)
    scores = sparsemax_scores(z, TEMPERATURES)
    assert scores.shape == (len(TEMPERATURES), 20, classes)
    for t, one in zip(TEMPERATURES, scores):
        expected = np.stack([project_on_simplex(t * row) for row in z.numpy()])
        assert one.numpy() == pytest.approx(expected, abs=1e-9 if t == 1e7 else 1e-12)
        assert torch.equal(one, ScoreMap("sparsemax", t).apply(z))


@pytest.mark.parametrize("t", TEMPERATURES)
def test_softmax(t):
    z = logits(5, 4, 7)
    assert ScoreMap("softmax", t).apply(z).numpy() == pytest.approx(torch.softmax(t * z, -1).numpy(), abs=1e-13)


@pytest.mark.parametrize("kind", ["softmax", "sparsemax"])
def test_large_temperatures_are_the_hard_vote(kind):
    z = logits(50, 10)
    assert ScoreMap(kind, 1e7).apply(z).numpy() == pytest.approx(ScoreMap("hardmax").apply(z).numpy(), abs=1e-11)


def test_hardmax_gives_ties_to_the_first():
    scores = ScoreMap("hardmax").apply(torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]]))
    assert scores.tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    assert scores.dtype == torch.float64


@pytest.mark.parametrize("kind", ["hardmax", "softmax", "sparsemax"])
@pytest.mark.parametrize("t", [1e-3, 1.0, 30.0, 1e7])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_rows_lie_on_the_simplex_and_sum_to_at_most_one_exactly(kind, t, classes):
    # the smoothing certificates need the sum of the floats, without rounding, to be at most 1
    for scale in (1e-6, 1.0, 100.0):
        scores = ScoreMap(kind, t).apply(logits(20, classes, seed=classes, scale=scale))
        assert (scores >= 0.0).all()
        for row in scores.tolist():
            total = sum(map(Fraction, row))
            assert 1 - Fraction(classes + 20, 2**51) <= total <= 1


@pytest.mark.parametrize("kind", ["hardmax", "softmax", "sparsemax"])
def test_extreme_logits_stay_finite(kind):
    z = torch.tensor([[1e308, -1e308, 0.0], [-1e308, -1e308, -1e308], [1e30, 1e30, -1e30]], dtype=torch.float64)
    scores = ScoreMap(kind, 1e7).apply(z)
    assert torch.isfinite(scores).all()
    assert scores[0].tolist() == pytest.approx([1.0, 0.0, 0.0])
    assert scores.sum(-1).tolist() == pytest.approx([1.0, 1.0, 1.0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_logits_are_mapped_in_float64(dtype):
    z = logits(4, 6).to(dtype)
    scores = ScoreMap("softmax", 2.0).apply(z)
    assert torch.equal(scores, ScoreMap("softmax", 2.0).apply(z.double()))


def jacobian(score_map, z, step=1e-6):
    """Rows: classes; by central differences."""
    shifts = step * torch.eye(len(z), dtype=torch.float64)
    up, down = score_map.apply(z + shifts), score_map.apply(z - shifts)
    return ((up - down) / (2 * step)).T.numpy()


@pytest.mark.parametrize("kind", ["softmax", "sparsemax"])
@pytest.mark.parametrize(("t", "classes"), [(1.0, 2), (1.0, 10), (2.5, 4), (0.3, 3)])
def test_lipschitz_factor_bounds_every_class_gradient(kind, t, classes):
    score_map = ScoreMap(kind, t)
    factor = score_map.lipschitz_factor(classes)
    largest = max(
        np.linalg.norm(jacobian(score_map, row), axis=1).max() for row in logits(200, classes, seed=3, scale=1.0 / t)
    )
    # two equal logits far above the rest are the softmax's worst case, all equal ones the sparsemax's
    at_worst = torch.full((classes,), -40.0 / t, dtype=torch.float64)
    at_worst[:2] = 0.0
    if kind == "sparsemax":
        at_worst[:] = 0.0
    attained = np.linalg.norm(jacobian(score_map, at_worst), axis=1).max()
    assert max(largest, attained) <= factor * (1 + 1e-6)
    assert attained == pytest.approx(factor, rel=1e-5)


def test_lipschitz_factors_of_the_literature():
    assert ScoreMap("softmax", 2.0).lipschitz_factor(10) == pytest.approx(2 * 0.353553, abs=1e-5)
    assert ScoreMap("sparsemax", 2.0).lipschitz_factor(4) == pytest.approx(2 * math.sqrt(0.75), rel=1e-12)
    assert ScoreMap("softmax").lipschitz_factor(10) > math.sqrt(2) / 4
    assert ScoreMap("hardmax").lipschitz_factor(10) == math.inf


@pytest.mark.parametrize(
    "score_map", [ScoreMap(), ScoreMap("softmax", 2.5), ScoreMap("sparsemax", 0.1), ScoreMap("softmax", 1e7)]
)
def test_text_and_back(score_map):
    assert ScoreMap.parse(str(score_map)) == score_map


def test_texts():
    assert str(ScoreMap("softmax", 2.5)) == "softmax(t=2.5)"
    assert str(ScoreMap("hardmax")) == "hardmax"
    assert ScoreMap("hardmax").is_hard
    assert not ScoreMap("softmax").is_hard


@pytest.mark.parametrize(
    "text", ["", "softmax", "hardmax(t=1.0)", "softmax(t=1", "softmax(t=a)", "relu(t=1.0)", "softmax(t=0)"]
)
def test_texts_that_are_no_map(text):
    with pytest.raises(ValueError, match=r"no score map|inverse_temperature|could not convert"):
        ScoreMap.parse(text)


@pytest.mark.parametrize("t", [0.0, -1.0, math.nan, math.inf, 1e-40])
def test_bad_temperatures(t):
    with pytest.raises(ValueError, match="`inverse_temperature`"):
        ScoreMap("softmax", t)
    with pytest.raises(ValueError, match="`inverse_temperature`"):
        sparsemax_scores(torch.zeros(2), (1.0, t))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["hardmax", "softmax", "sparsemax"])
def test_logits_must_be_finite(kind, value):
    with pytest.raises(ValueError, match="`logits` has NaN or infinite"):
        ScoreMap(kind).apply(torch.tensor([0.0, value]))


def test_bad_kind_and_shape():
    with pytest.raises(ValueError, match="`kind`"):
        ScoreMap("relu")
    with pytest.raises(ValueError, match="`logits` must have shape"):
        ScoreMap("softmax").apply(torch.tensor(1.0))
    with pytest.raises(ValueError, match="`num_classes`"):
        ScoreMap("softmax").lipschitz_factor(1)
