# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
from scipy.stats import binomtest

from hf_lip.smoothing.predict import predict_counts, predict_counts_batch, predict_moments
from hf_lip.smoothing.samples import Moments


@pytest.mark.parametrize(("alpha", "needed"), [(0.001, 11), (0.01, 8), (0.05, 6)])
def test_unanimous_votes_that_are_needed(alpha, needed):
    # lvm-rs.md 1.3
    assert predict_counts([0, needed, 0], alpha) == 1
    assert predict_counts([0, needed - 1, 0], alpha) == -1


@pytest.mark.parametrize(("n", "least"), [(100, 67), (1000, 553)])
def test_votes_that_are_needed(n, least):
    assert predict_counts([least, n - least], 0.001) == 0
    assert predict_counts([least - 1, n - least + 1], 0.001) == -1


def test_against_the_binomial_test_of_the_two_largest():
    rng = np.random.default_rng(0)
    counts = np.stack([rng.multinomial(60, p) for p in rng.dirichlet(np.full(4, 0.5), 200)])
    for alpha in (0.001, 0.05):
        predicted = predict_counts_batch(counts, alpha)
        for row, k in zip(counts, predicted):
            second, first = np.sort(row)[-2:]
            p_value = binomtest(int(first), int(first + second), 0.5).pvalue
            assert k == (int(row.argmax()) if p_value <= alpha else -1)
    assert (predicted == -1).any()
    assert (predicted >= 0).any()


def test_ties_abstain():
    assert predict_counts([50, 50, 3], 0.5) == -1
    assert predict_counts([1, 0], 0.99) == -1
    assert predict_counts([0, 7, 7], 0.999) == -1


def test_soft_scores():
    rng = np.random.default_rng(1)
    clear = Moments.from_scores(rng.dirichlet([8, 2, 2], 500))
    assert predict_moments(clear, 0.001) == 0
    assert predict_moments(Moments.from_scores(rng.dirichlet([2, 8, 2], 500)), 0.001) == 1
    assert predict_moments(Moments.from_scores(rng.dirichlet([3, 3, 2], 500)), 0.001) == -1
    assert predict_moments(Moments.from_scores(rng.dirichlet([8, 2, 2], 5)), 0.001) == -1


@pytest.mark.parametrize(
    ("counts", "alpha", "message"),
    [
        ([1.5, 2], 0.1, "whole numbers"),
        ([1, -1], 0.1, ">= 0"),
        ([5], 0.1, "at least 2 classes"),
        ([0, 0], 0.1, "without any vote"),
        ([5, 1], 0.0, "`alpha`"),
        ([5, 1], math.nan, "`alpha`"),
    ],
)
def test_bad_input(counts, alpha, message):
    with pytest.raises(ValueError, match=message):
        predict_counts(counts, alpha)


def test_one_sample_has_no_variance():
    with pytest.raises(ValueError, match="at least 2 samples"):
        predict_moments(Moments.from_scores([[0.5, 0.5]]), 0.1)
