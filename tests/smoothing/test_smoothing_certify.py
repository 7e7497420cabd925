# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch
from scipy.special import ndtr, ndtri

from hf_lip.smoothing import (
    ABSTAIN,
    SmoothingSettings,
    certify_image,
    clopper_pearson_lower,
    gaussian_noise,
    mono_radius,
    samples_needed,
)


IMAGE = torch.tensor([1.0, 0.5])
WEIGHT = torch.tensor([3.0, 4.0])
ARGUMENTS = {"sigma": 0.5, "n0": 100, "n": 1000, "alpha": 0.001, "num_classes": 2, "seed": 0}


def certify_mono(base, image, *, num_classes, index=0, batch_size=256, progress=None, **settings):
    return certify_image(
        base,
        image,
        SmoothingSettings(method="mono", **settings),
        num_classes=num_classes,
        index=index,
        batch_size=batch_size,
        progress=progress,
    )


def linear(noisy):
    """w = (3, 4), b = -1: the margin at `IMAGE` is 4, its distance to the boundary 0.8."""
    score = noisy @ WEIGHT - 1.0
    return torch.stack([score, -score], dim=1)


def band(noisy):
    """Classes x < -1, [-1, 1], > 1 on a line."""
    x = noisy[:, 0]
    return torch.stack([(x < -1).float(), (x.abs() <= 1).float(), (x > 1).float()], dim=1)


def constant(noisy):
    return torch.tensor([0.0, 1.0, 0.0]).expand(len(noisy), 3)


# exactly solvable classifiers, lvm-rs.md 6.2


@pytest.mark.parametrize("sigma", [0.25, 0.5, 1.0])
def test_linear_classifier_stays_below_its_distance(sigma):
    result = certify_mono(linear, IMAGE, **{**ARGUMENTS, "sigma": sigma, "n": 20_000}, batch_size=5000)
    assert result.predict == 0
    assert 0.7 < result.radius < 0.8
    expected = float(ndtr(0.8 / sigma))
    assert result.counts[0] / 20_000 == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 20_000))
    assert result.radius == mono_radius(clopper_pearson_lower(result.counts[0], 20_000, 0.001), sigma)


@pytest.mark.parametrize(
    ("sigma", "p", "at_expected_count", "mean"),
    [(0.25, 0.99931286, 0.773521, 0.7743), (0.5, 0.94520071, 0.789976, 0.7900), (1.0, 0.78814460, 0.786192, 0.7863)],
)
def test_linear_classifier_over_200_runs(sigma, p, at_expected_count, mean):
    n = 100_000
    assert float(ndtr(0.8 / sigma)) == pytest.approx(p, abs=5e-9)
    assert mono_radius(clopper_pearson_lower(round(n * p), n, 0.001), sigma) == pytest.approx(
        at_expected_count, abs=6e-6
    )
    counts = np.random.default_rng(0).binomial(n, p, size=200)
    radii = np.array([mono_radius(lower, sigma) for lower in clopper_pearson_lower(counts, n, 0.001)])
    assert radii.mean() == pytest.approx(mean, abs=2e-3)
    assert np.sum(radii > 0.8) <= 2


def test_band_stays_below_the_one_class_and_the_true_radius():
    result = certify_mono(
        band, torch.zeros(1), sigma=1.0, n=20_000, alpha=0.001, num_classes=3, seed=0, batch_size=5000
    )
    assert result.predict == 1
    assert 0.42 < result.radius < 0.475233 < 0.969343


def test_constant_classifier_is_never_infinite():
    result = certify_mono(
        constant, torch.zeros(1), sigma=0.5, n=100_000, alpha=0.001, num_classes=3, seed=0, batch_size=20_000
    )
    assert result.counts == (0, 100_000, 0)
    assert result.radius == pytest.approx(0.5 * 3.811457, abs=3e-7)


# statistics, lvm-rs.md 6.3


def test_tie_is_certified_at_most_alpha_of_the_time():
    alpha, runs = 0.05, 4000
    counts = np.random.default_rng(1).binomial(1000, 0.5, size=runs)
    lower = clopper_pearson_lower(counts, 1000, alpha)
    assert not np.isnan(lower).any()
    rate = np.mean(lower > 0.5)
    assert rate <= alpha + 4 * math.sqrt(alpha * (1 - alpha) / runs)
    # exact: 0.0468; a bound that never errs would be useless
    assert rate == pytest.approx(0.0468, abs=4 * math.sqrt(0.0468 * 0.9532 / runs))


def test_radius_exceeds_the_true_one_at_most_alpha_of_the_time():
    alpha, runs, sigma = 0.05, 4000, 0.5
    rng = np.random.default_rng(2)
    p = rng.uniform(0.5, 1.0, size=runs)
    lower = clopper_pearson_lower(rng.binomial(1000, p), 1000, alpha)
    radii = np.array([mono_radius(value, sigma) for value in lower])
    assert not np.isnan(radii).any()
    assert np.mean(radii > sigma * ndtri(p)) <= alpha + 4 * math.sqrt(alpha * (1 - alpha) / runs)


def test_the_procedure_errs_at_most_alpha_on_a_tie():
    # the whole procedure, selection included, on a classifier whose two classes have probability 1/2 each
    def tie(noisy):
        return torch.stack([noisy[:, 0], -noisy[:, 0]], dim=1)

    runs, alpha = 300, 0.05
    arguments = {"sigma": 1.0, "n0": 10, "n": 200, "alpha": alpha, "num_classes": 2, "seed": 7}
    false = sum(not certify_mono(tie, torch.zeros(1), **arguments, index=index).abstained for index in range(runs))
    assert false / runs <= alpha + 4 * math.sqrt(alpha * (1 - alpha) / runs)


# the procedure


def test_votes_are_those_of_the_documented_noise():
    result = certify_mono(linear, IMAGE, **ARGUMENTS, index=4, batch_size=64)
    for phase, counts, size in [(0, result.selection_counts, 100), (1, result.counts, 1000)]:
        noise = gaussian_noise((2,), seed=0, index=4, first_draw=0, num_draws=size, phase=phase)
        noisy = torch.from_numpy((IMAGE.double().numpy() + 0.5 * noise).astype(np.float32))
        assert counts == tuple(linear(noisy).argmax(dim=1).bincount(minlength=2).tolist())


@pytest.mark.parametrize("batch_size", [1, 7, 111, 999, 1000, 5000])
def test_same_counts_for_any_batch_size(batch_size):
    # 999 leaves a last batch of one copy
    arguments = {**ARGUMENTS, "sigma": 2.0}
    expected = certify_mono(linear, IMAGE, **arguments, batch_size=256)
    assert certify_mono(linear, IMAGE, **arguments, batch_size=batch_size) == expected
    assert sum(expected.counts) == 1000
    assert 0 < expected.counts[1] < 1000


def test_seed_and_index_change_the_noise():
    runs = {
        certify_mono(linear, IMAGE, **{**ARGUMENTS, "sigma": 2.0, "seed": seed}, index=index).counts
        for seed, index in [(0, 0), (0, 1), (1, 0)]
    }
    assert len(runs) == 3


def test_class_is_chosen_on_the_selection_samples_only():
    calls = []

    def switching(noisy):
        # the first batch votes for class 1, all later ones for class 0
        calls.append(len(noisy))
        return torch.eye(2)[[1 if len(calls) == 1 else 0] * len(noisy)]

    result = certify_mono(switching, IMAGE, **ARGUMENTS, batch_size=100)
    assert (result.candidate, result.predict, result.radius) == (1, ABSTAIN, 0.0)
    assert result.p_lower == 0.0
    assert (result.selection_counts, result.counts) == ((0, 100), (1000, 0))


def test_no_certificate_at_one_half():
    def alternating(noisy):
        return torch.eye(2)[torch.arange(len(noisy)) % 2]

    result = certify_mono(alternating, IMAGE, **ARGUMENTS, batch_size=100)
    assert result.abstained
    assert result.radius == 0.0


def test_progress_counts_all_copies():
    done = []
    certify_mono(linear, IMAGE, **ARGUMENTS, batch_size=300, progress=done.append)
    assert done == [100, 300, 300, 300, 100]


def test_base_classifier_receives_float32():
    def check(noisy):
        assert noisy.dtype == torch.float32
        assert noisy.shape[1:] == (2,)
        return linear(noisy)

    certify_mono(check, IMAGE.double(), **ARGUMENTS)


@pytest.mark.parametrize(
    ("alpha", "needed"), [(0.001, 10), (0.01, 7), (0.05, 5), (0.25, 3), (0.5, 2), (0.9, 1), (1e-300, 997)]
)
def test_samples_needed(alpha, needed):
    assert samples_needed(alpha) == needed
    assert alpha ** (1 / needed) > 0.5
    if needed > 1:
        assert alpha ** (1 / (needed - 1)) <= 0.5


def test_ten_samples_certify_and_nine_never_do():
    assert certify_mono(constant, torch.zeros(1), sigma=1.0, n=10, num_classes=3, seed=0).radius == pytest.approx(
        0.002976, abs=6e-7
    )
    with pytest.raises(ValueError, match=r"`n`=9 samples can never certify at alpha=0.001.*n >= 10"):
        certify_mono(constant, torch.zeros(1), sigma=1.0, n=9, num_classes=3, seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": 0.0}, "`sigma`"),
        ({"sigma": -0.1}, "`sigma`"),
        ({"sigma": math.nan}, "`sigma`"),
        ({"alpha": 0.0}, "`alpha`"),
        ({"alpha": 1.0}, "`alpha`"),
        ({"n0": 0}, "`n0`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"num_classes": 0}, "`num_classes`"),
        ({"num_classes": 3}, "returns 2 classes, `num_classes` is 3"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        certify_mono(linear, IMAGE, **{**ARGUMENTS, **change})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_image_must_be_finite(value):
    with pytest.raises(ValueError, match="`image` has NaN or infinite"):
        certify_mono(linear, torch.tensor([value, 0.0]), **ARGUMENTS)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_must_be_finite(value):
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        certify_mono(lambda noisy: torch.full((len(noisy), 2), value), IMAGE, **ARGUMENTS)


def test_logits_must_have_one_row_per_image():
    with pytest.raises(ValueError, match=r"logits \(B, num_classes\)"):
        certify_mono(lambda noisy: torch.zeros(1, 2), IMAGE, **ARGUMENTS)
