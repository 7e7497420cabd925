# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_lip.training import step_noise
from hf_lip.training.arguments import NoiseArguments, TrainingArguments
from hf_lip.training.objective import Objective


IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 1])


class Classifier(nn.Module):
    """Remembers what it was given."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(192, 3)
        self.seen = []

    def forward(self, pixel_values):
        self.seen.append(pixel_values.detach())
        return SimpleNamespace(logits=self.linear(pixel_values.flatten(1)))


def make(transform=lambda pixels: pixels, penalty=None, certified=False, **options):
    noise_names = set(vars(NoiseArguments()))
    args = TrainingArguments(**{name: value for name, value in options.items() if name not in noise_names})
    args.resolve(certified=certified)
    noise = NoiseArguments(**{name: value for name, value in options.items() if name in noise_names})
    model = Classifier()
    return model, Objective(model, model, transform, args, noise, penalty=penalty)


def drawn(sd, copies=1, step=5):
    return step_noise(IMAGES, sd=sd, copies=copies, seed=0, step=step)


def test_plain_training_is_cross_entropy_of_the_pixels():
    model, objective = make()
    loss = objective(IMAGES, LABELS, step=5, progress=0.5)
    assert torch.equal(model.seen[0], IMAGES)
    torch.testing.assert_close(loss, F.cross_entropy(model.linear(IMAGES.flatten(1)), LABELS))


def test_noise_comes_before_what_the_processor_does():
    model, objective = make(transform=lambda pixels: (pixels - 0.5) / 0.25, noise_sd=0.3)
    objective(IMAGES, LABELS, step=5, progress=0.5)
    torch.testing.assert_close(model.seen[0], (IMAGES + drawn(0.3) - 0.5) / 0.25)


def test_noisy_copies_are_stacked_with_their_labels():
    model, objective = make(noise_sd=0.3, noise_copies=3)
    loss = objective(IMAGES, LABELS, step=5, progress=0.5)
    noisy = IMAGES.repeat(3, 1, 1, 1) + drawn(0.3, 3)
    torch.testing.assert_close(model.seen[0], noisy)
    torch.testing.assert_close(loss, F.cross_entropy(model.linear(noisy.flatten(1)), LABELS.repeat(3)))


def test_consistency_is_added_to_the_classification_loss():
    plain = make(noise_sd=0.3, noise_copies=2)[1](IMAGES, LABELS, step=5, progress=0.5)
    options = {"noise_sd": 0.3, "noise_method": "consistency"}
    none = make(**options, consistency_weight=0.0, entropy_weight=0.0)[1](IMAGES, LABELS, step=5, progress=0.5)
    some = make(**options)[1](IMAGES, LABELS, step=5, progress=0.5)
    torch.testing.assert_close(none, plain)
    assert some > plain + 0.1


def test_smoothadv_trains_on_attacked_images_with_the_same_noise():
    options = {"noise_sd": 0.3, "noise_method": "smoothadv", "attack_epsilon": 0.5, "noise_copies": 2}
    model, objective = make(**options, attack_steps=2, attack_warmup=0.5)
    distances = []
    for progress in (0.0, 0.25, 0.9):
        model.seen.clear()
        loss = objective(IMAGES, LABELS, step=5, progress=progress)
        shift = (model.seen[-1] - drawn(0.3, 2)).view(2, 4, 3, 8, 8) - IMAGES
        torch.testing.assert_close(shift[0], shift[1], rtol=0, atol=1e-6)
        distances.append(shift[0].flatten(1).norm(dim=1).max().item())
    # the radius grows from 0 over the first half of training
    assert distances == [pytest.approx(0.0, abs=1e-5), pytest.approx(0.25, rel=0.2), pytest.approx(0.5, rel=0.2)]
    assert loss > make(noise_sd=0.3, noise_copies=2)[1](IMAGES, LABELS, step=5, progress=0.9)
    loss.backward()
    assert model.linear.weight.grad.abs().sum() > 0


def test_the_penalty_is_added_with_its_weight():
    plain = make()[1](IMAGES, LABELS, step=5, progress=0.5)
    found = make(penalty=lambda: torch.tensor(7.0), lipschitz_penalty=0.1)[1](IMAGES, LABELS, step=5, progress=0.5)
    assert found.item() == pytest.approx(plain.item() + 0.7)


def test_pixels_are_channels_last_for_ordinary_networks_only():
    for certified, expected in ((False, True), (True, False)):
        model, objective = make(certified=certified)
        objective(IMAGES, LABELS, step=0, progress=0.5)
        assert model.seen[0].is_contiguous(memory_format=torch.channels_last) == expected


def test_arguments_must_be_resolved():
    objective = Objective(Classifier(), Classifier(), lambda pixels: pixels, TrainingArguments(), NoiseArguments())
    with pytest.raises(ValueError, match="resolved"):
        objective(IMAGES, LABELS, step=0, progress=0.5)
