# SPDX-License-Identifier: Apache-2.0
"""Rescaled checkpoints keep their promise, checked with explicit operators of the bytes on disk."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from hf_lip import LipschitzVisionConfig, LipschitzVisionForImageClassification
from hf_lip.checkpoints.channel_factors import channel_factors, scale_channels
from hf_lip.checkpoints.layers import LayerInfo
from hf_lip.checkpoints.rescale import rescale_checkpoint
from hf_lip.ops.exact import conv_matrix, exact_spectral_norm

from .tiny_checkpoints import gpt2, resnet, save_plain, vit


MODELS = {"resnet-basic": resnet, "resnet-bottleneck": lambda: resnet("bottleneck"), "vit": vit, "gpt2": gpt2}
AUTO = {"gpt2": AutoModelForCausalLM}


def stored_tensors(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def explicit_norm(name, weight, model):
    """Largest singular value of the layer's operator, for convolutions on a small image."""
    if weight.ndim == 2:
        return exact_spectral_norm(weight)
    module = model.get_submodule(name.removesuffix(".weight"))
    size = 6 if max(module.kernel_size) < 7 else 9
    matrix = conv_matrix(weight, size, padding=module.padding, stride=module.stride, groups=module.groups)
    return exact_spectral_norm(matrix)


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    """Name, model and its folder."""
    model = MODELS[request.param]()
    folder = tmp_path_factory.mktemp("original") / request.param
    model.save_pretrained(folder)
    return request.param, model, folder


@pytest.mark.parametrize("to", [1.0, 0.3])
@pytest.mark.parametrize("mode", ["sn", "sr"])
def test_norms_of_the_bytes_on_disk_are_at_most_c(case, mode, to, tmp_path):
    name, model, folder = case
    report = rescale_checkpoint(folder, tmp_path / "out", mode=mode, to=to)
    old, new = stored_tensors(folder), stored_tensors(tmp_path / "out")
    rows = {row.tensor: row for row in report.layers}
    assert len(rows) == len(report.layers) > 5
    assert report.largest_after <= to < report.largest_before
    for tensor, value in new.items():
        assert value.dtype == old[tensor].dtype
        if tensor not in rows:
            assert torch.equal(value, old[tensor])
            continue
        row = rows[tensor]
        exact = explicit_norm(tensor, value, model)
        assert exact <= row.after.upper * (1 + 1e-12) <= to * (1 + 1e-12)
        assert explicit_norm(tensor, old[tensor], model) <= row.before.upper * (1 + 1e-12)
        if row.before.upper <= to:
            assert torch.equal(value, old[tensor])
            assert row.factors == (1.0, 1.0)
        elif mode == "sn":
            # no more than needed, and one factor
            assert row.after.lower >= to * (1 - 2e-3)
            assert torch.allclose(value, old[tensor] * row.factors[0], rtol=1e-6)
        else:
            assert (value.abs() <= old[tensor].abs()).all()
    loaded = AUTO.get(name, AutoModelForImageClassification).from_pretrained(tmp_path / "out")
    assert type(loaded) is type(model)
    assert torch.equal(loaded.state_dict()[next(iter(rows))], new[next(iter(rows))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_rounding_into_the_dtype_does_not_break_the_promise(dtype, tmp_path):
    model = resnet("bottleneck").to(dtype)
    model.save_pretrained(tmp_path / "model")
    for mode in ("sn", "sr"):
        report = rescale_checkpoint(tmp_path / "model", tmp_path / mode, mode=mode, to=0.7)
        new = stored_tensors(tmp_path / mode)
        for row in report.layers:
            assert new[row.tensor].dtype == dtype
            exact = explicit_norm(row.tensor, new[row.tensor], model)
            assert exact <= row.after.upper * (1 + 1e-12) <= 0.7 * (1 + 1e-12)
            if mode == "sn":
                assert row.after.upper >= 0.7 * (1 - 4 * torch.finfo(dtype).eps) * (1 - 1e-9)
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / mode, dtype=dtype)
        assert loaded.dtype == dtype


def test_rounding_up_happens_and_is_caught(tmp_path):
    """Some bfloat16 matrices, plainly divided by their norm, round to a norm above 1."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{index}.weight": torch.randn(12, 12, generator=generator).bfloat16() for index in range(20)}
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    report = rescale_checkpoint(tmp_path / "model", tmp_path / "out")
    new = stored_tensors(tmp_path / "out")
    plain = [exact_spectral_norm((w.double() / exact_spectral_norm(w)).bfloat16()) for w in tensors.values()]
    assert sum(norm > 1 for norm in plain) >= 3
    for row in report.layers:
        assert exact_spectral_norm(new[row.tensor]) <= row.after.upper <= 1
        assert row.after.upper > 0.98


def test_enlarge_brings_every_layer_to_c(case, tmp_path):
    _, model, folder = case
    report = rescale_checkpoint(folder, tmp_path / "out", to=50.0, enlarge=True)
    new = stored_tensors(tmp_path / "out")
    for row in report.layers:
        assert 50 * (1 - 2e-3) <= row.after.lower <= row.after.upper <= 50
        assert explicit_norm(row.tensor, new[row.tensor], model) <= 50 * (1 + 1e-12)


def test_folded_batch_norms_compute_the_same(tmp_path):
    for layer_type in ("basic", "bottleneck"):
        model = resnet(layer_type)
        model.save_pretrained(tmp_path / layer_type)
        report = rescale_checkpoint(tmp_path / layer_type, tmp_path / f"{layer_type}-folded", fold_bn=True, to=1e6)
        folded = AutoModelForImageClassification.from_pretrained(tmp_path / f"{layer_type}-folded").eval()
        norms = [module for module in folded.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            assert norm.running_mean.eq(0).all()
            assert norm.running_var.eq(1).all()
            assert norm.weight.eq(math.sqrt(1 + norm.eps)).all()
        assert sum(row.folded is not None for row in report.layers) == len(norms)
        images = torch.randn(5, 3, 32, 32)
        with torch.no_grad():
            expected = model(images).logits
            assert (folded(images).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        # the measured norm is that of the folded layer
        new = stored_tensors(tmp_path / f"{layer_type}-folded")
        for row in report.layers:
            exact = explicit_norm(row.tensor, new[row.tensor], model)
            assert exact <= row.after.upper * (1 + 1e-12)
        assert any(row.folded.upper > 1.5 * row.before.upper for row in report.layers if row.folded is not None)


def test_folding_then_rescaling(tmp_path):
    model = resnet()
    model.save_pretrained(tmp_path / "model")
    for mode in ("sn", "sr"):
        report = rescale_checkpoint(tmp_path / "model", tmp_path / mode, fold_bn=True, mode=mode)
        new = stored_tensors(tmp_path / mode)
        for row in report.layers:
            assert explicit_norm(row.tensor, new[row.tensor], model) <= 1 + 1e-12
        AutoModelForImageClassification.from_pretrained(tmp_path / mode)


def test_patterns_select_layers(case, tmp_path):
    name, _, folder = case
    pattern = {"vit": "vit.encoder.*.dense", "gpt2": "*mlp*"}.get(name, "*.stages.0.*")
    report = rescale_checkpoint(folder, tmp_path / "out", to=0.1, layers=(pattern,))
    old, new = stored_tensors(folder), stored_tensors(tmp_path / "out")
    changed = {tensor for tensor in old if not torch.equal(old[tensor], new[tensor])}
    assert changed == {row.tensor for row in report.layers}
    assert changed
    assert {reason for tensor, reason in report.not_rescaled.items()} >= {"not selected"}


def test_tied_weights_are_rescaled_once(tmp_path):
    model = gpt2()
    model.save_pretrained(tmp_path / "model")
    report = rescale_checkpoint(tmp_path / "model", tmp_path / "out", to=0.5)
    assert [row.tensor for row in report.layers].count("transformer.wte.weight") == 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert exact_spectral_norm(loaded.lm_head.weight) <= 0.5
    # the table of positions is looked up only
    assert "transformer.wpe.weight" in report.not_rescaled
    named = rescale_checkpoint(tmp_path / "model", tmp_path / "named", to=0.5, layers=("*wpe",))
    assert [row.tensor for row in named.layers] == ["transformer.wpe.weight"]


def test_report_and_card_state_what_was_done(tmp_path):
    resnet().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\npipeline_tag: image-classification\n---\nOld.\n")
    report = rescale_checkpoint(tmp_path / "model", tmp_path / "out", to=0.9, command="hf-lip rescale model --to 0.9")
    content = json.loads((tmp_path / "out" / "rescale_report.json").read_text())
    assert content["settings"]["to"] == 0.9
    assert [row["after"]["upper"] for row in content["layers"]] == [row.after.upper for row in report.layers]
    assert content["largest_norm_after"] == max(row.after.upper for row in report.layers)
    card = (tmp_path / "out" / "README.md").read_text()
    for text in ("license: mit", "pipeline_tag: image-classification", "hf-lip rescale model --to 0.9"):
        assert text in card
    assert "statistics of the batch norms" in card
    assert "Old." not in card
    assert str(tmp_path) not in card + json.dumps(content)
    # a card never shows less than the norm
    for line in card.splitlines():
        if line.startswith("| `"):
            name, *_, after, _ = (cell.strip(" `") for cell in line.strip("|").split("|"))
            assert float(after) >= next(row.after.upper for row in report.layers if row.name == name)


def layer_cases():
    yield "linear", nn.Linear(7, 5), None
    yield "tall", nn.Linear(5, 9), None
    yield "conv1d", nn.Conv1d(3, 4, 3, stride=2, padding=1), (9,)
    yield "conv2d", nn.Conv2d(3, 4, (3, 2), padding=1), (6, 5)
    yield "strided", nn.Conv2d(3, 4, 3, stride=2, padding=1), (7, 6)
    yield "patches", nn.Conv2d(2, 5, 3, stride=3), (9, 9)
    yield "dilated", nn.Conv2d(2, 3, 3, dilation=2, stride=2, padding=2), (8, 7)
    yield "grouped", nn.Conv2d(4, 6, 3, groups=2, padding=1), (5, 5)
    yield "depthwise", nn.Conv2d(4, 4, 5, groups=4, padding=2), (6, 6)
    yield "conv3d", nn.Conv3d(2, 3, (2, 3, 2), padding=1), (4, 3, 4)
    yield "strided3d", nn.Conv3d(2, 3, 3, stride=(1, 2, 2), padding=1), (3, 4, 4)
    yield "transposed", nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), (4, 4)
    yield "transposed-groups", nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (3, 4)
    yield "transposed1d", nn.ConvTranspose1d(3, 2, 4, stride=3, dilation=2), (5,)


@pytest.mark.parametrize("num_iterations", [1, 2, 4])
@pytest.mark.parametrize(("module", "size"), [case[1:] for case in layer_cases()], ids=[c[0] for c in layer_cases()])
def test_channel_factors_make_operators_of_norm_one(module, size, num_iterations):
    torch.manual_seed(4)
    with torch.no_grad():
        module.double().weight.normal_()
        # one channel far from the others
        module.weight[0] *= 20
    kind = type(module).__name__
    if size is None:
        layer = LayerInfo("layer", "layer.weight", None, "linear")
        shape = (module.in_features,)
    else:
        kind = "conv_transpose" if "Transpose" in kind else "conv"
        arguments = {"stride": module.stride, "dilation": module.dilation, "groups": module.groups}
        layer = LayerInfo("layer", "layer.weight", None, kind, arguments=arguments)
        shape = (module.in_channels, *size)
    factors = channel_factors(module.weight, layer, num_iterations)
    channels = module.out_features if size is None else module.out_channels
    assert factors.shape == (channels,)
    with torch.no_grad():
        module.weight.copy_(scale_channels(module.weight, layer, 1 / factors))
        module.bias.zero_()
        images = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
        norm = exact_spectral_norm(module(images).flatten(1).T)
    assert norm <= 1 + 1e-12
    assert norm > {1: 0.3, 2: 0.5, 4: 0.7}[num_iterations]


def test_channels_that_are_zero_stay_zero(tmp_path):
    weight = torch.randn(6, 4)
    weight[2] = 0
    (tmp_path / "model").mkdir()
    save_file({"fc.weight": weight, "zero.weight": torch.zeros(3, 3)}, tmp_path / "model" / "model.safetensors")
    for enlarge in (False, True):
        out = tmp_path / str(enlarge)
        report = rescale_checkpoint(tmp_path / "model", out, mode="sr", to=0.5, enlarge=enlarge)
        new = stored_tensors(out)
        assert new["fc.weight"][2].eq(0).all()
        assert new["zero.weight"].eq(0).all()
        assert exact_spectral_norm(new["fc.weight"]) <= report.layers[0].after.upper <= 0.5


def test_hf_lip_layers_are_refused_and_their_certificate_is_never_copied(tmp_path):
    config = LipschitzVisionConfig.from_size("tiny", image_size=8, num_channels=1, num_labels=3)
    LipschitzVisionForImageClassification(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="1-Lipschitz already"):
        rescale_checkpoint(tmp_path / "model", tmp_path / "out")
    resnet().save_pretrained(tmp_path / "resnet")
    certificate = (tmp_path / "model" / "lipschitz_certificate.json").read_text()
    (tmp_path / "resnet" / "lipschitz_certificate.json").write_text(certificate)
    report = rescale_checkpoint(tmp_path / "resnet", tmp_path / "out")
    assert not (tmp_path / "out" / "lipschitz_certificate.json").exists()
    assert any("lipschitz_certificate.json was not copied" in note for note in report.notes)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"mode": "svd"}, "`mode` must be 'sn'"),
        ({"to": 0.0}, "`to` must be a positive"),
        ({"to": math.nan}, "`to` must be a positive"),
        ({"num_iterations": 0}, "`num_iterations` must be at least 1"),
        ({"bn_eps": -1.0}, "`bn_eps` must be finite"),
        ({"rtol": 1.0}, "`rtol` must be in"),
        ({"chain": ("a",)}, "`chain` says where scales may move"),
        ({"layers": ("nothing.*",)}, r"`layers` 'nothing.\*' matches nothing"),
    ],
)
def test_settings_that_make_no_sense(settings, match, tmp_path):
    save_plain(nn.Sequential(nn.Linear(3, 2)), tmp_path / "model")
    with pytest.raises(ValueError, match=match):
        rescale_checkpoint(tmp_path / "model", tmp_path / "out", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(value, tmp_path):
    model = nn.Sequential(nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight[1, 1] = value
    save_plain(model, tmp_path / "model")
    with pytest.raises(ValueError, match=r"0\.weight.*not finite"):
        rescale_checkpoint(tmp_path / "model", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_limit_out_of_the_range_of_the_dtype(tmp_path):
    save_plain(nn.Sequential(nn.Linear(3, 2)).half(), tmp_path / "model")
    with pytest.raises(ValueError, match="convert the checkpoint to float32"):
        rescale_checkpoint(tmp_path / "model", tmp_path / "out", to=1e-12)
    with pytest.raises(ValueError, match="leave the range of the type"):
        rescale_checkpoint(tmp_path / "model", tmp_path / "out", to=1e9, enlarge=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_quantised_weights_are_left_and_said_so(tmp_path):
    (tmp_path / "model").mkdir()
    tensors = {"a.weight": torch.ones(3, 3, dtype=torch.int8), "b.weight": 5 * torch.eye(3)}
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    report = rescale_checkpoint(tmp_path / "model", tmp_path / "out")
    assert "quantised" in report.not_rescaled["a.weight"]
    assert [row.name for row in report.layers] == ["b"]
    with pytest.raises(ValueError, match=r"a\.weight.*quantised"):
        rescale_checkpoint(tmp_path / "model", tmp_path / "out2", layers=("a*",))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_huge_and_tiny_weights(scale, tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(2, 3, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    save_plain(model, tmp_path / "model")
    for mode in ("sn", "sr"):
        out = tmp_path / f"{mode}"
        report = rescale_checkpoint(tmp_path / "model", out, mode=mode, enlarge=True)
        for row, tensor in zip(report.layers, (stored_tensors(out)[row.tensor] for row in report.layers)):
            assert 0.2 < row.after.upper <= 1
            assert torch.isfinite(tensor).all()
