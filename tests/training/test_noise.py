# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_lip.training import ImageBatches, consistency_loss, noisy_pixels, smoothed_attack, step_noise


IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class TestStepNoise:
    def test_it_is_gaussian_of_the_asked_deviation_and_fresh_everywhere(self):
        images = torch.zeros(40, 3, 16, 16)
        noise = step_noise(images, sd=0.25, copies=2, seed=1, step=7)
        assert noise.shape == (80, 3, 16, 16)
        assert noise.std().item() == pytest.approx(0.25, rel=0.01)
        assert abs(noise.mean().item()) < 0.005
        # every image, copy, step and seed has its own
        flat = F.normalize(noise.flatten(1), dim=1)
        assert (flat @ flat.T - torch.eye(80)).abs().max() < 0.25
        for other in ({"seed": 2, "step": 7}, {"seed": 1, "step": 8}):
            assert not torch.isclose(step_noise(images, sd=0.25, copies=2, **other), noise).any(dim=0).all()
        assert torch.equal(step_noise(images, sd=0.25, copies=2, seed=1, step=7), noise)

    def test_processes_share_the_noise_of_one_global_batch_image_by_image(self):
        images = torch.arange(12.0).view(12, 1, 1, 1).expand(12, 1, 4, 4)
        batches = ImageBatches(images, torch.arange(12), batch_size=6)
        images, labels = batches.batch(0, 1)
        whole = step_noise(images, sd=1.0, copies=2, seed=0, step=3).view(2, 6, 1, 4, 4)
        by_label = {int(label): whole[:, row] for row, label in enumerate(labels)}
        for process in range(3):
            part, part_labels = batches.batch(0, 1, process_index=process, num_processes=3)
            noise = step_noise(part, sd=1.0, copies=2, seed=0, step=3, process_index=process, num_processes=3)
            for row, label in enumerate(part_labels):
                assert torch.equal(noise.view(2, 2, 1, 4, 4)[:, row], by_label[int(label)])

    def test_evaluation_noise_belongs_to_the_image(self):
        index = torch.tensor([5, 2, 9, 0, 1, 3])
        noise = noisy_pixels(IMAGES, index, sd=0.5, seed=3) - IMAGES
        alone = noisy_pixels(IMAGES[2:3], index[2:3], sd=0.5, seed=3) - IMAGES[2:3]
        assert torch.equal(alone[0], noise[2])
        assert noise.std().item() == pytest.approx(0.5, rel=0.05)
        assert not torch.equal(noisy_pixels(IMAGES, index, sd=0.5, seed=4) - IMAGES, noise)


class TestConsistency:
    def test_it_is_the_formula_of_the_paper(self):
        logits = torch.randn(3 * 5, 4, requires_grad=True)
        copies = logits.view(3, 5, 4).softmax(-1)
        mean = copies.mean(0)
        divergence = sum((mean * (mean / copy).log()).sum(-1) for copy in copies) / 3
        entropy = -(mean * mean.log()).sum(-1)
        expected = (10.0 * divergence + 0.5 * entropy).mean()
        found = consistency_loss(logits, 3, weight=10.0, entropy_weight=0.5)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (found, expected)))

    def test_equal_and_certain_predictions_cost_nothing(self):
        logits = torch.tensor([[80.0, 0.0], [0.0, 80.0]]).repeat(2, 1)
        assert consistency_loss(logits, 2, weight=10.0, entropy_weight=0.5).item() == pytest.approx(0.0, abs=1e-6)
        uncertain = consistency_loss(torch.zeros(4, 2), 2, weight=10.0, entropy_weight=0.5)
        assert uncertain.item() == pytest.approx(0.5 * math.log(2))

    @pytest.mark.parametrize(("shape", "copies"), [((6, 3), 1), ((5, 3), 2), ((6,), 2)])
    def test_shapes_that_are_no_copies(self, shape, copies):
        with pytest.raises(ValueError, match="copies"):
            consistency_loss(torch.zeros(shape), copies, weight=1.0, entropy_weight=1.0)


class TestSmoothedAttack:
    def make(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        return model.append(nn.Dropout(0.5)).append(nn.Linear(512, 4)).train()

    def attack(self, model, epsilon=0.5, steps=3, copies=2):
        labels = torch.arange(6) % 4
        noise = 0.1 * torch.randn(6 * copies, 3, 8, 8, generator=torch.Generator().manual_seed(2))
        attacked = smoothed_attack(model, model, IMAGES, labels, noise, epsilon=epsilon, steps=steps)

        def loss(images):
            """-log of the smoothed probability of the label."""
            model.eval()
            with torch.no_grad():
                p = model(images.repeat(copies, 1, 1, 1) + noise).softmax(-1).view(copies, 6, 4).mean(0)
            model.train()
            return -p[torch.arange(6), labels].log().mean().item()

        return attacked, loss

    def test_it_raises_the_loss_of_the_smoothed_network_inside_the_ball(self):
        model = self.make()
        attacked, loss = self.attack(model)
        distance = (attacked - IMAGES).flatten(1).norm(dim=1)
        assert distance.max().item() <= 0.5 * (1 + 1e-5)
        assert distance.min().item() > 0.3
        assert 0.0 <= attacked.min().item() <= attacked.max().item() <= 1.0
        direction = torch.randn_like(IMAGES)
        random = IMAGES + 0.5 * direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        assert loss(attacked) > loss(IMAGES) + 5 * abs(loss(random) - loss(IMAGES))
        # further away is worse
        assert loss(self.attack(model, epsilon=1.0)[0]) > loss(attacked)

    def test_the_model_is_as_it_was(self):
        model = self.make()
        model[0].bias.requires_grad_(False)
        model[1].eval()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        modes, flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
        self.attack(model)
        assert modes == [m.training for m in model.modules()]
        assert flags == [p.requires_grad for p in model.parameters()]
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    def test_radius_zero_is_no_attack(self):
        attacked, _ = self.attack(self.make(), epsilon=0.0)
        assert torch.equal(attacked, IMAGES)
