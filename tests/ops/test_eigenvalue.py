# SPDX-License-Identifier: Apache-2.0
"""Eigenvalue intervals: what a Cholesky factorisation proves, and that nothing else is taken for a proof."""

import math
from fractions import Fraction

import pytest
import torch

from hf_lip.ops import cholesky, eigenvalue
from hf_lip.ops.cholesky import not_positive_definite
from hf_lip.ops.eigenvalue import EigenvalueIntervals, rayleigh_lower_bounds, shift_error, top_eigenvectors
from hf_lip.ops.rounding import down, exact_double, gamma, scaled, unscaled, up

from .test_certified import is_positive_definite, rationals


DOUBLE = torch.float64
DTYPES = [DOUBLE, torch.complex128]
# batched factorisations, single ones, single ones in blocks
SIDES = [1, 2, 5, 24, 25, 60, 130]


def gram_matrices(count: int, side: int, dtype: torch.dtype, rank: int | None = None) -> torch.Tensor:
    factor = torch.randn(count, side, rank or side, dtype=dtype)
    return factor @ factor.mH / side


def owners(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", SIDES)
def test_factorisation_breaks_down_exactly_where_the_matrix_is_not_definite(side, dtype):
    matrices = gram_matrices(6, side, dtype)
    top = torch.linalg.eigvalsh(matrices)[:, -1]
    identity = torch.eye(side, dtype=dtype)
    for factor, expected in ((1 + 1e-9, False), (1 - 1e-9, True), (0.5, True), (2.0, False)):
        shifted = factor * top[:, None, None] * identity - matrices
        assert not_positive_definite(shifted.clone()).tolist() == [expected] * 6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_matrices_that_are_not_finite_are_not_definite(side, dtype, bad):
    # some builds of LAPACK report success for NaN
    for row, column in {(0, 0), (side - 1, side - 1), (side // 2, side // 3), (side - 1, 0)}:
        matrices = 4 * torch.eye(side, dtype=dtype).repeat(3, 1, 1)
        matrices[1, row, column] = matrices[1, column, row] = bad
        assert not_positive_definite(matrices).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", [24, 25, 40])
def test_only_the_lower_triangle_is_read(side, dtype):
    """So an upper triangle that differs by rounding stays outside of the proof."""
    matrices = gram_matrices(2, side, dtype) + torch.eye(side, dtype=dtype)
    spoilt = matrices.tril() + 1e3 * torch.ones(side, side, dtype=dtype).triu(1)
    assert not not_positive_definite(spoilt).any()
    spoilt = matrices.triu() + 1e3 * torch.ones(side, side, dtype=dtype).tril(-1)
    assert not_positive_definite(spoilt).all()


def test_threads_find_what_one_thread_finds():
    matrices = gram_matrices(23, 40, DOUBLE)
    smallest = torch.linalg.eigvalsh(matrices)[:, 0]
    matrices -= smallest.median() * (1 + 1e-9) * torch.eye(40, dtype=DOUBLE)
    expected = (smallest <= smallest.median()).tolist()
    assert sum(expected) == 12
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert not_positive_definite(matrices.clone()).tolist() == expected
    finally:
        torch.set_num_threads(threads)


def test_views_that_are_not_contiguous_are_refused():
    matrices = gram_matrices(2, 60, DOUBLE)[:, ::2, ::2]
    with pytest.raises(ValueError, match="contiguous"):
        not_positive_definite(matrices)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("tolerance", [1e-9, 1e-3, 0.3])
def test_interval_holds_the_largest_eigenvalue(side, dtype, tolerance):
    for rank in {1, max(1, side // 3), side}:
        matrices = gram_matrices(20, side, dtype, rank)
        found = EigenvalueIntervals(1, tolerance)
        found.include(matrices, owners(20))
        top = torch.linalg.eigvalsh(matrices).amax().item()
        assert found.lower.item() <= top * (1 + 1e-13)
        assert found.proved_upper().item() >= top * (1 - 1e-13)
        assert found.proved_upper().item() <= found.lower.item() * (1 + 1.01 * tolerance + 1e-10)


@pytest.mark.parametrize("side", [3, 30])
def test_stacks_keep_to_themselves(side):
    matrices = gram_matrices(60, side, torch.complex128) * torch.logspace(-12, 12, 60, dtype=DOUBLE)[:, None, None]
    owner = torch.arange(60) % 7
    found = EigenvalueIntervals(7, 1e-6)
    # in two parts, the second with smaller matrices of another size
    found.include(matrices, owner)
    extra = gram_matrices(7, 2, DOUBLE) * 1e-3
    found.include(extra, torch.arange(7))
    for stack in range(7):
        tops = [torch.linalg.eigvalsh(matrices[owner == stack]).amax(), torch.linalg.eigvalsh(extra[stack]).amax()]
        top = max(tops).item()
        assert found.lower[stack].item() <= top * (1 + 1e-13)
        assert top * (1 - 1e-13) <= found.proved_upper()[stack].item() <= top * (1 + 2e-6)


def test_zero_matrices_end_at_the_floor():
    found = EigenvalueIntervals(2, 1e-3)
    found.include(torch.zeros(2, 30, 30, dtype=DOUBLE), torch.arange(2))
    assert found.lower.tolist() == [0.0, 0.0]
    assert all(0 < upper < 1e-150 for upper in found.proved_upper().tolist())


@pytest.mark.parametrize("side", [1, 4, 24, 25, 48])
def test_a_shift_below_the_eigenvalue_is_found_out(side):
    """The factorisation is what proves: a candidate that is too small by 1e-9 fails it."""
    matrices = gram_matrices(4, side, DOUBLE)
    top = torch.linalg.eigvalsh(matrices)[:, -1]
    found = EigenvalueIntervals(1, 1e-3)
    assert found.fails(matrices, top * (1 - 1e-9)).tolist() == [0, 1, 2, 3]
    assert found.fails(matrices, top * (1 + 1e-9)).tolist() == []
    found.shift[:] = top.amax() * (1 - 1e-9)
    found.include(matrices, owners(4))
    assert found.proved_upper().item() >= top.amax().item()


def test_margin_grows_with_the_largest_matrix_whichever_call_saw_it():
    matrices = gram_matrices(3, 40, torch.complex128)
    shift = 10 * torch.linalg.eigvalsh(matrices).amax()
    for call in (lambda f: f.fails(matrices, shift.expand(3)), lambda f: f.include(matrices, owners(3))):
        found = EigenvalueIntervals(1, 1e-3)
        found.shift[:] = shift
        call(found)
        assert found.proved_upper().item() >= shift.item() * (1 + shift_error(40, True))
        found.fails(torch.ones(1, 1, 1, dtype=DOUBLE), torch.full((1,), 9.0, dtype=DOUBLE))
        assert found.proved_upper().item() >= shift.item() * (1 + shift_error(40, True))


@pytest.mark.parametrize("complex_entries", [False, True])
@pytest.mark.parametrize("side", [1, 2, 10, 100, 1000])
def test_margin_is_twice_that_of_the_theorem(side, complex_entries):
    # Higham 2002, theorem 10.3: |error| <= gamma_(n + 1) |R^T| |R|; products of complex numbers err sqrt(8) times more
    step = gamma((3 if complex_entries else 1) * (side + 1))
    theorem = step / (1 - step) * side
    assert shift_error(side, complex_entries) >= 2 * theorem
    assert shift_error(side, complex_entries) <= 1e-8 * side


def test_interval_is_proved_over_the_rationals():
    for _ in range(20):
        matrices = gram_matrices(3, 4, DOUBLE)
        found = EigenvalueIntervals(1, 1e-12)
        found.include(matrices, owners(3))
        definite = []
        for end in (found.proved_upper().item(), found.lower.item()):
            shifted = [[[-x for x in row] for row in rationals(matrix)] for matrix in matrices]
            for matrix in shifted:
                for i in range(4):
                    # the lower triangle is the matrix that is meant
                    matrix[i][i] += Fraction(end)
                    matrix[i][i + 1 :] = [matrix[j][i] for j in range(i + 1, 4)]
            definite.append([is_positive_definite(matrix) for matrix in shifted])
        assert all(definite[0])
        assert not all(definite[1])


@pytest.mark.parametrize("side", [2, 12, 30])
@pytest.mark.parametrize("kind", ["zero", "nan", "infinite", "tiny", "huge", "last", "random", "first axis"])
def test_vectors_that_are_garbage_cost_tightness_only(side, kind, monkeypatch):
    calls = 0

    def useless(matrices, num_steps):
        nonlocal calls
        calls += 1
        vectors = torch.zeros(matrices.shape[:2], dtype=matrices.dtype)
        if kind == "last":
            return torch.linalg.eigh(matrices).eigenvectors[..., 0]
        if kind == "random":
            return torch.randn(vectors.shape, dtype=matrices.dtype)
        fill = {"zero": 0.0, "nan": math.nan, "infinite": math.inf, "tiny": 1e-161, "huge": 1e200}
        vectors[:, 0] = fill.get(kind, 1.0)
        return vectors

    matrices = gram_matrices(5, side, torch.complex128)
    top = torch.linalg.eigvalsh(matrices).amax().item()
    monkeypatch.setattr(eigenvalue, "top_eigenvectors", useless)
    found = EigenvalueIntervals(1, 1e-3)
    found.include(matrices, owners(5))
    assert 0 <= found.lower.item() <= top
    assert top <= found.proved_upper().item() < math.inf
    # the steps widen geometrically: it ends
    assert calls < 200


def test_eigensolver_that_errs_cannot_break_the_ends(monkeypatch):
    matrices = gram_matrices(5, 20, DOUBLE)
    top = torch.linalg.eigvalsh(matrices).amax().item()
    true = torch.linalg.eigh

    class Wrong:
        def __init__(self, matrix):
            self.eigenvalues, vectors = true(matrix)
            self.eigenvectors = vectors + 0.3 * torch.randn_like(vectors)

    monkeypatch.setattr(torch.linalg, "eigh", Wrong)
    found = EigenvalueIntervals(1, 1e-6)
    found.include(matrices, owners(5))
    assert found.lower.item() <= top <= found.proved_upper().item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rayleigh_bounds_are_below_the_eigenvalue(dtype):
    for side in (1, 3, 30):
        matrices = gram_matrices(8, side, dtype)
        top = torch.linalg.eigvalsh(matrices)[:, -1]
        exact = top_eigenvectors(matrices, side)
        noisy = exact + 0.05 * torch.randn_like(exact)
        for vectors in (exact, noisy, torch.randn_like(exact), exact * 1e-3, exact * 1e3):
            assert (rayleigh_lower_bounds(matrices, vectors) <= top * (1 + 1e-14)).all()
        assert (rayleigh_lower_bounds(matrices, exact) >= top * (1 - 1e-11)).all()
        # where squares lose their digits nothing is claimed
        assert not rayleigh_lower_bounds(matrices, exact * 1e-161).any()
        assert not rayleigh_lower_bounds(matrices, exact * math.nan).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [1, 3, 12, 40])
def test_lanczos_vectors_are_near_the_top(dtype, steps):
    matrices = gram_matrices(4, 40, dtype)
    found = rayleigh_lower_bounds(matrices, top_eigenvectors(matrices, steps))
    top = torch.linalg.eigvalsh(matrices)[:, -1]
    assert (found <= top).all()
    assert (found >= top * {1: 0.1, 3: 0.5, 12: 0.97, 40: 1 - 1e-10}[steps]).all()


def test_lanczos_survives_an_invariant_subspace():
    # the identity: the first step is exact and leaves nothing
    for matrices in (torch.eye(30, dtype=DOUBLE)[None], torch.diag(torch.arange(30.0) // 15).double()[None]):
        vectors = top_eigenvectors(matrices, 12)
        assert torch.isfinite(vectors).all()
        assert rayleigh_lower_bounds(matrices, vectors).item() == pytest.approx(1.0, rel=1e-10)


def test_scaling_is_exact_and_rounding_goes_outwards():
    for value in (1.0, 0.1, 1e-300, 5e-324, 2.0**-1022, 1e300, 1.7e308):
        weight = torch.tensor([[value, value / 3]], dtype=DOUBLE)
        matrix, exponent = scaled(weight)
        assert 2.0**-80 < matrix.abs().amax().item() < 2.0**30
        assert Fraction(matrix[0, 0].item()) * Fraction(2) ** exponent == Fraction(value)
        for result in (matrix[0, 0].item(), 1.0, 1 / 3):
            exact = Fraction(result) * Fraction(2) ** exponent
            high = unscaled(result, exponent)
            assert math.isinf(high) or Fraction(high) >= exact
            assert Fraction(unscaled(result, exponent, -math.inf)) <= exact
    for value in (0.0, 5e-324, 1e-310, 0.1, 1.0, 1e308):
        assert down(value) <= value < up(value)
        assert down(value) >= 0.0
    assert unscaled(0.0, 500) > 0.0 == unscaled(0.0, 500, -math.inf)
    assert unscaled(1.5, 1100) == math.inf
    assert unscaled(1.5, 1100, -math.inf) < math.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, DOUBLE])
def test_casts_are_exact(dtype):
    values = torch.randn(1000).to(dtype)
    limits = torch.finfo(dtype)
    values[:3] = torch.tensor([limits.tiny, limits.smallest_normal / 4, limits.max], dtype=DOUBLE)
    double = exact_double(values)
    assert double.dtype == DOUBLE
    assert torch.equal(double.to(dtype), values)
    assert double[1].item() == torch.finfo(dtype).smallest_normal / 4 > 0


def test_limits_of_the_batched_factorisation_are_covered():
    assert max(side for side in SIDES if side <= cholesky._BATCHED_SIDE) == cholesky._BATCHED_SIDE
    assert cholesky._BATCHED_SIDE + 1 in SIDES
