# SPDX-License-Identifier: Apache-2.0
"""Gram iteration against singular values: bound, rate, scale, gradient and memory."""

import math
import time

import pytest
import torch

from hf_lip.ops import conv_spectral_norm, exact_spectral_norm, gram_iteration
from hf_lip.ops.gram import gram_interval


def random_matrix(index: int) -> torch.Tensor:
    rows, columns = torch.randint(1, 40, (2,)).tolist()
    kind = index % 5
    if kind == 0:
        return torch.randn(rows, columns, dtype=torch.float64)
    if kind == 1:
        rank = max(1, min(rows, columns) // 4)
        return torch.randn(rows, rank, dtype=torch.float64) @ torch.randn(rank, columns, dtype=torch.float64)
    if kind == 2:
        decay = torch.arange(1, columns + 1, dtype=torch.float64) ** -1.5
        return torch.randn(rows, columns, dtype=torch.float64) * decay
    if kind == 3:
        return torch.linalg.qr(torch.randn(rows, rows, dtype=torch.float64))[0] * 0.7
    return torch.randn(*((1, columns) if index % 2 else (rows, 1)), dtype=torch.float64)


def test_upper_bound_monotone_and_within_the_schatten_factor():
    for index in range(200):
        weight = random_matrix(index)
        exact = exact_spectral_norm(weight)
        rank = min(weight.shape)
        previous = math.inf
        for n in range(16):
            bound = gram_iteration(weight, n).item()
            assert bound >= exact * (1 - 1e-12)
            assert bound <= previous * (1 + 1e-12)
            assert bound <= rank ** (2.0 ** -(n + 1)) * exact * (1 + 1e-12)
            previous = bound


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (4, 4)])
@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_value_is_the_schatten_norm(shape, n):
    weight = torch.randn(shape, dtype=torch.float64)
    order = 2.0 ** (n + 1)
    expected = torch.linalg.svdvals(weight).pow(order).sum().pow(1 / order)
    torch.testing.assert_close(gram_iteration(weight, n), expected, rtol=1e-13, atol=0)


def test_rate_on_a_gaussian_matrix():
    weight = torch.randn(500, 400, dtype=torch.float64)
    values = torch.linalg.svdvals(weight)
    # the thresholds presuppose a top gap of at least 0.5 %
    assert 1 - values[1] / values[0] >= 5e-3
    error = {n: gram_iteration(weight, n).item() / values[0].item() - 1 for n in (5, 6, 10)}
    assert error[5] < 2e-2
    assert error[6] < 5e-3
    assert error[10] < 1e-10


def test_rate_on_a_decaying_spectrum():
    left, right = (torch.linalg.qr(torch.randn(512, 512, dtype=torch.float64))[0] for _ in range(2))
    weight = left / torch.arange(1, 513, dtype=torch.float64) @ right
    assert gram_iteration(weight, 3).item() - 1 < 1e-5


@pytest.mark.parametrize("n", [1, 3, 6])
def test_rate_on_an_orthogonal_matrix_is_only_linear(n):
    weight = torch.linalg.qr(torch.randn(512, 512, dtype=torch.float64))[0]
    assert gram_iteration(weight, n).item() == pytest.approx(512 ** (2.0 ** -(n + 1)), rel=1e-10)


@pytest.mark.parametrize(("dtype", "top", "tolerance"), [(torch.float64, 30, 1e-13), (torch.float32, 15, 1e-5)])
def test_scale_invariance(dtype, top, tolerance):
    weight = torch.randn(20, 30, dtype=dtype)
    for n in (0, 1, 6, 20):
        reference = gram_iteration(weight, n)
        for exponent in range(-top, top + 1, 5):
            scale = 10.0**exponent
            bound = gram_iteration(weight * scale, n)
            assert bound.item() == pytest.approx(reference.item() * scale, rel=tolerance)


def test_gradient_is_finite_at_extreme_scales():
    for scale in (1e-30, 1.0, 1e30):
        weight = (torch.randn(6, 4) * scale).requires_grad_()
        gram_iteration(weight, 20).backward()
        # the gradient of a norm does not depend on the scale; in the limit it is u v^T
        left, _, right = torch.linalg.svd(weight.detach().double())
        torch.testing.assert_close(weight.grad.double(), torch.outer(left[:, 0], right[0]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n", [0, 1, 6, 20])
def test_zero_matrix_has_value_and_gradient_zero(n):
    weight = torch.zeros(5, 3, requires_grad=True)
    bound = gram_iteration(weight, n)
    bound.backward()
    assert bound.item() == 0.0
    assert torch.equal(weight.grad, torch.zeros(5, 3))


def test_zero_matrix_inside_a_batch_leaves_the_others_alone():
    batch = torch.randn(3, 4, 5, dtype=torch.float64)
    batch[1] = 0
    batch.requires_grad_()
    bounds = gram_iteration(batch, 5)
    bounds.sum().backward()
    assert bounds[1].item() == 0.0
    assert torch.isfinite(batch.grad).all()
    assert batch.grad[0].abs().sum() > 0


def naive_bound(weight: torch.Tensor, n: int) -> torch.Tensor:
    gram = weight.mH @ weight if n else weight
    for _ in range(n - 1):
        gram = gram.mH @ gram
    return torch.linalg.vector_norm(gram, dim=(-2, -1)).pow(0.5**n)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (2, 3, 5, 4)])
@pytest.mark.parametrize("n", [0, 1, 2, 4])
def test_explicit_gradient_is_that_of_autograd(dtype, shape, n):
    weight = torch.randn(shape, dtype=dtype, requires_grad=True)
    coefficients = torch.rand(shape[:-2], dtype=torch.float64)
    explicit = torch.autograd.grad((gram_iteration(weight, n) * coefficients).sum(), weight)[0]
    automatic = torch.autograd.grad((naive_bound(weight, n) * coefficients).sum(), weight)[0]
    torch.testing.assert_close(explicit, automatic, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_gradient_and_second_gradient_by_finite_differences(dtype, n):
    weight = torch.randn(2, 4, 3, dtype=dtype, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: gram_iteration(w, n), (weight,), rtol=1e-5)
    assert torch.autograd.gradgradcheck(lambda w: gram_iteration(w, n), (weight,), rtol=1e-4)


def test_gradient_tends_to_the_top_singular_vectors():
    weight = torch.randn(60, 40, dtype=torch.float64, requires_grad=True)
    gram_iteration(weight, 10).backward()
    left, values, right = torch.linalg.svd(weight.detach())
    assert 1 - values[1] / values[0] > 1e-2
    torch.testing.assert_close(weight.grad, torch.outer(left[:, 0], right[0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 48), (48, 64)])
def test_saved_memory_does_not_depend_on_the_iterations(shape):
    weight = torch.randn(shape, requires_grad=True)

    def saved_entries(n: int) -> int:
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            gram_iteration(weight, n)
        return count

    counts = [saved_entries(n) for n in (1, 6, 15)]
    # the weight and the scalar result
    assert counts == [weight.numel() + 1] * 3


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_saved_memory_of_a_convolution_does_not_depend_on_the_iterations(mode):
    weight = torch.randn(8, 6, 3, 3, requires_grad=True)

    def saved_entries(n: int) -> int:
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            conv_spectral_norm(weight, 8, padding_mode=mode, num_iterations=n)
        return count

    assert len({saved_entries(n) for n in (1, 6, 15)}) == 1


@pytest.mark.parametrize("shape", [(2, 20000), (20000, 2)])
def test_the_smaller_side_is_iterated(shape):
    # the larger gram matrix would take 1.6 GB a copy
    weight = torch.randn(shape, requires_grad=True)
    start = time.process_time()
    gram_iteration(weight, 10).backward()
    assert time.process_time() - start < 2
    assert weight.grad.shape == weight.shape


def test_batch_equals_loop():
    batch = torch.randn(4, 3, 9, 7)
    looped = torch.stack([torch.stack([gram_iteration(w, 6) for w in row]) for row in batch])
    torch.testing.assert_close(gram_iteration(batch, 6), looped, rtol=1e-6, atol=0)


def test_half_precision_is_computed_in_float32_even_under_autocast():
    weight = torch.randn(30, 20).bfloat16()
    bound = gram_iteration(weight, 8)
    assert bound.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gram_iteration(weight.float(), 8), bound)
    assert bound.item() >= exact_spectral_norm(weight) * (1 - 1e-5)


@pytest.mark.parametrize("weight", [torch.zeros(3), torch.zeros(0, 3), torch.zeros(2, 3, 0)])
def test_wrong_shapes_are_errors(weight):
    with pytest.raises(ValueError, match="weight must be non-empty"):
        gram_iteration(weight)


def test_wrong_arguments_are_errors():
    with pytest.raises(ValueError, match="num_iterations"):
        gram_iteration(torch.eye(2), -1)
    with pytest.raises(TypeError, match="weight"):
        gram_iteration(torch.eye(2, dtype=torch.int64))


@pytest.mark.parametrize("rtol", [0.3, 1e-3, 1e-9])
def test_interval_holds_the_norm_whenever_it_stops(rtol):
    for index in range(200):
        weight = random_matrix(index)
        exact = exact_spectral_norm(weight)
        for most in (1, 2, 5, 24):
            lower, upper, products = gram_interval(weight, rtol, most)
            assert lower.item() <= exact * (1 + 1e-12)
            assert upper.item() >= exact * (1 - 1e-12)
            assert 1 <= products <= most
            assert upper - lower <= rtol * upper or products == most


def test_interval_of_a_gaussian_matrix_is_narrow_after_nine_products():
    # the threshold presupposes a top gap; the seed of the tests gives one
    for shape in ((500, 400), (300, 300), (64, 900)):
        lower, upper, products = gram_interval(torch.randn(shape, dtype=torch.float64), 1e-3)
        assert products <= 9
        assert 0 <= (upper - lower).item() <= 1e-3 * upper.item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_trace_based_ends_are_exact_on_orthogonal_matrices_at_once(dtype):
    weight = torch.linalg.qr(torch.randn(512, 512, dtype=dtype))[0]
    lower, upper, products = gram_interval(weight, 1e-6)
    assert products == 1
    assert upper.item() == pytest.approx(1, abs=1e-6)
    assert lower.item() == pytest.approx(1, abs=1e-6)
    # plain iteration is 5 % off after six
    assert gram_iteration(weight, 6).item() > 1.04


def test_interval_of_a_batch_is_that_of_its_largest_matrix():
    batch = torch.randn(2, 30, 12, 9, dtype=torch.complex128) * torch.rand(2, 30, 1, 1)
    batch[0, 3] = 0
    exact = torch.linalg.svdvals(batch).amax().item()
    lower, upper, _ = gram_interval(batch, 1e-9)
    assert lower.item() <= exact * (1 + 1e-12)
    assert exact * (1 - 1e-12) <= upper.item() <= exact * (1 + 1e-8)
    # dropping the hopeless ones along the way changes nothing
    single = max(gram_interval(matrix, 1e-9)[1].item() for matrix in batch.flatten(0, 1))
    assert upper.item() == pytest.approx(single, rel=1e-8)


@pytest.mark.parametrize("top", [1e-30, 1e-15, 1.0, 1e15, 1e30])
def test_interval_scales(top):
    weight = torch.randn(20, 30)
    reference = [end.item() for end in gram_interval(weight, 1e-4)[:2]]
    found = [end.item() for end in gram_interval(weight * top, 1e-4)[:2]]
    assert found == pytest.approx([end * top for end in reference], rel=1e-5)


def test_interval_of_zero_and_of_half_precision():
    assert [end.item() for end in gram_interval(torch.zeros(4, 3))[:2]] == [0.0, 0.0]
    weight = torch.randn(30, 20, requires_grad=True)
    lower, upper, _ = gram_interval(weight.bfloat16())
    assert lower.dtype == upper.dtype == torch.float32
    assert not upper.requires_grad
    exact = exact_spectral_norm(weight.bfloat16())
    assert lower.item() <= exact * (1 + 1e-5)
    assert upper.item() >= exact * (1 - 1e-5)


def test_wrong_arguments_of_the_interval_are_errors():
    weight = torch.ones(3, 4)
    cases = [
        (lambda: gram_interval(torch.ones(3)), ValueError, "at least two dimensions"),
        (lambda: gram_interval(torch.ones(3, 0)), ValueError, "non-empty"),
        (lambda: gram_interval(weight.long()), TypeError, "floating point"),
        (lambda: gram_interval(weight, 0.0), ValueError, "rtol"),
        (lambda: gram_interval(weight, 1.0), ValueError, "rtol"),
        (lambda: gram_interval(weight, 1e-3, 0), ValueError, "max_iterations"),
        (lambda: gram_interval(weight, 1e-3, 2.0), ValueError, "max_iterations"),
        (lambda: gram_interval(weight * math.nan), ValueError, "not finite"),
        (lambda: gram_interval(weight * math.inf), ValueError, "not finite"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
