# SPDX-License-Identifier: Apache-2.0
"""Intervals of matrices and of low-rank products: proved over the rationals, tight, sound at every scale."""

import math
import subprocess
import sys
import warnings
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from hf_lip.ops import exact_spectral_norm, interval
from hf_lip.ops.interval import SpectralNorm, dense_norm, dense_norms, low_rank_norm

from .test_certified import FLOATS, proves_norm_below, random_matrix


DOUBLE = torch.float64


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rtol", [0.0, 1e-3])
def test_both_ends_are_proved_over_the_rationals(dtype, rtol):
    for index in range(40):
        weight = random_matrix(index, dtype)[:4]
        found = dense_norm(weight, rtol)
        assert found.certified
        assert proves_norm_below(weight, found.upper)
        # not below the lower end: an eigenvalue of W W^T is at least its square
        assert not proves_norm_below(weight, found.lower)
        assert found.relative_width <= max(rtol, 1e-9)


@pytest.mark.parametrize(("dtype", "cases"), [(torch.float32, 1000), (torch.bfloat16, 1000), (torch.float16, 500)])
def test_interval_holds_in_many_draws(dtype, cases):
    weights = [random_matrix(index, dtype) for index in range(cases)]
    for index, weight in enumerate(weights):
        exact = exact_spectral_norm(weight)
        found = dense_norm(weight, (0.0, 1e-6, 1e-3, 0.3)[index % 4])
        assert found.lower <= exact <= found.upper
        assert found.reason is None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interval_holds_in_ten_thousand_draws(dtype):
    for index in range(10_000):
        weight = random_matrix(index, dtype)
        exact = exact_spectral_norm(weight)
        found = dense_norm(weight, (0.0, 1e-3)[index % 2])
        assert found.lower <= exact <= found.upper


@pytest.mark.parametrize("rtol", [0.0, 1e-8, 1e-4, 1e-2])
@pytest.mark.parametrize(
    "weight",
    [
        pytest.param(lambda: torch.randn(300, 200), id="gaussian"),
        pytest.param(lambda: torch.randn(3, 900), id="wide"),
        pytest.param(lambda: torch.linalg.qr(torch.randn(256, 256))[0], id="orthogonal"),
        pytest.param(lambda: torch.eye(64), id="identity"),
        pytest.param(lambda: torch.outer(torch.randn(70), torch.randn(90)), id="rank one"),
        pytest.param(lambda: torch.diag(torch.linspace(1 - 1e-3, 1, 80)), id="cluster"),
        pytest.param(lambda: torch.diag(1.0 / torch.arange(1, 100)), id="decaying"),
        pytest.param(lambda: torch.randn(1, 40), id="one row"),
        pytest.param(lambda: torch.randn(40, 1), id="one column"),
        pytest.param(lambda: torch.ones(33, 65), id="constant"),
        pytest.param(lambda: torch.randn(600, 640), id="strips"),
    ],
)
def test_interval_is_as_narrow_as_asked_for(weight, rtol):
    weight = weight()
    exact = exact_spectral_norm(weight)
    for matrix in (weight, weight.T):
        found = dense_norm(matrix, rtol)
        assert found.lower <= exact * (1 + 1e-13)
        assert found.upper >= exact * (1 - 1e-13)
        assert found.relative_width <= max(rtol, 1e-7)
        assert found.reason is None


def test_lanczos_start_that_misses_the_top_vector_costs_nothing_but_time(monkeypatch):
    # the start vector is the same for every matrix: here it has no part in the top singular vector
    start = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    basis = torch.linalg.qr(torch.cat([start[:, None], torch.randn(100, 99, dtype=DOUBLE)], dim=1))[0]
    values = torch.linspace(1, 0.1, 100, dtype=DOUBLE)
    values[-1] = 3.0
    weight = basis @ torch.diag(values) @ basis.T
    found = dense_norm(weight)
    assert found.lower <= 3.0 * (1 + 1e-12)
    assert 3.0 * (1 - 1e-12) <= found.upper <= 3.0 * (1 + 1.1e-3)


def test_norms_known_exactly_are_inside():
    hadamard = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    for _ in range(5):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
        found = dense_norm(hadamard, 0.0)
        assert Fraction(found.lower) ** 2 <= hadamard.shape[0] <= Fraction(found.upper) ** 2
    for value in (1.0, 0.1, 1e-300, 5e-324, 1e300, 1.7e308):
        found = dense_norm(torch.tensor([[value]], dtype=DOUBLE), 0.0)
        assert found.lower <= value <= found.upper
        assert found.upper <= max(value * (1 + 1e-10), 1e-323) or value == 1.7e308


def test_ends_scale_over_the_whole_range():
    weight = torch.randn(6, 9, dtype=DOUBLE)
    reference = dense_norm(weight)
    for exponent in (-1060, -1000, -500, 500, 1000):
        factor = Fraction(2) ** exponent
        scaled = weight * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)
        found = dense_norm(scaled)
        loss = Fraction(1, 10**9) if exponent > -1020 else Fraction(1, 10**3)
        for end in ("lower", "upper"):
            expected = Fraction(getattr(reference, end)) * factor
            assert abs(Fraction(getattr(found, end)) - expected) <= loss * expected
    overflow = dense_norm(torch.full((3, 3), 1.7e308, dtype=DOUBLE))
    assert overflow.upper == math.inf
    assert 1.7e308 <= overflow.lower < math.inf
    assert overflow.relative_width == math.inf
    assert overflow.reason
    for dtype in (torch.float32, torch.bfloat16):
        for scale in (1e-40, 1e-30, 1e30, 3e38):
            small = torch.tensor([[1.0, 0.5], [-0.25, 0.75]], dtype=DOUBLE).mul(scale).to(dtype)
            exact = exact_spectral_norm(small)
            found = dense_norm(small)
            assert found.lower <= exact <= found.upper <= exact * 1.001


def test_rows_of_very_different_scales():
    weight = torch.randn(5, 7, dtype=DOUBLE) * torch.tensor([1e-300, 1e-150, 1.0, 1e100, 1e150], dtype=DOUBLE)[:, None]
    found = dense_norm(weight)
    norm = torch.linalg.vector_norm(weight[4] / 1e150).item() * 1e150
    assert found.lower <= norm <= found.upper


def test_zero_weights_give_exactly_zero():
    for found in (
        dense_norm(torch.zeros(3, 4)),
        dense_norm(torch.zeros(1, 4, dtype=torch.bfloat16)),
        low_rank_norm(torch.zeros(6, 2), torch.randn(2, 5)),
        low_rank_norm(torch.randn(6, 2), torch.zeros(2, 5)),
    ):
        assert (found.lower, found.upper, found.relative_width, found.reason) == (0.0, 0.0, 0.0, None)
    mixed = dense_norms([torch.zeros(3, 4), torch.ones(3, 4)])
    assert mixed[0].upper == 0.0
    assert mixed[1].lower <= math.sqrt(12) <= mixed[1].upper


@pytest.mark.parametrize("shape", [(5, 5), (30, 9), (9, 64), (40, 50)])
def test_batch_holds_what_the_loop_holds(shape):
    weights = [torch.randn(shape) for _ in range(40)]
    weights[7] = weights[7] * 1e-20
    weights[8] = torch.linalg.qr(torch.randn(max(shape), max(shape)))[0][: shape[0], : shape[1]]
    weights[9] = torch.zeros(shape)
    for found, weight in zip(dense_norms(weights), weights):
        exact, alone = exact_spectral_norm(weight), dense_norm(weight)
        assert found.lower <= exact * (1 + 1e-13)
        assert found.upper >= exact * (1 - 1e-13)
        assert found.relative_width <= 1e-3
        assert found.upper == pytest.approx(alone.upper, rel=1e-3)


def test_weight_stays_as_it_is_and_nothing_else_matters():
    weight = torch.nn.Parameter(torch.randn(20, 30))
    copy = weight.detach().clone()
    state = torch.get_rng_state()
    expected = dense_norm(weight)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weight.detach(), copy)
    assert dense_norm(weight.detach()) == expected
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"), torch.inference_mode():
        assert dense_norm(weight) == expected
    strided = torch.empty(40, 60)[::2, ::2].copy_(copy)
    assert not strided.is_contiguous()
    assert dense_norm(strided).upper == pytest.approx(expected.upper, rel=1e-12)


def test_subnormal_numbers_that_the_processor_drops_are_an_error():
    weight = torch.full((2, 2), 1e-40)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor keeps subnormal numbers")
    try:
        with pytest.raises(RuntimeError, match="set_flush_denormal"):
            dense_norm(weight)
    finally:
        torch.set_flush_denormal(False)
    assert dense_norm(weight).upper > 0


@pytest.mark.parametrize("slab", [2**23, 64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (3, 100), (5, 999)])
def test_entries_that_are_not_finite_are_refused_wherever_they_are(bad, place, slab, monkeypatch):
    monkeypatch.setattr(interval, "_SLAB_ENTRIES", slab)
    weight = torch.ones(6, 1000)
    weight[place] = bad
    for matrix in (weight, weight.T):
        with pytest.raises(ValueError, match="not finite"):
            dense_norm(matrix)


@pytest.mark.parametrize("shape", [(6, 1000), (1000, 6), (1, 777), (513, 1100)])
def test_slabs_give_the_same_interval(shape, monkeypatch):
    weight = torch.randn(shape)
    weight[-1, -1] = 100.0
    whole = dense_norm(weight, 1e-9)
    monkeypatch.setattr(interval, "_SLAB_ENTRIES", 4 * min(shape))
    found = dense_norm(weight, 1e-9)
    assert found.upper == pytest.approx(whole.upper, rel=1e-8)
    assert found.lower <= exact_spectral_norm(weight) <= found.upper


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_memory_of_a_tall_matrix_stays_far_below_its_float64_copy():
    script = """
import torch
from hf_lip.ops.interval import dense_norm

def memory(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) / 1024

torch.set_num_threads(1)
dense_norm(torch.randn(64, 65))
weight = torch.empty(1_000_000, 64, dtype=torch.bfloat16).fill_(0.5)
weight[::3] = -0.25
before = memory("VmRSS")
found = dense_norm(weight)
print(memory("VmHWM") - before, found.lower, found.upper)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    grown, lower, upper = map(float, done.stdout.split())
    # in float64 it has 488 MB
    assert grown < 250
    exact = math.sqrt(64 * (666_666 * 0.25 + 333_334 * 0.0625))
    assert lower <= exact <= upper


@pytest.mark.parametrize(("out", "rank", "inner"), [(40, 4, 60), (60, 1, 30), (5, 8, 7), (12, 12, 12), (3, 20, 50)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_rank_interval_is_that_of_the_product(out, rank, inner, dtype):
    for _ in range(20):
        left, right = torch.randn(out, rank).to(dtype), torch.randn(rank, inner).to(dtype)
        exact = exact_spectral_norm(left.double() @ right.double())
        found = low_rank_norm(left, right)
        assert found.lower <= exact * (1 + 1e-13)
        assert found.upper >= exact * (1 - 1e-13)
        assert found.relative_width <= 1e-3
        assert found.reason is None


def test_low_rank_interval_is_proved_over_the_rationals():
    for _ in range(20):
        left, right = torch.randn(3, 2), torch.randn(2, 4)
        found = low_rank_norm(left, right)
        # products of float32 numbers need 48 bits, the sum of two one more: exact in float64
        product = left.double() @ right.double()
        assert proves_norm_below(product, found.upper)
        assert not proves_norm_below(product, found.lower)


@pytest.mark.parametrize("gap", [1e-3, 1e-8, 1e-13, 1e-16])
def test_low_rank_factors_that_cancel(gap):
    left = torch.tensor([[1.0, 1.0], [2.0, 2.0]], dtype=DOUBLE)
    right = torch.tensor([[1.0, 3.0], [-1.0, -3.0 + gap]], dtype=DOUBLE)
    # the product is [[0, g], [0, 2 g]]
    exact = (right[0, 1] + right[1, 1]).item() * math.sqrt(5)
    found = low_rank_norm(left, right)
    assert found.lower <= exact * (1 + 1e-12)
    assert found.upper >= exact * (1 - 1e-12)
    if gap < 1e-12:
        assert "cancel" in found.reason
    nothing = low_rank_norm(left, torch.tensor([[1.0, 3.0], [-1.0, -3.0]], dtype=DOUBLE))
    assert nothing.lower == 0.0
    assert nothing.upper < 1e-10


def test_low_rank_factors_at_the_ends_of_the_range():
    left, right = torch.randn(6, 2, dtype=DOUBLE), torch.randn(2, 5, dtype=DOUBLE)
    reference = low_rank_norm(left, right)
    found = low_rank_norm(left * 2.0**1000, right * 2.0**-1000)
    assert found.upper == pytest.approx(reference.upper, rel=1e-12)
    assert low_rank_norm(left * 2.0**1000, right * 2.0**1000).upper == math.inf
    tiny = low_rank_norm(left * 2.0**-1000, right * 2.0**-1000)
    assert (tiny.lower, tiny.upper) == (0.0, 5e-324)
    found = low_rank_norm(torch.full((50_000, 16), 1e-3), torch.randn(16, 300))
    assert found.relative_width <= 1e-3


def test_widths():
    assert SpectralNorm(0.0, 0.0, "formula").relative_width == 0.0
    assert SpectralNorm(1.0, 2.0, "formula").relative_width == 0.5
    assert SpectralNorm(1.0, math.inf, "formula").relative_width == math.inf


def test_wrong_arguments_are_errors():
    good = torch.ones(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.quantize_per_tensor(good, 0.1, 0, torch.qint8)
    cases = [
        (lambda: dense_norm(torch.ones(3)), ValueError, "non-empty matrix"),
        (lambda: dense_norm(torch.ones(3, 0)), ValueError, "non-empty matrix"),
        (lambda: dense_norm(torch.ones(0, 3)), ValueError, "non-empty matrix"),
        (lambda: dense_norm(torch.ones(3, 3, 3)), ValueError, "non-empty matrix"),
        (lambda: dense_norm(good, 1.0), ValueError, "rtol"),
        (lambda: dense_norm(good, -0.1), ValueError, "rtol"),
        (lambda: dense_norm(good, math.nan), ValueError, "rtol"),
        (lambda: dense_norm(good.long()), TypeError, "floating point"),
        (lambda: dense_norm(good.to(torch.complex64)), TypeError, "floating point"),
        (lambda: dense_norm(good.to(torch.float8_e5m2)), TypeError, "Dequantise"),
        (lambda: dense_norm(good.to("meta")), TypeError, "meta device"),
        (lambda: dense_norm(good.to_sparse()), TypeError, "to_dense"),
        (lambda: dense_norm(quantised), TypeError, "Dequantise"),
        (lambda: low_rank_norm(good, torch.ones(3, 3)), ValueError, "cannot be multiplied"),
        (lambda: low_rank_norm(good, torch.ones(4, 0)), ValueError, "non-empty matrix"),
        (lambda: low_rank_norm(good, torch.full((4, 3), math.nan)), ValueError, "not finite"),
        (lambda: low_rank_norm(good, torch.ones(4, 3), rtol=2.0), ValueError, "rtol"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
