# SPDX-License-Identifier: Apache-2.0
"""The spectral norm of every kind of layer, against the layer itself applied to unit vectors."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P
from transformers.pytorch_utils import Conv1D

from hf_lip import spectral_norm, spectral_norms
from hf_lip.ops import exact_spectral_norm
from hf_lip.ops.interval import SpectralNorm


DOUBLE = torch.float64


def operator_of(layer: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    """The linear part of a layer on inputs (channels, *sizes) as a matrix, by applying it to unit vectors."""
    layer = layer.double().eval()
    count = math.prod(shape)
    with torch.no_grad():
        images = torch.eye(count, dtype=DOUBLE).reshape(count, *shape)
        offset = layer(torch.zeros(1, *shape, dtype=DOUBLE))
        return (layer(images) - offset).flatten(1).T


def check(layer: nn.Module, shape: tuple[int, ...], input_size=None, rtol=1e-3) -> SpectralNorm:
    # parametrised weights are computed anew in each dtype
    found = spectral_norm(layer.double().eval(), input_size, rtol=rtol)
    exact = torch.linalg.svdvals(operator_of(layer, shape))[0].item()
    assert found.certified
    assert found.lower <= exact * (1 + 1e-13)
    assert found.upper >= exact * (1 - 1e-13)
    return found


LINEAR = [
    pytest.param(lambda: nn.Linear(30, 20), (30,), id="Linear"),
    pytest.param(lambda: nn.Linear(3, 40, bias=False), (3,), id="Linear without bias"),
    pytest.param(lambda: Conv1D(20, 30), (30,), id="Conv1D of transformers"),
    pytest.param(lambda: parametrizations.spectral_norm(nn.Linear(12, 9)), (12,), id="spectral norm"),
    pytest.param(lambda: parametrizations.weight_norm(nn.Linear(12, 9)), (12,), id="weight norm"),
    pytest.param(lambda: parametrizations.orthogonal(nn.Linear(12, 12)), (12,), id="orthogonal"),
]
CONVOLUTIONS = [
    pytest.param(lambda: nn.Conv1d(3, 4, 5, padding=2), (3, 11), id="Conv1d"),
    pytest.param(lambda: nn.Conv1d(2, 4, 5, stride=3, padding=4, dilation=2, groups=2), (2, 17), id="Conv1d all"),
    pytest.param(lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 7, 6), id="Conv2d"),
    pytest.param(lambda: nn.Conv2d(3, 4, 3), (3, 7, 6), id="Conv2d without padding"),
    pytest.param(lambda: nn.Conv2d(3, 4, (3, 2), padding="same"), (3, 7, 6), id="same"),
    pytest.param(lambda: nn.Conv2d(3, 4, (4, 2), padding="same", dilation=(1, 3)), (3, 7, 6), id="same, dilation"),
    pytest.param(
        lambda: nn.Conv2d(3, 4, (4, 3), padding="same", padding_mode="circular"), (3, 7, 6), id="same circle"
    ),
    pytest.param(
        lambda: nn.Conv2d(3, 4, (4, 3), padding="same", padding_mode="reflect"), (3, 7, 6), id="same reflect"
    ),
    pytest.param(lambda: nn.Conv2d(3, 4, 3, padding="valid"), (3, 7, 6), id="valid"),
    pytest.param(lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4, stride=2), (4, 7, 6), id="depthwise"),
    pytest.param(lambda: nn.Conv2d(3, 8, 4, stride=4), (3, 12, 8), id="patches"),
    pytest.param(lambda: nn.Conv2d(3, 8, 1, stride=2), (3, 6, 5), id="1x1"),
    *(
        pytest.param(
            lambda mode=mode: nn.Conv2d(2, 3, (3, 5), padding=(1, 2), padding_mode=mode),
            (2, 6, 5),
            id=f"Conv2d {mode}",
        )
        for mode in ("circular", "reflect", "replicate")
    ),
    pytest.param(lambda: nn.Conv3d(2, 3, (2, 3, 1), padding=(1, 1, 0), stride=(1, 2, 1)), (2, 3, 4, 3), id="Conv3d"),
    pytest.param(lambda: nn.Conv3d(2, 2, 2, padding=1, padding_mode="replicate"), (2, 3, 2, 3), id="Conv3d replicate"),
    pytest.param(lambda: nn.ConvTranspose1d(3, 2, 4, stride=3, padding=1, output_padding=2), (3, 6), id="T1"),
    pytest.param(
        lambda: nn.ConvTranspose1d(2, 4, 3, dilation=3, output_padding=2, groups=2), (2, 9), id="T1 dilation"
    ),
    pytest.param(lambda: nn.ConvTranspose2d(3, 2, 4, stride=2, padding=1), (3, 4, 5), id="T2"),
    pytest.param(
        lambda: nn.ConvTranspose2d(4, 2, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), groups=2),
        (4, 4, 3),
        id="T2 all",
    ),
    pytest.param(lambda: nn.ConvTranspose3d(2, 3, 2, stride=2, output_padding=1), (2, 2, 3, 2), id="T3"),
    pytest.param(
        lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3, padding=1)), (3, 5, 5), id="parametrised Conv2d"
    ),
]


@pytest.mark.parametrize(("make", "shape"), LINEAR)
def test_linear_layers(make, shape):
    found = check(make(), shape, rtol=1e-6)
    assert found.relative_width <= 1e-6
    assert found.reason is None


@pytest.mark.parametrize("path", ["explicit", "frequencies"])
@pytest.mark.parametrize(("make", "shape"), CONVOLUTIONS)
def test_convolutions(make, shape, path, monkeypatch):
    if path == "frequencies":
        monkeypatch.setattr("hf_lip.ops.conv_interval._EXPLICIT_SIDE", 0)
    layer = make()
    found = check(layer, shape, shape[1:])
    if path == "explicit":
        assert found.relative_width <= 1e-3
    else:
        assert found.relative_width <= 1e-3 or found.reason
    if layer.padding_mode != "circular" or max(layer.stride) == 1:
        everywhere = spectral_norm(layer)
        assert everywhere.upper >= found.lower


def test_embedding():
    layer = nn.Embedding(50, 8)
    exact = exact_spectral_norm(layer.weight)
    found = spectral_norm(layer)
    assert found.lower <= exact <= found.upper <= exact * 1.001


def test_keywords_read_from_a_layer_are_those_of_its_weight():
    layer = nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 3), dilation=(1, 2), groups=2)
    keywords = {"stride": (2, 1), "padding": (1, 3), "dilation": (1, 2), "groups": 2}
    assert spectral_norm(layer, 9) == spectral_norm(layer.weight, 9, **keywords)
    transposed = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
    keywords = {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2, "transposed": True}
    assert spectral_norm(transposed, 5) == spectral_norm(transposed.weight, 5, **keywords)


def test_batch_norm_in_eval_mode():
    for layer, shape in (
        (nn.BatchNorm1d(5), (5,)),
        (nn.BatchNorm2d(5, eps=1e-2), (5, 2, 3)),
        (nn.BatchNorm3d(4, affine=False), (4, 1, 2, 2)),
    ):
        with torch.no_grad():
            layer.running_mean.normal_()
            layer.running_var.uniform_(1e-3, 3)
            if layer.affine:
                layer.weight.normal_()
                layer.bias.normal_()
        found = check(layer, shape)
        assert found.method == "formula"
        assert found.relative_width < 1e-14
    with torch.no_grad():
        layer.running_var[1] = math.nan
    with pytest.raises(ValueError, match="running_var"):
        spectral_norm(layer)
    with pytest.raises(ValueError, match="running statistics"):
        spectral_norm(nn.BatchNorm2d(3, track_running_stats=False))


def largest_slope(layer: nn.Module, shape: tuple[int, ...]) -> float:
    """The norm of the Jacobian of a normalisation where it is steepest: at 0."""
    layer = layer.double()
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x[None])[0], torch.zeros(shape, dtype=DOUBLE))
    return torch.linalg.svdvals(jacobian.reshape(math.prod(shape), -1))[0].item()


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        pytest.param(lambda: nn.LayerNorm(12), (12,), id="LayerNorm"),
        pytest.param(lambda: nn.LayerNorm((3, 4), eps=1e-3), (3, 4), id="LayerNorm of two axes"),
        pytest.param(lambda: nn.LayerNorm(12, elementwise_affine=False), (12,), id="LayerNorm without weight"),
        pytest.param(lambda: nn.LayerNorm(1), (1,), id="LayerNorm of one feature"),
        pytest.param(lambda: nn.GroupNorm(2, 6), (6, 2, 2), id="GroupNorm"),
        pytest.param(lambda: nn.GroupNorm(6, 6), (6, 3), id="GroupNorm of single channels"),
        pytest.param(lambda: nn.RMSNorm(12, eps=1e-6), (12,), id="RMSNorm"),
        pytest.param(lambda: LlamaRMSNorm(12), (12,), id="LlamaRMSNorm"),
        pytest.param(lambda: GemmaRMSNorm(12), (12,), id="GemmaRMSNorm, which adds 1 to its weight"),
    ],
)
def test_normalisations_by_their_global_constant(make, shape):
    layer = make()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    found = spectral_norm(layer)
    steepest = largest_slope(layer, shape)
    # the slope at 0 shows that the constant is not too small
    assert found.upper >= steepest * (1 - 1e-6)
    assert found.lower <= steepest * (1 + 1e-6)
    assert found.method == "formula"
    # and no pair of points is torn apart further
    layer = layer.double()
    eps = getattr(layer, "eps", None) or layer.variance_epsilon
    points = torch.randn(2, 200, *shape, dtype=DOUBLE) * math.sqrt(eps)
    with torch.no_grad():
        moved = (layer(points[0]) - layer(points[1])).flatten(1).norm(dim=1)
    assert (moved <= found.upper * (points[0] - points[1]).flatten(1).norm(dim=1) * (1 + 1e-6)).all()


def test_normalisations_that_have_no_constant():
    with pytest.raises(ValueError, match="eps"):
        spectral_norm(nn.LayerNorm(4, eps=0.0))
    # None stands for the precision of whatever dtype comes in
    with pytest.raises(ValueError, match="eps"):
        spectral_norm(nn.RMSNorm(4))
    layer = nn.LayerNorm(4)
    with torch.no_grad():
        layer.weight[2] = math.inf
    with pytest.raises(ValueError, match="not finite"):
        spectral_norm(layer)
    with torch.no_grad():
        layer.weight.zero_()
    assert spectral_norm(layer).upper == 0.0


@pytest.mark.parametrize(
    "layer", [NemotronLayerNorm1P(6), ConvNextLayerNorm(6)], ids=lambda layer: type(layer).__name__
)
def test_classes_with_a_forward_of_their_own_are_not_taken_for_their_parent(layer):
    # the first adds 1 to its weight
    with pytest.raises(TypeError, match=type(layer).__name__):
        spectral_norm(layer)


def test_classes_that_only_sound_like_a_normalisation_are_refused():
    class OddRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.eps = 1e-6

        def forward(self, x):
            return 3 * self.weight * x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()

    with pytest.raises(TypeError, match="no root-mean-square normalisation"):
        spectral_norm(OddRMSNorm())


def test_low_rank_pairs():
    left, right = torch.randn(40, 4), torch.randn(4, 60)
    exact = exact_spectral_norm(left.double() @ right.double())
    found = spectral_norm((left, right))
    assert found.method == "low rank cholesky"
    assert found.lower <= exact <= found.upper <= exact * 1.001


def many_items():
    layers = [nn.Linear(7, 5) for _ in range(5)] + [nn.Linear(5, 7), nn.Linear(300, 290), Conv1D(6, 7)]
    layers += [nn.Embedding(7, 5), torch.randn(5, 7), torch.zeros(5, 7), (torch.randn(5, 2), torch.randn(2, 7))]
    items = [(layer, None, {}) for layer in layers]
    items += [(nn.Conv2d(2, 3, 3, padding=1), size, {}) for size in (5, 6, None)]
    items += [(torch.randn(4, 2, 3), 9, {"stride": 2, "padding": 1}), (nn.LayerNorm(5), None, {})]
    return items


@pytest.mark.parametrize("rtol", [1e-9, 1e-3])
def test_stacked_is_looped(rtol):
    items = many_items()
    done = []
    stacked = spectral_norms(items, rtol=rtol, progress=done.append)
    assert sum(done) == len(items) == len(stacked)
    for found, (item, size, keywords) in zip(stacked, items):
        looped = spectral_norm(item, size, rtol=rtol, **keywords)
        assert (found.method, found.certified, found.reason) == (looped.method, looped.certified, looped.reason)
        # two intervals of the same norm
        assert found.lower <= looped.upper
        assert looped.lower <= found.upper
        assert found.relative_width <= looped.relative_width + rtol
    assert spectral_norms([]) == []


def test_stacks_larger_than_a_batch(monkeypatch):
    weights = [torch.randn(6, 9) for _ in range(23)]
    expected = [spectral_norm(weight, rtol=1e-9) for weight in weights]
    monkeypatch.setattr("hf_lip.spectral.norms._STACKED_ENTRIES", 5 * 36)
    done = []
    found = spectral_norms([(weight, None, {}) for weight in weights], rtol=1e-9, progress=done.append)
    assert done == [5, 5, 5, 5, 3]
    assert [norm.upper for norm in found] == pytest.approx([norm.upper for norm in expected], rel=1e-8)


def test_one_bad_item_of_many_is_named_by_its_error():
    good = torch.ones(3, 4)
    with pytest.raises(ValueError, match="not finite"):
        spectral_norms([(good, None, {}), (good * math.nan, None, {})])
    with pytest.raises(TypeError, match="floating point"):
        spectral_norms([(good, None, {}), (good.long(), None, {})])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_without_a_proof_by_gram_iteration(dtype):
    for weight, size, keywords in (
        (torch.randn(20, 30).to(dtype), None, {}),
        (torch.randn(4, 3, 3, 3).to(dtype), 8, {"padding_mode": "circular"}),
        (torch.randn(4, 3, 5).to(dtype), 9, {"padding_mode": "circular", "dilation": 2}),
        (torch.randn(4, 2, 3, 3).to(dtype), 8, {"padding_mode": "zeros", "groups": 2}),
        (torch.randn(4, 3, 3, 3).to(dtype), 6, {"padding_mode": "replicate"}),
        (torch.randn(4, 3, 3, 3).to(dtype), 6, {"transposed": True, "stride": 2, "output_padding": 1}),
    ):
        found = spectral_norm(weight, size, certified=False, **keywords)
        proved = spectral_norm(weight, size, **keywords)
        assert not found.certified
        assert "gram iteration" in found.method
        assert found.upper >= proved.lower * (1 - 1e-5)
        assert found.lower <= proved.upper * (1 + 1e-5)
        assert found.reason or found.relative_width <= 1e-3


def test_no_gradient_and_no_change():
    layer = nn.Conv2d(3, 4, 3, padding=1)
    copy = layer.weight.detach().clone()
    state = torch.get_rng_state()
    found = spectral_norm(layer, 6)
    assert isinstance(found.lower, float)
    assert isinstance(found.upper, float)
    assert layer.weight.grad is None
    assert torch.equal(layer.weight, copy)
    assert torch.equal(torch.get_rng_state(), state)


def bad_tensors():
    good = torch.ones(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.quantize_per_tensor(good, 0.1, 0, torch.qint8)
    return [
        (good.to("meta"), TypeError, "meta device"),
        (quantised, TypeError, "Dequantise"),
        (good.to(torch.int8), TypeError, "Dequantise"),
        (good.to(torch.float8_e4m3fn), TypeError, "Dequantise"),
        (good.to(torch.complex64), TypeError, "floating point"),
        (good.bool(), TypeError, "floating point"),
        (good.to_sparse(), TypeError, "to_dense"),
        (good * math.nan, ValueError, "not finite"),
        (good * math.inf, ValueError, "not finite"),
        (good[:0], ValueError, "non-empty"),
        (good[:, :0], ValueError, "non-empty"),
    ]


@pytest.mark.parametrize("certified", [True, False])
@pytest.mark.parametrize(("weight", "error", "message"), bad_tensors())
def test_bad_tensors_are_errors(weight, error, message, certified):
    with pytest.raises(error, match=message):
        spectral_norm(weight, certified=certified)
    if weight.numel() and not weight.is_sparse and not weight.is_quantized:
        kernel = weight[..., None].expand(3, 4, 3)
        with pytest.raises(error, match=message):
            spectral_norm(kernel, 5, certified=certified)


@pytest.mark.parametrize("certified", [True, False])
def test_good_tensors_of_unusual_make(certified):
    for weight in (
        torch.zeros(3, 4),
        torch.zeros(1, 4),
        torch.randn(1, 9),
        torch.randn(9, 1),
        torch.randn(1, 1),
        torch.randn(6, 8).T,
        torch.randn(12, 8)[::2],
        torch.randn(5).expand(4, 5),
        torch.randn(4, 5) * 1e-30,
        torch.randn(4, 5) * 1e30,
        torch.randn(4, 5, dtype=DOUBLE) * 1e-300,
    ):
        exact = exact_spectral_norm(weight)
        found = spectral_norm(weight, certified=certified)
        assert found.lower <= exact * (1 + 1e-5)
        assert found.upper >= exact * (1 - 1e-5)
        assert found.relative_width <= 1e-3 + 1e-5
    zero = spectral_norm(torch.zeros(3, 2, 3, 3), 5, certified=certified)
    assert (zero.lower, zero.upper) == (0.0, 0.0)


def test_wrong_arguments_are_errors():
    kernel, conv = torch.ones(2, 3, 3, 3), nn.Conv2d(3, 2, 3)
    cases = [
        (lambda: spectral_norm(conv, 5, padding=1), ValueError, "padding must be left out"),
        (lambda: spectral_norm(conv, 5, stride=2, groups=3), ValueError, "stride, groups must be left out"),
        (lambda: spectral_norm(nn.ReLU()), TypeError, "ReLU has no spectral norm"),
        (lambda: spectral_norm(nn.InstanceNorm2d(3)), TypeError, "InstanceNorm2d has no spectral norm"),
        (lambda: spectral_norm([torch.ones(2, 2)]), TypeError, "a layer, a tensor or a pair"),
        (lambda: spectral_norm((torch.ones(2, 2),)), TypeError, "a layer, a tensor or a pair"),
        (lambda: spectral_norm((torch.ones(2, 2),) * 3), TypeError, "a layer, a tensor or a pair"),
        (lambda: spectral_norm(torch.ones(2)), ValueError, "matrix or a kernel"),
        (lambda: spectral_norm(torch.ones(2, 2, 2, 2, 2, 2), 4), ValueError, "matrix or a kernel"),
        (lambda: spectral_norm(kernel, 5, padding_mode="mirror"), ValueError, "padding_mode must be one of"),
        (lambda: spectral_norm(kernel, 5, groups=3), ValueError, "groups must divide"),
        (lambda: spectral_norm(kernel, 0), ValueError, "input_size"),
        (lambda: spectral_norm(kernel, (5, 5, 5)), ValueError, "input_size"),
        (lambda: spectral_norm(kernel, 2, padding=0), ValueError, "no output"),
        (lambda: spectral_norm(kernel, 5, rtol=1.5), ValueError, "rtol"),
        (
            lambda: spectral_norm(kernel, 5, transposed=True, padding_mode="reflect"),
            ValueError,
            "padding_mode='zeros'",
        ),
        (lambda: spectral_norm(kernel, 5, transposed=True, output_padding=1), ValueError, "output_padding"),
        (lambda: spectral_norm(kernel, 1, transposed=True, padding=2), ValueError, "no output pixel"),
        (lambda: spectral_norm(kernel, certified=False), ValueError, "needs an input_size"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


def test_output_that_no_input_reaches():
    layer = nn.ConvTranspose1d(1, 1, 1, padding=1, output_padding=2, dilation=3)
    assert layer(torch.ones(1, 1, 1)).shape == (1, 1, 1)
    with pytest.raises(ValueError, match="No pixel of input_size"):
        spectral_norm(layer, 1)
