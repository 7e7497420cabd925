# SPDX-License-Identifier: Apache-2.0
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import jvp, vjp
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    activations,
)

from hf_lip import LipschitzVisionConfig, LipschitzVisionForImageClassification
from hf_lip.checkpoints.composer import Composer, bound_product, bound_sum
from hf_lip.checkpoints.composition import (
    UnknownCompositionError,
    checkpoint_bound,
    global_lipschitz_bound,
    known_architectures,
)
from hf_lip.checkpoints.shapes import Shapes
from hf_lip.checkpoints.source import Checkpoint
from hf_lip.models.cifar_resnet.configuration_cifar_resnet import CifarResNetConfig
from hf_lip.models.cifar_resnet.modeling_cifar_resnet import CifarResNetForImageClassification

from .explicit_operators import explicit_norm
from .tiny_checkpoints import stirred


def resnet(layer_type, **options):
    torch.manual_seed(0)
    sizes = [6, 10] if layer_type == "basic" else [16, 24]
    config = ResNetConfig(
        embedding_size=6, hidden_sizes=sizes, depths=[2, 1], layer_type=layer_type, num_labels=4, **options
    )
    return stirred(ResNetForImageClassification(config))


def cifar(**options):
    torch.manual_seed(0)
    config = CifarResNetConfig(num_blocks=[1, 1], hidden_sizes=[4, 7], image_size=8, num_labels=3, **options)
    return stirred(CifarResNetForImageClassification(config))


def lipschitz_vision():
    torch.manual_seed(0)
    config = LipschitzVisionConfig.from_size("tiny", image_size=8, num_channels=1)
    return LipschitzVisionForImageClassification(config).eval()


def function_of(model):
    """The map from one input batch to logits, in float64."""
    model = model.double()
    if isinstance(model, LipschitzVisionForImageClassification):
        return lambda x: model(pixel_values=x, output_certified_radius=False).logits
    if isinstance(model, PreTrainedModel):
        return lambda x: model(pixel_values=x).logits
    return model


def largest_stretch(model, shape, num_starts=3, num_steps=8):
    """Largest ratio |f(x + d) - f(x)| / |d| found: random pairs at all scales, and ascent of |J(x) v| over x and v."""
    function = function_of(model)
    torch.manual_seed(1)
    best = 0.0

    def ratio(x, direction):
        with torch.no_grad():
            return float((function(x + direction) - function(x)).norm() / direction.norm())

    for scale in (1e-4, 1e-2, 1.0, 10.0):
        for _ in range(5):
            x = torch.randn(1, *shape, dtype=torch.float64)
            best = max(best, ratio(x, scale * torch.randn_like(x)))
    for start in range(num_starts):
        x = torch.randn(1, *shape, dtype=torch.float64) * 2.0**start
        v = torch.randn_like(x)
        for _ in range(num_steps):
            # a power step on J^T J at x
            v = v / v.norm()
            _, image = jvp(function, (x,), (v,))
            _, pull = vjp(function, x)
            (v,) = pull(image)
            # then x along the gradient of |J(x) v|^2
            point = x.clone().requires_grad_()
            direction = v / v.norm()
            step = 1e-3
            stretched = (function(point + step * direction) - function(point)).square().sum()
            (gradient,) = torch.autograd.grad(stretched, point)
            if gradient.norm() > 0:
                moved = x + 0.1 * x.norm() * gradient / gradient.norm()
                x = moved if ratio(moved, step * direction) > ratio(x, step * direction) else x
            best = max(best, ratio(x, step * direction), ratio(x, 1e-6 * direction))
    return best


MODELS = {
    "basic resnet": (lambda: resnet("basic"), (3, 24, 24), (24, 24)),
    "bottleneck resnet": (lambda: resnet("bottleneck", downsample_in_bottleneck=True), (3, 16, 24), (16, 24)),
    "gelu resnet": (lambda: resnet("basic", hidden_act="gelu", downsample_in_first_stage=True), (3, 16, 16), 16),
    "cifar resnet": (cifar, (3, 8, 8), None),
    "lipschitz vision": (lipschitz_vision, (1, 8, 8), None),
}


@pytest.mark.parametrize("name", MODELS)
def test_attacks_stay_below_the_bound(name):
    build, shape, input_size = MODELS[name]
    model = build()
    bound = global_lipschitz_bound(model, input_size)
    assert bound.input_shape == shape
    # the product of the parts is the bound, and each joint of the tree is what its inside says
    assert bound_product(part.bound for part in bound.parts) == pytest.approx(bound.upper, rel=1e-12)

    def check(part):
        if part.inside:
            join = {"chain": bound_product, "residual": bound_sum}[part.kind]
            assert part.bound == join(inside.bound for inside in part.inside)
        for inside in part.inside:
            check(inside)

    for part in bound.parts:
        check(part)
    found = largest_stretch(model, shape)
    assert 0.0 < found <= bound.upper


def test_the_attack_reaches_a_bound_that_is_tight():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 5, 3, stride=2, padding=1), nn.BatchNorm2d(5), nn.LeakyReLU(1.0)).eval()
    model[1].running_var.copy_(torch.rand(5) + 0.1)
    bound = global_lipschitz_bound(model, (2, 12, 12))
    found = largest_stretch(model, (2, 12, 12), num_steps=60)
    assert 0.95 * bound.upper < found <= bound.upper


def make_diagonal(model, factor):
    """Every convolution `factor` times the identity of its first channels, every batch norm the identity."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.dirac_(module.weight)
            module.weight.data *= factor
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
            module.running_mean.zero_()
            module.running_var.fill_(1.0 - module.eps)


def test_a_cifar_resnet_that_reaches_its_bound():
    model = cifar(image_std=[0.5, 0.5, 0.5], image_mean=[0.0, 0.0, 0.0])
    make_diagonal(model, 1.3)
    # shortcuts pad their new channels on both sides, convolutions append them: one channel in the middle stays itself
    front = model.layer2[0].shortcut.front
    model.layer2[0].conv1.weight.data.zero_()
    model.layer2[0].conv1.weight.data[front, 0, 1, 1] = 1.3
    nn.init.zeros_(model.linear.weight)
    model.linear.weight.data[1, front] = 2.0
    # 1 / std, first convolution, two blocks, mean over 4 x 4 pixels, last layer
    constant = 2.0 * 1.3 * (1.0 + 1.3**2) ** 2 / 4.0 * 2.0
    bound = global_lipschitz_bound(model).upper
    assert constant <= bound <= constant * (1 + 1e-2)
    # a grey level on the pixels that both strides read
    direction = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    direction[:, 0, ::2, ::2] = 1.0
    function = function_of(model)
    with torch.no_grad():
        change = function(0.5 + direction) - function(torch.full_like(direction, 0.5))
    assert float(change.norm() / direction.norm()) == pytest.approx(constant, rel=1e-5)


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_a_resnet_block_that_reaches_its_bound(kind):
    model = resnet(kind)
    make_diagonal(model, 1.2)
    block = model.resnet.encoder.stages[0].layers[1]
    shape = (block.shortcut(torch.zeros(1, 6 if kind == "basic" else 16, 6, 6)).shape[1], 6, 6)
    composer = Composer(Shapes.of(nn.Sequential(block), shape))
    (part,) = composer.measure([composer.part("block", block)], 1e-4)
    constant = 1.0 + 1.2 ** (2 if kind == "basic" else 3)
    assert constant <= part.bound <= constant * (1 + 1e-3)
    direction = torch.zeros(1, *shape)
    direction[:, 0] = 1.0
    with torch.no_grad():
        change = block(1.0 + direction) - block(torch.ones_like(direction))
    assert float(change.norm() / direction.norm()) == pytest.approx(constant, rel=1e-4)


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6), (4, 7, 7)),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(4, affine=False), (3, 6, 6)),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4), (3, 6, 6)),
        (nn.Conv1d(3, 4, 4, stride=2, padding="valid"), nn.BatchNorm1d(4), (3, 15)),
        (nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), (2, 4, 5, 4)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2, output_padding=1), nn.BatchNorm2d(6), (4, 5, 5)),
        (nn.Linear(6, 5), nn.BatchNorm1d(5), (6,)),
    ],
)
def test_batch_norm_is_folded_into_the_layer_before_it(layer, norm, shape):
    torch.manual_seed(0)
    if norm.affine:
        nn.init.normal_(norm.weight)
    norm.running_var.copy_(torch.rand(norm.num_features) + 0.01)
    norm.running_mean.normal_()
    model = nn.Sequential(layer, norm).eval()
    bound = global_lipschitz_bound(model, shape)
    assert [part.kind for part in bound.parts] == [f"{type(layer).__name__} with batch norm"]
    norms = [explicit_norm(module, shape) for module in (model, layer)]
    loose = norms[1] * float((norm.running_var.double() + norm.eps).rsqrt().max())
    assert norms[0] <= bound.upper
    # as tight as the layer itself: far below the product of the two norms, but for paddings that only have a bound
    room = 2.0 if isinstance(layer, nn.Conv2d) and layer.padding_mode == "reflect" else 1.1
    assert bound.upper <= room * norms[0]
    if not norm.affine:
        assert bound.upper < loose


def test_batch_norm_over_another_axis_than_the_features_is_not_folded():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).eval()
    # 5 channels of 6 features: the norm scales channels, the layer mixes features
    model[1].running_var.copy_(torch.tensor([1e-2, 1.0, 1.0, 1.0, 1.0]))
    bound = global_lipschitz_bound(model, (5, 6))
    assert len(bound.parts) == 2
    norm = explicit_norm(model, (5, 6))
    assert norm <= bound.upper <= 1.01 * norm


WITHOUT_A_CONSTANT = (
    nn.Softplus(), nn.Hardshrink(), nn.Threshold(0.1, 20.0), nn.GLU(), nn.CELU(-1.0),
    activations.ReLUSquaredActivation(),
)  # fmt: skip


@pytest.mark.parametrize("layer", WITHOUT_A_CONSTANT, ids=lambda layer: type(layer).__name__)
def test_layers_without_a_constant_are_refused_by_name(layer):
    model = nn.Sequential(nn.Linear(4, 4), layer).eval()
    with pytest.raises(UnknownCompositionError, match=rf"^1 is a {type(layer).__name__}, whose composition is not"):
        global_lipschitz_bound(model, (4,))


def test_sequential_of_sequentials_and_known_shapes():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.Dropout(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).eval()
    bound = global_lipschitz_bound(model, (1, 10, 10))
    kinds = {part.name: part.bound for part in bound.parts}
    assert kinds["1"] == 2.0
    assert kinds["3"] == pytest.approx(1 / 5)
    assert largest_stretch(model, (1, 10, 10)) <= bound.upper


class OwnForward(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_classes_with_a_forward_of_their_own_are_refused():
    for model in (OwnForward(nn.Linear(2, 2)), nn.Sequential(Twice(2, 2)), nn.TransformerEncoderLayer(4, 2)):
        with pytest.raises(UnknownCompositionError, match="whose composition is not known"):
            global_lipschitz_bound(model.eval(), (4, 4) if isinstance(model, nn.TransformerEncoderLayer) else (2,))


def test_hooks_and_parametrised_weights_are_refused():
    model = nn.Sequential(nn.Linear(2, 2)).eval()
    handle = model[0].register_forward_hook(lambda module, inputs, output: 3 * output)
    with pytest.raises(UnknownCompositionError, match=r"^0 \(Linear\) has hooks or parametrised weights"):
        global_lipschitz_bound(model, (2,))
    handle.remove()
    assert global_lipschitz_bound(model, (2,)).upper > 0
    nn.utils.parametrizations.spectral_norm(model[0])
    with pytest.raises(UnknownCompositionError, match="remove_parametrizations"):
        global_lipschitz_bound(model.eval(), (2,))


def test_recorders_of_hidden_states_are_no_obstacle():
    model = resnet("basic")
    before = global_lipschitz_bound(model, 16).upper
    with torch.no_grad():
        model(torch.zeros(1, 3, 16, 16), output_hidden_states=True)
    assert global_lipschitz_bound(model, 16).upper == before
    model = cifar()
    with torch.no_grad():
        model(torch.zeros(1, 3, 8, 8), output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules())
    assert global_lipschitz_bound(model).upper > 0


def test_training_mode_missing_and_broken_weights():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match=r"in training mode.*call `model.eval\(\)`"):
        global_lipschitz_bound(model, (2,))
    model.eval()[1].train()
    with pytest.raises(ValueError, match=r"^1 is in training mode"):
        global_lipschitz_bound(model, (2,))
    model.eval()
    model[1].running_var[0] = -1.0
    with pytest.raises(ValueError, match="batch norm behind 0 has NaN, infinite or negative statistics"):
        global_lipschitz_bound(model, (2,))
    model[1].running_var[0] = 1.0
    model[0].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"^0 holds NaN or infinite weights"):
        global_lipschitz_bound(model, (2,))
    with pytest.raises(ValueError, match=r"0\.weight is on the meta device"):
        global_lipschitz_bound(model.to("meta"), (2,))


def test_input_sizes():
    model = nn.Sequential(nn.Linear(4, 2)).eval()
    with pytest.raises(ValueError, match="`input_size` must be the shape of one input"):
        global_lipschitz_bound(model, 4)
    with pytest.raises(ValueError, match=r"does not run on an input of shape \(5,\)"):
        global_lipschitz_bound(model, (5,))
    assumed = global_lipschitz_bound(resnet("basic"))
    assert assumed.input_shape == (3, 224, 224)
    assert "assumed" in assumed.assumptions[0]
    assert "224" not in "".join(global_lipschitz_bound(cifar()).assumptions)
    with pytest.raises(ValueError, match=r"certified for 8 x 8, got \(16, 16\)"):
        global_lipschitz_bound(lipschitz_vision(), 16)


def test_a_layer_met_with_two_sizes_is_refused():
    conv = nn.Conv2d(1, 1, 3, padding=1)
    model = nn.Sequential(conv, nn.AvgPool2d(2), conv).eval()
    with pytest.raises(UnknownCompositionError, match="meets several shapes"):
        global_lipschitz_bound(model, (1, 8, 8))


def test_normalisation_inside_the_model_counts():
    wide, narrow = (cifar(image_std=[std] * 3) for std in (0.5, 0.25))
    ratio = global_lipschitz_bound(narrow).upper / global_lipschitz_bound(wide).upper
    assert ratio == pytest.approx(2.0)
    assert any(
        "the normalisation inside the model is counted" in text for text in global_lipschitz_bound(wide).assumptions
    )


def test_sums_and_products_round_up():
    assert bound_product([]) == 1.0
    assert bound_product([1.0, 3.0, 1.0]) == 3.0
    assert bound_product([0.1, 0.1]) > 0.1 * 0.1
    assert bound_sum([0.1, 0.2]) > 0.1 + 0.2
    assert bound_sum([]) == 0.0
    assert bound_product([2.0, 0.0]) < 1e-300


def test_checkpoints(tmp_path):
    model = resnet("basic")
    model.save_pretrained(tmp_path)
    bound, reason = checkpoint_bound(Checkpoint.open(tmp_path), 16)
    assert reason is None
    assert bound == global_lipschitz_bound(model, 16)
    tensors = load_file(tmp_path / "model.safetensors")
    weights = tmp_path / "model.safetensors"
    for change, expected in (
        ({"extra": torch.zeros(2)}, "extra is not part of it"),
        ({"classifier.1.weight": None}, "classifier.1.weight is not stored"),
        ({"classifier.1.weight": torch.zeros(9, 10)}, "classifier.1.weight is not part of it"),
        ({"classifier.1.weight": torch.full((4, 10), math.nan)}, "NaN or infinite weights"),
    ):
        changed = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
        save_file(changed, weights)
        bound, reason = checkpoint_bound(Checkpoint.open(tmp_path), 16)
        assert bound is None
        assert expected in reason
    save_file({name: tensor for name, tensor in tensors.items() if "batches" not in name}, weights)
    assert checkpoint_bound(Checkpoint.open(tmp_path), 16)[0] is not None
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "in words"}))
    assert "not known: config.json names no model" in checkpoint_bound(Checkpoint.open(tmp_path), 16)[1]


def test_a_network_of_unknown_composition(tmp_path):
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=20)
    BertModel(config).save_pretrained(tmp_path)
    bound, reason = checkpoint_bound(Checkpoint.open(tmp_path))
    assert bound is None
    assert "the composition of BertModel is not known here" in reason
    assert all(name in reason for name in known_architectures())
