# SPDX-License-Identifier: Apache-2.0
"""Spectral norms as proved intervals: lower <= norm of the stored weights' operator <= upper, rounding included.

Weights are cast to float64 and scaled by a power of two, both exactly. The Gram matrix of the smaller side gets an
interval of its largest eigenvalue by Lanczos and Cholesky (`EigenvalueIntervals`), to which the rounding of the Gram
matrix itself is added. Assumed: IEEE float64 with gradual underflow, conventional matrix products (no Strassen
scheme), sine and cosine good to 4 units in the last place. Everything runs on the cpu for that reason.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .eigenvalue import EigenvalueIntervals, shift_error
from .rounding import down, exact_double, gamma, scaled, unscaled, up


# rows that are cast to float64 at once when a tall matrix is multiplied by itself, in entries
_SLAB_ENTRIES = 2**23


@dataclass(frozen=True)
class SpectralNorm:
    """lower <= spectral norm <= upper.

    Attributes:
        lower, upper: ends of the interval; proved, including float rounding, where `certified`.
        method: how the upper end was obtained.
        certified: whether both ends are proved.
        reason: why the interval is wider than asked for, None if it is not.
    """

    lower: float
    upper: float
    method: str
    certified: bool = True
    reason: str | None = None

    @property
    def relative_width(self) -> float:
        """(upper - lower) / upper; 0 for the norm 0, infinite where upper overflows."""
        if self.upper == 0.0:
            return 0.0
        return math.inf if math.isinf(self.upper) else (self.upper - self.lower) / self.upper


def check_rtol(rtol: float) -> None:
    """Raise ValueError unless `rtol` is a relative width between 0 (as narrow as float64 proves) and 1."""
    if not 0.0 <= rtol < 1.0:
        raise ValueError(f"rtol must be in [0, 1), but got {rtol!r}.")


def eigenvalue_tolerance(rtol: float, side: int, complex_entries: bool) -> float:
    """Width to ask of the eigenvalue so that its root is as narrow as `rtol`, or as narrow as float64 proves."""
    return max(1.9 * rtol, 16 * shift_error(side, complex_entries))


def interval(
    lower: float, upper: float, exponent: int, method: str, rtol: float, reason: str | None = None
) -> SpectralNorm:
    """Scale the ends back by 2^exponent, outwards; a reason is given where the width asked for is not met."""
    if upper == 0.0:
        # no computed bound is, but that of a zero matrix
        return SpectralNorm(0.0, 0.0, method)
    low, high = unscaled(lower, exponent, -math.inf), unscaled(upper, exponent)
    result = SpectralNorm(min(low, high), high, method)
    if result.relative_width <= max(rtol, 1e-7):
        return result
    reason = reason or "float64 rounds too much: the weights cancel, or lie near its smallest or largest numbers"
    return SpectralNorm(result.lower, result.upper, method, True, reason)


def check_matrix(weight: Tensor) -> None:
    """Raise ValueError unless `weight` is a non-empty matrix."""
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"weight must be a non-empty matrix (out, in), but its shape is {tuple(weight.shape)}.")


def _gram(matrix: Tensor) -> Tensor:
    """matrix @ matrix.T of (r, d), by strips of the lower triangle."""
    side = matrix.shape[0]
    if side < 512:
        return matrix @ matrix.T
    gram = matrix.new_empty(side, side)
    step = -(-side // 8)
    for start in range(0, side, step):
        strip = matrix[start:] @ matrix[start : start + step].T
        gram[start:, start : start + step] = strip
        gram[start : start + step, start:] = strip.T
    return gram


def gram_of_smaller_side(weight: Tensor) -> tuple[Tensor, int, int]:
    """Gram matrix (r, r) float64 of a scaled matrix of any float dtype; the exponent of the scale; the longer side.

    A long matrix is cast and multiplied slab by slab, so that memory stays at the weight itself, r^2 and a slab.
    """
    if weight.shape[0] > weight.shape[1]:
        weight = weight.T
    rows, columns = weight.shape
    step = max(1, _SLAB_ENTRIES // rows)
    if columns <= 2 * step:
        matrix, exponent = scaled(exact_double(weight))
        return _gram(matrix), exponent, columns
    tops = [exact_double(part).abs().amax() for part in weight.split(step, dim=1)]
    _, exponent = scaled(torch.stack(tops))
    gram = torch.zeros(rows, rows, dtype=torch.float64, device="cpu")
    for part in weight.split(step, dim=1):
        gram += _gram(exact_double(part) * math.ldexp(1.0, -exponent))
    return gram, exponent, columns + 64 + columns // step


def dense_norms(weights: list[Tensor], rtol: float = 1e-3) -> list[SpectralNorm]:
    """Proved intervals of the spectral norms of matrices of one shape, all in one batch.

    Args:
        weights: matrices (out, in), any float dtype of 16 bits or more.
        rtol: relative width asked for.

    Raises:
        TypeError: values that are no plain floats (integers, quantised, on the meta device).
        ValueError: wrong shapes, entries that are not finite, rtol out of range.
    """
    check_rtol(rtol)
    grams, exponents, longest = [], [], 0
    for weight in weights:
        check_matrix(weight)
        gram, exponent, columns = gram_of_smaller_side(weight)
        grams.append(gram)
        exponents.append(exponent)
        longest = max(longest, columns)
    return gram_norms(torch.stack(grams), exponents, longest, rtol, "cholesky")


def gram_norms(grams: Tensor, exponents: list[int], length: int, rtol: float, method: str) -> list[SpectralNorm]:
    """Intervals from real Gram matrices (N, r, r) whose entries are sums of `length` products each."""
    side = grams.shape[-1]
    found = EigenvalueIntervals(grams.shape[0], eigenvalue_tolerance(rtol, side, complex_entries=False))
    found.include(grams, torch.arange(grams.shape[0], device="cpu"))
    squares = grams.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    error = 2 * gamma(length + 2) * squares
    ends = zip((found.lower - error).tolist(), (found.proved_upper() + error).tolist(), squares.tolist(), exponents)
    results = []
    for low, high, square, exponent in ends:
        if square == 0.0:
            # scaled entries are near 1, or all zero
            results.append(SpectralNorm(0.0, 0.0, method))
            continue
        results.append(interval(down(math.sqrt(down(low))), up(math.sqrt(up(high))), exponent, method, rtol))
    return results


def dense_norm(weight: Tensor, rtol: float = 1e-3) -> SpectralNorm:
    """Proved interval of the spectral norm of one matrix (out, in); arguments and errors as in `dense_norms`."""
    return dense_norms([weight], rtol)[0]


def low_rank_norm(left: Tensor, right: Tensor, rtol: float = 1e-3) -> SpectralNorm:
    """Proved interval of the norm of left @ right, which is never formed: LoRA's B A, for instance.

    With left = Q T, Q orthonormal, the norm is that of T @ right (r x in).

    Args:
        left: (out, r).
        right: (r, in).
        rtol: relative width asked for.

    Raises:
        TypeError, ValueError: as in `dense_norms`, and inner sizes that differ.
    """
    check_rtol(rtol)
    check_matrix(left)
    check_matrix(right)
    if left.shape[1] != right.shape[0]:
        raise ValueError(f"left {tuple(left.shape)} and right {tuple(right.shape)} cannot be multiplied.")
    tall, left_exponent = scaled(exact_double(left))
    wide, right_exponent = scaled(exact_double(right))
    if not (tall.any() and wide.any()):
        return SpectralNorm(0.0, 0.0, "zero factor")
    rank = left.shape[1]
    _, triangle = torch.linalg.qr(tall)
    core = triangle @ wide
    gram = _gram(core if core.shape[0] <= core.shape[1] else core.T)
    found = gram_norms(gram[None], [0], max(core.shape) + 64, rtol, "cholesky")[0]
    # Householder QR is backward stable: T belongs to a matrix near `tall` (Higham 2002, theorem 19.4)
    size = torch.linalg.vector_norm(tall).item() * torch.linalg.vector_norm(wide).item()
    error = up(4 * rank * gamma(16 * tall.numel() + 64) * size + 4 * gamma(rank + 8) * size * math.sqrt(rank))
    return interval(
        down(found.lower - error), up(found.upper + error), left_exponent + right_exponent, "low rank cholesky", rtol,
        "the factors cancel, so that float64 cannot narrow the interval",
    )  # fmt: skip
