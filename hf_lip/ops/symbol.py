# SPDX-License-Identifier: Apache-2.0
"""The symbol of a convolution: Gram matrices of its Fourier blocks, at any set of frequencies.

With taps P_t (a x b, the smaller channel side first) the block at frequency w is D(w) = sum_t P_t exp(i w t), and

    D(w) D(w)* = sum_tau R_tau exp(i w tau),    R_tau = sum_t P_(t + tau) P_t^T,

so a few real products R_tau serve all frequencies: for 3 x 3 taps 45 products of a x b by b x a, where forming every
block's Gram matrix takes four real products a frequency.
"""

import cmath
import itertools
import math

import torch
from torch import Tensor

from .rounding import PHASE_ERROR, gamma


# entries of a tap up to which the products of all taps are taken at once
_SMALL_TAP = 2**14


def grid_frequencies(grid: tuple[int, ...], twist: tuple[int, ...] | None = None) -> tuple[Tensor, tuple[int, ...]]:
    """Frequencies of a torus, one of each pair that a real kernel makes conjugate.

    Args:
        grid: size of the torus.
        twist: 0 or 1 a dimension; 1 shifts the frequencies by half a step (the torus with a change of sign).

    Returns:
        integers (F, d) and denominators (d): frequency = 2 pi * integer / denominator.
    """
    twist = twist or (0,) * len(grid)
    denominators = tuple(2 * n for n in grid)
    axes = [torch.arange(n, device="cpu") * 2 + shift for n, shift in zip(grid, twist)]
    numbers = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)
    return numbers[_one_of_each_pair(numbers, denominators)], denominators


def _one_of_each_pair(numbers: Tensor, denominators: tuple[int, ...]) -> Tensor:
    """Mask of the frequencies that come first of themselves and their negative."""
    modulus = torch.tensor(denominators, device="cpu")
    negative = (-numbers) % modulus
    weights = torch.tensor([math.prod(denominators[i + 1 :]) for i in range(len(denominators))], device="cpu")
    return (numbers * weights).sum(dim=-1) <= (negative * weights).sum(dim=-1)


def nearest_frequency(point: tuple[float, ...], grid: tuple[int, ...], twist: tuple[int, ...]) -> Tensor:
    """The frequency (1, d), as in `grid_frequencies`, that lies nearest to a point given in turns."""
    numbers = [(2 * round(x * n - t / 2) + t) % (2 * n) for x, n, t in zip(point, grid, twist)]
    return torch.tensor([numbers], device="cpu")


class Symbol:
    """Gram matrices of the Fourier blocks of a real kernel.

    Args:
        kernel: (groups, out, in, *taps) float64, finite, scaled so that its largest entry is near 1.

    Attributes:
        side: size of the Gram matrices, the smaller of out and in.
        error: bound of the spectral norm of the rounding error of any Gram matrix that `grams` gives.
        taps: number of taps along each axis.
    """

    def __init__(self, kernel: Tensor) -> None:
        self.transposed = kernel.shape[1] > kernel.shape[2]
        if self.transposed:
            kernel = kernel.transpose(1, 2)
        self.groups, self.side, self.columns = kernel.shape[:3]
        self.taps: tuple[int, ...] = tuple(kernel.shape[3:])
        # (taps, groups, side, columns), each tap contiguous
        self._tap_matrices = kernel.flatten(3).movedim(-1, 0).contiguous()
        lags = [lag for lag in itertools.product(*(range(1 - t, t) for t in self.taps)) if lag > (0,) * len(lag)]
        self.lags = torch.tensor(lags, device="cpu").reshape(len(lags), len(self.taps))
        # what the cosines (the mean first) and the sines are multiplied by: real and imaginary parts interleaved
        self._basis = kernel.new_zeros(2 * len(lags) + 1, self.groups, self.side, self.side, 2)
        self._basis[0, ..., 0] = self._correlation((0,) * len(self.taps))
        for index, lag in enumerate(lags, start=1):
            correlation = self._correlation(lag)
            torch.add(correlation, correlation.mT, out=self._basis[index, ..., 0])
            torch.sub(correlation, correlation.mT, out=self._basis[len(lags) + index, ..., 1])
        tap_norms = torch.linalg.vector_norm(kernel, dim=(1, 2)).flatten(1).sum(dim=1).max().item()
        count = self.columns * math.prod(self.taps) + 4 * len(lags) + 64
        self.error = 2 * (gamma(count) + (PHASE_ERROR if lags else 0.0)) * tap_norms**2
        # what the operator with entries |k| stretches by at most
        self.absolute_gain = tap_norms

    def _correlation(self, lag: tuple[int, ...]) -> Tensor:
        """R_lag (groups, side, side)."""
        if self.groups * self.side * self.columns <= _SMALL_TAP:
            taps = self._tap_matrices.unflatten(0, self.taps)
            ahead = taps[tuple(slice(max(0, step), t + min(0, step)) for step, t in zip(lag, self.taps))]
            behind = taps[tuple(slice(max(0, -step), t - max(0, step)) for step, t in zip(lag, self.taps))]
            last = len(lag) - 1
            return torch.einsum("pgij,pgkj->gik", ahead.flatten(0, last), behind.flatten(0, last))
        total = self._tap_matrices.new_zeros(self.groups, self.side, self.side)
        for tap in itertools.product(*(range(max(0, -step), t - max(0, step)) for step, t in zip(lag, self.taps))):
            ahead = self._tap_matrices[self._tap_index(tuple(x + step for x, step in zip(tap, lag)))]
            total.baddbmm_(ahead, self._tap_matrices[self._tap_index(tap)].mT)
        return total

    def _tap_index(self, tap: tuple[int, ...]) -> int:
        index = 0
        for x, size in zip(tap, self.taps):
            index = index * size + x
        return index

    def grams(self, numbers: Tensor, denominators: tuple[int, ...]) -> Tensor:
        """Gram matrices (groups, F, side, side) at the frequencies 2 pi * numbers / denominators.

        Real where there is one tap only, else complex128.
        """
        count = numbers.shape[0]
        if self.lags.shape[0] == 0:
            return self._basis[..., 0].expand(count, -1, -1, -1).transpose(0, 1).contiguous()
        coefficients = torch.cat(self.phases(numbers, denominators), dim=1)
        blocks = (coefficients @ self._basis.flatten(1)).reshape(count, self.groups, self.side, self.side, 2)
        return torch.view_as_complex(blocks).transpose(0, 1).contiguous()

    def input_vector(self, turns: tuple[float, ...], vector: Tensor) -> Tensor:
        """The channel vector, on the input side of the kernel, that belongs to a vector of the smaller side."""
        if self.transposed:
            return vector.conj()
        image = torch.zeros(self.columns, dtype=torch.complex128, device="cpu")
        for tap in itertools.product(*(range(size) for size in self.taps)):
            angle = -2 * math.pi * sum(x * turn for x, turn in zip(tap, turns))
            matrix = self._tap_matrices[self._tap_index(tap)][0]
            image += cmath.exp(1j * angle) * (matrix.T.to(vector.dtype) @ vector)
        return image

    def phases(self, numbers: Tensor, denominators: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Cosines (F, lags + 1) and sines (F, lags), each off by less than PHASE_ERROR."""
        total = math.lcm(*denominators)
        weights = torch.tensor([total // d for d in denominators], device="cpu")
        # the angle as an exact fraction of the circle, reduced to half a turn before it is rounded
        turns = ((numbers * weights) @ self.lags.T) % total
        turns = torch.where(2 * turns > total, turns - total, turns)
        angles = turns.double() * (2 * math.pi / total)
        ones = torch.ones(numbers.shape[0], 1, dtype=torch.float64, device="cpu")
        return torch.cat([ones, torch.cos(angles)], dim=1), torch.sin(angles)

    def quadratic_form(self, vector: Tensor, group: int, resolution: int) -> Tensor:
        """v* D D* v on a grid of frequencies (resolution, ...), for one fixed vector (side,)."""
        outer = torch.outer(vector.conj(), vector).flatten()
        # symmetric matrices see the real part of it only, antisymmetric ones the imaginary part
        form = self._basis[: len(self.lags) + 1, group, ..., 0].flatten(1) @ outer.real
        turned = torch.zeros_like(form[1:])
        if outer.is_complex():
            turned = -(self._basis[len(self.lags) + 1 :, group, ..., 1].flatten(1) @ outer.imag)
        coefficients = torch.zeros((resolution,) * len(self.taps), dtype=torch.complex128, device="cpu")
        coefficients[(0,) * len(self.taps)] = form[0]
        for lag, cosine, sine in zip(self.lags.tolist(), form[1:], turned):
            # cosine * cos(w lag) + sine * sin(w lag) is the real part of (cosine + i sine) exp(-i w lag)
            coefficients[tuple(step % resolution for step in lag)] += torch.complex(cosine, sine)
        return torch.fft.fftn(coefficients).real


def cell_centres(level_size: int, dimensions: int) -> Tensor:
    """Odd integers (F, d) over 2 * level_size: centres of the cells of a uniform partition, one of each pair."""
    axis = torch.arange(level_size, device="cpu") * 2 + 1
    numbers = torch.stack(torch.meshgrid(*[axis] * dimensions, indexing="ij"), dim=-1).flatten(0, -2)
    return numbers[_one_of_each_pair(numbers, (2 * level_size,) * dimensions)]


def subdivide(numbers: Tensor) -> Tensor:
    """Centres of the 2^d halves of every cell, over a denominator twice as large."""
    corners = torch.tensor(list(itertools.product((-1, 1), repeat=numbers.shape[1])), device="cpu")
    return (2 * numbers[:, None] + corners).flatten(0, 1)
