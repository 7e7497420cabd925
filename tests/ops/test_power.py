# SPDX-License-Identifier: Apache-2.0
"""Power iteration: always below the norm, converging to it, with the exact adjoint and gradient."""

import pytest
import torch

from hf_lip.ops import (
    conv_matrix,
    conv_spectral_norm_estimate,
    exact_conv_norm,
    exact_spectral_norm,
    spectral_norm_estimate,
)
from hf_lip.ops import power as power_module
from hf_lip.ops.geometry import conv_geometry


DOUBLE = torch.float64

CONVOLUTIONS = [
    ((3, 3), (5, 6), 1, None),
    ((3, 3), (7, 8), 2, None),
    ((5, 3), (6, 6), (2, 3), (1, 2)),
    ((2, 4), (7, 5), 1, None),
    ((2, 2), (7, 7), 3, 0),
    ((3, 3), (4, 4), 1, 5),
]


def test_dense_estimate_is_a_lower_bound_and_converges():
    for _ in range(50):
        rows, columns = torch.randint(1, 10, (2,)).tolist()
        weight = torch.randn(rows, columns, dtype=DOUBLE)
        exact = exact_spectral_norm(weight)
        vector = torch.randn(columns, dtype=DOUBLE)
        previous = 0.0
        for n in (0, 1, 3, 10):
            sigma, new = spectral_norm_estimate(weight, vector, n)
            assert previous * (1 - 1e-12) <= sigma.item() <= exact * (1 + 1e-12)
            assert torch.linalg.vector_norm(new).item() == pytest.approx(1, abs=1e-12)
            previous = sigma.item()
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=DOUBLE))
    assert spectral_norm_estimate(weight, torch.ones(3, dtype=DOUBLE), 100)[0].item() == pytest.approx(3, rel=1e-12)
    # one step is far from enough, which is why an estimate is no certificate
    assert spectral_norm_estimate(weight, torch.ones(3, dtype=DOUBLE), 1)[0].item() < 2.95


def test_dense_vector_is_kept_between_calls():
    weight = torch.randn(6, 8, dtype=DOUBLE)
    vector = torch.randn(8, dtype=DOUBLE)
    at_once, expected = spectral_norm_estimate(weight, vector, 5)
    for _ in range(5):
        sigma, vector = spectral_norm_estimate(weight, vector)
    torch.testing.assert_close(sigma, at_once)
    torch.testing.assert_close(vector, expected)


def test_gradient_flows_through_sigma_only():
    weight = torch.randn(4, 5, dtype=DOUBLE, requires_grad=True)
    sigma, vector = spectral_norm_estimate(weight, torch.randn(5, dtype=DOUBLE), 3)
    assert not vector.requires_grad
    sigma.backward()
    left = (weight @ vector / sigma).detach()
    torch.testing.assert_close(weight.grad, torch.outer(left, vector))

    kernel = torch.randn(2, 3, 3, 3, dtype=DOUBLE, requires_grad=True)
    fixed = torch.randn(3, 5, 5, dtype=DOUBLE)
    assert torch.autograd.gradcheck(
        lambda k: conv_spectral_norm_estimate(k, fixed, padding_mode="circular", num_iterations=0)[0], (kernel,)
    )


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize(("kernel", "size", "stride", "padding"), CONVOLUTIONS)
def test_conv_operator_and_adjoint_are_the_explicit_matrix(mode, kernel, size, stride, padding):
    weight = torch.randn(2, 3, *kernel, dtype=DOUBLE)
    matrix = conv_matrix(weight, size, padding_mode=mode, padding=padding, stride=stride)
    geometry = conv_geometry(kernel, size, padding_mode=mode, padding=padding, stride=stride)
    circular = mode == "circular"
    x = torch.randn(3, *size, dtype=DOUBLE)
    if circular or geometry.pads[0][0] == geometry.pads[0][1]:
        forward = power_module._conv(x, weight, geometry, circular)
        torch.testing.assert_close(forward.flatten(), matrix @ x.flatten())
    y = torch.randn(2, *geometry.output_size, dtype=DOUBLE)
    adjoint = power_module._conv_adjoint(y, weight, geometry, circular)
    torch.testing.assert_close(adjoint.flatten(), matrix.T @ y.flatten())


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize(("kernel", "size", "stride", "padding"), CONVOLUTIONS)
def test_conv_estimate_converges_to_the_operator_norm_from_below(mode, kernel, size, stride, padding):
    weight = torch.randn(2, 3, *kernel, dtype=DOUBLE)
    exact = exact_conv_norm(weight, size, padding_mode=mode, padding=padding, stride=stride)
    start = torch.randn(3, *size, dtype=DOUBLE)
    options = {"padding_mode": mode, "padding": padding, "stride": stride}
    for n in (1, 10):
        sigma, vector = conv_spectral_norm_estimate(weight, start, **options, num_iterations=n)
        assert 0 < sigma.item() <= exact * (1 + 1e-12)
        assert vector.shape == start.shape
    sigma, _ = conv_spectral_norm_estimate(weight, start, **options, num_iterations=600)
    assert sigma.item() == pytest.approx(exact, rel=1e-2)


def test_zero_weights_and_zero_vectors_stay_finite():
    weight = torch.zeros(3, 4, requires_grad=True)
    sigma, vector = spectral_norm_estimate(weight, torch.zeros(4), 2)
    sigma.backward()
    assert sigma.item() == 0.0
    torch.testing.assert_close(vector, torch.full((4,), 0.5))
    assert torch.equal(weight.grad, torch.zeros(3, 4))
    # tiny and huge vectors neither vanish nor overflow
    for scale in (1e-30, 1e30):
        sigma, _ = spectral_norm_estimate(torch.eye(4), torch.ones(4) * scale)
        assert sigma.item() == pytest.approx(1, rel=1e-6)


def test_half_precision_is_computed_in_float32():
    weight = torch.randn(4, 5).bfloat16()
    sigma, vector = spectral_norm_estimate(weight, torch.randn(5), 20)
    assert sigma.dtype == vector.dtype == torch.float32
    assert sigma.item() == pytest.approx(exact_spectral_norm(weight), rel=1e-2)


def test_wrong_arguments_are_errors():
    kernel = torch.ones(2, 3, 3, 3)
    cases = [
        (lambda: spectral_norm_estimate(torch.ones(2, 3), torch.ones(2)), "vector"),
        (lambda: spectral_norm_estimate(torch.ones(3), torch.ones(3)), "weight"),
        (lambda: spectral_norm_estimate(torch.ones(2, 3), torch.ones(3), -1), "num_iterations"),
        (lambda: conv_spectral_norm_estimate(kernel, torch.ones(2, 4, 4), padding_mode="zeros"), "vector"),
        (lambda: conv_spectral_norm_estimate(kernel, torch.ones(3, 4), padding_mode="zeros"), "vector"),
        (lambda: conv_spectral_norm_estimate(kernel[0], torch.ones(3, 4, 4), padding_mode="zeros"), "weight"),
        (lambda: conv_spectral_norm_estimate(kernel, torch.ones(3, 4, 4), padding_mode="reflect"), "reflect"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
