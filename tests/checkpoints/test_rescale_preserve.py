# SPDX-License-Identifier: Apache-2.0
"""`preserve_logits`: the same predictions bit by bit, and clear refusals where scales have nowhere to go."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    ResNetBackbone,
    ResNetConfig,
    ResNetForImageClassification,
)

from hf_lip.checkpoints.fold_batch_norm import fold_batch_norm
from hf_lip.checkpoints.layers import describe
from hf_lip.checkpoints.preserve_logits import exponent_for, powers_of_two
from hf_lip.checkpoints.rescale import rescale_checkpoint
from hf_lip.checkpoints.source import Checkpoint
from hf_lip.models.cifar_resnet.configuration_cifar_resnet import CifarResNetConfig
from hf_lip.models.cifar_resnet.modeling_cifar_resnet import CifarResNetForImageClassification

from .tiny_checkpoints import PlainNet, gpt2, resnet, save_plain, stirred, vit


def cifar_resnet():
    config = CifarResNetConfig(num_blocks=[1, 1, 1], hidden_sizes=[4, 6, 8], num_labels=5)
    return stirred(CifarResNetForImageClassification(config))


RESNETS = {
    "resnet-basic": resnet,
    "resnet-bottleneck": lambda: resnet("bottleneck"),
    "resnet-leaky": lambda: resnet(hidden_act="leaky_relu"),
    "cifar-resnet": cifar_resnet,
}


@torch.no_grad()
def logits_of(model, dtype=torch.float32):
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    return model(pixel_values=images.to(dtype)).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["sn", "sr"])
@pytest.mark.parametrize("name", RESNETS)
def test_logits_are_divided_by_one_power_of_two(name, mode, dtype, tmp_path):
    model = RESNETS[name]().to(dtype)
    model.save_pretrained(tmp_path / "model")
    expected = logits_of(model, dtype)
    report = rescale_checkpoint(tmp_path / "model", tmp_path / "out", preserve_logits=True, mode=mode, to=0.25)
    assert report.scales_read_from == "model"
    assert report.largest_after <= 0.25 < report.largest_before
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out", dtype=dtype).eval()
    found = logits_of(loaded, dtype)
    assert report.logits_exponent > 0
    assert torch.equal(found * 2.0**report.logits_exponent, expected)
    assert torch.equal(found.argmax(1), expected.argmax(1))
    for row in report.layers:
        if mode == "sn" and row.factors[1] < 1:
            assert row.after.upper > 0.125
    if mode == "sr":
        assert any(row.factors[0] < row.factors[1] for row in report.layers)


def test_enlarged_layers_keep_the_predictions_too(tmp_path):
    model = resnet()
    model.save_pretrained(tmp_path / "model")
    report = rescale_checkpoint(tmp_path / "model", tmp_path / "out", preserve_logits=True, enlarge=True, to=64.0)
    found = logits_of(AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval())
    assert report.logits_exponent < 0
    assert torch.equal(found * 2.0**report.logits_exponent, logits_of(model))
    assert all(32 < row.after.upper <= 64 for row in report.layers)


def test_folded_and_preserved(tmp_path):
    model = resnet("bottleneck")
    model.save_pretrained(tmp_path / "model")
    report = rescale_checkpoint(tmp_path / "model", tmp_path / "out", preserve_logits=True, fold_bn=True)
    found = logits_of(AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval())
    expected = logits_of(model)
    assert report.largest_after <= 1
    difference = found * 2.0**report.logits_exponent - expected
    assert difference.abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("mode", ["sn", "sr"])
def test_a_stated_chain(mode, tmp_path):
    torch.manual_seed(6)
    model = stirred(PlainNet())
    save_plain(model, tmp_path / "model")
    report = rescale_checkpoint(
        tmp_path / "model", tmp_path / "out", preserve_logits=True, mode=mode, to=0.5, chain=("0", "2", "6", "8")
    )
    assert report.scales_read_from == "names"
    assert any("user's statement: 0, 2, 6, 8" in note for note in report.notes)
    rescaled = PlainNet().eval()
    rescaled.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    images = torch.randn(9, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(rescaled(images) * 2.0**report.logits_exponent, model(images))
    assert report.logits_exponent == sum(-int(torch.tensor(row.factors[0]).log2()) for row in report.layers)
    assert all(row.after.upper <= 0.5 for row in report.layers)


class NamedNet(nn.Module):
    """conv1, bn1, downsample.0, downsample.1, fc, as in many public checkpoints without a config."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(4, eps=1e-3)
        self.downsample = nn.Sequential(nn.Conv2d(3, 4, 1, bias=bias), nn.BatchNorm2d(4, eps=1e-3))
        self.fc = nn.Linear(4, 3)

    def forward(self, images):
        hidden = torch.relu(self.bn1(self.conv1(images)) + self.downsample(images))
        return self.fc(hidden.mean(dim=(2, 3)))


@pytest.mark.parametrize("mode", ["sn", "sr"])
@pytest.mark.parametrize("bias", [False, True])
def test_pairs_told_from_names(bias, mode, tmp_path):
    torch.manual_seed(7)
    model = stirred(NamedNet(bias))
    save_plain(model, tmp_path / "model")
    images = torch.randn(9, 3, 8, 8)
    with torch.no_grad():
        expected = model(images)
    report = rescale_checkpoint(tmp_path / "model", tmp_path / "out", preserve_logits=True, mode=mode, to=0.5)
    assert any("told from their names and is not proved" in note for note in report.notes)
    again = NamedNet(bias).eval()
    again.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    with torch.no_grad():
        assert torch.equal(again(images) * 2.0**report.logits_exponent, expected)
    with pytest.raises(ValueError, match="state it with `bn_eps`"):
        rescale_checkpoint(tmp_path / "model", tmp_path / "folded", fold_bn=True, to=1e6)
    rescale_checkpoint(tmp_path / "model", tmp_path / "folded", fold_bn=True, to=1e6, bn_eps=1e-3)
    again.load_state_dict(load_file(tmp_path / "folded" / "model.safetensors"))
    with torch.no_grad():
        assert (again(images) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_folding_linear_and_transposed_layers(tmp_path):
    model = nn.Sequential(
        nn.ConvTranspose2d(3, 4, 2, stride=2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5)
    )
    with torch.no_grad():
        for norm in (model[1], model[4]):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
            norm.weight.normal_()
    save_plain(model.eval(), tmp_path / "model")
    checkpoint = Checkpoint.open(tmp_path / "model")
    layers = {layer.name: layer for layer in describe(checkpoint).layers}
    images = torch.randn(6, 3, 2, 2)
    with torch.no_grad():
        expected = model(images)
        # names do not tell that this kernel is transposed
        transposed = type(layers["0"])("0", "0.weight", "0.bias", "conv_transpose")
        for layer, norm in ((transposed, layers["1"]), (layers["3"], layers["4"])):
            folded = fold_batch_norm(checkpoint, layer, norm, 1e-5)
            model.load_state_dict(model.state_dict() | {layer.weight: folded.weight, **folded.others})
        assert torch.allclose(model(images), expected, atol=1e-5)


def test_names_of_a_network_with_norms_before_convolutions_are_not_trusted(tmp_path):
    modules = nn.ModuleDict({"bn1": nn.BatchNorm2d(3), "conv1": nn.Conv2d(3, 5, 3, bias=False), "fc": nn.Linear(5, 2)})
    save_plain(stirred(modules), tmp_path / "model")
    with pytest.raises(ValueError, match="seem to stand before their convolutions"):
        rescale_checkpoint(tmp_path / "model", tmp_path / "out", preserve_logits=True, to=0.01)


@pytest.mark.parametrize(
    ("model", "layers", "match"),
    [
        (vit, "*intermediate*", "GELU follows"),
        (vit, "*query*", "softmax"),
        (vit, "*patch_embeddings*", "identity skip"),
        (gpt2, "*c_proj*", "identity skip"),
        (gpt2, "*wte*", "identity skip"),
    ],
)
def test_layers_whose_scale_cannot_move(model, layers, match, tmp_path):
    model().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=rf"(?s){match}.*f\(s x\) = s f\(x\).*Leave such layers out with `layers`"):
        rescale_checkpoint(tmp_path / "model", tmp_path / "out", preserve_logits=True, to=1e-3, layers=(layers,))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_last_layer_of_any_classifier_can_be_divided(tmp_path):
    model = vit()
    model.save_pretrained(tmp_path / "model")
    images = torch.randn(5, 3, 16, 16)
    report = rescale_checkpoint(
        tmp_path / "model", tmp_path / "out", preserve_logits=True, to=1e-3, layers=("classifier",)
    )
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(loaded(images).logits * 2.0**report.logits_exponent, model(images).logits)


def test_layers_within_the_limit_do_not_matter(tmp_path):
    """A transformer whose norms are small enough is copied, although scales could not move."""
    model = gpt2()
    model.save_pretrained(tmp_path / "model")
    report = rescale_checkpoint(tmp_path / "model", tmp_path / "out", preserve_logits=True, to=1e4)
    assert report.num_changed == 0
    assert report.logits_exponent == 0
    # nor is enlarging them forced
    report = rescale_checkpoint(tmp_path / "model", tmp_path / "out2", preserve_logits=True, to=1e4, enlarge=True)
    assert report.num_changed == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out2")


def test_outputs_that_are_not_logits_are_not_divided(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    torch.manual_seed(0)
    backbone = stirred(ResNetBackbone(config))
    backbone.save_pretrained(tmp_path / "traced")
    # every convolution has its batch norm all the same
    rescale_checkpoint(tmp_path / "traced", tmp_path / "out", preserve_logits=True, to=0.25)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        loaded = ResNetBackbone.from_pretrained(tmp_path / "out").eval()
        for new, old in zip(loaded(images).feature_maps, backbone(images).feature_maps):
            assert torch.equal(new, old)


def test_regression_is_refused(tmp_path):
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic", num_labels=1)
    stirred(ResNetForImageClassification(config)).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="regression"):
        rescale_checkpoint(tmp_path / "model", tmp_path / "out", preserve_logits=True, to=1e-3)


def test_values_that_would_lose_digits_are_refused(tmp_path):
    model = NamedNet()
    with torch.no_grad():
        model.conv1.weight.mul_(100)
        # three times the smallest subnormal float16
        model.conv1.weight[0, 0, 0, 0] = 3 * 2.0**-24
    save_plain(model.half(), tmp_path / "model")
    with pytest.raises(ValueError, match=r"1 of 108 values of conv1\.weight would leave the normal range"):
        rescale_checkpoint(tmp_path / "model", tmp_path / "out", preserve_logits=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("chain", "match"),
    [(("0", "fc"), "names 'fc', which is no linear layer"), (("0", "2", "0"), "names '0' twice")],
)
def test_chains_that_make_no_sense(chain, match, tmp_path):
    save_plain(PlainNet(), tmp_path / "model")
    with pytest.raises(ValueError, match=match):
        rescale_checkpoint(tmp_path / "model", tmp_path / "out", preserve_logits=True, chain=chain)


def test_without_a_chain_the_user_is_told_of_it(tmp_path):
    save_plain(stirred(PlainNet()), tmp_path / "model")
    with pytest.raises(ValueError, match=r"no chain was stated.*with `chain`"):
        rescale_checkpoint(tmp_path / "model", tmp_path / "out", preserve_logits=True, to=1e-3)


def test_exponents_are_the_smallest():
    generator = torch.Generator().manual_seed(8)
    norms = torch.exp(20 * torch.randn(2000, generator=generator, dtype=torch.float64))
    norms = torch.cat([norms, powers_of_two(torch.arange(-900, 900))])
    for limit in (1.0, 0.3, 1e-5, 7.0):
        exponent = exponent_for(norms, limit)
        divided = norms * powers_of_two(-exponent)
        assert (divided <= limit).all()
        assert (2 * divided > limit).all()


def test_batch_norms_without_statistics_of_their_own(tmp_path):
    """A batch norm that lacks a bias cannot be folded into, one that lacks its mean takes no scale up."""
    tensors = {name: value for name, value in NamedNet().state_dict().items() if name != "bn1.bias"}
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match=r"batch norm bn1 does not store bn1\.bias"):
        rescale_checkpoint(tmp_path / "model", tmp_path / "out", fold_bn=True, bn_eps=1e-5)
    del tensors["bn1.running_mean"]
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not store bn1\.running_mean"):
        rescale_checkpoint(tmp_path / "model", tmp_path / "out", preserve_logits=True, to=1e-3)
