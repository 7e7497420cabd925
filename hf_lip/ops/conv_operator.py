# SPDX-License-Identifier: Apache-2.0
"""A convolution as an operator on images: applied as torch applies it, and stretched for proved lower bounds."""

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input

from .rounding import down, gamma


_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
# pixels of the largest image on which the operator is stretched
_MOST_PIXELS = 2**22
_ADJOINTS = {1: conv1d_input, 2: conv2d_input, 3: conv3d_input}


class ConvArguments(NamedTuple):
    """How a kernel is applied; one entry a spatial dimension, `pads` are (before, after)."""

    pads: tuple[tuple[int, int], ...]
    padding_mode: str
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def pad_image(x: Tensor, pads: tuple[tuple[int, int], ...], mode: str) -> Tensor:
    """Pad (..., *sizes), in any of the four modes and by any number of pixels the mode is defined for."""
    if mode == "zeros":
        return F.pad(x, [pad for pair in reversed(pads) for pad in pair])
    for axis, pair in zip(range(x.ndim - len(pads), x.ndim), pads):
        x = x.index_select(axis, _pixels_read(x.shape[axis], pair, mode))
    return x


def _pixels_read(size: int, pads: tuple[int, int], mode: str) -> Tensor:
    """Which pixel of a line each pixel of the padded line repeats; a zero is pixel `size`."""
    index = torch.arange(-pads[0], size + pads[1], device="cpu")
    if mode == "circular":
        return index % size
    if mode == "replicate":
        return index.clamp(0, size - 1)
    if mode == "reflect":
        return (index.abs() - (size - 1)).abs().neg() + (size - 1)
    return index.where((index >= 0) & (index < size), size)


def _pad_adjoint(x: Tensor, sizes: tuple[int, ...], pads: tuple[tuple[int, int], ...], mode: str) -> Tensor:
    """Adjoint of `pad_image`: padded images back to (..., *sizes)."""
    for axis, (size, pair) in enumerate(zip(sizes, pads), start=x.ndim - len(pads)):
        if mode == "zeros":
            x = x.narrow(axis, pair[0], size)
        else:
            shape = [*x.shape[:axis], size, *x.shape[axis + 1 :]]
            x = x.new_zeros(shape).index_add(axis, _pixels_read(size, pair, mode), x)
    return x


def convolve(x: Tensor, kernel: Tensor, arguments: ConvArguments) -> Tensor:
    """Images (B, in, *sizes) -> (B, out, *sizes') for a kernel (out, in / groups, *k)."""
    padded = pad_image(x, arguments.pads, arguments.padding_mode)
    return _CONVOLUTIONS[kernel.ndim - 2](
        padded, kernel, stride=arguments.stride, dilation=arguments.dilation, groups=arguments.groups
    )


def operator_matrix(kernel: Tensor, input_size: tuple[int, ...], arguments: ConvArguments) -> Tensor:
    """The operator of every group as a matrix: (groups, out / groups * pixels', in / groups * pixels), float64."""
    lines = []
    for n, pads, k, s, d in zip(
        input_size, arguments.pads, kernel.shape[2:], arguments.stride, arguments.dilation, strict=True
    ):
        read = _pixels_read(n, pads, arguments.padding_mode)
        outputs = (n + sum(pads) - d * (k - 1) - 1) // s + 1
        starts, taps = torch.arange(outputs, device="cpu") * s, torch.arange(k, device="cpu") * d
        lines.append(read[starts[:, None] + taps])
    grouped = kernel.unflatten(0, (arguments.groups, -1))
    pixels_out, pixels_in = math.prod(line.shape[0] for line in lines), math.prod(input_size)
    matrix = kernel.new_zeros(*grouped.shape[:3], pixels_out, pixels_in)
    for tap in itertools.product(*(range(k) for k in kernel.shape[2:])):
        source = torch.zeros(1, dtype=torch.int64, device="cpu")
        inside = torch.ones(1, dtype=torch.bool, device="cpu")
        for line, index, n in zip(lines, tap, input_size, strict=True):
            column = line[:, index]
            source = (source[:, None] * n + column).flatten()
            inside = (inside[:, None] & (column < n)).flatten()
        rows = inside.nonzero()[:, 0]
        # one tap reads one pixel for each output: no entry is met twice
        matrix[..., rows, source[rows]] += grouped[(..., *tap, None)]
    return matrix.transpose(2, 3).flatten(3).flatten(1, 2)


def part_of_large_image(
    kernel: Tensor, input_size: tuple[int, ...], arguments: ConvArguments
) -> tuple[tuple[int, ...], ConvArguments]:
    """Of a large image, a part: size and arguments of an operator that is a submatrix of the whole one.

    Under zero padding the corner will do, elsewhere the windows from the first on that reads no padding.
    """
    channels = kernel.shape[1] * arguments.groups
    spans = [d * (k - 1) + 1 for d, k in zip(arguments.dilation, kernel.shape[2:])]
    longest = whole = max(input_size)
    while channels * math.prod(min(n, longest) for n in input_size) > _MOST_PIXELS and longest > 4 * max(spans):
        longest = 3 * longest // 4
    part = tuple(min(n, longest) for n in input_size)
    if longest < whole and arguments.padding_mode != "zeros":
        part = tuple(min(c, n - s + 1) for c, n, s in zip(part, input_size, arguments.stride))
        arguments = arguments._replace(pads=((0, 0),) * len(spans), padding_mode="zeros")
    return part, arguments


def _normal_map(x: Tensor, kernel: Tensor, arguments: ConvArguments) -> Tensor:
    """T^T T x for the operator T, without autograd, which inference mode forbids."""
    pads, mode, stride, dilation, groups = arguments
    sizes = tuple(x.shape[2:])
    padded = [n + sum(pad) for n, pad in zip(sizes, pads)]
    output = convolve(x, kernel, arguments)
    adjoint = _ADJOINTS[len(sizes)]
    image = adjoint([*x.shape[:2], *padded], kernel, output, stride, 0, dilation, groups)
    return _pad_adjoint(image, sizes, pads, mode)


@torch.autocast("cpu", enabled=False)
def stretch_lower_bound(
    kernel: Tensor,
    input_size: tuple[int, ...],
    arguments: ConvArguments,
    copies: int,
    enough: float,
    steps: int,
    start: Tensor | None = None,
) -> float:
    """Proved lower bound of the operator's norm: the stretch |T x| / |x| of one image, rounding taken off.

    The image is found by Lanczos steps in float32; the stretch is computed in float64.

    Args:
        kernel: float64 (out, in / groups, *k), entries about 1.
        input_size: image size.
        copies: largest number of times a pixel is read through the padding.
        enough: stop as soon as the estimate reaches this.
        steps: largest number of Lanczos steps.
        start: image (1, in, *sizes) to begin with; a random one by default.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    shape = (1, kernel.shape[1] * arguments.groups, *input_size)
    noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    vector = noise if start is None else start + 1e-3 * start.square().mean().sqrt() * noise
    vector /= torch.linalg.vector_norm(vector)
    single = kernel.float()
    best, reached = vector, 0.0
    steps = min(steps, vector.numel())
    basis = torch.empty(steps, vector.numel(), dtype=torch.float32, device="cpu")
    projected = torch.zeros(steps + 1, steps + 1, dtype=torch.float64, device="cpu")
    for step in range(steps):
        basis[step] = vector.flatten()
        rows = basis[: step + 1]
        image = _normal_map(vector, single, arguments).flatten()
        projected[step, step] = torch.dot(rows[-1], image)
        image = image - rows.T @ (rows @ image)
        image = image - rows.T @ (rows @ image)
        length = torch.linalg.vector_norm(image)
        values, vectors = torch.linalg.eigh(projected[: step + 1, : step + 1])
        reached = math.sqrt(max(0.0, values[-1].item()))
        best = (vectors[:, -1].float() @ rows).reshape(shape)
        if reached >= enough or not length > 1e-6 * reached**2:
            break
        projected[step, step + 1] = projected[step + 1, step] = length
        vector = (image / length).reshape(shape)

    best = best.double()
    length = torch.linalg.vector_norm(best).item()
    if length == 0.0:
        return 0.0
    output = convolve(best, kernel, arguments)
    # the rounding of each output is at most gamma times what the kernel of absolute values makes of |x|
    absolute_gain = torch.linalg.vector_norm(kernel, dim=(0, 1)).sum().item() * math.sqrt(copies)
    error = 2 * gamma(2 * kernel[0].numel() + 16) * absolute_gain * length
    stretched = torch.linalg.vector_norm(output).item() * (1 - 2 * gamma(output.numel() + 8)) - error
    return down(down(stretched) / (length * (1 + 2 * gamma(best.numel() + 8))))
