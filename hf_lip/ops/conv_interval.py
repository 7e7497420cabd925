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

from .conv_operator import ConvArguments, operator_matrix, part_of_large_image, stretch_lower_bound
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
_CELL_WORK = 6e10
# and cells held at once
_MOST_CELLS = 2**22
# frequencies of a torus from which on the branch and bound is tried first, and from which on it has to do
_MANY_FREQUENCIES, _MOST_FREQUENCIES = 2**12, 2**20
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
    reason = None
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
        low, high, _ = _all_sizes(Symbol(problem.kernel), rtol, _CELL_WORK)
        method = "frequency cells"
        if padding_mode == "circular" and max(strides) > 1:
            strided = torus_problem(kernel, stride=strides, dilation=dilations, groups=groups)
            low, _, _ = _all_sizes(Symbol(strided.kernel), rtol, _CELL_WORK)
            reason = "circular padding on sizes that the stride does not divide is bounded without the stride"
    else:
        low, high, method, wave = _one_size(problem, rtol)
    if method == "frequency cells" and reason is None:
        reason = "the branch and bound ran out of its work limit"
    high = up(high * copies)
    if input_size is None and problem.copies > 1:
        reason = f"{padding_mode} padding reads a pixel {problem.copies} times at most, which may not stretch as much"
    if sizes is not None and not whole:
        # the torus only contains the operator, so the lower end is that of the operator itself
        enough = (1 - rtol) * high
        part, operator = part_of_large_image(kernel, sizes, operator)
        start = None if wave is None or max(*strides, *dilations, groups) > 1 else wave.on_image(part)
        low = stretch_lower_bound(kernel, part, operator, problem.copies, enough, _OPERATOR_STEPS, start)
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
    norms = dense_norms(list(operator_matrix(kernel, sizes, operator)), rtol)
    low, high = max(n.lower for n in norms), max(n.upper for n in norms)
    if operator.padding_mode == "zeros":
        # every entry is a weight
        return low, high, "explicit cholesky"
    # entries are sums of weights where several taps read one pixel
    gain = torch.linalg.vector_norm(kernel, dim=(0, 1)).sum().item() * math.sqrt(copies)
    error = up(gamma(2 * kernel[0].numel() + 16) * gain)
    return down(low - error), up(high + error), "explicit cholesky"


def _one_size(problem: TorusProblem, rtol: float) -> tuple[float, float, str, PlaneWave | None]:
    symbol = Symbol(problem.kernel)
    assert problem.grid is not None
    found = EigenvalueIntervals(1, eigenvalue_tolerance(rtol, symbol.side, complex_entries=True))
    twist, wave = (0,) * len(problem.grid), None
    doubled = tuple(2 * n for n in problem.grid)
    if symbol.side > 1:
        peak, vector = _peak(symbol)
        wave = PlaneWave(peak, symbol.input_vector(peak, vector))
        if not problem.circular:
            # frequencies as far from the peak as can be
            turns = [x * n % 1.0 for x, n in zip(peak, problem.grid)]
            twist = tuple(int(min(turn, 1 - turn) < 0.25) for turn in turns)
        _raise(found, symbol, nearest_frequency(peak, problem.grid, twist), doubled)
    count = math.prod(problem.grid) // 2
    if count > _MANY_FREQUENCIES:
        # the norm on the infinite grid is hardly above that of a large torus
        low, high, peak = _all_sizes(symbol, rtol / 2, min(_CELL_WORK, count * _work(symbol)))
        if high - low <= rtol * high or count > _MOST_FREQUENCIES:
            vector = _raise(found, symbol, nearest_frequency(peak, problem.grid, twist), doubled)
            return _ends(found, symbol)[0], high, "frequency cells", PlaneWave(peak, symbol.input_vector(peak, vector))
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


def _work(symbol: Symbol) -> float:
    """Multiplications that one frequency takes: phases, Gram matrices, factorisations."""
    count = 2 * len(symbol.lags) + 1
    return 40 * count + symbol.groups * (2 * count * symbol.side**2 + 4 / 3 * symbol.side**3)


def _all_sizes(symbol: Symbol, rtol: float, most_work: float) -> tuple[float, float, tuple[float, ...]]:
    """Ends of the norm on the infinite grid, and a frequency, in turns, near which it is reached."""
    types = [(taps - 1) / 2 for taps in symbol.taps]
    size = 2 ** math.ceil(math.log2(5 * max(1.0, sum(types))))
    found = EigenvalueIntervals(1, eigenvalue_tolerance(rtol, symbol.side, complex_entries=True))
    peak: tuple[float, ...] = (0.0,) * len(types)
    if symbol.side > 1:
        scale = 2 * _PEAK_GRID
        peak = _peak(symbol)[0]
        nearest = nearest_frequency(peak, (scale,) * len(types), (0,) * len(types))
        _raise(found, symbol, nearest, (2 * scale,) * len(types))
    cells = cell_centres(size, len(types))
    work = 0.0
    high = 0.0
    while cells.shape[0]:
        denominators = (2 * size,) * len(types)
        # frequencies are 2 pi odd / (2 size): half a cell is pi / size wide
        decay = math.cos(min(math.pi / 2, sum(types) * math.pi / size))
        work += cells.shape[0] * _work(symbol)
        last = decay >= 1 - 0.02 * rtol or work > most_work or cells.shape[0] * 2 ** len(types) > _MOST_CELLS
        remaining = []
        for chunk in _chunks(symbol, cells):
            flat = symbol.grams(chunk, denominators).flatten(0, 1)
            owner = torch.zeros(flat.shape[0], dtype=torch.int64, device="cpu")
            before, some, bounds = found.lower.item(), torch.zeros(0, dtype=torch.int64, device="cpu"), owner.double()
            if symbol.side == 1:
                # each block is its own norm
                some, bounds = torch.arange(len(flat), device="cpu"), flat[:, 0, 0].real.clamp_min(0.0)
                found.raise_lower(bounds, owner)
            if last:
                found.include(flat, owner)
                continue
            failed = found.fails(flat, found.shift[owner] * (decay**2 * (1 - 1e-12)))
            if failed.numel() and symbol.side > 1:
                # what the failing cells reach may raise the lower end
                some = failed[:: max(1, failed.numel() // 8)]
                bounds = rayleigh_lower_bounds(flat[some], top_eigenvectors(flat[some], _PEAK_STEPS))
                found.raise_lower(bounds, owner[some])
            if found.lower.item() > before:
                place = chunk[some[bounds.argmax()] % len(chunk)]
                peak = tuple(x / (2 * size) for x in place.tolist())
            open_cells = torch.zeros(chunk.shape[0], dtype=torch.bool, device="cpu")
            open_cells[failed % chunk.shape[0]] = True
            remaining.append(chunk[open_cells])
        if last:
            high = _ends(found, symbol)[1] / (decay * (1 - 1e-12))
            break
        cells = subdivide(torch.cat(remaining))
        size *= 2
    low, upper = _ends(found, symbol)
    return low, max(up(high), up(upper)), peak


def _ends(found: EigenvalueIntervals, symbol: Symbol) -> tuple[float, float]:
    low = down(found.lower.item() - symbol.error)
    # twice, for cells that were tested at shifts lowered by the square of a cosine, which is above 1/2
    return down(math.sqrt(low)), up(math.sqrt(up(found.proved_upper().item() + 2 * symbol.error)))


def _chunks(symbol: Symbol, numbers: Tensor) -> Sequence[Tensor]:
    return numbers.split(max(1, _CHUNK_ENTRIES // (symbol.groups * symbol.side**2 + 2 * len(symbol.lags))))


def _raise(found: EigenvalueIntervals, symbol: Symbol, numbers: Tensor, denominators: tuple[int, ...]) -> Tensor:
    """Raise the lower end by the blocks of one frequency (1, d); returns the vector of the largest."""
    grams = symbol.grams(numbers, denominators).flatten(0, 1)
    vectors = top_eigenvectors(grams, 2 * _PEAK_STEPS)
    bounds = rayleigh_lower_bounds(grams, vectors)
    found.raise_lower(bounds, torch.zeros(grams.shape[0], dtype=torch.int64, device="cpu"))
    return vectors[bounds.argmax()]


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
    return form.flatten()[top].item(), tuple(int(x) for x in torch.unravel_index(form.argmax(), form.shape))
