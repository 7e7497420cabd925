# SPDX-License-Identifier: Apache-2.0
"""One set of checks over a table of layers: no Jacobian, and no attack, may exceed the certified bound."""

import copy

import pytest
import torch
from torch import nn

from hf_lip.layers import (
    AOLConv2d,
    AOLLinear,
    CPLConv2d,
    CPLLinear,
    SLLConv2d,
    SLLLinear,
    SRConv2d,
    SRLinear,
)
from hf_lip.ops.power import spectral_norm_estimate


# name: (constructor, shape of one input)
CASES = {
    "cpl-dense-thin": (lambda: CPLLinear(24, 5), (24,)),
    "cpl-dense-wide": (lambda: CPLLinear(12, 40, activation="tanh"), (12,)),
    "cpl-dense-power": (lambda: CPLLinear(70, 66), (70,)),
    "cpl-conv-zeros": (lambda: CPLConv2d(4, 5, 6), (4, 6, 6)),
    "cpl-conv-circular": (lambda: CPLConv2d(3, 3, 5, padding_mode="circular"), (3, 5, 5)),
    "cpl-conv-5x5": (lambda: CPLConv2d(2, 3, (6, 7), kernel_size=5, activation="leaky_relu"), (2, 6, 7)),
    "sll-dense": (lambda: SLLLinear(20, 16), (20,)),
    "sll-dense-sr": (lambda: SLLLinear(16, 24, num_iterations=3, activation="sigmoid"), (16,)),
    "sll-conv-zeros": (lambda: SLLConv2d(4, 5, 6), (4, 6, 6)),
    "sll-conv-circular": (lambda: SLLConv2d(3, 4, 5, padding_mode="circular", activation="softplus"), (3, 5, 5)),
    "sll-conv-sr": (lambda: SLLConv2d(3, 4, 5, num_iterations=2), (3, 5, 5)),
    "aol-dense": (lambda: AOLLinear(18, 12), (18,)),
    "aol-conv-zeros": (lambda: AOLConv2d(3, 4, 6), (3, 6, 6)),
    "aol-conv-circular": (lambda: AOLConv2d(4, 2, 5, padding_mode="circular"), (4, 5, 5)),
    "sr-dense": (lambda: SRLinear(12, 18), (12,)),
    "sr-dense-input": (lambda: SRLinear(12, 9, num_iterations=4, side="input"), (12,)),
    "sr-conv-zeros": (lambda: SRConv2d(3, 4, 6), (3, 6, 6)),
    "sr-conv-stride": (lambda: SRConv2d(3, 4, 6, stride=2, num_iterations=2), (3, 6, 6)),
    "sr-conv-circular": (lambda: SRConv2d(4, 3, 6, padding_mode="circular", stride=3), (4, 6, 6)),
}


def trained_like(make) -> nn.Module:
    """A layer with generic weights of uneven rows, in evaluation mode."""
    layer = make()
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight))
        layer.weight.mul_(torch.rand(layer.weight.shape[0]).view(-1, *[1] * (layer.weight.ndim - 1)) * 3)
        layer.bias.copy_(torch.randn_like(layer.bias))
    return layer.eval()


def jacobian_norm(layer: nn.Module, x: torch.Tensor) -> float:
    jacobian = torch.autograd.functional.jacobian(lambda y: layer(y[None])[0], x)
    return torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), 2).item()


def attacked_ratio(layer: nn.Module, shape: tuple[int, ...], steps: int = 60) -> float:
    """Largest |f(x) - f(y)| / |x - y| found by gradient ascent on pairs, float64."""
    x = torch.randn(8, *shape, dtype=torch.float64).requires_grad_()
    y = (x.detach() + 0.1 * torch.randn_like(x)).requires_grad_()
    optimizer = torch.optim.Adam([x, y], lr=0.05)
    best = 0.0
    for _ in range(steps):
        ratio = (layer(x) - layer(y)).flatten(1).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
        best = max(best, ratio.max().item())
        optimizer.zero_grad()
        (-ratio.log().sum()).backward()
        optimizer.step()
    return best


@pytest.mark.parametrize("name", CASES)
def test_no_jacobian_and_no_attack_exceeds_the_bound(name):
    make, shape = CASES[name]
    layer = trained_like(make)
    bound = layer.lipschitz_bound()
    assert bound <= 1.0 + 1e-6
    norms = [jacobian_norm(layer, scale * torch.randn(*shape, dtype=torch.float64)) for scale in (0.1, 1.0, 10.0)]
    assert max(norms) <= bound * (1 + 1e-12)
    assert attacked_ratio(layer, shape) <= bound * (1 + 1e-9)


@pytest.mark.parametrize("name", CASES)
def test_bound_is_not_vacuous(name):
    # the identity or an isometry nearby: the bound of a linear layer has to be close to what its matrix does
    make, shape = CASES[name]
    layer = trained_like(make)
    if name.startswith(("aol", "sr")):
        exact = jacobian_norm(layer, torch.randn(*shape, dtype=torch.float64))
        assert layer.lipschitz_bound() <= exact * (1.35 if "zeros" in name or "stride" in name else 1 + 1e-9)
    else:
        assert layer.lipschitz_bound() == 1.0


@pytest.mark.parametrize("name", CASES)
def test_bound_follows_weights_that_change_after_freezing(name):
    make, shape = CASES[name]
    layer = trained_like(make)
    before = layer.lipschitz_bound()
    with torch.no_grad():
        layer.weight.mul_(4.0)
    after = layer.lipschitz_bound()
    assert after > before * 1.4
    assert jacobian_norm(layer, 10 * torch.randn(*shape, dtype=torch.float64)) <= after * (1 + 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_training_mode_is_frozen_again_on_the_way_to_evaluation(name):
    make, shape = CASES[name]
    layer = trained_like(make).train()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(4, *shape)).square().sum().backward()
        optimizer.step()
        # asking in between must not make the layer believe that it is up to date
        layer.lipschitz_bound()
    layer.eval()
    assert layer.lipschitz_bound() <= 1.0 + 1e-6
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("name", CASES)
def test_reload_deepcopy_and_missing_keys(name):
    make, shape = CASES[name]
    layer = trained_like(make)
    x = torch.randn(2, *shape)
    expected = layer(x)
    other = make().eval()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), expected)
    assert torch.equal(other.rescaling, layer.rescaling)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert copy.deepcopy(layer).lipschitz_bound() == layer.lipschitz_bound()
    state = layer.state_dict()
    del state["rescaling"]
    with pytest.raises(RuntimeError, match="rescaling"):
        make().load_state_dict(state)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bound_holds_for_weights_as_cast(name, dtype):
    make, shape = CASES[name]
    layer = trained_like(make).to(dtype)
    bound = layer.lipschitz_bound()
    norms = [jacobian_norm(layer, scale * torch.randn(*shape, dtype=torch.float64)) for scale in (1.0, 10.0)]
    assert max(norms) <= bound * (1 + 1e-12)
    assert bound <= 1.02
    layer.freeze()
    assert layer.lipschitz_bound() <= 1.0 + 1e-6


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_compiles_without_graph_breaks(name, training):
    make, shape = CASES[name]
    layer = trained_like(make).train(training)
    x = torch.randn(2, *shape)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    expected = copy.deepcopy(layer)(x)
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpl-conv-zeros", "sll-dense", "sr-conv-zeros"])
def test_compiles_with_inductor(name):
    make, shape = CASES[name]
    layer = trained_like(make)
    x = torch.randn(2, *shape)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))


@pytest.mark.parametrize("name", CASES)
def test_zero_weight_is_harmless(name):
    make, shape = CASES[name]
    layer = make()
    with torch.no_grad():
        layer.weight.zero_()
    x = torch.randn(2, *shape)
    out = layer(x)
    out.sum().backward()
    assert out.isfinite().all()
    assert layer.weight.grad.isfinite().all()
    layer.eval()
    assert layer(x).isfinite().all()
    assert layer.lipschitz_bound() <= 1.0


@pytest.mark.parametrize("name", CASES)
def test_non_finite_weights_are_refused(name):
    make, _ = CASES[name]
    layer = make()
    with torch.no_grad():
        layer.weight.view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        layer.eval()


@pytest.mark.parametrize("name", CASES)
def test_float64_evaluation_stays_inside_its_error_bound(name):
    # float32 with its own unit roundoff is the same analysis, 2^29 times larger
    make, shape = CASES[name]
    layer = trained_like(make)
    x = torch.rand(64, *shape, dtype=torch.float64).float()
    norm = x.double().flatten(1).norm(dim=1).max().item()
    out_norm, error = layer.propagate(norm, 0.0, layer.lipschitz_bound())
    exact = layer(x.double())
    measured = (layer(x).double() - exact).flatten(1).norm(dim=1).max().item()
    assert 0 < error < 1e-10
    assert measured <= error * 2.0**29
    assert exact.flatten(1).norm(dim=1).max().item() <= out_norm


def test_cpl_with_one_power_iteration_reports_the_stretch():
    layer = trained_like(lambda: CPLLinear(40, 40))
    torch.manual_seed(1)
    sigma, _ = spectral_norm_estimate(layer.weight.detach(), torch.randn(40), 1)
    layer.rescaling.fill_(sigma.item() ** 2)
    bound = layer.lipschitz_bound()
    exact = torch.linalg.matrix_norm(layer.weight.double(), 2).item()
    assert bound == pytest.approx(2 * exact**2 / layer.rescaling[0].item() - 1, rel=1e-9)
    assert bound > 1.05
    # all units on: the Jacobian attains the bound, so a certificate of 1 would be false
    with torch.no_grad():
        layer.bias.fill_(1e6)
    assert jacobian_norm(layer, torch.zeros(40, dtype=torch.float64)) == pytest.approx(bound, rel=1e-6)


@pytest.mark.parametrize("make", [lambda: SLLLinear(6, 5), lambda: SLLConv2d(3, 5, 6)], ids=["dense", "conv"])
def test_q_acts_and_keeps_the_bound(make):
    layer = make().train()
    with torch.no_grad():
        layer.log_q.zero_()
        plain = layer.training_rescaling()
        layer.log_q.copy_(torch.linspace(-2, 2, 5))
        weighted = layer.training_rescaling()
        layer.log_q.fill_(1.7)
        constant = layer.training_rescaling()
    torch.testing.assert_close(constant, plain)
    assert not torch.allclose(weighted, plain, rtol=0.05)
    with torch.no_grad():
        layer.log_q.copy_(torch.linspace(-2, 2, 5))
    assert layer.eval().lipschitz_bound() == 1.0
    layer.train()
    layer.training_rescaling().sum().backward()
    assert layer.log_q.grad.abs().max() > 1e-2


def test_sll_formula_by_hand():
    layer = SLLLinear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        layer.bias.zero_()
        layer.log_q.copy_(torch.tensor([0.0, 2.0]).log1p())
    # G = [[1, 1], [1, 2]], q = (1, 3): T = (1 + 3, 1/3 + 2)
    torch.testing.assert_close(layer.training_rescaling(), torch.tensor([4.0, 7.0 / 3.0]))
    # K x = (1, 3): y = x - 2 K^T (1/4, 9/7)
    expected = torch.tensor([[1.0 - 2 * (1 / 4 + 9 / 7), 2.0 - 2 * 9 / 7]])
    torch.testing.assert_close(layer.eval()(torch.tensor([[1.0, 2.0]])), expected, rtol=1e-5, atol=1e-5)


def test_adjoint_of_every_convolution():
    for name in ("cpl-conv-zeros", "cpl-conv-circular", "cpl-conv-5x5"):
        make, shape = CASES[name]
        layer = make()
        x = torch.randn(1, *shape, dtype=torch.float64)
        weight = layer.weight.detach().double()
        out = layer.apply_operator(x, weight, None)
        y = torch.randn_like(out)
        torch.testing.assert_close((out * y).sum(), (x * layer.apply_adjoint(y, weight)).sum())


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_stretching_padding_is_refused(mode):
    with pytest.raises(ValueError, match="padding_mode"):
        CPLConv2d(2, 2, 6, padding_mode=mode)


def test_other_image_size_is_refused():
    with pytest.raises(ValueError, match="certified for images of 6 x 6"):
        CPLConv2d(2, 2, 6)(torch.randn(1, 2, 8, 8))


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: CPLLinear(4, 4, activation="maxmin"), "activation"),
        (lambda: CPLConv2d(2, 2, 6, kernel_size=4), "kernel_size"),
        (lambda: SRConv2d(2, 2, 6, stride=0), "stride"),
        (lambda: SRLinear(2, 2, num_iterations=0), "num_iterations"),
        (lambda: SLLConv2d(2, 2, 2, padding_mode="circular"), "circular"),
    ],
)
def test_bad_arguments_are_named(make, argument):
    with pytest.raises(ValueError, match=argument):
        make()
