# SPDX-License-Identifier: Apache-2.0
"""Gram matrices of Fourier blocks against extended precision, and that no frequency is left out."""

import itertools
import math

import numpy as np
import pytest
import torch

from hf_lip.ops import symbol as symbol_module
from hf_lip.ops.rounding import PHASE_ERROR
from hf_lip.ops.symbol import Symbol, cell_centres, grid_frequencies, nearest_frequency, subdivide


DOUBLE = torch.float64
PI = 4 * np.arctan(np.longdouble(1))
KERNELS = [
    (1, 4, 4, 3, 3),
    (1, 3, 5, 4),
    (1, 5, 3, 2, 3, 2),
    (3, 2, 2, 3, 2),
    (4, 1, 1, 7, 7),
    (1, 1, 6, 9),
    (2, 3, 4, 1),
]


def blocks(kernel: torch.Tensor, numbers: torch.Tensor, denominators: tuple[int, ...]) -> np.ndarray:
    """Fourier blocks (groups, F, out, in), in extended precision, whole turns taken off in integers."""
    assert np.finfo(np.longdouble).eps < 1e-18
    taps = np.indices(kernel.shape[3:]).reshape(kernel.ndim - 3, -1)
    total = math.lcm(*denominators)
    weights = np.array([total // d for d in denominators], dtype=object)
    turns = (numbers.numpy().astype(object) * weights) @ taps.astype(object) % total
    angles = turns.astype(np.longdouble) * (2 * PI / total)
    waves = np.cos(angles) + 1j * np.sin(angles)
    flat = kernel.flatten(3).numpy().astype(np.longdouble)
    return np.einsum("goit,ft->gfoi", flat, waves)


def grams(kernel: torch.Tensor, numbers: torch.Tensor, denominators: tuple[int, ...]) -> np.ndarray:
    exact = blocks(kernel, numbers, denominators)
    if kernel.shape[1] > kernel.shape[2]:
        # the conjugate of D* D is the Gram matrix of the transposed kernel
        return np.einsum("gfoi,gfoj->gfij", exact, exact.conj())
    return np.einsum("gfoi,gfpi->gfop", exact, exact.conj())


@pytest.mark.parametrize("small_tap", [0, 2**14])
@pytest.mark.parametrize("shape", KERNELS)
def test_gram_matrices_are_within_the_error_that_is_claimed(shape, small_tap, monkeypatch):
    monkeypatch.setattr(symbol_module, "_SMALL_TAP", small_tap)
    for kind in ("gaussian", "positive", "cancelling", "uneven"):
        kernel = torch.randn(shape, dtype=DOUBLE)
        if kind == "positive":
            kernel = kernel.abs()
        elif kind == "cancelling":
            kernel -= kernel.mean(dim=tuple(range(3, kernel.ndim)), keepdim=True)
        elif kind == "uneven":
            kernel *= torch.exp(6 * torch.randn(shape, dtype=DOUBLE))
            kernel /= kernel.abs().max()
        tested = Symbol(kernel)
        assert tested.side == min(shape[1:3])
        dimensions = len(shape) - 3
        numbers = torch.randint(0, 2 * 997, (40, dimensions))
        numbers[0] = 0
        denominators = (2 * 997, 2 * 1000, 2 * 13)[:dimensions]
        numbers = numbers % torch.tensor(denominators)
        found = tested.grams(numbers, denominators)
        assert found.shape == (shape[0], 40, tested.side, tested.side)
        error = np.abs(found.numpy() - grams(kernel, numbers, denominators))
        # the bound is on the norm of the error; it should not be met by chance only
        assert np.sqrt((error**2).sum(axis=(2, 3))).max() <= tested.error / 3
        assert tested.error <= 1e-12 * tested.absolute_gain**2


def test_one_tap_gives_real_matrices():
    kernel = torch.randn(2, 3, 5, 1, 1, dtype=DOUBLE)
    found = Symbol(kernel).grams(*grid_frequencies((3, 4)))
    assert found.dtype == DOUBLE
    expected = kernel[..., 0, 0] @ kernel[..., 0, 0].mT
    torch.testing.assert_close(found, expected[:, None].expand_as(found), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "denominators", [(2 * 3, 2 * 5), (2 * 1009, 2 * 1013), (2**31, 2**31), (2 * 99_991, 2 * 99_989)]
)
def test_phases_are_as_accurate_as_the_proof_assumes(denominators):
    tested = Symbol(torch.randn(1, 1, 1, 5, 7, dtype=DOUBLE))
    numbers = torch.stack([torch.randint(0, d, (300,)) for d in denominators], dim=1)
    numbers[:3] = torch.tensor([[0, 0], [1, 1], [d - 1 for d in denominators]])
    cosines, sines = tested.phases(numbers, denominators)
    total = math.lcm(*denominators)
    weights = np.array([total // d for d in denominators], dtype=object)
    turns = (numbers.numpy().astype(object) * weights) @ tested.lags.numpy().T.astype(object) % total
    angles = turns.astype(np.longdouble) * (2 * PI / total)
    error = np.hypot(cosines[:, 1:].numpy() - np.cos(angles), sines.numpy() - np.sin(angles)).max()
    assert error < PHASE_ERROR / 4
    assert (cosines[:, 0] == 1).all()


def test_lags_are_one_of_each_pair():
    tested = Symbol(torch.randn(1, 2, 2, 3, 1, 2, dtype=DOUBLE))
    kept = {tuple(lag) for lag in tested.lags.tolist()}
    every = set(itertools.product(range(-2, 3), range(1), range(-1, 2)))
    assert kept | {tuple(-x for x in lag) for lag in kept} | {(0, 0, 0)} == every
    assert not kept & {tuple(-x for x in lag) for lag in kept}


@pytest.mark.parametrize("grid", [(1,), (6,), (7,), (1, 1), (1, 4), (2, 2), (5, 4), (6, 7), (2, 3, 4), (3, 1, 5)])
def test_frequencies_are_one_of_each_conjugate_pair(grid):
    for twist in itertools.product((0, 1), repeat=len(grid)):
        numbers, denominators = grid_frequencies(grid, twist)
        assert denominators == tuple(2 * n for n in grid)
        kept = {tuple(x) for x in numbers.tolist()}
        assert len(kept) == len(numbers)
        mirrored = {tuple((-x) % d for x, d in zip(f, denominators)) for f in kept}
        assert kept | mirrored == set(itertools.product(*(range(t, 2 * n, 2) for n, t in zip(grid, twist))))
        assert all(f == tuple((-x) % d for x, d in zip(f, denominators)) for f in kept & mirrored)


@pytest.mark.parametrize("shape", [(1, 3, 2, 3, 3), (2, 2, 3, 4, 2), (1, 2, 2, 5)])
def test_frequencies_of_the_torus_carry_the_circulant_operator(shape):
    kernel = torch.randn(shape, dtype=DOUBLE)
    grid = (4, 5)[: len(shape) - 3]
    found = torch.linalg.eigvalsh(Symbol(kernel).grams(*grid_frequencies(grid))).amax().sqrt().item()
    tops = []
    for group in kernel:
        folded = torch.zeros(*group.shape[:2], *grid, dtype=DOUBLE)
        for tap in itertools.product(*(range(k) for k in group.shape[2:])):
            folded[(..., *(t % n for t, n in zip(tap, grid)))] += group[(..., *tap)]
        spectrum = torch.fft.fftn(folded, dim=tuple(range(2, folded.ndim))).flatten(2).permute(2, 0, 1)
        tops.append(torch.linalg.svdvals(spectrum).amax().item())
    assert found == pytest.approx(max(tops), rel=1e-12)


def test_nearest_frequency_is_nearest():
    for _ in range(200):
        grid, twist = torch.randint(1, 9, (2,)).tolist(), tuple(torch.randint(0, 2, (2,)).tolist())
        point = torch.rand(2).tolist()
        found = nearest_frequency(tuple(point), tuple(grid), twist)[0].tolist()
        for number, n, shift, x in zip(found, grid, twist, point):
            choices = range(shift, 2 * n, 2)
            assert number in choices

            def distance(choice, n=n, x=x):
                apart = abs(choice / (2 * n) - x) % 1
                return min(apart, 1 - apart)

            assert distance(number) <= min(map(distance, choices)) + 1e-12


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_cells_cover_every_frequency_and_halves_cover_their_cell(dimensions):
    size = 4
    numbers = cell_centres(size, dimensions)
    kept = {tuple(x) for x in numbers.tolist()}
    mirrored = {tuple((-x) % (2 * size) for x in f) for f in kept}
    assert kept | mirrored == set(itertools.product(range(1, 2 * size, 2), repeat=dimensions))
    halves = subdivide(numbers)
    assert len(halves) == len(numbers) * 2**dimensions == len({tuple(x) for x in halves.tolist()})
    # over twice the denominator each lies half a new cell from its parent's centre
    apart = (halves.reshape(len(numbers), -1, dimensions) - 2 * numbers[:, None]).abs()
    assert (apart == 1).all()


@pytest.mark.parametrize(
    "shape", [(1, 3, 3, 3, 3), (2, 2, 4, 3, 2), (1, 4, 2, 6), (1, 1, 3, 5, 5), (1, 2, 2, 2, 2, 3)]
)
@pytest.mark.parametrize("resolution", [4, 8])
def test_quadratic_form_is_that_of_the_gram_matrices(shape, resolution):
    tested = Symbol(torch.randn(shape, dtype=DOUBLE))
    dimensions = len(shape) - 3
    vector = torch.randn(tested.side, dtype=torch.complex128)
    places = list(itertools.product(range(resolution), repeat=dimensions))
    matrices = tested.grams(2 * torch.tensor(places), (2 * resolution,) * dimensions)
    for group in range(shape[0]):
        form = tested.quadratic_form(vector, group, resolution)
        for place, matrix in zip(places, matrices[group]):
            expected = (vector.conj() @ matrix.to(vector.dtype) @ vector).real.item()
            assert form[place].item() == pytest.approx(expected, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("shape", [(1, 3, 5, 3, 3), (1, 5, 3, 3, 3), (1, 4, 4, 5)])
def test_input_vector_is_stretched_by_the_block(shape):
    kernel = torch.randn(shape, dtype=DOUBLE)
    tested = Symbol(kernel)
    turns = (0.25, 0.125)[: len(shape) - 3]
    numbers = torch.tensor([[int(turn * 16) for turn in turns]])
    values, vectors = torch.linalg.eigh(tested.grams(numbers, (16,) * len(turns))[0, 0])
    channels = tested.input_vector(turns, vectors[:, -1])
    assert channels.shape == (shape[2],)
    # a plane wave of these channels, seen by the kernel: sum over taps of K_t exp(2 pi i turn t), or its conjugate
    stretches = []
    for sign in (1, -1):
        block = blocks(kernel, sign * numbers % 16, (16,) * len(turns))[0, 0]
        vector = channels.resolve_conj().numpy().astype(np.clongdouble)
        stretches.append(float(np.linalg.norm(block @ vector) / np.linalg.norm(vector)))
    assert max(stretches) == pytest.approx(values[-1].sqrt().item(), rel=1e-9)
