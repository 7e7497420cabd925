# SPDX-License-Identifier: Apache-2.0
"""Naive references for tests and audits: explicit operators and their singular values, in float64.

Exact up to the rounding of LAPACK; slow and memory-hungry on purpose. Nothing here is a certificate.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import Size, as_tuple, conv_geometry
from .power import wrap_pad


# entries of the largest explicit operator, 2 GB in float64
_MAX_ENTRIES = 2**28


def conv_matrix(
    weight: Tensor,
    input_size: Size,
    *,
    padding_mode: str = "zeros",
    padding: Size | None = None,
    stride: Size = 1,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """Explicit matrix of a convolution, one column per input pixel, by convolving the unit images.

    Args:
        weight: (out, in / groups, kh, kw).
        input_size: int or (h, w).
        padding_mode: "zeros" or "circular".
        padding: pixels on each side, None for "same" (see `conv_geometry`).
        stride: int or pair.
        dilation: int or pair.
        groups: number of channel groups.

    Returns:
        float64 (out * H' * W', in * H * W), images flattened as (channel, row, column).

    Raises:
        ValueError: wrong shapes or sizes, unsupported padding mode, or a matrix of more than 2 GB.
    """
    if weight.ndim != 4 or weight.numel() == 0:
        raise ValueError(f"weight must be a kernel (out, in, kh, kw), but its shape is {tuple(weight.shape)}.")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups must divide the {weight.shape[0]} output channels, but got {groups!r}.")
    geometry = conv_geometry(
        weight.shape[2:], input_size, padding_mode=padding_mode, padding=padding, stride=stride, dilation=dilation
    )
    height, width = geometry.input_size
    channels = weight.shape[1] * groups
    columns = channels * height * width
    rows = weight.shape[0] * geometry.output_size[0] * geometry.output_size[1]
    if rows * columns > _MAX_ENTRIES:
        raise ValueError(
            f"the explicit operator would be {rows} x {columns}, more than {_MAX_ENTRIES} entries. "
            "Use a smaller input_size, or hf_lip.ops.certified.certified_conv_norm."
        )
    images = torch.eye(columns, dtype=torch.float64, device=weight.device).reshape(columns, channels, height, width)
    if padding_mode == "circular":
        images = wrap_pad(images, geometry)
    else:
        (top, bottom), (left, right) = geometry.pads
        images = F.pad(images, (left, right, top, bottom))
    outputs = F.conv2d(
        images,
        weight.detach().double(),
        stride=geometry.stride,
        dilation=as_tuple(dilation, 2, "dilation", 1),
        groups=groups,
    )
    return outputs.flatten(1).T


def exact_spectral_norm(weight: Tensor) -> float:
    """Largest singular value of a matrix (m, n), by a float64 SVD."""
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"weight must be a non-empty matrix (m, n), but its shape is {tuple(weight.shape)}.")
    return torch.linalg.svdvals(weight.detach().double())[0].item()


def exact_conv_norm(
    weight: Tensor,
    input_size: Size,
    *,
    padding_mode: str = "zeros",
    padding: Size | None = None,
    stride: Size = 1,
    dilation: Size = 1,
    groups: int = 1,
) -> float:
    """Largest singular value of the explicit operator; arguments and errors as in `conv_matrix`."""
    matrix = conv_matrix(
        weight,
        input_size,
        padding_mode=padding_mode,
        padding=padding,
        stride=stride,
        dilation=dilation,
        groups=groups,
    )
    return exact_spectral_norm(matrix)
