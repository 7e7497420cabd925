# SPDX-License-Identifier: Apache-2.0
"""Spectral norms of convolutions, differentiable (Delattre et al., arXiv 2305.16173 and arXiv 2402.00240).

Kernels have shape (out, in / groups, *k) with one to three spatial dimensions. A circular convolution is block
diagonal in the Fourier basis; a zero-padded one is a submatrix of the circular one on a larger torus. All values here
are upper bounds in exact arithmetic; `hf_lip.ops.certified` and `hf_lip.ops.interval` are the ones to use where
floating point rounding has to be covered too.
"""

import math

import torch
from torch import Tensor

from .geometry import (
    Padding,
    Size,
    as_tuple,
    check_kernel,
    fold_kernel,
    polyphase_kernel,
    torus_problem,
)
from .gram import gram_iteration
from .rescale import iterated_row_sums


def _transform(kernel: Tensor, grid: tuple[int, ...], half: bool) -> Tensor:
    """Fourier blocks (..., F, out, in) of kernels (..., out, in, *taps) on a torus no smaller than the taps."""
    axes = tuple(range(-len(grid), 0))
    transform = torch.fft.rfftn if half else torch.fft.fftn
    return transform(kernel, s=grid, dim=axes).flatten(-len(grid)).movedim(-1, -3)


def conv_frequency_blocks(weight: Tensor, grid_size: Size, stride: Size = 1, half: bool = True) -> Tensor:
    """Blocks of the circular convolution in the Fourier basis; its norm is the largest of the blocks' norms.

    Args:
        weight: real kernel (out, in, *k); half precision is computed in float32. Taps beyond the torus wrap round.
        grid_size: torus size, int or one a dimension, a multiple of the stride.
        stride: int or one a dimension; the blocks are then the polyphase blocks.
        half: leave out the frequencies that a real kernel repeats as complex conjugates.

    Returns:
        complex (F, out, in * prod(s)) with F = prod(n / s), or about half of it when `half`.

    Raises:
        ValueError: wrong shapes, or a stride that does not divide the grid.
    """
    check_kernel(weight, (1, 2, 3))
    dimensions = weight.ndim - 2
    grid = as_tuple(grid_size, dimensions, "grid_size", 1)
    strides = as_tuple(stride, dimensions, "stride", 1)
    if any(n % s for n, s in zip(grid, strides)):
        raise ValueError(f"grid_size {grid} must be a multiple of the stride {strides}.")
    grid = tuple(n // s for n, s in zip(grid, strides))
    if weight.dtype in (torch.float16, torch.bfloat16):
        weight = weight.float()
    return _transform(fold_kernel(polyphase_kernel(weight, strides), grid), grid, half)


def conv_spectral_norm(
    weight: Tensor,
    input_size: Size,
    *,
    padding_mode: str = "zeros",
    padding: Padding | None = None,
    stride: Size = 1,
    dilation: Size = 1,
    groups: int = 1,
    num_iterations: int = 6,
) -> Tensor:
    """Upper bound of the norm of one convolution at one image size, by Gram iteration over the frequencies.

    Exact in the limit for circular padding (stride dividing the size); for zero padding the limit is the norm on the
    torus n + padding, which contains the operator (arXiv 2402.00240; here with an exact embedding). Reflect and
    replicate padding multiply the bound by the norm of the padding map.

    Args:
        weight: (out, in / groups, *k) with one to three sizes k.
        input_size: image size, int or one a dimension.
        padding_mode: "zeros", "circular", "reflect" or "replicate".
        padding: pixels on each side, None for "same" (see `hf_lip.ops.geometry.as_pads`).
        stride, dilation: int or one a dimension.
        groups: number of channel groups; the norm is the largest of theirs.
        num_iterations: Gram products, see `gram_iteration`.

    Returns:
        scalar tensor, differentiable.

    Raises:
        ValueError: as `hf_lip.ops.geometry.torus_problem`.
    """
    if weight.dtype in (torch.float16, torch.bfloat16):
        weight = weight.float()
    problem = torus_problem(
        weight,
        input_size,
        padding_mode=padding_mode,
        padding=padding,
        stride=stride,
        dilation=dilation,
        groups=groups,
    )
    assert problem.grid is not None
    grouped = torch.stack([fold_kernel(kernel, problem.grid) for kernel in problem.kernel])
    blocks = _transform(grouped, problem.grid, half=True)
    return gram_iteration(blocks, num_iterations).max() * math.sqrt(problem.copies)


def conv_grid_norm(weight: Tensor, grid_size: Size = 64, num_iterations: int = 6, stride: Size = 1) -> Tensor:
    """Upper bound of the norm for every image size: the largest block on a grid of frequencies, divided by cosines.

    A trigonometric polynomial with t taps stays above max * cos((t - 1) pi / (2 n)) at some point of an n-point grid
    (Riesz; Duffin and Schaeffer), one axis after the other. Holds for every zero padding, and for circular padding on
    sizes that the stride divides.

    Args:
        weight: (out, in, *k).
        grid_size: number of frequencies per axis, int or one a dimension, at least the number ceil(k / s) of
            polyphase taps.
        num_iterations: Gram products.
        stride: int or one a dimension.

    Returns:
        scalar tensor, differentiable.

    Raises:
        ValueError: a grid that is too coarse for the kernel.
    """
    check_kernel(weight, (1, 2, 3))
    grid = as_tuple(grid_size, weight.ndim - 2, "grid_size", 1)
    strides = as_tuple(stride, weight.ndim - 2, "stride", 1)
    correction = 1.0
    for n, k, s in zip(grid, weight.shape[2:], strides):
        taps = -(-k // s)
        if n < taps:
            raise ValueError(f"grid_size {grid} is too coarse: it needs at least {taps} frequencies for {taps} taps.")
        correction /= math.cos((taps - 1) * math.pi / (2 * n))
    blocks = conv_frequency_blocks(weight, tuple(n * s for n, s in zip(grid, strides)), strides)
    return gram_iteration(blocks, num_iterations).max() * correction


def conv_kernel_norm(weight: Tensor, num_iterations: int = 4) -> Tensor:
    """Upper bound of the norm for every image size, zero or circular padding and stride, without a grid.

    The largest absolute row sum of the iterated autocorrelation ("norm2toep", arXiv 2402.00240), on the smaller of the
    two channel sides. The error to the norm on the infinite grid halves per iteration.

    Args:
        weight: (out, in, kh, kw).
        num_iterations: Gram products, at least 1.

    Returns:
        scalar tensor, differentiable; 0 for a zero kernel.
    """
    check_kernel(weight)
    if weight.shape[0] > weight.shape[1]:
        weight = weight.transpose(0, 1)
    row_sums, scale = iterated_row_sums(weight, num_iterations)
    top = row_sums.amax()
    positive = top > 0
    root = torch.where(positive, top, torch.ones_like(top)).pow(0.5**num_iterations)
    return torch.where(positive, root * scale, torch.zeros_like(root))
