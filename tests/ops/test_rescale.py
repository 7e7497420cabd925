# SPDX-License-Identifier: Apache-2.0
"""Spectral rescaling against explicit operators: 1-Lipschitz, equal to AOL at one step, weights q that act."""

import pytest
import torch

from hf_lip.ops import (
    certified_conv_norm,
    certified_spectral_norm,
    exact_conv_norm,
    exact_spectral_norm,
    rescaling_factors,
)
from hf_lip.ops import rescale as rescale_module


DOUBLE = torch.float64


def rescaled(weight: torch.Tensor, n: int, side: str, q: torch.Tensor | None = None) -> torch.Tensor:
    factors = rescaling_factors(weight, n, side=side, q=q)
    axis = 0 if side == "output" else 1
    assert factors.shape == (weight.shape[axis],)
    assert (factors > 0).all()
    shape = [1] * weight.ndim
    shape[axis] = -1
    return weight / factors.reshape(shape)


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("with_q", [False, True])
def test_dense_rescaling_is_1_lipschitz(side, with_q):
    for index in range(100):
        rows, columns = torch.randint(1, 12, (2,)).tolist()
        weight = torch.randn(rows, columns, dtype=DOUBLE)
        # rows of very different size, and rows of zeros
        weight = weight * torch.exp(4 * torch.randn(rows, 1, dtype=DOUBLE))
        weight[torch.rand(rows) < 0.1] = 0
        q = torch.exp(torch.randn(rows if side == "output" else columns, dtype=DOUBLE)) if with_q else None
        for n in range(1, 6):
            assert exact_spectral_norm(rescaled(weight, n, side, q)) <= 1 + 1e-9, (index, n)


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_conv_rescaling_is_1_lipschitz_for_paddings_strides_and_sizes(side, n):
    for kernel in ((3, 3), (5, 3), (3, 5), (2, 2), (4, 1)):
        weight = torch.randn(3, 2, *kernel, dtype=DOUBLE)
        q = torch.exp(torch.randn(3 if side == "output" else 2, dtype=DOUBLE))
        for weights in (None, q):
            layer = rescaled(weight, n, side, weights)
            for mode in ("zeros", "circular"):
                for size, stride in ((6, 1), (6, 2), (3, 1), ((5, 4), 2)):
                    assert exact_conv_norm(layer, size, padding_mode=mode, stride=stride) <= 1 + 1e-6
            assert exact_conv_norm(layer, 6, padding=0 if max(kernel) > 4 else 4) <= 1 + 1e-6


def test_tall_kernels_are_padded_by_their_own_height():
    # padding both axes by the width, as the published code does, truncates the correlation of a 5x3 kernel
    for _ in range(20):
        layer = rescaled(torch.randn(2, 2, 5, 3, dtype=DOUBLE), 1, "output")
        assert exact_conv_norm(layer, 8, padding_mode="circular") <= 1
    weight = torch.randn(2, 3, 5, 3, dtype=DOUBLE)
    transposed = rescaling_factors(weight.transpose(2, 3), 3)
    torch.testing.assert_close(rescaling_factors(weight, 3), transposed, rtol=1e-10, atol=0)


@pytest.mark.parametrize("side", ["output", "input"])
def test_one_step_is_aol(side):
    weight = torch.randn(6, 4, dtype=DOUBLE)
    gram = weight @ weight.T if side == "output" else weight.T @ weight
    torch.testing.assert_close(rescaling_factors(weight, 1, side=side), gram.abs().sum(1).sqrt(), rtol=1e-13, atol=0)

    kernel = torch.randn(3, 2, 3, 2, dtype=DOUBLE)
    rows = kernel if side == "output" else kernel.transpose(0, 1)
    sums = torch.zeros(rows.shape[0], dtype=DOUBLE)
    for dy in range(-2, 3):
        for dx in range(-1, 2):
            shifted = torch.zeros_like(rows)
            for y in range(3):
                for x in range(2):
                    if 0 <= y + dy < 3 and 0 <= x + dx < 2:
                        shifted[:, :, y, x] = rows[:, :, y + dy, x + dx]
            sums += torch.einsum("iyab,jyab->ij", rows, shifted).abs().sum(1)
    torch.testing.assert_close(rescaling_factors(kernel, 1, side=side), sums.sqrt(), rtol=1e-13, atol=0)


def test_weights_q_are_those_of_sll_and_really_act():
    weight = torch.randn(5, 7, dtype=DOUBLE)
    q = torch.exp(torch.randn(5, dtype=DOUBLE))
    expected = ((weight @ weight.T).abs() * q[None, :] / q[:, None]).sum(1)
    torch.testing.assert_close(rescaling_factors(weight, 1, q=q) ** 2, expected, rtol=1e-13, atol=0)
    for n in (1, 3):
        for w in (weight, torch.randn(5, 2, 3, 3, dtype=DOUBLE)):
            plain, weighted = rescaling_factors(w, n), rescaling_factors(w, n, q=q)
            assert (weighted / plain - 1).abs().max() > 1e-2
            torch.testing.assert_close(rescaling_factors(w, n, q=torch.ones(5)), plain, rtol=1e-13, atol=0)
            # the scale of q does not matter
            torch.testing.assert_close(rescaling_factors(w, n, q=7 * q), weighted, rtol=1e-12, atol=0)


def test_residual_diagonal_dominates_the_gram_matrix():
    for _ in range(80):
        weight = torch.randn(6, 5, dtype=DOUBLE) * torch.exp(2 * torch.randn(6, 1, dtype=DOUBLE))
        q = torch.exp(torch.randn(6, dtype=DOUBLE))
        for n in (1, 2, 3):
            residual = rescaling_factors(weight, n, q=q) ** 2
            slack = torch.diag(residual) - weight @ weight.T
            assert torch.linalg.eigvalsh(slack)[0] >= -1e-9 * residual.max()


def test_many_steps_divide_by_the_spectral_norm():
    weight = torch.randn(64, 48, dtype=DOUBLE)
    norms = [exact_spectral_norm(rescaled(weight, n, "output")) for n in (1, 2, 4, 10)]
    assert norms == sorted(norms)
    assert 0.9995 <= norms[-1] <= 1 + 1e-9


def test_certified_norm_of_a_rescaled_layer_is_at_most_one():
    dense = rescaled(torch.randn(40, 60, dtype=DOUBLE), 3, "output")
    assert certified_spectral_norm(dense) <= 1
    conv = rescaled(torch.randn(5, 9, 3, 3, dtype=DOUBLE), 2, "input")
    assert certified_conv_norm(conv, 10) <= 1


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (3, 4, 3, 3), (4, 2, 2, 3)])
def test_factors_scale_with_the_weight_without_overflow(n, shape):
    weight = torch.randn(shape)
    reference = rescaling_factors(weight, n)
    for scale in (1e-18, 1e18):
        torch.testing.assert_close(rescaling_factors(weight * scale, n) / scale, reference, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 3, 3)])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_zero_rows_have_factor_one_and_no_gradient(shape, n):
    weight = torch.randn(shape)
    weight[1] = 0
    weight.requires_grad_()
    factors = rescaling_factors(weight, n)
    factors.sum().backward()
    assert factors[1].item() == 1.0
    assert torch.isfinite(weight.grad).all()
    assert (weight.grad[1] == 0).all()
    assert (weight.grad[0] != 0).any()

    zero = torch.zeros(shape, requires_grad=True)
    factors = rescaling_factors(zero, n)
    factors.sum().backward()
    assert torch.equal(factors, torch.ones(4))
    assert torch.equal(zero.grad, torch.zeros(shape))


@pytest.mark.parametrize("n", [4, 6, 8])
def test_rows_that_underflow_stay_on_the_safe_side(n):
    # in float32 the power of the small row underflows; a factor of 1 would leave the row at 1e10
    weight = torch.diag(torch.tensor([1e20, 1e10, 1e14]))
    layer = rescaled(weight, n, "output")
    assert exact_spectral_norm(layer) <= 1 + 1e-6


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 3, 2)])
@pytest.mark.parametrize("side", ["output", "input"])
def test_gradients_by_finite_differences(n, shape, side):
    weight = torch.randn(shape, dtype=DOUBLE, requires_grad=True)
    channels = shape[0] if side == "output" else shape[1]
    q = (0.5 + torch.rand(channels, dtype=DOUBLE)).requires_grad_()
    assert torch.autograd.gradcheck(lambda w, v: rescaling_factors(w, n, side=side, q=v), (weight, q))


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 5), (1, 1)])
def test_direct_and_fourier_iterations_agree(dtype, n, kernel, monkeypatch):
    weight = torch.randn(3, 5, *kernel, dtype=dtype)
    results = []
    for cheaper in (True, False):
        monkeypatch.setattr(rescale_module, "_direct_is_cheaper", lambda *_, choice=cheaper: choice)
        results.append(rescaling_factors(weight, n))
    tolerance = 1e-12 if dtype == DOUBLE else 1e-5
    torch.testing.assert_close(results[0], results[1], rtol=tolerance, atol=0)


def test_large_kernels_take_the_fourier_path():
    weight = torch.randn(8, 8, 5, 5, dtype=DOUBLE)
    assert not rescale_module._direct_is_cheaper(weight.shape, DOUBLE, 4)
    assert exact_conv_norm(rescaled(weight, 4, "output"), 6) <= 1 + 1e-9


def test_half_precision_and_autocast_compute_in_float32():
    weight = torch.randn(6, 4).bfloat16()
    factors = rescaling_factors(weight, 2)
    assert factors.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rescaling_factors(weight.float(), 2), factors)


def test_wrong_arguments_are_errors():
    weight = torch.ones(2, 3)
    cases = [
        (lambda: rescaling_factors(torch.ones(3)), ValueError, "weight"),
        (lambda: rescaling_factors(torch.ones(2, 0)), ValueError, "weight"),
        (lambda: rescaling_factors(torch.ones(2, 3, 3)), ValueError, "weight"),
        (lambda: rescaling_factors(weight, 0), ValueError, "num_iterations"),
        (lambda: rescaling_factors(weight, side="rows"), ValueError, "side"),
        (lambda: rescaling_factors(weight, q=torch.ones(3)), ValueError, "q must"),
        (lambda: rescaling_factors(weight, side="input", q=torch.ones(2)), ValueError, "q must"),
        (lambda: rescaling_factors(weight.long()), TypeError, "weight"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
