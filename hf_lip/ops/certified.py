# SPDX-License-Identifier: Apache-2.0
"""Certified upper bounds of norms: proved for the stored weights as exact real numbers, float rounding included.

Weights are cast to float64, exactly, and scaled by a power of two, exactly. With A the rounded Gram matrix of the
smaller side, a Cholesky factorisation of lambda * I - A that runs to completion proves, by Rump ("Verification of
positive definiteness", BIT 2006; error bound of Demmel 1989, Higham 2002 theorem 10.3),

    largest eigenvalue of A <= lambda + gamma / (1 - gamma) * trace(lambda * I - A),     gamma = k u / (1 - k u).

To it comes the rounding of the product A itself, gamma * |W|_F^2 in norm, whatever the order of the sums. lambda is
only a candidate: an eigenvalue routine that errs costs tightness or time, never soundness. The constants used are at
least twice those of the theorems, which covers reciprocals inside LAPACK, the rounding of the scalar operations and
underflow (entries are scaled to about 1). Assumed: IEEE float64 with gradual underflow, conventional matrix products
(no Strassen scheme), sine and cosine good to 4 units in the last place. Everything runs on the cpu for that reason.
"""

import math

import torch
from torch import Tensor

from .geometry import Size, check_kernel, conv_geometry, polyphase_kernel
from .rounding import PHASE_ERROR, UNIT_ROUNDOFF, exact_double, gamma, scaled, unscaled, up


# complex entries held at once, 32 MB
_CHUNK_ENTRIES = 2**21
# where the search for an eigenvalue starts: positive, and negligible for weights scaled to about 1
_CANDIDATE_FLOOR = 2.0**-300
# squares of this size neither overflow nor lose digits to underflow
_SAFE_SQUARES = (2.0**-900, 2.0**900)


class _EigenvalueBound:
    """One lambda such that lambda * I - A passed a Cholesky factorisation for every matrix A given so far."""

    def __init__(self) -> None:
        self.candidate = _CANDIDATE_FLOOR

    def include(self, grams: Tensor) -> None:
        """Raise the candidate until it passes for all of `grams` (F, c, c); only those that fail are tried again."""
        inflation = 1e-12
        while True:
            shifted = -grams
            shifted.diagonal(dim1=-2, dim2=-1).add_(self.candidate)
            grams = grams[torch.linalg.cholesky_ex(shifted).info != 0]
            if grams.shape[0] == 0:
                return
            hardest = grams[0] if grams.shape[0] == 1 else grams[torch.linalg.matrix_norm(grams).argmax()]
            top = torch.linalg.eigvalsh(hardest)[-1].item() * (1 + inflation)
            if top <= self.candidate:
                # the eigenvalue is reached and rounding still breaks the factorisation
                inflation *= 2
                top = self.candidate * (1 + inflation)
            self.candidate = top

    def proved(self, size: int, complex_entries: bool) -> float:
        """Upper bound of the largest eigenvalue of all the matrices, of side `size`."""
        error = gamma((4 if complex_entries else 2) * (size + 2))
        return self.candidate * (1 + 2 * error * size + 8 * UNIT_ROUNDOFF)


def certified_spectral_norm(weight: Tensor) -> float:
    """Proved upper bound of the spectral norm of a matrix, within about 1e-9 of it in relative terms.

    Args:
        weight: (m, n), any floating dtype; the bound is for the stored values.

    Returns:
        float; exactly 0.0 for a zero matrix.

    Raises:
        TypeError: weight is not real floating point.
        ValueError: wrong shape, or entries that are not finite.
    """
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(
            f"weight must be a non-empty matrix (m, n), but its shape is {tuple(weight.shape)}. "
            "Use certified_conv_norm for kernels."
        )
    matrix, exponent = scaled(exact_double(weight))
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    gram = matrix @ matrix.T
    squares = gram.diagonal().sum().item()
    if squares == 0.0:
        return 0.0
    bound = _EigenvalueBound()
    bound.include(gram[None])
    rows, columns = matrix.shape
    eigenvalue = bound.proved(rows, complex_entries=False) + 2 * gamma(columns + 2) * squares
    return unscaled(up(math.sqrt(up(eigenvalue))), exponent)


def _integers(count: int) -> Tensor:
    # on the cpu whatever the default device of the caller
    return torch.arange(count, device="cpu")


def _frequencies(height: int, width: int) -> Tensor:
    """(F, 2) integer frequencies of an h x w torus, one of each complex conjugate pair."""
    rows, columns = torch.meshgrid(_integers(height), _integers(width // 2 + 1), indexing="ij")
    own_conjugate = (columns == 0) | (2 * columns == width)
    kept = ~own_conjugate | (rows <= height // 2)
    return torch.stack([rows[kept], columns[kept]], dim=1)


def _phases(frequencies: Tensor, grid: tuple[int, int], taps: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Cosines and sines (F, taps) of the angles of a direct Fourier transform, each off by less than PHASE_ERROR."""
    height, width = grid
    x, y = torch.meshgrid(_integers(taps[0]), _integers(taps[1]), indexing="ij")
    total = height * width
    # the angle as an exact fraction of the circle, reduced to half a turn before it is rounded
    turns = (frequencies[:, :1] * x.flatten() * width + frequencies[:, 1:] * y.flatten() * height) % total
    turns = torch.where(2 * turns > total, turns - total, turns)
    angles = turns.double() * (2 * math.pi / total)
    return torch.cos(angles), torch.sin(angles)


def certified_conv_norm(
    weight: Tensor,
    input_size: Size,
    *,
    padding_mode: str = "zeros",
    padding: Size | None = None,
    stride: Size = 1,
) -> float:
    """Proved upper bound of the norm of a convolution at one image size.

    Every frequency block of a torus that contains the operator (see `conv_geometry`) is built by a direct Fourier
    transform with bounded error and checked by a Cholesky factorisation. For circular padding, stride dividing the
    size, the bound is the operator's norm but for rounding; for zero padding it is the norm on the torus n + padding,
    a few per cent above on small images.

    Args:
        weight: (out, in, kh, kw), any floating dtype.
        input_size: int or (h, w).
        padding_mode: "zeros" or "circular".
        padding: pixels on each side, int or pair; None for "same".
        stride: int or pair.

    Returns:
        float; exactly 0.0 for a zero kernel. Memory stays within a few hundred MB whatever the sizes.

    Raises:
        TypeError: weight is not real floating point.
        ValueError: wrong shape, entries that are not finite, sizes without output, or another padding mode: reflect
            and replicate padding read pixels more than once and break the bound.
    """
    check_kernel(weight)
    geometry = conv_geometry(weight.shape[2:], input_size, padding_mode=padding_mode, padding=padding, stride=stride)
    kernel, exponent = scaled(exact_double(weight))
    # the scaled largest entry is 0 for a zero kernel only
    if not kernel.any():
        return 0.0
    kernel = polyphase_kernel(kernel, geometry.torus_stride)
    if kernel.shape[0] > kernel.shape[1]:
        kernel = kernel.transpose(0, 1)
    copies = up(math.sqrt(geometry.copies))
    rows, columns, taps_h, taps_w = kernel.shape
    if taps_h == taps_w == 1:
        # one block, and a real one
        norm = certified_spectral_norm(kernel[:, :, 0, 0])
        return unscaled(up(norm * copies), exponent)

    step_h, step_w = geometry.torus_stride
    grid = (geometry.torus[0] // step_h, geometry.torus[1] // step_w)
    taps = kernel.flatten(2).permute(2, 0, 1).reshape(taps_h * taps_w, rows * columns).contiguous()
    frequencies = _frequencies(*grid)
    bound = _EigenvalueBound()
    squares = 0.0
    for chunk in frequencies.split(max(1, _CHUNK_ENTRIES // (rows * columns))):
        cosines, sines = _phases(chunk, grid, (taps_h, taps_w))
        blocks = torch.complex(cosines @ taps, sines @ taps).reshape(-1, rows, columns)
        grams = blocks @ blocks.mH
        squares = max(squares, grams.diagonal(dim1=-2, dim2=-1).real.sum(dim=-1).max().item())
        bound.include(grams)
    eigenvalue = bound.proved(rows, complex_entries=True) + 2 * gamma(4 * (columns + 2)) * squares
    # entrywise error of the transform, at most this multiple of the summed absolute taps, hence also in frobenius norm
    entry_error = 3 * (PHASE_ERROR + gamma(taps_h * taps_w + 2))
    block_error = entry_error * torch.linalg.vector_norm(taps.abs().sum(dim=0)).item()
    return unscaled(up(up(math.sqrt(up(eigenvalue)) + 1.001 * block_error) * copies), exponent)


def _certified_norms(vectors: Tensor) -> Tensor:
    """Upper bounds (k,) of the norms of float64 vectors (k, d), each entry of which may be off by one rounding."""
    squares = vectors.square().sum(dim=-1)
    length = vectors.shape[-1]
    growth = 1 + 2 * gamma(length + 8)
    bounds = torch.sqrt(squares) * growth
    low, high = _SAFE_SQUARES
    unsafe = ((squares < low) | (squares > high)).nonzero()[:, 0]
    unsafe = unsafe[(vectors[unsafe] != 0).any(dim=-1)]
    for row in unsafe.tolist():
        vector, exponent = scaled(vectors[row])
        bounds[row] = unscaled(up(math.sqrt(vector.square().sum().item()) * growth), exponent)
    return bounds


def _matrix(weight: Tensor) -> Tensor:
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"weight must be a non-empty matrix (k, d), but its shape is {tuple(weight.shape)}.")
    matrix = exact_double(weight)
    if not torch.isfinite(matrix).all():
        raise ValueError("weight has entries that are not finite, no bound exists.")
    return matrix


def certified_row_norms(weight: Tensor) -> Tensor:
    """Proved upper bounds of the l2 norms of the rows.

    Args:
        weight: (k, d), any floating dtype.

    Returns:
        float64 (k,); exactly 0 for zero rows.

    Raises:
        TypeError: weight is not real floating point.
        ValueError: wrong shape, or entries that are not finite.
    """
    return _certified_norms(_matrix(weight))


def certified_row_distances(weight: Tensor) -> Tensor:
    """Proved upper bounds of the l2 distances between rows, the denominators of the per-pair radius.

    Args:
        weight: (k, d), any floating dtype.

    Returns:
        float64 (k, k), symmetric, diagonal exactly 0; infinite where a difference overflows float64.

    Raises:
        TypeError: weight is not real floating point.
        ValueError: wrong shape, or entries that are not finite.
    """
    matrix = _matrix(weight)
    count = matrix.shape[0]
    distances = torch.zeros(count, count, dtype=torch.float64, device="cpu")
    for row in range(count - 1):
        differences = matrix[row + 1 :] - matrix[row]
        overflow = torch.isinf(differences).any(dim=-1)
        if overflow.any():
            differences[overflow] = 0
        norms = _certified_norms(differences).masked_fill(overflow, math.inf)
        distances[row, row + 1 :] = norms
        distances[row + 1 :, row] = norms
    return distances


_INTEGER_TWIN = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def round_up(value: Tensor | float, dtype: torch.dtype) -> Tensor:
    """Cast towards +infinity: the smallest number of `dtype` that is not below `value`.

    Args:
        value: float or tensor of any floating dtype.
        dtype: float16, bfloat16, float32 or float64.

    Returns:
        tensor of `dtype`, shape and device of `value`.

    Raises:
        TypeError: dtype is not one of these four.
        ValueError: value contains NaN.
    """
    if dtype not in _INTEGER_TWIN:
        raise TypeError(f"dtype must be one of {', '.join(map(str, _INTEGER_TWIN))}, but got {dtype}.")
    exact = torch.as_tensor(value, dtype=torch.float64).detach()
    if torch.isnan(exact).any():
        raise ValueError("value contains NaN, which cannot be rounded up.")
    cast = exact.to(dtype)
    bits = cast.view(_INTEGER_TWIN[dtype])
    # the bit pattern counts away from zero on both sides; above either zero comes the smallest subnormal number, 1
    above = torch.where(cast > 0, bits + 1, torch.where(cast < 0, bits - 1, torch.ones_like(bits)))
    return torch.where(cast.double() < exact, above.view(dtype), cast)
