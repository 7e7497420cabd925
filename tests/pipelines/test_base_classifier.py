# SPDX-License-Identifier: Apache-2.0
import copy
import shutil

import pytest
import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from hf_lip import LipschitzVisionConfig, LipschitzVisionForImageClassification
from hf_lip.pipelines.base_classifier import BaseClassifier, CertifiedBase, fold_batch_norms


CPU = torch.device("cpu")


def unchanged(pixels):
    return pixels


def with_statistics(network):
    """Batch norms as after training: folding them is then no identity."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0.0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0.0, 0.3, generator=generator)
    return network.eval()


@pytest.fixture
def network():
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], num_labels=4, layer_type="basic")
    return with_statistics(ResNetForImageClassification(config))


def logits_of(network, pixels):
    with torch.no_grad():
        return network(pixel_values=pixels).logits


# folding


def test_every_batch_norm_of_a_resnet_is_folded_without_changing_it(network):
    pixels = torch.rand(2, 3, 16, 16)
    folded = copy.deepcopy(network)
    with torch.no_grad():
        count = fold_batch_norms(folded, lambda: folded(pixel_values=pixels).logits)
    assert count == sum(isinstance(module, nn.BatchNorm2d) for module in network.modules()) > 5
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    other = torch.rand(5, 3, 24, 16)
    assert torch.allclose(logits_of(folded, other), logits_of(network, other), atol=1e-4)


class Twice(nn.Module):
    """A convolution whose output goes elsewhere too: its batch norm can not be folded."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.other = nn.BatchNorm2d(4)

    def forward(self, pixels):
        hidden = self.conv(pixels)
        if self.kind == "skip":
            return self.norm(hidden) + hidden
        if self.kind == "two norms":
            return self.norm(hidden) + self.other(hidden)
        if self.kind == "shared":
            return self.norm(hidden) + self.norm(2.0 * hidden)
        return self.norm(2.0 * hidden)


@pytest.mark.parametrize("kind", ["skip", "two norms", "shared", "scaled"])
def test_pairs_that_do_not_belong_together_stay(kind):
    torch.manual_seed(0)
    network = with_statistics(Twice(kind))
    pixels = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        expected = network(pixels)
        assert fold_batch_norms(network, lambda: network(pixels)) == 0
        assert torch.equal(network(pixels), expected)
    assert isinstance(network.norm, nn.BatchNorm2d)


# the base classifier


def test_it_is_the_model_made_fast(network):
    base = BaseClassifier(network, lambda pixels: (pixels - 0.5) / 0.25, device=CPU)
    pixels = torch.rand(6, 3, 16, 16)
    expected = logits_of(network, (pixels - 0.5) / 0.25)
    with torch.inference_mode():
        assert torch.allclose(base(pixels.clone()), expected, atol=1e-4)
    assert base.description == "float32, 8 batch norms folded, channels_last"
    # the model itself is as it was
    assert any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(network, dtype):
    base = BaseClassifier(network, unchanged, device=CPU, dtype=dtype)
    pixels = torch.rand(6, 3, 16, 16)
    with torch.inference_mode():
        logits = base(pixels.clone())
    assert logits.dtype == getattr(torch, dtype) == base.dtype
    expected = logits_of(network, pixels)
    difference = (logits.float() - expected).abs().max()
    assert 0 < difference < 0.05 * expected.abs().max()
    assert base.description.startswith(f"{dtype}, ")
    assert network.dtype == torch.float32


def test_later_changes_of_the_model_have_no_effect(network):
    base = BaseClassifier(network, unchanged, device=CPU)
    pixels = torch.rand(2, 3, 16, 16)
    before = base(pixels.clone())
    with torch.no_grad():
        network.classifier[1].weight.zero_()
    assert torch.equal(base(pixels.clone()), before)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_graph_gives_the_same(network):
    pixels = torch.rand(4, 3, 16, 16)
    plain = BaseClassifier(network, unchanged, device=CPU)
    compiled = BaseClassifier(network, unchanged, device=CPU, compiled=True)
    with torch.inference_mode():
        expected = plain(pixels.clone())
        # for the first call the graph is made, for the second it is there
        for _ in range(2):
            assert torch.allclose(compiled(pixels.clone()), expected, atol=1e-4)
    assert compiled.description.endswith("compiled")


def test_a_denoiser_runs_first_on_the_device_in_evaluation_mode(network):
    class Half(nn.Module):
        def forward(self, noisy):
            assert not self.training
            return 0.5 * noisy

    pixels = torch.rand(3, 3, 16, 16)
    base = BaseClassifier(network, lambda clean: clean - 0.1, device=CPU, denoiser=Half())
    assert torch.allclose(base(pixels.clone()), logits_of(network, 0.5 * pixels - 0.1), atol=1e-4)
    assert "denoised by Half" in base.description


def test_a_model_whose_rows_influence_each_other_is_refused(network):
    class BatchStatistics(type(network)):
        def forward(self, pixel_values):
            return super().forward(pixel_values=pixel_values - pixel_values.mean(dim=0))

    wrong = BatchStatistics(network.config).eval()
    with torch.no_grad():
        wrong.classifier[1].weight.mul_(20.0)
    base = BaseClassifier(wrong, unchanged, device=CPU)
    with pytest.raises(ValueError, match="change with the other images of its batch"):
        base(torch.rand(4, 3, 16, 16))


def test_unknown_dtype(network):
    with pytest.raises(ValueError, match="`dtype` must be one of float32, bfloat16, float16"):
        BaseClassifier(network, unchanged, device=CPU, dtype="int8")


# with a certificate


def test_the_constant_belongs_to_what_runs():
    torch.manual_seed(0)
    config = LipschitzVisionConfig.from_size("tiny", image_size=8, num_channels=3, num_labels=4)
    model = LipschitzVisionForImageClassification(config).eval()
    base = CertifiedBase(model, CPU)
    noisy = torch.randn(20, 3, 8, 8)
    with torch.inference_mode():
        logits = base(noisy)
    assert logits.dtype == torch.float64
    with torch.no_grad():
        expected = model(pixel_values=noisy.clamp(0, 1)).logits
    assert torch.allclose(logits.float(), expected, atol=1e-6)
    lipschitz, error = base.score_constants(0.5, 4)
    constant = model.certify().lipschitz_constant
    assert 0.5 * constant <= lipschitz <= 0.5 * constant * (1 + 1e-12)
    assert 0.5 * 2.0 * base.logit_error <= error < 1e-6
    # softmax scores of points that are close
    scores = torch.softmax(logits, dim=1)
    with torch.inference_mode():
        moved = torch.softmax(base(noisy + 1e-3), dim=1)
    distance = (1e-3 * torch.ones(3, 8, 8)).norm().item()
    assert (moved - scores).abs().max() <= lipschitz * distance + 2 * error
