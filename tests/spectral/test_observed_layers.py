# SPDX-License-Identifier: Apache-2.0
"""Which layers are found in a model, with which image sizes and which batch norm."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_lip.spectral.regularizer import LipschitzRegularizer

from .test_regularizer import explicit_norm, tiny_resnet


def test_layers_are_chosen_by_pattern_or_predicate():
    model = tiny_resnet()
    everything = LipschitzRegularizer(model, 16).layers
    assert len(everything) == 11
    assert LipschitzRegularizer(model, 16, layers="classifier.*").layers == ["classifier.1"]
    chosen = LipschitzRegularizer(model, 16, layers=["*stages.0*", "classifier.*"]).layers
    assert chosen == [name for name in everything if "stages.0" in name or name == "classifier.1"]
    by_kind = LipschitzRegularizer(model, 16, layers=lambda name, module: isinstance(module, nn.Linear)).layers
    assert by_kind == ["classifier.1"]
    with pytest.raises(ValueError, match="selects none"):
        LipschitzRegularizer(model, 16, layers="nothing")


def test_image_sizes_are_those_that_reach_the_layers():
    regularizer = LipschitzRegularizer(tiny_resnet(), 32)
    sizes = {layer.name: layer.input_size for stack in regularizer._stacks for layer in stack.layers}
    assert sizes["resnet.embedder.embedder.convolution"] == (32, 32)
    # stem and pooling halve it each
    assert sizes["resnet.encoder.stages.0.layers.0.layer.0.convolution"] == (8, 8)
    assert sizes["classifier.1"] is None


def test_shared_layers_take_the_largest_image():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x):
            return self.conv(F.avg_pool2d(self.conv(x), 2))

    regularizer = LipschitzRegularizer(Twice(), 8)
    assert regularizer._stacks[0].layers[0].input_size == (8, 8)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
        lambda: nn.ConvTranspose2d(4, 6, 3, padding=1, groups=2),
        lambda: nn.Conv2d(4, 6, 1),
    ],
)
def test_batch_norm_is_folded_into_the_layer_before_it(layer):
    model = nn.Sequential(layer(), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1))
    model.train()
    for _ in range(3):
        model(3 * torch.randn(8, 4, 5, 5))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0, 0.1, 1.0]))
    regularizer = LipschitzRegularizer(model, 5, batch_norm=True, target=1e-3, num_iterations=10)
    norms = regularizer.norm_estimates()
    exact = explicit_norm(model[:2], (4, 5, 5))
    assert exact * (1 - 1e-5) <= norms["0"] <= 1.2 * exact
    regularizer().backward()
    assert model[1].weight.grad.abs().sum() > 0
    plain = LipschitzRegularizer(model, 5, num_iterations=10).norm_estimates()
    assert plain["0"] != pytest.approx(norms["0"], rel=0.01)
    assert plain["3"] == pytest.approx(norms["3"])


def test_models_without_convolutions_take_no_image_size():
    with pytest.raises(ValueError, match="no convolution"):
        LipschitzRegularizer(nn.Linear(3, 3), 8)
    with pytest.raises(ValueError, match="selects none"):
        LipschitzRegularizer(nn.ReLU())
