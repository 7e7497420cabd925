# SPDX-License-Identifier: Apache-2.0
import json
import math
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

import hf_lip.checkpoints.spectrum as spectrum_module
from hf_lip import LipschitzVisionConfig, LipschitzVisionForImageClassification
from hf_lip.checkpoints.source import Checkpoint
from hf_lip.checkpoints.spectrum import spectrum
from hf_lip.checkpoints.spectrum_report import above, below

from .explicit_operators import convolution, explicit_norm
from .tiny_checkpoints import stirred


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "models"


def stored(folder, tensors, config=None):
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def rows_of(report):
    assert [row.depth for row in report.layers] == sorted(row.depth for row in report.layers)
    return {row.name: row for row in report.layers}


def require_contains(row, norm, rtol=None):
    assert row.lower <= norm * (1 + 1e-9)
    assert norm <= row.upper
    if rtol is not None:
        assert row.upper - row.lower <= rtol * row.upper


def require_accounts_for_everything(report, folder):
    """Each stored number is in a layer with a norm, in its bias, or in a skipped tensor."""
    total = sum(tensor.numel() for file in folder.glob("*.safetensors") for tensor in load_file(file).values())
    skipped = sum(tensor.num_parameters for tensor in report.skipped)
    assert report.num_parameters == total
    assert report.num_covered_parameters + report.num_bias_parameters + skipped == total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resnet_against_explicit_matrices(tmp_path, dtype):
    torch.manual_seed(1)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic", num_labels=3)
    model = stirred(ResNetForImageClassification(config)).to(dtype)
    model.save_pretrained(tmp_path)
    report = spectrum(tmp_path, input_size=16)
    require_accounts_for_everything(report, tmp_path)
    rows = rows_of(report)
    model = model.double()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            require_contains(rows[name], explicit_norm(module, (module.in_channels, *rows[name].input_size)))
        elif isinstance(module, nn.Linear):
            require_contains(rows[name], explicit_norm(module, (module.in_features,)), rtol=1e-3)
        elif isinstance(module, nn.BatchNorm2d):
            require_contains(rows[name], explicit_norm(module, (module.num_features, 1, 1)), rtol=1e-3)
        else:
            assert name not in rows
    assert all(row.certified for row in report.layers)
    assert report.global_bound is not None
    assert report.global_bound.input_shape == (3, 16, 16)


def test_gpt2_with_its_heads_and_its_tied_embedding(tmp_path):
    torch.manual_seed(2)
    config = GPT2Config(n_embd=24, n_layer=2, n_head=3, vocab_size=40, n_positions=16)
    model = stirred(GPT2LMHeadModel(config))
    model.save_pretrained(tmp_path)
    report = spectrum(tmp_path, rtol=1e-4)
    require_accounts_for_everything(report, tmp_path)
    rows = rows_of(report)
    for name, module in model.named_modules():
        if name in rows and rows[name].linear:
            matrix = module.weight.detach().double()
            require_contains(rows[name], float(torch.linalg.matrix_norm(matrix, 2)), rtol=1e-4)
            assert rows[name].frobenius_norm == pytest.approx(float(matrix.norm()))
            assert rows[name].stable_rank <= float(matrix.norm() / torch.linalg.matrix_norm(matrix, 2)) ** 2
    attention = model.transformer.h[1].attn.c_attn.weight.detach().double()
    heads = rows["transformer.h.1.attn.c_attn"].heads
    # queries, keys and values of three heads, in columns
    norms = [float(torch.linalg.matrix_norm(block, 2)) for block in attention.split(8, dim=1)]
    assert heads.count == len(norms) == 9
    assert heads.lower <= max(norms) <= heads.upper <= heads.lower * 1.001
    tied, table = rows["lm_head"], rows["transformer.wte"]
    assert (tied.tied, tied.num_parameters, tied.upper) == (True, 0, table.upper)
    assert (tied.kind, table.kind) == ("linear", "embedding")
    norm = rows["transformer.ln_f"]
    assert not norm.linear
    constant = float(model.transformer.ln_f.weight.detach().double().abs().max()) / math.sqrt(1e-5)
    assert constant <= norm.upper <= constant * (1 + 1e-9)


def test_shards_give_the_same_report(tmp_path):
    config = LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=64, tie_word_embeddings=True)
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = spectrum(tmp_path / "one"), spectrum(tmp_path / "many")
    assert one.layers == many.layers
    assert one.num_parameters == many.num_parameters
    # classes of transformers' own are recognised, not proved
    assert {row.kind for row in one.layers if not row.certified} == {"rms_norm"}
    assert "recognised by running it" in next(row.reason for row in one.layers if not row.certified)


def test_normalisation_with_one_plus_weight(tmp_path):
    config = GemmaConfig(**SMALL, vocab_size=64, num_key_value_heads=1, head_dim=8, rms_norm_eps=1e-4)
    model = GemmaForCausalLM(config)
    nn.init.normal_(model.model.norm.weight)
    model.save_pretrained(tmp_path)
    row = rows_of(spectrum(tmp_path))["model.norm"]
    inputs = torch.randn(32, dtype=torch.float64) * 1e-9
    jacobian = torch.autograd.functional.jacobian(model.model.norm.double(), inputs)
    slope = float(torch.linalg.matrix_norm(jacobian, 2))
    # the steepest point is 0
    assert slope * (1 - 1e-4) <= row.upper <= slope * (1 + 1e-4)


def test_vit_patches_and_weight_normed_convolution(tmp_path):
    torch.manual_seed(3)
    vit = stirred(ViTForImageClassification(ViTConfig(**SMALL, image_size=16, patch_size=4)))
    vit.save_pretrained(tmp_path / "vit")
    rows = rows_of(spectrum(tmp_path / "vit"))
    patches = vit.vit.embeddings.patch_embeddings.projection
    row = rows["vit.embeddings.patch_embeddings.projection"]
    require_contains(row, explicit_norm(patches, (3, 16, 16)), rtol=1e-3)
    config = Wav2Vec2Config(
        **SMALL, num_conv_pos_embedding_groups=4, num_conv_pos_embeddings=8, conv_dim=(8,) * 7, vocab_size=32
    )
    wav2vec = Wav2Vec2Model(config)
    wav2vec.save_pretrained(tmp_path / "wav2vec")
    report = spectrum(tmp_path / "wav2vec")
    require_accounts_for_everything(report, tmp_path / "wav2vec")
    row = rows_of(report)["encoder.pos_conv_embed.conv"]
    weight = wav2vec.encoder.pos_conv_embed.conv.weight.detach().double()
    layer = convolution(weight, padding=4, groups=4)
    assert row.certified
    # bounded for every length
    assert explicit_norm(layer, (32, 40)) <= row.upper <= 1.02 * explicit_norm(layer, (32, 40))


def test_layers_of_the_package_have_their_certified_constants(tmp_path):
    config = LipschitzVisionConfig.from_size("tiny", image_size=8, num_channels=1, block_type="sll")
    model = LipschitzVisionForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    report = spectrum(tmp_path)
    require_accounts_for_everything(report, tmp_path)
    bounds = {layer["name"]: layer["bound"] for layer in model.certificate.layers}
    for row in report.layers:
        assert (row.kind, row.linear, row.certified) == ("lipschitz", False, True)
        assert row.upper == bounds[row.name]
    assert report.global_bound.upper == model.certificate.lipschitz_constant
    assert report.largest is None


def test_names_and_shapes_against_explicit_matrices(tmp_path):
    torch.manual_seed(4)
    kernel = torch.randn(4, 2, 3, 3)
    left, right = torch.randn(8, 2), torch.randn(2, 6)
    direction, magnitude = torch.randn(4, 3, 5), torch.rand(4, 1, 1) + 0.5
    tensors = {
        "conv.weight": kernel,
        "fc.weight": torch.randn(5, 7, dtype=torch.float64),
        "fc.lora_A.weight": right,
        "fc.lora_B.weight": left,
        "experts.w": torch.randn(3, 4, 6),
        "bn.weight": torch.randn(6),
        "bn.running_mean": torch.randn(6),
        "bn.running_var": torch.rand(6),
        "sound.weight_v": direction,
        "sound.weight_g": magnitude,
        "token_embedding.weight": torch.randn(20, 4, dtype=torch.float64).half(),
    }
    folder = stored(tmp_path, tensors)
    report = spectrum(folder)
    require_accounts_for_everything(report, folder)
    rows = rows_of(report)

    def spectral(matrix):
        return float(torch.linalg.matrix_norm(matrix.double(), 2))

    require_contains(rows["fc"], spectral(tensors["fc.weight"]), rtol=1e-3)
    require_contains(rows["token_embedding"], spectral(tensors["token_embedding.weight"]), rtol=1e-3)
    require_contains(rows["fc.lora"], spectral(left.double() @ right.double()), rtol=1e-3)
    assert rows["fc.lora"].frobenius_norm == pytest.approx(float((left.double() @ right.double()).norm()))
    require_contains(rows["experts.w"], max(map(spectral, tensors["experts.w"])), rtol=1e-3)
    effective = torch._weight_norm(direction.double(), magnitude.double(), 0)
    assert explicit_norm(convolution(effective, padding=2), (3, 30)) <= rows["sound"].upper
    assert rows["sound"].frobenius_norm == pytest.approx(float(effective.norm()))
    # whatever stride, padding, groups, dilation, and also transposed
    for arguments in (
        {"padding": 1},
        {"padding": 1, "stride": 2},
        {"padding": 0, "groups": 2},
        {"padding": 2, "dilation": 2},
        {"padding": 1, "padding_mode": "circular"},
    ):
        layer = convolution(kernel, **arguments)
        assert explicit_norm(layer, (layer.in_channels, 8, 8)) <= rows["conv"].upper
    transposed = nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, bias=False)
    transposed.weight = nn.Parameter(kernel)
    assert explicit_norm(transposed, (4, 6, 6)) <= rows["conv"].upper
    # the supremum over frequencies, from a grid so fine that it is met up to 1e-4
    symbol = torch.fft.fft2(kernel.double(), s=(256, 256)).permute(2, 3, 0, 1)
    supremum = float(torch.linalg.matrix_norm(symbol, 2).max())
    assert rows["conv"].lower <= supremum * (1 + 1e-4)
    assert supremum <= rows["conv"].upper <= supremum * (1 + 1.2e-3)
    norm = rows["bn"]
    slopes = tensors["bn.weight"].double().abs() / tensors["bn.running_var"].double().sqrt()
    assert (norm.lower, norm.reason) == (0.0, "eps is not known")
    assert float(slopes.max()) <= norm.upper <= float(slopes.max()) * (1 + 1e-9)


def test_weights_without_a_norm_are_skipped_and_the_others_kept(tmp_path):
    tensors = {
        "a.weight": torch.randn(4, 4),
        "b.weight": torch.tensor([[1.0, math.nan], [0.0, 1.0]]),
        "c.weight": torch.tensor([[1.0, math.inf], [0.0, 1.0]]),
        "d.weight": torch.randn(4, 4),
        "e.weight": torch.ones(4, 4, dtype=torch.int8),
        "bn.weight": torch.randn(4),
        "bn.running_var": torch.zeros(4),
        "zero.weight_v": torch.zeros(3, 3, 3),
        "zero.weight_g": torch.ones(3, 1, 1),
        "null.weight": torch.zeros(3, 5),
        "row.weight": torch.tensor([[3.0, 4.0]]),
        "small.weight": torch.eye(3) * 1e-30,
        "large.weight": torch.eye(3) * 1e30,
    }
    folder = stored(tmp_path, tensors)
    report = spectrum(folder)
    require_accounts_for_everything(report, folder)
    rows = rows_of(report)
    assert sorted(rows) == ["a", "d", "large", "null", "row", "small"]
    assert (rows["null"].lower, rows["null"].upper, rows["null"].stable_rank) == (0.0, 0.0, None)
    require_contains(rows["row"], 5.0, rtol=1e-3)
    require_contains(rows["small"], float(torch.tensor(1e-30)), rtol=1e-3)
    require_contains(rows["large"], float(torch.tensor(1e30)), rtol=1e-3)
    reasons = {tensor.name: tensor.reason for tensor in report.skipped}
    assert "not finite" in reasons["b.weight"]
    assert "not finite" in reasons["c.weight"]
    assert "stored as I8" in reasons["e.weight"]
    assert "running_var" in reasons["bn.weight"]
    assert "zero" in reasons["zero.weight_v"]
    assert report.log10_product_of_upper_bounds == -math.inf
    assert json.loads(report.to_json())["totals"]["log10_product_of_upper_bounds_of_linear_layers"] is None


def test_a_checkpoint_without_any_layer(tmp_path):
    report = spectrum(stored(tmp_path, {"step": torch.zeros(3)}))
    assert (report.layers, report.largest) == ([], None)
    assert report.log10_product_of_upper_bounds == 0.0
    assert any("0 layers (none)" in line for line in report.summary())


def test_rows_totals_and_json(tmp_path):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8)
    stirred(GPT2LMHeadModel(config)).save_pretrained(tmp_path)
    report = spectrum(tmp_path)
    by_norm, by_depth = report.sorted_layers("norm"), report.sorted_layers("depth")
    linear = [row for row in by_norm if row.linear]
    assert by_norm[: len(linear)] == linear
    assert [row.upper for row in linear] == sorted((row.upper for row in linear), reverse=True)
    assert by_depth == report.layers
    with pytest.raises(ValueError, match="'norm' or 'depth', got 'name'"):
        report.sorted_layers("name")
    assert report.largest == linear[0]
    product = math.prod(row.upper for row in linear)
    assert report.log10_product_of_upper_bounds == pytest.approx(math.log10(product))
    content = json.loads(report.to_json())
    assert content["totals"]["num_layers"] == len(report.layers)
    assert content["totals"]["largest_linear_layer"] == linear[0].name
    first = content["layers"][0]
    assert first["name"] == "transformer.wte"
    assert (first["lower"], first["upper"]) == (report.layers[0].lower, report.layers[0].upper)
    assert first["relative_width"] <= 1e-3
    assert content["global_lipschitz_bound"] is None
    assert "GPT2LMHeadModel is not known" in content["no_global_lipschitz_bound"]
    assert content["layers"][3]["heads"]["count"] == 6


def test_decimals_keep_the_direction_of_a_bound():
    for value in (1 / 3, 10.6592729, 2.0, 1e-30, 8.55903e10, 0.1):
        assert float(below(value)) <= value <= float(above(value))
        assert float(above(value)) <= value * (1 + 1e-5)
    assert above(0.0) == below(0.0) == "0"


@pytest.mark.parametrize("rtol", [0.0, 1.0, -1e-3, math.nan])
def test_rtol_out_of_range(tmp_path, rtol):
    with pytest.raises(ValueError, match="`rtol` must be between 0 and 1"):
        spectrum(stored(tmp_path, {"a.weight": torch.randn(2, 2)}), rtol=rtol)


def test_progress_counts_layers_and_the_global_bound(tmp_path):
    folder = stored(tmp_path, {f"{index}.weight": torch.randn(3, 3 + index) for index in range(3)})
    steps = []
    spectrum(folder, progress=lambda *step: steps.append(step))
    done = [step[0] for step in steps]
    assert done == sorted(done)
    assert {step[1] for step in steps} == {4}
    assert steps[-2:] == [(3, 4, "global bound"), (4, 4, "")]


def test_no_more_than_a_batch_is_in_memory(tmp_path, monkeypatch):
    folder = stored(tmp_path, {f"{index}.weight": torch.randn(64, 64) for index in range(20)})
    monkeypatch.setattr(spectrum_module, "_BATCH_ENTRIES", 3 * 64 * 64)
    alive, peak, read = weakref.WeakSet(), 0, Checkpoint.tensor

    def watched(self, name):
        nonlocal peak
        tensor = read(self, name)
        alive.add(tensor)
        peak = max(peak, sum(tensor.numel() for tensor in alive))
        return tensor

    monkeypatch.setattr(Checkpoint, "tensor", watched)
    assert len(spectrum(folder).layers) == 20
    # the batch, and one more when the next begins
    assert 64 * 64 <= peak <= 4 * 64 * 64


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data/models")
@pytest.mark.parametrize(("depth", "num_convolutions"), [(20, 19), pytest.param(56, 55, marks=pytest.mark.slow)])
def test_public_cifar_resnets(depth, num_convolutions):
    folder = SHARED / f"cifar10-resnet{depth}"
    report = spectrum(folder)
    require_accounts_for_everything(report, folder)
    kinds = [row.kind for row in report.layers]
    assert (kinds.count("conv"), kinds.count("batch_norm"), kinds.count("linear")) == (
        num_convolutions, num_convolutions, 1,
    )  # fmt: skip
    assert report.skipped == []
    assert all(row.certified and row.relative_width <= 1e-3 for row in report.layers)
    weights = load_file(folder / "model.safetensors")
    for name in ("conv1", "layer3.0.conv1"):
        symbol = torch.fft.fft2(weights[f"{name}.weight"].double(), s=(32, 32)).permute(2, 3, 0, 1)
        norm = float(torch.linalg.matrix_norm(symbol, 2).max())
        assert norm <= rows_of(report)[name].upper <= 1.02 * norm
    assert "no model that transformers knows" in report.no_global_bound
