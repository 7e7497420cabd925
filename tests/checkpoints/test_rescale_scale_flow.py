# SPDX-License-Identifier: Apache-2.0
"""Which operations a scale passes, and where it goes, read off networks on the meta device."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import ResNetBackbone, ResNetConfig

from hf_lip.checkpoints.layers import LayerInfo, describe
from hf_lip.checkpoints.meta_model import MetaModel, build_meta_model
from hf_lip.checkpoints.scale_flow import trace_scale_flow
from hf_lip.checkpoints.scale_flow_names import follower_candidates
from hf_lip.checkpoints.source import Checkpoint
from hf_lip.models.cifar_resnet.configuration_cifar_resnet import CifarResNetConfig

from .tiny_checkpoints import resnet, stirred


def trace_flow(model, tmp_path):
    model.save_pretrained(tmp_path / "traced")
    checkpoint = Checkpoint.open(tmp_path / "traced")
    return trace_scale_flow(build_meta_model(checkpoint), describe(checkpoint).layers)


class Rule(nn.Module):
    """Two linear layers and one operation in between, on the meta device."""

    main_input_name = "pixel_values"
    config = CifarResNetConfig(num_channels=3, image_size=4)

    def __init__(self, operation):
        super().__init__()
        with torch.device("meta"):
            self.conv = nn.Conv2d(3, 3, 1)
            self.norm = nn.BatchNorm2d(3)
            self.fc = nn.Linear(48, 2)
        self.operation = operation
        self.eval()

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.fc(self.operation(self, self.conv(pixel_values)).flatten(1)))


def rule_flow(operation, stored=("conv.weight", "conv.bias", "norm.weight", "fc.weight", "fc.bias")):
    layers = [
        LayerInfo("conv", "conv.weight", "conv.bias" if "conv.bias" in stored else None, "conv"),
        LayerInfo("norm", "norm.weight", None, "batch_norm"),
        LayerInfo("fc", "fc.weight", "fc.bias", "linear"),
    ]
    return trace_scale_flow(MetaModel(Rule(operation), {name: name for name in stored}), layers)


PASSING = {
    "nothing": lambda net, x: x,
    "relu": lambda net, x: torch.relu_(x),
    "leaky relu": lambda net, x: nn.functional.leaky_relu(x, 0.3),
    "max pool and back": lambda net, x: nn.functional.interpolate(nn.functional.max_pool2d(x, 2), scale_factor=2),
    "sum of branches": lambda net, x: torch.relu(x) + 0.5 * x.abs(),
    "zero padding": lambda net, x: nn.functional.pad(x, (1, -1)),
    "joined": lambda net, x: torch.cat([x[:, :1], -x[:, 1:]], dim=1),
    "ratio": lambda net, x: x * x / x.abs(),
}
STOPPING = {
    "gelu": lambda net, x: nn.functional.gelu(x),
    "relu6": lambda net, x: nn.functional.relu6(x),
    "plus one": lambda net, x: x + 1,
    "identity skip": lambda net, x: x + torch.ones_like(x),
    "padding with ones": lambda net, x: nn.functional.pad(x, (1, -1), value=1.0),
    "square": lambda net, x: x * x + x,
    "rounding": lambda net, x: torch.div(x, x.new_ones(1), rounding_mode="floor"),
    "integers": lambda net, x: x.long().float(),
    "softmax": lambda net, x: x.softmax(1),
    "written into": lambda net, x: torch.zeros_like(x).copy_(x),
    "standardised weight": lambda net, x: nn.functional.conv2d(x, net.conv.weight / net.conv.weight.std()),
    "layer norm": lambda net, x: nn.functional.layer_norm(x, (4,)),
}


@pytest.mark.parametrize("name", PASSING)
def test_operations_that_a_scale_passes(name):
    flow = rule_flow(PASSING[name])
    assert not flow.stuck
    assert flow.logits == {"conv.weight": 1, "fc.weight": 1}
    assert flow.biases == {"conv.bias": {"conv.weight": 1}, "fc.bias": {"conv.weight": 1, "fc.weight": 1}}


@pytest.mark.parametrize("name", STOPPING)
def test_operations_that_a_scale_does_not_pass(name):
    flow = rule_flow(STOPPING[name])
    assert set(flow.stuck) == {"conv.weight"}
    assert flow.logits == {"fc.weight": 1}
    assert flow.biases == {"conv.bias": {}, "fc.bias": {"fc.weight": 1}}


def test_a_bias_that_is_not_stored_cannot_follow():
    flow = rule_flow(PASSING["relu"], ("conv.weight", "norm.weight", "fc.weight", "fc.bias"))
    assert set(flow.stuck) == {"conv.weight"}


def test_batch_norms_take_scales_up_where_they_alone_use_their_weight():
    flow = rule_flow(lambda net, x: net.norm(x))
    assert flow.followers == {"conv.weight": "norm.weight"}
    assert flow.norms == {"norm.weight": {"conv.weight": 1}}
    assert flow.logits == {"fc.weight": 1}
    # through an activation too, but then the layer cannot be folded
    flow = rule_flow(lambda net, x: net.norm(torch.relu(x)))
    assert flow.followers == {}
    assert flow.norms == {"norm.weight": {"conv.weight": 1}}
    flow = rule_flow(lambda net, x: net.norm(x) + x)
    assert flow.followers == {}
    assert set(flow.stuck) == {"conv.weight"}
    flow = rule_flow(lambda net, x: net.norm(x) * net.norm.weight.view(-1, 1, 1))
    assert set(flow.stuck) == {"conv.weight"}
    assert not any(flow.norms.values())


def test_flow_of_a_resnet(tmp_path):
    flow = trace_flow(resnet(), tmp_path)
    convolutions = {name for name in Checkpoint.open(tmp_path / "traced").names if "convolution.weight" in name}
    assert set(flow.followers) == convolutions
    for weight, norm in flow.followers.items():
        assert norm == weight.replace("convolution", "normalization")
        assert flow.norms[norm] == {weight: 1}
    assert flow.biases == {"classifier.1.bias": {"classifier.1.weight": 1}}
    assert flow.logits == {"classifier.1.weight": 1}


def test_a_residual_network_without_batch_norm_is_refused(tmp_path):
    """Batch norms taken out of the code: an identity skip needs both branches at one scale."""
    flow = trace_flow(stirred(resnet()), tmp_path)
    assert flow.stuck == {}
    model = resnet()
    for module in list(model.modules()):
        if hasattr(module, "normalization"):
            module.normalization = nn.Identity()
    model.save_pretrained(tmp_path / "bare")
    checkpoint = Checkpoint.open(tmp_path / "bare")
    meta = build_meta_model(checkpoint)
    for module in list(meta.model.modules()):
        if hasattr(module, "normalization"):
            module.normalization = nn.Identity()
    flow = trace_scale_flow(meta, describe(checkpoint).layers)
    inner = [name for name in flow.stuck if ".layer." in name]
    assert inner
    assert all("identity skip" in flow.stuck[name] for name in inner)
    # what lies before the first branch and after the last is a chain
    assert set(flow.logits) >= {"classifier.1.weight"}


def test_outputs_that_are_not_logits_stop_scales(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    flow = trace_flow(stirred(ResNetBackbone(config)), tmp_path)
    assert not flow.logits
    assert not flow.stuck
    net = Rule(lambda net, x: x)
    net.forward = lambda pixel_values: net.conv(pixel_values)
    layers = [LayerInfo("conv", "conv.weight", "conv.bias", "conv")]
    flow = trace_scale_flow(MetaModel(net, {"conv.weight": "conv.weight", "conv.bias": "conv.bias"}), layers)
    assert "they are not logits" in flow.stuck["conv.weight"]
    assert flow.logits == {}


def test_follower_candidates():
    assert "layer1.0.bn2" in follower_candidates("layer1.0.conv2")
    assert follower_candidates("layer2.0.downsample.0") == ["layer2.0.downsample.1"]
    assert follower_candidates("stages.0.convolution") == ["stages.0.normalization"]
    assert "bn1" in follower_candidates("conv1")
    assert follower_candidates("encoder.attention") == []
