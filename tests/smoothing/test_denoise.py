# SPDX-License-Identifier: Apache-2.0
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_lip.data import dataset_to_tensors, load_image_dataset
from hf_lip.smoothing import GaussianNoise, Sampler, SmoothingSettings, certify_images, noisy_copies
from hf_lip.smoothing.denoise import DiffusionDenoiser, noise_timestep


SIGMA = 0.5


def linear_schedule(steps=1000):
    return torch.cumprod(1.0 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64), dim=0)


def cosine_schedule(steps=4000):
    """Nichol and Dhariwal 2021, as in their released code."""

    def level(step):
        return math.cos((step / steps + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1.0 - level(step + 1) / level(step), 0.999) for step in range(steps)]
    return torch.cumprod(1.0 - torch.tensor(betas, dtype=torch.float64), dim=0)


# the rule, lvm-rs.md 2.9


@pytest.mark.parametrize(("sigma", "cosine", "linear"), [(0.25, 1158, 145), (0.5, 1984, 259), (1.0, 2809, 396)])
def test_timesteps_of_the_published_schedules(sigma, cosine, linear):
    assert noise_timestep(cosine_schedule(), sigma) == cosine
    assert noise_timestep(linear_schedule(), sigma) == linear
    for schedule in (cosine_schedule(), linear_schedule()):
        step = noise_timestep(schedule, sigma)
        noise = torch.sqrt((1 - schedule) / schedule)
        assert noise[step - 1] < 2 * sigma <= noise[step]
        assert 0.0 <= DiffusionDenoiser(lambda x, t: x, schedule, sigma).excess_noise <= 0.0064


def test_a_perfect_model_gives_back_the_image():
    schedule = linear_schedule()
    image = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    seen = {}

    def epsilon(x, t):
        seen["t"], seen["x"] = t.tolist(), x
        return 2.0 * SIGMA * noise * denoiser.signal / denoiser.noise

    denoiser = DiffusionDenoiser(epsilon, schedule, SIGMA)
    assert torch.allclose(denoiser(image + SIGMA * noise), image, atol=1e-6)
    assert seen["t"] == [259] * 4
    abar = schedule[259].item()
    assert torch.allclose(seen["x"], math.sqrt(abar) * (2 * (image + SIGMA * noise) - 1), atol=1e-6)
    # the same prediction said in other words
    clean = DiffusionDenoiser(lambda x, t: 2.0 * image - 1.0, schedule, SIGMA, "sample")
    assert torch.allclose(clean(image + SIGMA * noise), image, atol=1e-6)

    def velocity(x, t):
        return math.sqrt(abar) * noise - math.sqrt(1 - abar) * (2.0 * image - 1.0)

    # here the model's own noise level counts: slightly more than sigma
    exact = 0.5 * math.sqrt((1 - abar) / abar)
    clean = DiffusionDenoiser(velocity, schedule, SIGMA, "v_prediction")
    assert torch.allclose(clean(image + exact * noise), image, atol=1e-5)


def test_outputs_of_diffusers_and_learned_variances():
    schedule, noisy = linear_schedule(), torch.rand(2, 3, 4, 4)
    plain = DiffusionDenoiser(lambda x, t: 0.1 * x, schedule, SIGMA)(noisy)
    wrapped = DiffusionDenoiser(lambda x, t: SimpleNamespace(sample=0.1 * x), schedule, SIGMA)(noisy)
    doubled = DiffusionDenoiser(lambda x, t: torch.cat([0.1 * x, x], dim=1), schedule, SIGMA)(noisy)
    assert torch.equal(plain, wrapped)
    assert torch.equal(plain, doubled)
    assert plain.min() >= 0.0
    assert plain.max() <= 1.0


@pytest.mark.parametrize(
    ("schedule", "sigma", "prediction", "message"),
    [
        (linear_schedule(), 0.0, "epsilon", "`sigma`"),
        (linear_schedule(), 100.0, "epsilon", "more noise than the diffusion model has seen, at most"),
        (torch.tensor([]), 0.5, "epsilon", "`alphas_cumprod`"),
        (torch.tensor([0.5, 0.9]), 0.5, "epsilon", "`alphas_cumprod`"),
        (torch.tensor([0.5, 0.0]), 0.5, "epsilon", "`alphas_cumprod`"),
        (linear_schedule(), 0.5, "score", "`prediction`"),
    ],
)
def test_bad_arguments(schedule, sigma, prediction, message):
    with pytest.raises(ValueError, match=message):
        DiffusionDenoiser(lambda x, t: x, schedule, sigma, prediction)


# a small one, trained here


class NoisePredictor(nn.Module):
    """Predicts the noise in scaled 8x8 images, for one timestep."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64)
        )

    def forward(self, noisy, timestep):
        return self.layers(noisy).view_as(noisy)


def fit(module, batches, loss_of, steps):
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(*next(batches)).backward()
        optimizer.step()
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def digits():
    return {
        split: dataset_to_tensors(load_image_dataset("digits", split), image_size=8, num_channels=1, progress=False)
        for split in ("train", "test")
    }


@pytest.fixture(scope="module")
def networks(digits):
    """A classifier that never saw noise, and a denoiser."""
    torch.manual_seed(0)
    images, labels = digits["train"]

    def batches():
        while True:
            rows = torch.randint(len(images), (128,))
            yield images[rows], labels[rows]

    classifier = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    fit(classifier, batches(), lambda x, y: nn.functional.cross_entropy(classifier(x), y), 300)
    predictor = NoisePredictor()
    denoiser = DiffusionDenoiser(predictor, linear_schedule(), SIGMA)

    def loss(x, y):
        noise = torch.randn_like(x)
        scaled = denoiser.signal * (2 * x - 1) + denoiser.noise * noise
        return nn.functional.mse_loss(predictor(scaled, None), noise)

    fit(predictor, batches(), loss, 800)
    return classifier, denoiser.eval()


def test_it_removes_noise(digits, networks):
    image = digits["test"][0][0]
    noisy = noisy_copies(image, sigma=SIGMA, seed=0, index=0, first_draw=0, num_draws=200)
    before, after = (noisy - image).square().mean(), (networks[1](noisy) - image).square().mean()
    assert before == pytest.approx(SIGMA**2, rel=0.05)
    assert after < 0.5 * before


def test_denoised_smoothing_certifies_a_classifier_that_never_saw_noise(digits, networks):
    classifier, denoiser = networks
    images, labels = digits["test"]
    settings = SmoothingSettings(method="mono", sigma=SIGMA, n0=20, n=300, alpha=0.01)
    accuracy = {}
    for name, base in (("plain", classifier), ("denoised", nn.Sequential(denoiser, classifier))):
        with Sampler(base, GaussianNoise(SIGMA, 0), num_classes=10, batch_size=160) as sampler:
            results = dict(certify_images(sampler, settings, [(k, k, images[k]) for k in range(40)]))
        accuracy[name] = sum(results[k].predict == labels[k] and results[k].radius > 0.25 for k in range(40)) / 40
    assert accuracy["denoised"] > accuracy["plain"] + 0.15
    assert accuracy["denoised"] > 0.4
