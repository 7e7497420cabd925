# SPDX-License-Identifier: Apache-2.0
"""Spectral norms of 2-D convolutions, differentiable (Delattre et al., arXiv 2305.16173 and arXiv 2402.00240).

Kernels have shape (out, in, kh, kw). A circular convolution is block diagonal in the Fourier basis; a zero-padded one
is a submatrix of the circular one on a larger torus. All values here are upper bounds in exact arithmetic;
`hf_lip.ops.certified` is the one to use where floating point rounding has to be covered too.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .gram import gram_iteration
from .rescale import iterated_row_sums


Size = int | Sequence[int]

_PADDING_NORMS = {
    "reflect": "reflected pixels are read twice or more, so the padding map itself has a norm above 1",
    "replicate": "border pixels are read several times, so the padding map itself has a norm above 1",
}


class ConvGeometry(NamedTuple):
    """Sizes of one 2-D convolution; every pair is (height, width).

    Attributes:
        input_size: size of the input image.
        output_size: size of the output image.
        stride: step between outputs.
        pads: pixels added (before, after) along each axis.
        torus: size of a torus whose circular convolution contains the operator as a submatrix, up to repeated rows.
        torus_stride: stride of that circular convolution, it divides `torus`.
        copies: largest number of times one row of the circular convolution occurs in the operator (1 but for circular
            padding with more outputs than pixels); the operator's norm is at most sqrt(copies) times the circular one.
    """

    input_size: tuple[int, int]
    output_size: tuple[int, int]
    stride: tuple[int, int]
    pads: tuple[tuple[int, int], tuple[int, int]]
    torus: tuple[int, int]
    torus_stride: tuple[int, int]
    copies: int


def as_pair(value: Size, name: str, minimum: int) -> tuple[int, int]:
    """Read an int or a pair of ints, each at least `minimum`; raises ValueError naming the argument otherwise."""
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2 or any(not isinstance(v, int) or isinstance(v, bool) or v < minimum for v in pair):
        raise ValueError(f"{name} must be an int or a pair of ints, each at least {minimum}, but got {value!r}.")
    return pair[0], pair[1]


def check_kernel(weight: Tensor) -> None:
    """Raise ValueError unless `weight` is a non-empty 4-d kernel (out, in, kh, kw)."""
    if weight.ndim != 4 or weight.numel() == 0:
        raise ValueError(
            f"weight must be a non-empty kernel of shape (out, in, kh, kw), but its shape is {tuple(weight.shape)}. "
            "Give matrices to the dense functions and 1-d kernels a height of 1."
        )


def conv_geometry(
    kernel_size: Size,
    input_size: Size,
    *,
    padding_mode: str = "zeros",
    padding: Size | None = None,
    stride: Size = 1,
    dilation: Size = 1,
) -> ConvGeometry:
    """Work out the output size and the embedding torus of a convolution.

    Zero padding by p on n pixels embeds in every torus of size m >= n + p (p capped at k - 1, further outputs are
    zero); with stride s the smallest multiple of s is taken. Circular padding lives on the torus n, with stride
    gcd(s, n): the rows at multiples of s, modulo n, are rows of that operator.

    Args:
        kernel_size: (kh, kw).
        input_size: image size, int or (h, w).
        padding_mode: "zeros" or "circular".
        padding: pixels added on each side. None means k // 2, and for circular padding of an even kernel one pixel
            less on the far side, so that the output is the torus again.
        stride: int or pair.
        dilation: int or pair; the kernel then spans dilation * (k - 1) + 1 pixels.

    Raises:
        ValueError: unknown or unsupported padding mode, sizes out of range, or no output pixel at all.
    """
    if padding_mode in _PADDING_NORMS:
        raise ValueError(
            f"padding_mode={padding_mode!r} is not supported: {_PADDING_NORMS[padding_mode]} "
            "and the bounds do not hold. Use 'zeros' or 'circular'."
        )
    if padding_mode not in ("zeros", "circular"):
        raise ValueError(f"padding_mode must be 'zeros' or 'circular', but got {padding_mode!r}.")
    sizes = as_pair(input_size, "input_size", 1)
    strides = as_pair(stride, "stride", 1)
    dilations = as_pair(dilation, "dilation", 1)
    spans = tuple(d * (k - 1) + 1 for d, k in zip(dilations, as_pair(kernel_size, "kernel_size", 1)))
    if padding is None:
        near = (spans[0] // 2, spans[1] // 2)
        far = near if padding_mode == "zeros" else (spans[0] - 1 - near[0], spans[1] - 1 - near[1])
    else:
        near = far = as_pair(padding, "padding", 0)

    outputs, torus, torus_stride, copies = [], [], [], 1
    for n, k, s, before, after in zip(sizes, spans, strides, near, far):
        if n + before + after < k:
            raise ValueError(
                f"input_size {sizes} with padding {near} is smaller than the kernel's span {spans}: "
                "there is no output. Give a larger input_size or padding."
            )
        out = (n + before + after - k) // s + 1
        if padding_mode == "zeros":
            step = s
            size = -(-(n + min(max(before, after), k - 1)) // s) * s
        else:
            step = math.gcd(s, n)
            size = n
            copies *= -(-out * step // n)
        # one tap per phase: every frequency gives the same block, one is enough
        torus.append(step if k <= step else size)
        torus_stride.append(step)
        outputs.append(out)
    return ConvGeometry(
        sizes,
        (outputs[0], outputs[1]),
        strides,
        ((near[0], far[0]), (near[1], far[1])),
        (torus[0], torus[1]),
        (torus_stride[0], torus_stride[1]),
        copies,
    )


def polyphase_kernel(weight: Tensor, stride: Size) -> Tensor:
    """Regroup a strided kernel into a stride-1 kernel on the s-fold coarser grid.

    Args:
        weight: (out, in, kh, kw).
        stride: (sh, sw).

    Returns:
        (out, in * sh * sw, ceil(kh / sh), ceil(kw / sw)).
    """
    sh, sw = as_pair(stride, "stride", 1)
    if sh == sw == 1:
        return weight
    out, channels, kh, kw = weight.shape
    taps_h, taps_w = -(-kh // sh), -(-kw // sw)
    weight = F.pad(weight, (0, taps_w * sw - kw, 0, taps_h * sh - kh))
    weight = weight.reshape(out, channels, taps_h, sh, taps_w, sw).permute(0, 1, 3, 5, 2, 4)
    return weight.reshape(out, channels * sh * sw, taps_h, taps_w)


def _fold(weight: Tensor, dim: int, size: int) -> Tensor:
    """Wrap the taps of axis `dim` onto a torus of `size` points; taps that fall together are added."""
    taps = weight.shape[dim]
    if taps <= size:
        return weight
    index = torch.arange(taps, device=weight.device) % size
    shape = list(weight.shape)
    shape[dim] = size
    return weight.new_zeros(shape).index_add(dim, index, weight)


def conv_frequency_blocks(weight: Tensor, grid_size: Size, stride: Size = 1, half: bool = True) -> Tensor:
    """Blocks of the circular convolution in the Fourier basis; its norm is the largest of the blocks' norms.

    Args:
        weight: real kernel (out, in, kh, kw); half precision is computed in float32. Taps beyond the torus wrap round.
        grid_size: torus size, int or (h, w), a multiple of the stride.
        stride: int or (sh, sw); the blocks are then the polyphase blocks.
        half: leave out the frequencies that a real kernel repeats as complex conjugates.

    Returns:
        complex (F, out, in * sh * sw) with F = h/sh * w/sw, or h/sh * (w/sw // 2 + 1) when `half`.

    Raises:
        ValueError: wrong shapes, or a stride that does not divide the grid.
    """
    check_kernel(weight)
    height, width = as_pair(grid_size, "grid_size", 1)
    sh, sw = as_pair(stride, "stride", 1)
    if height % sh or width % sw:
        raise ValueError(f"grid_size {(height, width)} must be a multiple of the stride {(sh, sw)}.")
    height, width = height // sh, width // sw
    if weight.dtype in (torch.float16, torch.bfloat16):
        weight = weight.float()
    kernel = polyphase_kernel(weight, (sh, sw))
    kernel = _fold(_fold(kernel, 2, height), 3, width)
    transform = torch.fft.rfft2 if half else torch.fft.fft2
    return transform(kernel, s=(height, width)).flatten(2).permute(2, 0, 1)


def conv_spectral_norm(
    weight: Tensor,
    input_size: Size,
    *,
    padding_mode: str = "zeros",
    padding: Size | None = None,
    stride: Size = 1,
    num_iterations: int = 6,
) -> Tensor:
    """Upper bound of the norm of one convolution at one image size, by Gram iteration over the frequencies.

    Exact in the limit for circular padding (stride dividing the size); for zero padding the limit is the norm on the
    torus n + padding, which contains the operator (arXiv 2402.00240; here with an exact embedding).

    Args:
        weight: (out, in, kh, kw).
        input_size: image size, int or (h, w).
        padding_mode: "zeros" or "circular".
        padding: pixels on each side, None for "same" (see `conv_geometry`).
        stride: int or pair.
        num_iterations: Gram products, see `gram_iteration`.

    Returns:
        scalar tensor, differentiable.
    """
    check_kernel(weight)
    geometry = conv_geometry(weight.shape[2:], input_size, padding_mode=padding_mode, padding=padding, stride=stride)
    blocks = conv_frequency_blocks(weight, geometry.torus, geometry.torus_stride)
    return gram_iteration(blocks, num_iterations).max() * math.sqrt(geometry.copies)


def conv_grid_norm(weight: Tensor, grid_size: Size = 64, num_iterations: int = 6, stride: Size = 1) -> Tensor:
    """Upper bound of the norm for every image size: the largest block on a grid of frequencies, divided by cosines.

    A trigonometric polynomial with t taps stays above max * cos((t - 1) pi / (2 n)) at some point of an n-point grid
    (Riesz; Duffin and Schaeffer), one axis after the other. Holds for every zero padding, and for circular padding on
    sizes that the stride divides.

    Args:
        weight: (out, in, kh, kw).
        grid_size: number of frequencies per axis, int or pair, at least the number ceil(k / s) of polyphase taps.
        num_iterations: Gram products.
        stride: int or pair.

    Returns:
        scalar tensor, differentiable.

    Raises:
        ValueError: a grid that is too coarse for the kernel.
    """
    check_kernel(weight)
    grid = as_pair(grid_size, "grid_size", 1)
    strides = as_pair(stride, "stride", 1)
    correction = 1.0
    for n, k, s in zip(grid, weight.shape[2:], strides):
        taps = -(-k // s)
        if n < taps:
            raise ValueError(f"grid_size {grid} is too coarse: it needs at least {taps} frequencies for {taps} taps.")
        correction /= math.cos((taps - 1) * math.pi / (2 * n))
    blocks = conv_frequency_blocks(weight, (grid[0] * strides[0], grid[1] * strides[1]), strides)
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
