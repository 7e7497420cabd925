# SPDX-License-Identifier: Apache-2.0
"""The model family: constants against attacks, the Auto classes, shapes, modes and bad input."""

import copy

import pytest
import torch
from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification

from hf_lip import (
    LipschitzVisionBackbone,
    LipschitzVisionConfig,
    LipschitzVisionForImageClassification,
    LipschitzVisionModel,
)
from hf_lip.models.lipschitz_vision.configuration_lipschitz_vision import LIPSCHITZ_VISION_SIZES


SMALL = {
    "image_size": 8,
    "num_channels": 2,
    "hidden_sizes": [6, 6, 8, 5],
    "depths": [1, 0, 1, 1],
    "downsample_factors": [1, 2, 1, 1],
    "pool_size": 2,
    "num_dense_layers": 2,
    "dense_hidden_size": 12,
    "num_labels": 4,
    "image_mean": [0.3, 0.5],
}
CASES = {
    "cpl": {"block_type": "cpl"},
    "cpl-circular": {"block_type": "cpl", "padding_mode": "circular", "activation": "maxmin"},
    "sll": {"block_type": "sll", "dense_size": 30},
    "sll-sr": {"block_type": "sll", "num_iterations": 2, "head_type": "spectral", "hidden_act": "tanh"},
    "aol": {"block_type": "aol", "downsample_type": "unshuffle", "image_std": [0.5, 0.25]},
    "sr": {"block_type": "sr", "activation": "householder", "head_type": "truncation", "dense_size": 9},
    "dense-only": {"block_type": "sll", "depths": [0], "hidden_sizes": [2], "downsample_factors": [1], "pool_size": 1},
}


def make_model(name: str, **overrides) -> LipschitzVisionForImageClassification:
    torch.manual_seed(0)
    return LipschitzVisionForImageClassification(LipschitzVisionConfig(**{**SMALL, **CASES[name], **overrides}))


def pixels(batch: int = 3) -> torch.Tensor:
    return torch.rand(batch, 2, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CASES)
def test_output_in_both_modes(name):
    model = make_model(name).train()
    out = model(pixels(), labels=torch.tensor([0, 1, 2]))
    assert out.certified_radius is None
    assert out.lipschitz_constant is None
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    out = model(pixels())
    assert out.logits.shape == (3, 4)
    assert out.logits.dtype == torch.float32
    assert out.certified_radius.shape == (3,)
    assert (out.certified_radius >= 0).all()
    assert out.lipschitz_constant[0].item() == model.certificate.lipschitz_constant
    plain = model(pixels(), output_certified_radius=False)
    assert plain.certified_radius is None
    torch.testing.assert_close(plain.logits, out.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_nodes_are_the_forward_pass(name):
    model = make_model(name).eval()
    hidden = pixels().double()
    expected = model.lipschitz_vision(hidden).pooler_output
    for _, node in model.nodes():
        hidden = node(hidden)
    assert torch.equal(hidden, expected)


@pytest.mark.parametrize("name", CASES)
def test_no_pair_of_images_stretches_more_than_the_constants(name):
    model = make_model(name).eval()
    certificate = model.certify()
    x = pixels(8).double().requires_grad_()
    y = (x.detach() + 0.05 * torch.randn_like(x)).requires_grad_()
    optimizer = torch.optim.Adam([x, y], lr=0.02)
    for _ in range(40):
        distance = (x - y).flatten(1).norm(dim=1)
        features = (model.lipschitz_vision(x).pooler_output - model.lipschitz_vision(y).pooler_output).norm(dim=1)
        logits = (
            model.classifier(model.lipschitz_vision(x).pooler_output)
            - model.classifier(model.lipschitz_vision(y).pooler_output)
        ).norm(dim=1)
        assert (features / distance).max().item() <= certificate.feature_constant * (1 + 1e-9)
        assert (logits / distance).max().item() <= certificate.lipschitz_constant * (1 + 1e-9)
        optimizer.zero_grad()
        (-(logits / distance).log().sum()).backward()
        optimizer.step()


def test_standardisation_multiplies_the_constant():
    plain = make_model("aol", image_std=[1.0, 1.0]).eval().certify()
    scaled = make_model("aol", image_std=[0.5, 0.25]).eval().certify()
    assert scaled.feature_constant == pytest.approx(4 * plain.feature_constant, rel=1e-12)


def test_evaluation_error_covers_float64():
    # the same analysis with float32's unit roundoff, 2^29 times larger, must cover a float32 run
    for name in CASES:
        model = make_model(name).eval()
        certificate = model.certify()
        assert certificate.evaluation_error < 1e-9
        exact = model.classifier(model.lipschitz_vision(pixels(16).double()).pooler_output)
        single = model.classifier(model.lipschitz_vision(pixels(16)).pooler_output)
        assert (exact - single).abs().max().item() <= certificate.evaluation_error * 2.0**29


def test_certificate_is_dropped_when_weights_change():
    model = make_model("cpl").eval()
    model(pixels())
    first = model.certificate
    assert first is not None
    with torch.no_grad():
        model.lipschitz_vision.stages[0].blocks[0].layer.weight.mul_(2.0)
    assert model.certificate is None
    out = model(pixels())
    assert out.lipschitz_constant[0].item() > first.lipschitz_constant * 2
    assert model.certificate.weights_sha256 != first.weights_sha256
    state = make_model("cpl").eval().state_dict()
    model.load_state_dict(state)
    assert model.certificate is None


def test_training_step_then_evaluation_is_certified_afresh():
    model = make_model("cpl").eval()
    before = model.certify()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(pixels(), labels=torch.tensor([0, 1, 2])).loss.backward()
    optimizer.step()
    model.eval()
    after = model.certify()
    assert after.weights_sha256 != before.weights_sha256
    assert after.feature_constant <= 1.0 + 1e-9


@pytest.mark.parametrize("name", CASES)
def test_deepcopy_and_compile(name):
    model = make_model(name).eval()
    out = model(pixels())
    twin = copy.deepcopy(model)(pixels())
    assert torch.equal(twin.logits, out.logits)
    assert torch.equal(twin.certified_radius, out.certified_radius)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(pixels()).logits, out.logits)
    torch.testing.assert_close(compiled(pixels()).certified_radius, out.certified_radius)
    plain = torch.compile(model, fullgraph=True, backend="eager")(pixels(), output_certified_radius=False)
    torch.testing.assert_close(plain.logits, out.logits, rtol=1e-4, atol=1e-4)


def test_compiled_model_does_not_go_on_with_old_constants():
    model = make_model("cpl").eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    before = compiled(pixels()).lipschitz_constant[0].item()
    with torch.no_grad():
        model.classifier.weight.mul_(100.0)
    assert compiled(pixels()).lipschitz_constant[0].item() > 50 * before
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        compiled(pixels() * 255)


def test_parts_in_training_mode_are_not_certified():
    model = make_model("cpl").eval()
    model.lipschitz_vision.stages.train()
    with pytest.raises(ValueError, match=r"stages\.0\.blocks\.0\.layer is in training mode"):
        model(pixels())
    assert model(pixels(), output_certified_radius=False).logits.isfinite().all()


@pytest.mark.parametrize("how", ["data", "replaced", "numpy", "vector", "fused"])
def test_no_way_of_writing_weights_keeps_the_certificate(how):
    model = make_model("sll").eval()
    before = model(pixels()).lipschitz_constant[0].item()
    weight = model.classifier.weight
    if how == "data":
        weight.data.mul_(3.0)
    elif how == "replaced":
        for _ in range(3):
            model.classifier.weight = torch.nn.Parameter(model.classifier.weight.detach() * 3.0)
    elif how == "numpy":
        weight.detach().numpy()[:] *= 3.0
    elif how == "vector":
        vector = torch.nn.utils.parameters_to_vector(model.parameters())
        torch.nn.utils.vector_to_parameters(vector * 3.0, model.parameters())
    else:
        model(pixels(), labels=torch.tensor([0, 1, 2]), output_certified_radius=False).loss.backward()
        torch.optim.AdamW(model.parameters(), lr=0.5, fused=True).step()
    assert model.certificate is None
    assert model(pixels()).lipschitz_constant[0].item() != before


def test_config_changed_after_building_is_refused(tmp_path):
    model = make_model("cpl").eval()
    model.config.image_std = [0.01, 0.01]
    with pytest.raises(ValueError, match="config was changed"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="config was changed"):
        model(pixels())


def test_gradient_checkpointing_gives_the_same_gradients():
    plain, checkpointed = make_model("sll").train(), make_model("sll").train()
    # the older supported versions of transformers have the older name only
    enable = getattr(checkpointed, "activation_checkpointing_enable", checkpointed.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    for model in (plain, checkpointed):
        model(pixels(), labels=torch.tensor([0, 1, 2])).loss.backward()
    for (name, one), (_, other) in zip(plain.named_parameters(), checkpointed.named_parameters()):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_negative_initial_bias_keeps_images_apart_through_hundreds_of_layers():
    def contraction(initial_bias):
        torch.manual_seed(0)
        fields = {**SMALL, **CASES["dense-only"], "block_type": "cpl", "num_dense_layers": 300, "dense_hidden_size": 5}
        model = LipschitzVisionForImageClassification(
            LipschitzVisionConfig(**fields, initial_bias=initial_bias)
        ).eval()
        one, other = pixels(), pixels().flip(0)
        features = model.lipschitz_vision(one).pooler_output - model.lipschitz_vision(other).pooler_output
        return (features.norm() / (one - other).norm()).item()

    assert contraction(None) < 0.2
    assert contraction(-0.5) > 0.5


def test_hidden_states_and_tuples():
    model = make_model("cpl").eval()
    out = model(pixels(), output_hidden_states=True)
    assert [tuple(state.shape[1:]) for state in out.hidden_states] == [
        (2, 8, 8),
        (6, 8, 8),
        (6, 4, 4),
        (8, 4, 4),
        (5, 4, 4),
    ]
    as_tuple = model(pixels(), return_dict=False)
    assert torch.equal(as_tuple[0], model(pixels()).logits)


def test_auto_classes():
    config = AutoConfig.for_model("lipschitz_vision", **SMALL)
    assert isinstance(config, LipschitzVisionConfig)
    assert isinstance(AutoModel.from_config(config), LipschitzVisionModel)
    assert isinstance(AutoModelForImageClassification.from_config(config), LipschitzVisionForImageClassification)
    backbone = AutoBackbone.from_config(LipschitzVisionConfig(**SMALL, out_features=["stem", "stage3"]))
    assert isinstance(backbone, LipschitzVisionBackbone)
    assert backbone.channels == [2, 8]
    maps = backbone(pixels()).feature_maps
    assert [tuple(feature.shape[1:]) for feature in maps] == [(2, 8, 8), (8, 4, 4)]


# parameters of the published networks with ten classes (lipschitz-layers 1.5), in millions
@pytest.mark.parametrize(
    ("name", "millions"),
    [("cpl-s", 41.4), ("cpl-m", 78.8), ("sll-l", 118.2), ("sll-xl", 236.4), ("S", 41.4)],
)
def test_named_sizes(name, millions):
    config = LipschitzVisionConfig.from_size(name, num_labels=10)
    with torch.device("meta"):
        model = LipschitzVisionForImageClassification(config)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.12)
    assert config.feature_size == 64 * config.hidden_sizes[0]


def test_every_named_size_is_a_valid_config():
    for name in LIPSCHITZ_VISION_SIZES:
        assert LipschitzVisionConfig.from_size(name).model_type == "lipschitz_vision"
    tiny = LipschitzVisionForImageClassification(LipschitzVisionConfig.from_size("tiny", "sll", num_labels=3)).eval()
    assert tiny(torch.rand(1, 3, 32, 32)).certified_radius.shape == (1,)
    with pytest.raises(ValueError, match="cpl-xl"):
        LipschitzVisionConfig.from_size("huge")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_type": "bcop"}, "block_type"),
        ({"padding_mode": "reflect"}, "padding_mode"),
        ({"head_type": "mlp"}, "head_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"activation": "gelu"}, "activation"),
        ({"downsample_type": "stride"}, "downsample_type"),
        ({"image_std": [0.0, 1.0]}, "image_std"),
        ({"image_mean": [0.0]}, "image_mean"),
        ({"image_size": 9}, "image_size"),
        ({"depths": [1, 1]}, "depths"),
        ({"kernel_size": 2}, "kernel_size"),
        ({"pool_size": 0}, "pool_size"),
        ({"num_dense_layers": -1}, "num_dense_layers"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_configs_name_the_field(fields, message):
    with pytest.raises(Exception, match=message) as caught:
        LipschitzVisionConfig(**{**SMALL, **fields})
    assert isinstance(caught.value, ValueError) or "Validation" in type(caught.value).__name__


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (lambda x: x.fill_(torch.nan), ValueError, "NaN"),
        (lambda x: x.fill_(torch.inf), ValueError, "NaN or infinite"),
        (lambda x: x * 255, ValueError, r"\[0, 1\]"),
        (lambda x: x - 0.6, ValueError, r"\[0, 1\]"),
        (lambda x: x[:, :1], ValueError, r"shape \(batch, 2, 8, 8\)"),
        (lambda x: x[..., :7], ValueError, r"shape \(batch, 2, 8, 8\)"),
        (lambda x: x[0], ValueError, r"shape \(batch, 2, 8, 8\)"),
        (lambda x: x[:0], ValueError, "empty batch"),
        (lambda x: (x * 255).byte(), TypeError, "255"),
        (lambda x: x.numpy(), TypeError, "pixel_values"),
    ],
    ids=["nan", "inf", "0-255", "negative", "channels", "size", "no-batch", "empty", "uint8", "numpy"],
)
def test_bad_pixels_are_named(bad, error, message):
    model = make_model("sll").eval()
    with pytest.raises(error, match=message):
        model(bad(pixels()))


def test_other_bad_arguments():
    model = make_model("sll").eval()
    with pytest.raises(ValueError, match="labels"):
        model(pixels(), labels=torch.tensor([0, 1, 4]))
    with pytest.raises(ValueError, match="num_labels"):
        LipschitzVisionForImageClassification(LipschitzVisionConfig(**{**SMALL, "num_labels": 1}))
    with pytest.raises(ValueError, match="evaluation mode"):
        model.train()(pixels(), output_certified_radius=True)
    # inputs outside the pixel range have logits, and no radius in pixel units
    outside = model.eval()(pixels() + 5.0, output_certified_radius=False)
    assert outside.certified_radius is None
    assert outside.logits.isfinite().all()
