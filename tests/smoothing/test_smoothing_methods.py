# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_lip.ops.simplex import ScoreMap
from hf_lip.smoothing import (
    ABSTAIN,
    GaussianNoise,
    GridNoise,
    Sampler,
    SmoothingSettings,
    certify_image,
    certify_images,
    gaussian_noise,
    predict_images,
)
from hf_lip.smoothing.adaptive import AdaptiveRule, Stop
from hf_lip.smoothing.betting import certify_betting
from hf_lip.smoothing.lipschitz_radii import lipschitz_two_class_radius
from hf_lip.smoothing.predict import predict_counts
from hf_lip.smoothing.procedures import certify_counts


IMAGE = torch.tensor([1.0, 0.5])
WEIGHT = torch.tensor([3.0, 4.0])


def linear(noisy):
    """w = (3, 4), b = -1: the margin at `IMAGE` is 4, its distance to the boundary 0.8."""
    score = noisy @ WEIGHT - 1.0
    return torch.stack([score, -score], dim=1)


# the other procedures: the right samples reach them


def three(noisy):
    """Three classes with probabilities about 0.75, 0.2 and 0.05 at `IMAGE`, sigma = 2."""
    x = noisy @ torch.tensor([0.6, 0.8])
    return torch.stack([x, -0.4 - x, 3.0 * (x - 4.2)], dim=1)


def votes_of(base, n, phase, index=0, sigma=2.0):
    noise = gaussian_noise((2,), seed=0, index=index, first_draw=0, num_draws=n, phase=phase)
    noisy = torch.from_numpy((IMAGE.double().numpy() + sigma * noise).astype(np.float32))
    return base(noisy)


THREE = {"sigma": 2.0, "n0": 50, "n": 3000}


@pytest.mark.parametrize("method", ["mono", "bonferroni", "cpm", "auto"])
@pytest.mark.parametrize("randomized", [False, True])
def test_procedures_of_votes(method, randomized):
    settings = SmoothingSettings(method=method, randomized=randomized, **THREE)
    result = certify_image(three, IMAGE, settings, num_classes=3, index=4)
    counts = [
        votes_of(three, n, phase, 4).argmax(1).bincount(minlength=3).numpy() for n, phase in ((50, 0), (3000, 1))
    ]
    seed = (0, 4) if randomized else None
    expected = certify_counts(method, *counts, sigma=2.0, alpha=0.001, randomized_seed=seed)
    for name in ("predict", "radius", "p_lower", "p_upper_other", "candidate", "method", "details"):
        assert getattr(result, name) == getattr(expected, name)
    assert result.radius > 0.0
    assert result.score == counts[1][0] / 3000
    assert (result.selection_counts, result.counts, result.n) == (tuple(counts[0]), tuple(counts[1]), 3000)


def test_soft_scores_and_the_margin_of_a_lipschitz_bound():
    score_map = ScoreMap("softmax", 2.0)
    settings = SmoothingSettings(method="lvm", score_map=score_map, **THREE)
    result = certify_image(three, IMAGE, settings, num_classes=3)
    scores = score_map.apply(votes_of(three, 3000, 1)).numpy()
    assert result.score == pytest.approx(scores.mean(axis=0)[0])
    assert result.p_lower < scores.mean(axis=0)[0] < result.p_lower + 0.06
    assert (result.method, result.counts, result.selection_counts, result.n) == ("lvm", None, None, 3000)
    assert result.radius > 0.0
    aware = certify_image(
        three, IMAGE, SmoothingSettings(method="lvm", score_map=score_map, lipschitz=0.5, **THREE), num_classes=3
    )
    assert aware.p_lower == result.p_lower
    assert aware.radius > result.radius
    careful = certify_image(
        three,
        IMAGE,
        SmoothingSettings(method="lvm", score_map=score_map, lipschitz=0.5, score_error=0.01, **THREE),
        num_classes=3,
    )
    assert careful.p_lower == pytest.approx(aware.p_lower - 0.01)
    assert careful.p_upper_other == pytest.approx(aware.p_upper_other + 0.01)
    assert careful.radius == lipschitz_two_class_radius(careful.p_lower, careful.p_upper_other, 2.0, 0.5)
    # an error as large as the margin leaves no certificate
    hopeless = certify_image(
        three,
        IMAGE,
        SmoothingSettings(method="lvm", score_map=score_map, lipschitz=0.5, score_error=0.5, **THREE),
        num_classes=3,
    )
    assert (hopeless.predict, hopeless.radius) == (ABSTAIN, 0.0)


@pytest.mark.parametrize("batch_size", [7, 64, 5000])
@pytest.mark.parametrize("options", [{}, {"target_radius": 0.3}, {"rtol": 0.2}])
def test_adaptive_sampling_takes_the_looks_of_its_rule(batch_size, options):
    settings = SmoothingSettings(method="cpm", budget="adaptive", **THREE, **options)
    result = certify_image(three, IMAGE, settings, num_classes=3, batch_size=batch_size)
    selection = votes_of(three, 50, 0).argmax(1).bincount(minlength=3).numpy()
    votes = votes_of(three, 3000, 1).argmax(1)
    rule = AdaptiveRule(selection, n=3000, sigma=2.0, alpha=0.001, method="cpm", **options)
    look = rule.first_look
    while not isinstance(outcome := rule.update(votes[:look].bincount(minlength=3).numpy()), Stop):
        look = outcome.next_look
    assert result.n == look <= 3000
    assert result.counts == tuple(votes[:look].bincount(minlength=3).tolist())
    assert (result.radius, result.p_lower) == (outcome.decision.radius, outcome.decision.p_lower)
    assert result.details["stopped"] == outcome.reason


def test_adaptive_sampling_draws_no_further_than_the_batch_of_its_last_look():
    drawn = []
    settings = SmoothingSettings(method="mono", budget="adaptive", sigma=1.0, n0=20, n=20_000, rtol=0.1)
    result = certify_image(linear, IMAGE, settings, num_classes=2, batch_size=100, progress=drawn.append)
    assert result.predict == 0
    assert result.n <= sum(drawn) - 20 < result.n + 100
    assert result.n < 20_000


def group_results(images, settings, batch_size=64, noise=None):
    noise = GaussianNoise(settings.sigma, settings.seed) if noise is None else noise
    with Sampler(three, noise, num_classes=3, batch_size=batch_size) as sampler:
        return dict(certify_images(sampler, settings, images))


@pytest.mark.parametrize("batch_size", [7, 64])
def test_betting_takes_the_scores_in_their_order(batch_size):
    score_map = ScoreMap("softmax", 2.0)
    settings = SmoothingSettings(method="betting", score_map=score_map, **THREE)
    result = certify_image(three, IMAGE, settings, num_classes=3, index=4, batch_size=batch_size)
    selection, scores = [score_map.apply(votes_of(three, n, phase, 4)).numpy() for n, phase in ((50, 0), (3000, 1))]
    expected = certify_betting(selection, scores, sigma=2.0, alpha=0.001)
    # the scores of a batch may be rounded otherwise than those of all samples at once
    assert result.predict == expected.predict
    assert (result.radius, result.p_lower) == pytest.approx((expected.radius, expected.p_lower), rel=1e-6)
    backwards = certify_betting(selection, scores[::-1], sigma=2.0, alpha=0.001)
    assert result.p_lower != pytest.approx(backwards.p_lower, rel=1e-6)
    assert result.radius > 0.0
    assert result.score == pytest.approx(scores[:, 0].mean())
    lvm = certify_image(three, IMAGE, replace(settings, method="lvm"), num_classes=3, index=4, batch_size=batch_size)
    assert result.radius > lvm.radius
    aware = certify_image(
        three, IMAGE, replace(settings, lipschitz=0.5, score_error=0.01), num_classes=3, batch_size=batch_size
    )
    assert aware.radius == lipschitz_two_class_radius(aware.p_lower, aware.p_upper_other, 2.0, 0.5)


@pytest.mark.parametrize("method", ["mono", "lvm", "betting"])
def test_images_of_a_group_share_batches_but_not_results(method):
    score_map = ScoreMap() if method == "mono" else ScoreMap("softmax", 1.0)
    settings = SmoothingSettings(method=method, score_map=score_map, sigma=2.0, n0=10, n=200)
    images = [(place, 3 * place, IMAGE + place) for place in range(6)]
    together = group_results(images, settings)
    assert list(together) == [0, 3, 6, 9, 12, 15]
    for image in images:
        assert group_results([image], settings) == {image[1]: together[image[1]]}
    assert group_results(images[1::2], settings) == {index: together[index] for index in (3, 9, 15)}
    batches = []

    def spy(noisy):
        batches.append(len(noisy))
        return three(noisy)

    with Sampler(spy, GaussianNoise(2.0, 0), num_classes=3, batch_size=64) as sampler:
        list(certify_images(sampler, settings, images))
    # one batch of selection samples for all six, then four an image
    assert batches == [64] * (1 + 6 * 4)


def test_images_of_different_shapes_in_a_group():
    def base(noisy):
        return torch.stack([noisy.flatten(1).sum(1), torch.ones(len(noisy)), torch.zeros(len(noisy))], dim=1)

    settings = SmoothingSettings(method="mono", sigma=0.5, n0=10, n=100)
    images = [(place, place, torch.full(shape, 0.3)) for place, shape in enumerate([(4,), (2, 3), (4,), (2, 3)])]
    with Sampler(base, GaussianNoise(0.5, 0), num_classes=3, batch_size=32) as sampler:
        together = dict(certify_images(sampler, settings, images))
        for image in images:
            assert dict(certify_images(sampler, settings, [image])) == {image[1]: together[image[1]]}
    assert list(together) == [0, 1, 2, 3]


def test_sound_noise_in_a_certificate():
    settings = SmoothingSettings(method="mono", sigma=0.5, n0=10, n=500)
    image = torch.tensor([1.0, 128 / 255])
    result = group_results([(0, 5, image)], settings, noise=GridNoise(0.5, 0))[5]
    rows = np.empty((500, 2), dtype=np.float32)
    noise = GridNoise(0.5, 0)
    noise.fill(rows, noise.prepare(image), index=5, first_draw=0, phase=1)
    assert result.counts == tuple(three(torch.from_numpy(rows)).argmax(1).bincount(minlength=3).tolist())
    with pytest.raises(ValueError, match="certify without `sound_noise`"):
        group_results([(0, 5, IMAGE * 0.123)], settings, noise=GridNoise(0.5, 0))


# PREDICT


def test_predictions_of_votes_and_of_scores():
    settings = SmoothingSettings(method="mono", sigma=2.0, n=300)
    with Sampler(three, GaussianNoise(2.0, 0), num_classes=3, batch_size=64) as sampler:
        ((index, result),) = predict_images(sampler, settings, [(0, 7, IMAGE)])
        counts = votes_of(three, 300, 1, 7).argmax(1).bincount(minlength=3).numpy()
        assert (index, result.counts) == (7, tuple(counts))
        assert result.predict == predict_counts(counts, 0.001) == 0
        assert (result.radius, result.p_lower, result.candidate, result.method) == (None, None, None, "predict")
        soft = SmoothingSettings(method="lvm", score_map=ScoreMap("softmax", 1.0), sigma=2.0, n=2000)
        ((_, result),) = predict_images(sampler, soft, [(0, 7, IMAGE)])
        assert (result.predict, result.counts) == (0, None)
        few = SmoothingSettings(method="lvm", score_map=ScoreMap("softmax", 1.0), sigma=2.0, n=10)
        ((_, result),) = predict_images(sampler, few, [(0, 7, IMAGE)])
        assert result.abstained


# settings


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "magic"}, ValueError, "`method` must be one of mono, bonferroni"),
        ({"budget": "endless"}, ValueError, "`budget` must be 'fixed' or 'adaptive'"),
        ({"method": "lvm"}, ValueError, "'lvm' needs a soft `score_map`"),
        ({"score_map": ScoreMap("softmax", 1.0)}, ValueError, "needs method lvm or betting, not 'mono'"),
        (
            {"method": "lvm", "score_map": ScoreMap("softmax", 1.0), "budget": "adaptive"},
            ValueError,
            "'adaptive' is for votes",
        ),
        ({"rtol": 0.0}, ValueError, "`rtol`"),
        ({"rtol": 1.0}, ValueError, "`rtol`"),
        ({"target_radius": 0.5}, ValueError, "`target_radius` needs `budget`='adaptive'"),
        ({"budget": "adaptive", "target_radius": -1.0}, ValueError, "`target_radius`"),
        ({"budget": "adaptive", "randomized": True}, ValueError, "`randomized`"),
        ({"lipschitz": 1.0}, ValueError, "`lipschitz` needs soft scores"),
        ({"method": "lvm", "score_map": ScoreMap("softmax", 1.0), "lipschitz": 0.0}, ValueError, "`lipschitz`"),
        ({"score_error": -1.0}, ValueError, "`score_error`"),
        ({"n0": 0}, ValueError, "`n0`"),
        ({"n0": 1.5}, TypeError, "`n0`"),
        ({"seed": -1}, ValueError, "`seed`"),
    ],
)
def test_settings_that_do_not_hold(arguments, error, message):
    with pytest.raises(error, match=message):
        SmoothingSettings(**arguments)
