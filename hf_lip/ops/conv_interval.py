# SPDX-License-Identifier: Apache-2.0
"""Spectral norms of convolutions as proved intervals, for one image size or for all sizes.

One size: every Fourier block of a torus that contains the operator is proved to lie below the upper end. For zero
padding the torus n + padding may be twisted (a change of sign across its seam): it contains the operator all the same,
and its frequencies lie half a step off, which for a norm attained at a frequency of the plain torus, as that of most
trained kernels is, gives a bound several times closer to the operator. The lower end is the stretch of a vector by the
operator itself.

All sizes: the norm on the infinite grid, by branch and bound over cells of frequencies. With t taps an axis, a cell of
half widths h around c that holds the maximum M has |D(c)| >= M cos(sum h (t - 1) / 2): along the line to the centre a
trigonometric polynomial bounded by M decays from its maximum no faster than that (Riesz; Duffin and Schaeffer).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .conv_operator import ConvArguments, convolve, stretch_lower_bound
from .eigenvalue import EigenvalueIntervals, rayleigh_lower_bounds, top_eigenvectors
from .geometry import Padding, Size, TorusProblem, as_pads, as_tuple, check_kernel, torus_problem
from .interval import SpectralNorm, check_rtol, dense_norms, eigenvalue_tolerance, interval
from .rounding import down, exact_double, gamma, scaled, up
from .symbol import Symbol, cell_centres, grid_frequencies, nearest_frequency, subdivide


# complex entries of Gram matrices held at once, 32 MB
_CHUNK_ENTRIES = 2**21
# points a dimension of the grid on which a quadratic form is maximised, and Lanczos steps spent around it
_PEAK_GRID, _PEAK_STEPS = 64, 10
# work of a branch and bound, in multiplications of its factorisations, before the remaining cells are closed wider
_CELL_WORK = 2e11
# Lanczos steps on the operator itself, in float32
_OPERATOR_STEPS = 8
# an operator of at most this smaller side, and of as many entries, is written out instead
_EXPLICIT_SIDE, _EXPLICIT_ENTRIES = 384, 2**22


class PlaneWave(NamedTuple):
    """A frequency, in turns, and the channel vector (in,) that its Fourier block stretches most."""

    turns: tuple[float, ...]
    channels: Tensor

    def on_image(self, sizes: tuple[int, ...]) -> Tensor:
        """The wave on an image (1, in, *sizes), fading towards the border as zero padding asks for."""
        image = self.channels.reshape(1, -1, *[1] * len(sizes))
        for axis, (turn, size) in enumerate(zip(self.turns, sizes), start=2):
            positions = torch.arange(size, device="cpu")
            fade = torch.sin(math.pi * (positions + 1) / (size + 1))
            factor = fade * torch.exp(2j * math.pi * turn * positions)
            image = image * factor.reshape([-1 if dim == axis else 1 for dim in range(len(sizes) + 2)])
        return image.real.float()


def conv_norm(
    weight: Tensor,
    input_size: Size | None = None,
    *,
    padding_mode: str = "zeros",
    padding: Padding | None = None,
    stride: Size = 1,
    dilation: Size = 1,
    groups: int = 1,
    rtol: float = 1e-3,
) -> SpectralNorm:
    """Proved interval of the spectral norm of a convolution in one to three dimensions.

    Args:
        weight: (out, in / groups, *k), any float dtype of 16 bits or more.
        input_size: image size, int or one a dimension; None for the supremum over all sizes.
        padding_mode: "zeros", "circular", "reflect" or "replicate".
        padding: pixels on each side, int, one a dimension or pairs (before, after); None for "same".
        stride, dilation: int or one a dimension.
        groups: number of channel groups.
        rtol: relative width asked for. A zero-padded convolution at a small size, or a reflected or replicated border,
            may not allow it: the result then says why in `reason`.

    Raises:
        TypeError: values that are no plain floats.
        ValueError: shapes, sizes or modes that make no convolution, entries that are not finite, rtol out of range.
    """
    check_rtol(rtol)
    check_kernel(weight, (1, 2, 3))
    kernel, exponent = scaled(exact_double(weight))
    dimensions = kernel.ndim - 2
    strides = as_tuple(stride, dimensions, "stride", 1)
    dilations = as_tuple(dilation, dimensions, "dilation", 1)
    spans = [d * (k - 1) + 1 for d, k in zip(dilations, kernel.shape[2:])]
    problem = torus_problem(
        kernel,
        input_size,
        padding_mode=padding_mode,
        padding=padding,
        stride=strides,
        dilation=dilations,
        groups=groups,
    )
    if not kernel.any():
        return SpectralNorm(0.0, 0.0, "zero kernel")
    copies = up(math.sqrt(problem.copies))
    reason = "the branch and bound ran out of its work limit"
    operator = ConvArguments(
        as_pads(padding, spans, circular=padding_mode == "circular"), padding_mode, strides, dilations, groups
    )
    sizes = None if input_size is None else as_tuple(input_size, dimensions, "input_size", 1)
    whole, wave = problem.exact, None
    if sizes is not None and not whole and _is_small(kernel, sizes, operator):
        low, high, method = _explicit(kernel, sizes, operator, problem.copies, rtol)
        return interval(low, high, exponent, method, rtol)
    if math.prod(problem.kernel.shape[3:]) == 1:
        # one tap a phase: the operator is a matrix, applied at every position
        norms = dense_norms(list(problem.kernel.flatten(2)), rtol)
        low, high, method = max(n.lower for n in norms), max(n.upper for n in norms), "cholesky"
        # some position reads no padding, and shares no pixel with another
        ends = zip(sizes or (), operator.pads, spans, strides)
        whole = all(-(-before // s) * s - before + k <= n for n, (before, _), k, s in ends)
    elif problem.grid is None:
        low, high, method = _all_sizes(problem, rtol)
    else:
        low, high, method, wave = _one_size(problem, rtol)
    high = up(high * copies)
    if input_size is None and problem.copies > 1:
        reason = f"{padding_mode} padding reads a pixel {problem.copies} times at most, which may not stretch as much"
    if sizes is not None and not whole:
        # the torus only contains the operator, so the lower end is that of the operator itself
        enough = (1 - rtol) * high
        start = None if wave is None or max(*strides, *dilations, groups) > 1 else wave.on_image(sizes)
        low = stretch_lower_bound(kernel, sizes, operator, problem.copies, enough, _OPERATOR_STEPS, start)
        reason = f"at this size, {padding_mode} padding is only bounded through an operator that contains it"
    return interval(down(low), high, exponent, method, rtol, reason)


def _is_small(kernel: Tensor, sizes: tuple[int, ...], operator: ConvArguments) -> bool:
    """Whether the explicit operator, one group of it, is a matrix that is proved as fast as its Fourier blocks."""
    columns = kernel.shape[1] * math.prod(sizes)
    spans = [d * (k - 1) + 1 for d, k in zip(operator.dilation, kernel.shape[2:])]
    ends = zip(sizes, operator.pads, spans, operator.stride)
    rows = kernel.shape[0] // operator.groups * math.prod((n + sum(p) - k) // s + 1 for n, p, k, s in ends)
    return min(rows, columns) <= _EXPLICIT_SIDE and rows * columns * operator.groups <= _EXPLICIT_ENTRIES


def _explicit(
    kernel: Tensor, sizes: tuple[int, ...], operator: ConvArguments, copies: int, rtol: float
) -> tuple[float, float, str]:
    """The operator as a matrix, made by convolving the unit images of one group's channels in all groups at once."""
    channels, groups = kernel.shape[1], operator.groups
    count = channels * math.prod(sizes)
    images = torch.eye(count, dtype=torch.float64, device="cpu").reshape(count, channels, *sizes)
    columns = convolve(images.repeat(1, groups, *[1] * len(sizes)), kernel, operator)
    norms = dense_norms(list(columns.reshape(count, groups, -1).movedim(1, 0)), rtol)
    # entries are weights, or sums of some where several taps read one pixel
    gain = torch.linalg.vector_norm(kernel, dim=(0, 1)).sum().item() * math.sqrt(copies)
    error = up(gamma(2 * kernel[0].numel() + 16) * gain)
    return down(max(n.lower for n in norms) - error), up(max(n.upper for n in norms) + error), "explicit cholesky"


def _one_size(problem: TorusProblem, rtol: float) -> tuple[float, float, str, PlaneWave | None]:
    symbol = Symbol(problem.kernel)
    assert problem.grid is not None
    found = EigenvalueIntervals(1, eigenvalue_tolerance(rtol, symbol.side, complex_entries=True))
    twist, wave = (0,) * len(problem.grid), None
    if symbol.side > 1:
        peak, vector = _peak(symbol)
        wave = PlaneWave(peak, symbol.input_vector(peak, vector))
        if not problem.circular:
            # frequencies as far from the peak as can be
            turns = [x * n % 1.0 for x, n in zip(peak, problem.grid)]
            twist = tuple(int(min(turn, 1 - turn) < 0.25) for turn in turns)
        nearest = nearest_frequency(peak, problem.grid, twist)
        _raise(found, symbol, nearest, tuple(2 * n for n in problem.grid))
    numbers, denominators = grid_frequencies(problem.grid, twist)
    for chunk in _chunks(symbol, numbers):
        grams = symbol.grams(chunk, denominators).flatten(0, 1)
        found.include(grams, torch.zeros(grams.shape[0], dtype=torch.int64, device="cpu"))
        if found.witness is not None:
            index, vector = found.witness
            _, place = _top_of_form(symbol, vector, index // len(chunk))
            peak = tuple(x / _PEAK_GRID for x in place)
            wave = PlaneWave(peak, symbol.input_vector(peak, vector))
    low, high = _ends(found, symbol)
    return low, high, "torus cholesky" if not any(twist) else "twisted torus cholesky", wave


def _all_sizes(problem: TorusProblem, rtol: float) -> tuple[float, float, str]:
    symbol = Symbol(problem.kernel)
    types = [(taps - 1) / 2 for taps in symbol.taps]
    size = 2 ** math.ceil(math.log2(5 * max(1.0, sum(types))))
    found = EigenvalueIntervals(1, eigenvalue_tolerance(rtol, symbol.side, complex_entries=True))
    if symbol.side > 1:
        scale = 2 * _PEAK_GRID
        nearest = nearest_frequency(_peak(symbol)[0], (scale,) * len(types), (0,) * len(types))
        _raise(found, symbol, nearest, (2 * scale,) * len(types))
    cells = cell_centres(size, len(types))
    work = 0.0
    high = 0.0
    while cells.shape[0]:
        denominators = (2 * size,) * len(types)
        # frequencies are 2 pi odd / (2 size): half a cell is pi / size wide
        decay = math.cos(min(math.pi / 2, sum(types) * math.pi / size))
        work += cells.shape[0] * symbol.groups * 4 / 3 * symbol.side**3
        last = decay >= 1 - 0.02 * rtol or work > _CELL_WORK
        remaining = []
        for chunk in _chunks(symbol, cells):
            grams = symbol.grams(chunk, denominators)
            flat = grams.flatten(0, 1)
            owner = torch.zeros(flat.shape[0], dtype=torch.int64, device="cpu")
            if last:
                found.include(flat, owner)
                continue
            failed = found.fails(flat, found.shift[owner] * (decay**2 * (1 - 1e-12)))
            if failed.numel():
                # what the failing cells reach may raise the lower end
                some = failed[:: max(1, failed.numel() // 8)]
                vectors = top_eigenvectors(flat[some], _PEAK_STEPS)
                found.raise_lower(rayleigh_lower_bounds(flat[some], vectors), owner[some])
            open_cells = torch.zeros(chunk.shape[0], dtype=torch.bool, device="cpu")
            open_cells[failed % chunk.shape[0]] = True
            remaining.append(chunk[open_cells])
        if last:
            high = _ends(found, symbol)[1] / (decay * (1 - 1e-12))
            break
        cells = subdivide(torch.cat(remaining))
        size *= 2
    low, upper = _ends(found, symbol)
    return low, max(up(high), up(upper)), "frequency cells"


def _ends(found: EigenvalueIntervals, symbol: Symbol) -> tuple[float, float]:
    low = down(found.lower.item() - symbol.error)
    # twice, for cells that were tested at shifts lowered by the square of a cosine, which is above 1/2
    return down(math.sqrt(low)), up(math.sqrt(up(found.proved_upper().item() + 2 * symbol.error)))


def _chunks(symbol: Symbol, numbers: Tensor) -> Sequence[Tensor]:
    return numbers.split(max(1, _CHUNK_ENTRIES // (symbol.groups * symbol.side**2)))


def _raise(found: EigenvalueIntervals, symbol: Symbol, numbers: Tensor, denominators: tuple[int, ...]) -> None:
    grams = symbol.grams(numbers, denominators).flatten(0, 1)
    vectors = top_eigenvectors(grams, 2 * _PEAK_STEPS)
    owner = torch.zeros(grams.shape[0], dtype=torch.int64, device="cpu")
    found.raise_lower(rayleigh_lower_bounds(grams, vectors), owner)


def _peak(symbol: Symbol) -> tuple[tuple[float, ...], Tensor]:
    """Frequency, in turns, near which the largest block lies, and a vector: guesses, they cost tightness only."""
    dimensions = len(symbol.taps)
    numbers, denominators = grid_frequencies((2,) * dimensions)
    for _ in range(2):
        # for a fixed vector the best frequency is found at once, on a fine grid
        grams = symbol.grams(numbers, denominators).flatten(0, 1)
        vectors = top_eigenvectors(grams, _PEAK_STEPS)
        best = int(rayleigh_lower_bounds(grams, vectors).argmax())
        tops = [_top_of_form(symbol, vector, index // len(numbers)) for index, vector in enumerate(vectors)]
        place, vector = tops[best][1], vectors[best]
        numbers = 2 * torch.tensor([place for _, place in sorted(tops, reverse=True)[:2]], device="cpu")
        denominators = (2 * _PEAK_GRID,) * dimensions
    return tuple(x / _PEAK_GRID for x in place), vector


def _top_of_form(symbol: Symbol, vector: Tensor, group: int) -> tuple[float, tuple[int, ...]]:
    form = symbol.quadratic_form(vector, group, _PEAK_GRID)
    top = int(form.argmax())
    return form.flatten()[top].item(), tuple(int(x) for x in torch.unravel_index(torch.tensor(top), form.shape))
