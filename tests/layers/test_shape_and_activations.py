# SPDX-License-Identifier: Apache-2.0
"""Constants of the parts without weights, from their Jacobians."""

import pytest
import torch

from hf_lip.layers import (
    ChannelPadding,
    ChannelProjection,
    Flatten,
    GroupSort,
    Householder,
    InputNormalization,
    MaxMin,
    MaxPool2d,
    PixelUnshuffle,
    ReLU,
    SumPool2d,
)
from hf_lip.layers.activations import MONOTONE_ACTIVATIONS


def singular_values(module, *shape):
    x = torch.randn(*shape, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda y: module(y[None])[0], x)
    return torch.linalg.svdvals(jacobian.reshape(-1, x.numel()))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (ReLU(), (12,)),
        (MaxPool2d(2), (2, 4, 4)),
        (ChannelProjection(2), (3, 4, 4)),
        (ChannelPadding(5), (3, 4, 4)),
        (Flatten(), (2, 3, 3)),
        (SumPool2d(2), (2, 4, 4)),
        (PixelUnshuffle(2), (2, 4, 4)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else None,
)
def test_norm_is_exactly_one(module, shape):
    assert singular_values(module, *shape).max().item() == pytest.approx(1.0, abs=1e-12)
    assert module.lipschitz_bound() == 1.0


@pytest.mark.parametrize("channels", [6, 7])
@pytest.mark.parametrize("kind", [MaxMin, lambda: Householder(6)], ids=["maxmin", "householder"])
def test_gradient_norm_preserving(kind, channels):
    if channels == 7 and kind is not MaxMin:
        kind = lambda: Householder(7)  # noqa: E731
    module = kind()
    if isinstance(module, Householder):
        torch.nn.init.uniform_(module.theta, -3, 3)
    values = singular_values(module, channels, 3, 3)
    torch.testing.assert_close(values, torch.ones_like(values))


def test_maxmin_by_hand_and_as_householder():
    x = torch.tensor([[1.0, 5.0, 3.0, 2.0, 9.0]])
    expected = torch.tensor([[3.0, 5.0, 1.0, 2.0, 9.0]])
    assert torch.equal(MaxMin()(x), expected)
    torch.testing.assert_close(Householder(5)(x), expected[:, [2, 3, 0, 1, 4]])


def test_householder_is_continuous_at_the_mirror():
    module = Householder(2)
    torch.nn.init.constant_(module.theta, 0.7)
    direction = torch.tensor([[torch.cos(torch.tensor(0.35)), torch.sin(torch.tensor(0.35))]])
    normal = torch.tensor([[direction[0, 1], -direction[0, 0]]])
    gap = module(direction + 1e-4 * normal) - module(direction - 1e-4 * normal)
    assert gap.norm() < 1e-3


def test_group_sort():
    x = torch.tensor([[3.0, 1.0, 2.0, 9.0, 7.0, 8.0]])
    assert torch.equal(GroupSort(3)(x), torch.tensor([[1.0, 2.0, 3.0, 7.0, 8.0, 9.0]]))
    values = singular_values(GroupSort(3), 6, 2, 2)
    torch.testing.assert_close(values, torch.ones_like(values))
    with pytest.raises(ValueError, match="group_size"):
        GroupSort(4)(x)


def test_normalisation_counts():
    module = InputNormalization([0.5, 0.4, 0.3], [0.2, 0.25, 0.5])
    assert module.lipschitz_bound() == pytest.approx(5.0)
    assert singular_values(module, 3, 2, 2).max().item() <= module.lipschitz_bound()
    assert InputNormalization([0.1], [1.0]).lipschitz_bound() == 1.0
    norm, error = module.input_bounds(4)
    corner = torch.ones(1, 3, 2, 2, dtype=torch.float64)
    assert module(corner).norm().item() <= norm
    assert 0 < error < 1e-12
    with pytest.raises(ValueError, match="std"):
        InputNormalization([0.0], [0.0])


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="kernel_size"):
        SumPool2d(3)(torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="num_channels"):
        ChannelPadding(2)(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="num_channels"):
        ChannelProjection(4)(torch.zeros(1, 3))


@pytest.mark.parametrize("name", MONOTONE_ACTIVATIONS)
def test_slopes_lie_between_zero_and_one(name):
    x = torch.cat([torch.linspace(-60, 60, 20001), 20 + torch.linspace(-1e-8, 1e-8, 2001)]).double().sort().values
    rise, run = MONOTONE_ACTIVATIONS[name](x).diff(), x.diff()
    rounding = 1e-14
    assert (rise >= -rounding).all()
    assert (rise <= run + rounding).all()
