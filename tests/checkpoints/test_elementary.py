# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from torch import nn
from transformers import activations

from hf_lip.checkpoints.elementary import elementary_bound, mean_over_pixels

from .explicit_operators import explicit_norm


def test_bounds_follow_torch_pooling():
    torch.manual_seed(0)
    cases = [
        (nn.AvgPool2d(2), (2, 6, 6)),
        (nn.AvgPool2d(3, stride=2, padding=1), (2, 7, 6)),
        (nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False), (2, 7, 6)),
        (nn.AvgPool2d((3, 2), stride=1, ceil_mode=True), (1, 6, 5)),
        (nn.AvgPool1d(4, stride=3, ceil_mode=True), (2, 9)),
        (nn.AvgPool3d(2, stride=1), (1, 4, 4, 3)),
        (nn.AdaptiveAvgPool2d(1), (3, 5, 4)),
        (nn.AdaptiveAvgPool2d((None, 3)), (2, 4, 7)),
        (nn.AdaptiveAvgPool1d(4), (2, 7)),
    ]
    for layer, shape in cases:
        bound, _ = elementary_bound(layer, shape)
        norm = explicit_norm(layer, shape)
        assert norm <= bound <= norm * (1 + 1e-6), layer
    assert elementary_bound(nn.AdaptiveAvgPool2d(1), (3, 5, 4))[0] == pytest.approx(1 / math.sqrt(20))
    assert 1 / math.sqrt(20) <= mean_over_pixels(5, 4) <= 1 / math.sqrt(20) * (1 + 1e-12)
    # a divisor of one's own has no rule
    assert elementary_bound(nn.AvgPool2d(2, divisor_override=1), (1, 4, 4)) is None


@pytest.mark.parametrize(
    ("layer", "constant"),
    [
        (nn.MaxPool2d(3, stride=2, padding=1), 2.0),
        (nn.MaxPool2d(2), 1.0),
        (nn.MaxPool2d(3, stride=1), 3.0),
        (nn.MaxPool1d(5, stride=2), math.sqrt(3)),
        (nn.MaxPool2d(3, stride=2, dilation=2), 3.0),
        (nn.MaxPool2d(3, stride=3, dilation=2), 1.0),
    ],
)
def test_max_pooling_reaches_its_constant(layer, constant):
    bound, _ = elementary_bound(layer, (1, 15, 15))
    assert constant <= bound <= constant * (1 + 1e-12)
    shape = (1, 1, 15) if isinstance(layer, nn.MaxPool1d) else (1, 1, 15, 15)
    basis = torch.eye(math.prod(shape)).reshape(-1, *shape[1:])
    # one bright pixel is the maximum of every window that reads it
    stretches = layer(basis).flatten(1).norm(dim=1)
    assert float(stretches.max()) == pytest.approx(constant)


SLOPES = [
    nn.ReLU(), nn.ReLU6(), nn.Tanh(), nn.Sigmoid(), nn.Softsign(), nn.LogSigmoid(), nn.Tanhshrink(),
    nn.Softshrink(0.3), nn.Hardtanh(), nn.Hardsigmoid(), nn.Hardswish(), nn.SELU(), nn.SiLU(), nn.Mish(), nn.GELU(),
    nn.GELU("tanh"), nn.LeakyReLU(-1.3), nn.ELU(1.4), nn.CELU(0.7), nn.RReLU(1.1, 1.5), nn.PReLU(3, init=-1.2),
    activations.GELUActivation(), activations.FastGELUActivation(), activations.NewGELUActivation(),
    activations.AccurateGELUActivation(), activations.QuickGELUActivation(), activations.GELUTanh(),
    activations.ClippedGELUActivation(-2.0, 3.0), activations.SiLUActivation(), activations.MishActivation(),
    activations.LinearActivation(),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("layer", SLOPES, ids=str)
def test_slopes_of_activations(layer):
    """The constant is between the largest slope on a grid and that slope plus what can lie between two points."""
    layer = layer.eval().double()
    bound, _ = elementary_bound(layer, (3,))
    step = 2.0**-12
    grid = torch.arange(-24.0, 24.0, step, dtype=torch.float64)
    inputs = grid.reshape(-1, 3).requires_grad_()
    (slopes,) = torch.autograd.grad(layer(inputs).sum(), inputs)
    largest = float(slopes.abs().max())
    assert largest <= bound
    # |f'''| <= 16 where a smooth slope is largest; hardswish is steepest right at a kink
    room = step if isinstance(layer, nn.Hardswish) else 16 * step**2 / 8
    assert bound <= largest + room + 2e-6
    # differences as well as derivatives: jumps have no slope
    values = layer(grid.reshape(-1, 1).expand(-1, 3)).detach()
    assert float(values.diff(dim=0).abs().max()) <= bound * step * (1 + 1e-9)


def test_softmax_is_a_half_lipschitz():
    layer = nn.Softmax(dim=-1)
    bound, _ = elementary_bound(layer, (2,))
    assert bound == 0.5
    jacobian = torch.autograd.functional.jacobian(layer, torch.zeros(2, dtype=torch.float64))
    assert float(torch.linalg.matrix_norm(jacobian, 2)) == pytest.approx(0.5)
    for _ in range(50):
        jacobian = torch.autograd.functional.jacobian(layer, 3 * torch.randn(5, dtype=torch.float64))
        assert float(torch.linalg.matrix_norm(jacobian, 2)) <= 0.5 + 1e-12
