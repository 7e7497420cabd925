# SPDX-License-Identifier: Apache-2.0
"""A convolution as an operator on images: applied as torch applies it, and stretched for proved lower bounds."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .rounding import down, gamma


_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


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
    for axis, (before, after) in zip(range(x.ndim - len(pads), x.ndim), pads):
        size = x.shape[axis]
        index = torch.arange(-before, size + after, device=x.device)
        if mode == "circular":
            index = index % size
        elif mode == "replicate":
            index = index.clamp(0, size - 1)
        else:
            index = (index.abs() - (size - 1)).abs().neg() + (size - 1)
        x = x.index_select(axis, index)
    return x


def convolve(x: Tensor, kernel: Tensor, arguments: ConvArguments) -> Tensor:
    """Images (B, in, *sizes) -> (B, out, *sizes') for a kernel (out, in / groups, *k)."""
    padded = pad_image(x, arguments.pads, arguments.padding_mode)
    return _CONVOLUTIONS[kernel.ndim - 2](
        padded, kernel, stride=arguments.stride, dilation=arguments.dilation, groups=arguments.groups
    )


def _normal_map(x: Tensor, kernel: Tensor, arguments: ConvArguments) -> Tensor:
    """T^T T x for the operator T."""
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        output = convolve(point, kernel, arguments)
        return torch.autograd.grad(output, point, output.detach())[0]


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
    basis: list[Tensor] = []
    projected = torch.zeros(steps + 1, steps + 1, dtype=torch.float64, device="cpu")
    for step in range(min(steps, vector.numel())):
        basis.append(vector.flatten())
        rows = torch.stack(basis)
        image = _normal_map(vector, single, arguments).flatten()
        projected[step, step] = torch.dot(basis[-1], image)
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
