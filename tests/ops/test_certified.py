# SPDX-License-Identifier: Apache-2.0
"""Certified norms are never below the truth: checked against float64 SVDs and, without any rounding, rationals."""

import math
import time
from fractions import Fraction

import numpy as np
import pytest
import torch

from hf_lip.ops import certified as certified_module
from hf_lip.ops import (
    certified_conv_norm,
    certified_row_distances,
    certified_row_norms,
    certified_spectral_norm,
    conv_frequency_blocks,
    conv_matrix,
    exact_conv_norm,
    exact_spectral_norm,
    round_up,
)


DOUBLE = torch.float64
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def rationals(matrix: torch.Tensor) -> list[list[Fraction]]:
    return [[Fraction(value) for value in row] for row in matrix.double().tolist()]


def is_positive_definite(matrix: list[list[Fraction]]) -> bool:
    """Exact elimination without rounding: all pivots positive."""
    matrix = [row[:] for row in matrix]
    for k in range(len(matrix)):
        if matrix[k][k] <= 0:
            return False
        for i in range(k + 1, len(matrix)):
            ratio = matrix[i][k] / matrix[k][k]
            matrix[i] = [a - ratio * b for a, b in zip(matrix[i], matrix[k])]
    return True


def proves_norm_below(matrix: torch.Tensor, bound: float) -> bool:
    """Whether bound^2 I - W W^T is positive definite over the rationals, that is |W| < bound."""
    rows = rationals(matrix)
    gram = [[-sum(a * b for a, b in zip(x, y)) for y in rows] for x in rows]
    for i in range(len(rows)):
        gram[i][i] += Fraction(bound) ** 2
    return is_positive_definite(gram)


def random_matrix(index: int, dtype: torch.dtype) -> torch.Tensor:
    rows, columns = torch.randint(1, 8, (2,)).tolist()
    weight = torch.randn(rows, columns, dtype=DOUBLE)
    if index % 4 == 1:
        weight = torch.linalg.qr(torch.randn(rows, rows, dtype=DOUBLE))[0]
    elif index % 4 == 2:
        weight = torch.outer(weight[:, 0], weight[0])
    elif index % 4 == 3:
        weight = weight * torch.exp(3 * torch.randn(rows, 1, dtype=DOUBLE))
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_bound_holds_in_thousands_of_draws(dtype):
    for index in range(5000):
        weight = random_matrix(index, dtype)
        exact = exact_spectral_norm(weight)
        bound = certified_spectral_norm(weight)
        assert exact <= bound <= exact * (1 + 1e-10)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dense_bound_is_proved_over_the_rationals(dtype):
    for index in range(60):
        weight = random_matrix(index, dtype)[:4]
        bound = certified_spectral_norm(weight)
        assert proves_norm_below(weight, bound)
        assert not proves_norm_below(weight, bound * (1 - 1e-9))


def test_dense_bound_is_not_below_a_norm_known_exactly():
    hadamard = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    for _ in range(5):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
        norm = math.sqrt(hadamard.shape[0])
        assert norm <= certified_spectral_norm(hadamard) <= norm * (1 + 1e-10)
    for value in (1.0, 0.1, 1e-300, 5e-324, 1e300):
        single = torch.tensor([[value]], dtype=DOUBLE)
        assert value <= certified_spectral_norm(single) <= max(value * (1 + 1e-10), 1e-323)


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (30, 80), (80, 30), (128, 128)])
def test_dense_bound_of_larger_matrices_is_tight(shape):
    weight = torch.randn(shape)
    exact = exact_spectral_norm(weight)
    assert exact <= certified_spectral_norm(weight) <= exact * (1 + 1e-9)
    assert certified_spectral_norm(weight.T) == pytest.approx(certified_spectral_norm(weight), rel=1e-10)


def test_dense_bound_scales_over_the_whole_range():
    weight = torch.randn(6, 9, dtype=DOUBLE)
    reference = certified_spectral_norm(weight)
    for exponent in (-1060, -1000, -500, 500, 1000):
        scaled = weight * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)
        half = 2.0 ** (exponent // 2)
        assert certified_spectral_norm(scaled) / half / 2.0 ** (exponent - exponent // 2) == pytest.approx(
            reference, rel=1e-9 if exponent > -1022 else 1e-3
        )
    assert certified_spectral_norm(torch.full((3, 3), 1.7e308, dtype=DOUBLE)) == math.inf


@pytest.mark.parametrize("factor", [0.0, 0.3, 0.999999])
def test_bound_survives_an_eigenvalue_routine_that_errs_low(factor, monkeypatch):
    true = torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda matrix: true(matrix) * factor)
    for shape in ((5, 8), (20, 12)):
        weight = torch.randn(shape)
        assert certified_spectral_norm(weight) >= exact_spectral_norm(weight)
    kernel = torch.randn(2, 3, 3, 3)
    assert certified_conv_norm(kernel, 5) >= exact_conv_norm(kernel, 5)


def test_zero_weights_give_exactly_zero():
    assert certified_spectral_norm(torch.zeros(3, 4)) == 0.0
    assert certified_conv_norm(torch.zeros(3, 4, 3, 3), 5) == 0.0
    assert certified_conv_norm(torch.zeros(3, 4, 1, 1), 5, padding_mode="circular") == 0.0
    assert torch.equal(certified_row_norms(torch.zeros(3, 4)), torch.zeros(3, dtype=DOUBLE))
    # a kernel whose taps cancel at a frequency is no zero kernel
    assert certified_conv_norm(torch.tensor([[[[1.0, -1.0]]]]), 1, padding_mode="circular") < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_conv_bound_holds_for_random_shapes(dtype, mode):
    for index in range(300):
        kernel = torch.randint(1, 6, (2,)).tolist()
        weight = torch.randn(*torch.randint(1, 4, (2,)).tolist(), *kernel).to(dtype)
        size = torch.randint(1, 7, (2,)).tolist()
        options = {
            "padding_mode": mode,
            "stride": torch.randint(1, 4, (2,)).tolist(),
            "padding": None if index % 2 else torch.randint(0, 6, (2,)).tolist(),
        }
        try:
            exact = exact_conv_norm(weight, size, **options)
        except ValueError:
            with pytest.raises(ValueError, match="no output"):
                certified_conv_norm(weight, size, **options)
            continue
        bound = certified_conv_norm(weight, size, **options)
        # the explicit operator is the zero matrix where every output lies in the padding
        assert bound >= exact * (1 - 1e-14)
        assert bound <= weight.double().abs().sum().item() * math.sqrt(math.prod(size) * 36) + 1e-12


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (2, 2), (5, 3), (3, 4), (9, 2)])
@pytest.mark.parametrize(("size", "stride"), [(6, 1), (6, 2), ((4, 6), 2), (6, (1, 3)), (8, 4)])
def test_circular_bound_is_the_operator_norm(kernel, size, stride):
    weight = torch.randn(3, 2, *kernel)
    exact = exact_conv_norm(weight, size, padding_mode="circular", stride=stride)
    bound = certified_conv_norm(weight, size, padding_mode="circular", stride=stride)
    assert exact <= bound <= exact * (1 + 1e-10)


@pytest.mark.parametrize("size", [5, 7, (5, 8)])
def test_circular_stride_that_does_not_divide_the_size(size):
    weight = torch.randn(3, 2, 3, 3)
    exact = exact_conv_norm(weight, size, padding_mode="circular", stride=2)
    bound = certified_conv_norm(weight, size, padding_mode="circular", stride=2)
    assert exact <= bound <= certified_conv_norm(weight, size, padding_mode="circular") * (1 + 1e-10)


@pytest.mark.parametrize("size", [4, 7, (5, 9), 14])
def test_zero_padding_bound_is_the_norm_on_the_enlarged_torus(size):
    weight = torch.randn(3, 4, 3, 5)
    height, width = (size, size) if isinstance(size, int) else size
    torus = torch.linalg.svdvals(conv_frequency_blocks(weight.double(), (height + 1, width + 2))).amax().item()
    bound = certified_conv_norm(weight, size)
    assert exact_conv_norm(weight, size) <= bound
    assert torus <= bound <= torus * (1 + 1e-10)


def test_zero_padding_bound_is_close_on_ordinary_images():
    weight = torch.randn(4, 6, 3, 3)
    exact = exact_conv_norm(weight, 12)
    assert exact <= certified_conv_norm(weight, 12) <= exact * 1.05


def test_patch_embedding_is_bounded_by_its_reshaped_matrix():
    weight = torch.randn(6, 3, 4, 4)
    bound = certified_conv_norm(weight, 12, padding=0, stride=4)
    assert bound == pytest.approx(exact_spectral_norm(weight.flatten(1)), rel=1e-10)
    assert exact_conv_norm(weight, 12, padding=0, stride=4) <= bound


def test_two_tap_difference_needs_the_enlarged_torus():
    weight = torch.tensor([1.0, -1.0]).reshape(1, 1, 1, 2)
    exact = exact_conv_norm(weight, (1, 7), padding=(0, 1))
    assert certified_conv_norm(weight, (1, 7), padding_mode="circular") < exact
    assert certified_conv_norm(weight, (1, 7), padding=(0, 1)) >= exact


@pytest.mark.parametrize(("mode", "stride"), [("circular", 1), ("circular", 2), ("zeros", 1), ("zeros", 2)])
def test_conv_bound_is_proved_over_the_rationals(mode, stride):
    for _ in range(5):
        weight = torch.randn(2, 1, 1, 3).to(torch.bfloat16)
        matrix = conv_matrix(weight, (1, 6), padding_mode=mode, padding=(0, 1), stride=(1, stride))
        bound = certified_conv_norm(weight, (1, 6), padding_mode=mode, padding=(0, 1), stride=(1, stride))
        assert proves_norm_below(matrix, bound)


def test_conv_bound_on_a_norm_known_exactly():
    # all taps positive: the norm on a torus is the sum of the taps, 9/8 + ... in exact binary fractions
    weight = torch.arange(1, 10).reshape(1, 1, 3, 3) / 8
    for size in (3, 5, 8):
        assert 45 / 8 <= certified_conv_norm(weight, size, padding_mode="circular") <= 45 / 8 * (1 + 1e-11)


@pytest.mark.parametrize("entries", [1, 7, 40])
def test_frequencies_in_small_chunks_give_the_same_bound(entries, monkeypatch):
    kernels = [torch.randn(3, 4, 3, 3), torch.tensor([[[[1.0, -1.0]]]])]
    whole = [certified_conv_norm(kernel, 6) for kernel in kernels]
    monkeypatch.setattr(certified_module, "_CHUNK_ENTRIES", entries)
    for kernel, expected in zip(kernels, whole):
        assert certified_conv_norm(kernel, 6) == pytest.approx(expected, rel=1e-11)
        assert certified_conv_norm(kernel, 6) >= exact_conv_norm(kernel, 6)


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (2, 2), (5, 4), (6, 7)])
def test_frequencies_are_one_of_each_conjugate_pair(grid):
    height, width = grid
    kept = {tuple(f) for f in certified_module._frequencies(height, width).tolist()}
    mirrored = {((-h) % height, (-w) % width) for h, w in kept}
    assert kept | mirrored == {(h, w) for h in range(height) for w in range(width)}
    assert all(f == ((-f[0]) % height, (-f[1]) % width) for f in kept & mirrored)


@pytest.mark.parametrize(
    ("grid", "taps"), [((5, 7), (3, 3)), ((34, 33), (3, 3)), ((113, 112), (7, 7)), ((1, 1000), (1, 9))]
)
def test_phases_are_as_accurate_as_the_proof_assumes(grid, taps):
    frequencies = certified_module._frequencies(*grid)
    cosines, sines = certified_module._phases(frequencies, grid, taps)
    y, x = np.indices(taps).reshape(2, 1, -1)
    f = frequencies.numpy()
    # whole turns taken off in integers, the rest in extended precision
    turns = (f[:, :1] * y * grid[1] + f[:, 1:] * x * grid[0]) % (grid[0] * grid[1])
    angles = turns.astype(np.longdouble) * (8 * np.arctan(np.longdouble(1)) / (grid[0] * grid[1]))
    assert np.finfo(np.longdouble).eps < 1e-18
    error = np.hypot(cosines.numpy() - np.cos(angles), sines.numpy() - np.sin(angles)).max()
    assert error < certified_module.PHASE_ERROR / 4


def test_conv_bound_scales_over_the_whole_range():
    weight = torch.randn(3, 2, 3, 3, dtype=DOUBLE)
    reference = certified_conv_norm(weight, 5)
    for exponent in (-900, 900):
        assert certified_conv_norm(weight * 2.0**exponent, 5) == pytest.approx(reference * 2.0**exponent, rel=1e-12)


@pytest.mark.parametrize("dtype", FLOATS)
def test_row_norms_and_distances_are_proved_over_the_rationals(dtype):
    for _ in range(20):
        weight = torch.randn(5, 7, dtype=DOUBLE).to(dtype)
        weight[3] = weight[1]
        weight[4] = 0
        rows = rationals(weight)
        norms = certified_row_norms(weight)
        assert norms.dtype == DOUBLE
        assert norms[4].item() == 0.0
        for row, norm in zip(rows, norms.tolist()):
            square = sum(a * a for a in row)
            assert square <= Fraction(norm) ** 2 <= square * (1 + Fraction(1, 10**13))
        distances = certified_row_distances(weight)
        assert torch.equal(distances, distances.T)
        assert torch.equal(distances.diagonal(), torch.zeros(5, dtype=DOUBLE))
        assert distances[1, 3].item() == 0.0
        for i in range(5):
            for j in range(5):
                square = sum((a - b) ** 2 for a, b in zip(rows[i], rows[j]))
                assert square <= Fraction(distances[i, j].item()) ** 2 <= square * (1 + Fraction(1, 10**13))


def test_row_norms_and_distances_at_extreme_scales():
    weight = torch.tensor([[1e-200, 2e-200], [3e300, 1e-300], [5e-324, 0.0], [1.0, 1.0]], dtype=DOUBLE)
    rows = rationals(weight)
    for row, norm in zip(rows, certified_row_norms(weight).tolist()):
        square = sum(a * a for a in row)
        assert square <= Fraction(norm) ** 2
        assert norm <= 1.0001 * max(map(float, row)) * math.sqrt(2) + 1e-323
    distances = certified_row_distances(weight)
    for i in range(4):
        for j in range(4):
            square = sum((a - b) ** 2 for a, b in zip(rows[i], rows[j]))
            assert square <= Fraction(distances[i, j].item()) ** 2
    far = certified_row_distances(torch.tensor([[1.7e308], [-1.7e308], [0.0]], dtype=DOUBLE))
    assert far[0, 1].item() == math.inf
    assert far[0, 2].item() == pytest.approx(1.7e308)


@pytest.mark.parametrize("dtype", FLOATS)
def test_round_up_is_the_next_number_above(dtype):
    values = torch.cat(
        [
            torch.randn(2000, dtype=DOUBLE) * torch.exp(10 * torch.randn(2000, dtype=DOUBLE)),
            torch.tensor([0.0, 1.0, -1.0, 1e-300, -1e-300, 1e300, -1e300, math.inf, -math.inf, 65519.0, -65521.0]),
        ]
    )
    cast = round_up(values, dtype)
    assert cast.dtype == dtype
    assert (cast.double() >= values).all()
    # numbers of the target type are kept, and between the value and the result there is no other
    torch.testing.assert_close(round_up(cast, dtype), cast, rtol=0, atol=0)
    if dtype == torch.bfloat16:
        bits = cast.view(torch.int16)
        below = torch.where(cast > 0, bits - 1, torch.where(cast < 0, bits + 1, torch.full_like(bits, -32767)))
        below = below.view(dtype).double()
    else:
        array = cast.numpy()
        with np.errstate(over="ignore"):
            below = torch.from_numpy(np.nextafter(array, np.array(-np.inf, array.dtype))).double()
    finite = cast > -math.inf
    assert (below[finite] < values[finite]).all()


def test_round_up_keeps_shape_and_reads_floats():
    assert round_up(0.1, torch.float32).item() > 0.1
    assert round_up(torch.full((2, 3), 0.1, dtype=DOUBLE, requires_grad=True), torch.bfloat16).shape == (2, 3)
    assert round_up(-0.1, torch.float16).item() > -0.1
    assert round_up(1e-60, torch.float32).item() == 2.0**-149
    assert round_up(-1e-60, torch.float32).item() == 0.0


def test_the_smaller_side_is_factorised():
    # the larger gram matrix would have 20000 rows and take 3 GB and minutes
    start = time.process_time()
    for weight in (torch.randn(2, 20000), torch.randn(20000, 2)):
        exact = exact_spectral_norm(weight)
        assert exact <= certified_spectral_norm(weight) <= exact * (1 + 1e-9)
    for weight in (torch.randn(2, 2000, 3, 3), torch.randn(2000, 2, 3, 3)):
        assert certified_conv_norm(weight, 4) > 0
    assert time.process_time() - start < 5


def test_certificates_do_not_track_gradients_and_leave_the_weight_alone():
    weight = torch.randn(4, 5, requires_grad=True)
    copy = weight.detach().clone()
    assert isinstance(certified_spectral_norm(weight), float)
    assert not certified_row_norms(weight).requires_grad
    assert not certified_row_distances(weight).requires_grad
    kernel = torch.randn(2, 3, 3, 3, requires_grad=True)
    assert isinstance(certified_conv_norm(kernel, 4), float)
    assert torch.equal(weight.detach(), copy)


def test_certificates_do_not_depend_on_autocast_or_the_default_device():
    weight, kernel = torch.randn(20, 30), torch.randn(3, 4, 3, 3)
    calls = [
        lambda: certified_spectral_norm(weight),
        lambda: certified_conv_norm(kernel, 6),
        lambda: certified_row_norms(weight).tolist(),
        lambda: certified_row_distances(weight).tolist(),
    ]
    expected = [call() for call in calls]
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        assert [call() for call in calls] == expected


def test_thousand_small_layers_are_certified_quickly():
    weights = [torch.randn(5, 64) for _ in range(1000)]
    start = time.process_time()
    for weight in weights:
        certified_spectral_norm(weight)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(bad):
    matrix = torch.ones(3, 4)
    matrix[1, 2] = bad
    kernel = torch.ones(2, 3, 3, 3)
    kernel[1, 1, 0, 2] = bad
    for call in (
        lambda: certified_spectral_norm(matrix),
        lambda: certified_conv_norm(kernel, 4),
        lambda: certified_row_norms(matrix),
        lambda: certified_row_distances(matrix),
    ):
        with pytest.raises(ValueError, match="not finite"):
            call()


def test_wrong_arguments_are_errors():
    kernel = torch.ones(2, 3, 3, 3)
    cases = [
        (lambda: certified_spectral_norm(kernel), ValueError, "certified_conv_norm"),
        (lambda: certified_spectral_norm(torch.ones(2, 0)), ValueError, "weight"),
        (lambda: certified_spectral_norm(torch.ones(2, 2, dtype=torch.int64)), TypeError, "weight"),
        (lambda: certified_spectral_norm(torch.ones(2, 2, dtype=torch.complex64)), TypeError, "weight"),
        (lambda: certified_conv_norm(torch.ones(2, 3), 4), ValueError, "weight"),
        (lambda: certified_conv_norm(kernel.long(), 4), TypeError, "weight"),
        (lambda: certified_conv_norm(kernel, 0), ValueError, "input_size"),
        (lambda: certified_conv_norm(kernel, (4, 4, 4)), ValueError, "input_size"),
        (lambda: certified_conv_norm(kernel, "44"), ValueError, "input_size"),
        (lambda: certified_conv_norm(kernel, 2, padding=0), ValueError, "no output"),
        (lambda: certified_conv_norm(kernel, 4, stride=0), ValueError, "stride"),
        (lambda: certified_conv_norm(kernel, 4, padding=-1), ValueError, "padding"),
        (lambda: certified_conv_norm(kernel, 4, padding_mode="reflect"), ValueError, "read several times"),
        (lambda: certified_conv_norm(kernel, 4, padding_mode="replicate"), ValueError, "read several times"),
        (lambda: certified_conv_norm(kernel, 4, padding_mode="valid"), ValueError, "padding_mode"),
        (lambda: certified_row_norms(torch.ones(3)), ValueError, "weight"),
        (lambda: certified_row_distances(torch.ones(3)), ValueError, "weight"),
        (lambda: certified_row_norms(torch.ones(3, 3, dtype=torch.int32)), TypeError, "weight"),
        (lambda: round_up(math.nan, torch.float32), ValueError, "NaN"),
        (lambda: round_up(1.0, torch.int32), TypeError, "dtype"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
