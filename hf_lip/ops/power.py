# SPDX-License-Identifier: Apache-2.0
"""Power iteration: lower bounds of spectral norms, for training steps and diagnostics. Never a certificate.

Any number of steps stays below the norm, so a layer divided by the estimate is in general not 1-Lipschitz
(Meunier et al., ICML 2022, arXiv 2110.12690, train with one step per forward pass and a vector kept between passes).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import ConvGeometry, Size, check_kernel, conv_geometry


def wrap_pad(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """Circular padding of (..., H, W) by the pads of `geometry`, which may exceed the image."""
    for axis, (before, after) in zip((-2, -1), geometry.pads):
        size = x.shape[axis]
        index = torch.arange(-before, size + after, device=x.device) % size
        x = x.index_select(axis, index)
    return x


def _unwrap_pad(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """Adjoint of `wrap_pad`: adds every copy back onto its pixel."""
    for axis, size, (before, after) in zip((-2, -1), geometry.input_size, geometry.pads):
        index = torch.arange(-before, size + after, device=x.device) % size
        shape = list(x.shape)
        shape[axis] = size
        x = x.new_zeros(shape).index_add(axis, index, x)
    return x


def _conv(x: Tensor, weight: Tensor, geometry: ConvGeometry, circular: bool) -> Tensor:
    """The operator on one image: (in, H, W) -> (out, H', W')."""
    if circular:
        return F.conv2d(wrap_pad(x, geometry), weight, stride=geometry.stride)
    padding = (geometry.pads[0][0], geometry.pads[1][0])
    return F.conv2d(x[None], weight, stride=geometry.stride, padding=padding)[0]


def _conv_adjoint(y: Tensor, weight: Tensor, geometry: ConvGeometry, circular: bool) -> Tensor:
    """The exact adjoint of `_conv`: (out, H', W') -> (in, H, W)."""
    # pixels of the padded image beyond the last window, never read
    spill = [
        n + sum(pads) - ((out - 1) * s + k)
        for n, pads, out, s, k in zip(
            geometry.input_size, geometry.pads, geometry.output_size, geometry.stride, weight.shape[2:]
        )
    ]
    x = F.conv_transpose2d(y[None], weight, stride=geometry.stride)[0]
    x = F.pad(x, (0, spill[1], 0, spill[0]))
    if circular:
        return _unwrap_pad(x, geometry)
    (top, _), (left, _) = geometry.pads
    height, width = geometry.input_size
    return x[:, top : top + height, left : left + width]


def _unit(vector: Tensor, previous: Tensor) -> Tensor:
    """Normalise; a vector that vanished (it lay in the kernel of the map) is replaced by the previous one."""
    top = vector.abs().amax()
    vector = torch.where(top > 0, vector / torch.where(top > 0, top, torch.ones_like(top)), previous)
    return vector / torch.linalg.vector_norm(vector)


def _power_iteration(
    forward: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor], vector: Tensor, num_iterations: int
) -> tuple[Tensor, Tensor]:
    if not isinstance(num_iterations, int) or num_iterations < 0:
        raise ValueError(f"num_iterations must be an int of at least 0, but got {num_iterations!r}.")
    with torch.autocast(vector.device.type, enabled=False):
        with torch.no_grad():
            vector = _unit(vector.detach(), torch.ones_like(vector))
            for _ in range(num_iterations):
                vector = _unit(adjoint(forward(vector)), vector)
        return torch.linalg.vector_norm(forward(vector)), vector


def _working_precision(weight: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    if weight.dtype in (torch.float16, torch.bfloat16):
        weight = weight.float()
    return weight, vector.to(weight.dtype)


def spectral_norm_estimate(weight: Tensor, vector: Tensor, num_iterations: int = 1) -> tuple[Tensor, Tensor]:
    """Lower bound |W v| of the norm of a matrix after some steps v <- W^T W v.

    Args:
        weight: (out, in); half precision is computed, and returned, in float32.
        vector: (in,), any length; a zero vector stands for the constant one.
        num_iterations: number of steps, at least 0.

    Returns:
        sigma, a scalar whose gradient is u v^T, and the new unit vector (in,), detached.

    Raises:
        ValueError: shapes that do not fit, or a negative number of steps.
    """
    if weight.ndim != 2 or vector.shape != weight.shape[1:]:
        raise ValueError(
            "weight must be a matrix (out, in) and vector (in,), but their shapes are "
            f"{tuple(weight.shape)} and {tuple(vector.shape)}."
        )
    weight, vector = _working_precision(weight, vector)
    return _power_iteration(lambda v: weight @ v, lambda u: u @ weight, vector, num_iterations)


def conv_spectral_norm_estimate(
    weight: Tensor,
    vector: Tensor,
    *,
    padding_mode: str,
    padding: Size | None = None,
    stride: Size = 1,
    num_iterations: int = 1,
) -> tuple[Tensor, Tensor]:
    """Lower bound |K * v| of the norm of a convolution, at the image size of `vector`.

    Args:
        weight: (out, in, kh, kw); half precision is computed, and returned, in float32.
        vector: image (in, H, W), any length; a zero image stands for the constant one.
        padding_mode: "zeros" or "circular".
        padding: pixels on each side, None for "same" (see `conv_geometry`).
        stride: int or pair.
        num_iterations: number of steps, at least 0.

    Returns:
        sigma, a differentiable scalar, and the new unit vector (in, H, W), detached.

    Raises:
        ValueError: shapes that do not fit, an unsupported padding mode, or a negative number of steps.
    """
    check_kernel(weight)
    if vector.ndim != 3 or vector.shape[0] != weight.shape[1]:
        raise ValueError(
            f"vector must be an image (in, H, W) with {weight.shape[1]} channels, "
            f"but its shape is {tuple(vector.shape)}."
        )
    geometry = conv_geometry(
        weight.shape[2:], tuple(vector.shape[1:]), padding_mode=padding_mode, padding=padding, stride=stride
    )
    circular = padding_mode == "circular"
    weight, vector = _working_precision(weight, vector)
    return _power_iteration(
        lambda v: _conv(v, weight, geometry, circular),
        lambda u: _conv_adjoint(u, weight, geometry, circular),
        vector,
        num_iterations,
    )
