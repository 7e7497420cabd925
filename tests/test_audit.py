# SPDX-License-Identifier: Apache-2.0
"""The attack itself: it finds what is there to find, and nothing inside the exact distance."""

import pytest
import torch

from hf_lip.audit import l2_pgd


def linear(pixels: torch.Tensor) -> torch.Tensor:
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-3.0, 1.0]], dtype=pixels.dtype)
    return pixels.flatten(1) @ weight.T - torch.tensor([1.0, 0.0, 5.0], dtype=pixels.dtype)


def test_finds_the_boundary_of_a_linear_classifier():
    # f_0 - f_1 = 3 x + 4 y - 1 at (1, 1/2): margin 4, distance 4 / 5
    images = torch.tensor([1.0, 0.5], dtype=torch.float64).view(1, 1, 1, 2).repeat(2, 1, 1, 1)
    labels = torch.zeros(2, dtype=torch.long)
    found = l2_pgd(linear, images, labels, torch.tensor([0.799, 0.801], dtype=torch.float64), num_steps=60)
    assert found.tolist() == [False, True]


def test_clipping_keeps_pixels_in_range():
    images = torch.tensor([1.0, 0.0], dtype=torch.float64).view(1, 1, 1, 2)
    labels = torch.zeros(1, dtype=torch.long)
    # the nearest boundary point of 3 x + 4 y = 1 lies at y < 0; along y = 0 it is 2/3 away
    radius = torch.tensor([0.5], dtype=torch.float64)
    assert l2_pgd(linear, images, labels, radius, num_steps=60).item()
    assert not l2_pgd(linear, images, labels, radius, num_steps=60, clip=True).item()


def test_bad_arguments_are_named():
    images, labels = torch.rand(2, 1, 1, 2), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="must agree"):
        l2_pgd(linear, images, labels, torch.ones(3))
    with pytest.raises(ValueError, match="radii"):
        l2_pgd(linear, images, labels, torch.tensor([1.0, -1.0]))
