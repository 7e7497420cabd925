# SPDX-License-Identifier: Apache-2.0
"""Spectral rescaling factors, one an output channel, of stored weights of every layout (arXiv 2402.00240).

The factors R of `ops.rescale` make diag(1/R) W 1-Lipschitz in exact arithmetic. Here they are computed in float64 for
what checkpoints hold: strides by their polyphase form (the published factors ignore them), dilation, groups,
transposed convolutions, one to three spatial dimensions, and tall matrices without their large Gram matrix. Rounding
is left to whoever measures the rescaled layer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.geometry import as_tuple, dilate_kernel, polyphase_kernel
from ..ops.rescale import rescaling_factors
from .layers import LayerInfo


# float64 entries of one block of a product, 32 MB
_BLOCK_ENTRIES = 2**22


def channel_factors(weight: Tensor, layer: LayerInfo, num_iterations: int = 1) -> Tensor:
    """Factors R: output channels divided by them make an operator of norm at most 1, whatever the image size.

    Args:
        weight: as stored; computed in float64.
        layer: its layout and arguments.
        num_iterations: N >= 1; 1 is AOL, more comes closer to norm 1. Memory for kernels grows fourfold a step.

    Returns:
        float64 (out,), at least the norm of the channel's weights; 1 for channels that are zero.
    """
    weight = weight.detach().double()
    if layer.kind in ("conv", "conv_transpose"):
        return _kernel_factors(weight, layer, num_iterations)
    # an embedding multiplies one-hot rows from the left, as transformers' Conv1D does
    matrix = weight.T if layer.transposed_weight or layer.kind == "embedding" else weight
    return _matrix_factors(matrix, num_iterations)


def scale_channels(weight: Tensor, layer: LayerInfo, factors: Tensor) -> Tensor:
    """Multiply output channel i by factors[i]; factors (out,) or a scalar tensor."""
    if factors.ndim == 0:
        return weight * factors
    if layer.kind == "conv_transpose":
        groups = layer.arguments.get("groups", 1)
        per_group = factors.reshape(groups, -1)
        blocks = weight.reshape(groups, -1, *weight.shape[1:])
        return (blocks * per_group.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))).reshape(weight.shape)
    if layer.transposed_weight or layer.kind == "embedding":
        return weight * factors
    return weight * factors.reshape(-1, *[1] * (weight.ndim - 1))


def _matrix_factors(matrix: Tensor, num_iterations: int) -> Tensor:
    """As `rescaling_factors`, in memory of the size of the matrix also where it is tall."""
    rows, columns = matrix.shape
    norms = torch.linalg.vector_norm(matrix, dim=1)
    if rows <= columns:
        factors = rescaling_factors(matrix, num_iterations)
    else:
        scale = torch.linalg.vector_norm(matrix)
        scaled = matrix / torch.where(scale > 0, scale, 1.0)
        # (W W^T)^(2^(N-1)) = W (W^T W)^(2^(N-1) - 1) W^T
        power = scaled.T @ scaled
        left = scaled
        for _ in range(num_iterations - 1):
            left = left @ power
            power = power @ power
        blocks = left.split(max(1, _BLOCK_ENTRIES // rows))
        sums = torch.cat([(block @ scaled.T).abs().sum(dim=1) for block in blocks])
        factors = sums.pow(0.5**num_iterations) * scale
    # the diagonal of W W^T <= diag(R)^2 says so; it holds the factors where sums underflow
    return torch.where(norms > 0, torch.maximum(factors, norms), 1.0)


def _kernel_factors(weight: Tensor, layer: LayerInfo, num_iterations: int) -> Tensor:
    dimensions = weight.ndim - 2
    arguments = layer.arguments
    stride = as_tuple(arguments.get("stride", 1), dimensions, "stride", 1)
    if arguments.get("padding_mode", "zeros") != "zeros":
        # on a torus the polyphase form needs sizes that the stride divides; without a stride every size is covered
        stride = (1,) * dimensions
    if any(step > 1 for step in stride):
        # without a stride the taps' distance changes nothing
        weight = dilate_kernel(weight, as_tuple(arguments.get("dilation", 1), dimensions, "dilation", 1))
    factors = []
    for block in weight.chunk(arguments.get("groups", 1)):
        phases = polyphase_kernel(block, stride)
        if layer.kind == "conv":
            factors.append(_stride_one_factors(phases, num_iterations))
            continue
        # the adjoint: its outputs are the inputs, each with all its phases
        rows = _stride_one_factors(phases.transpose(0, 1), num_iterations)
        factors.append(rows.reshape(block.shape[1], -1).amax(dim=1))
    return torch.cat(factors)


def _stride_one_factors(kernel: Tensor, num_iterations: int) -> Tensor:
    if kernel[0, 0].numel() == 1:
        return _matrix_factors(kernel.flatten(1), num_iterations)
    if kernel.ndim == 3:
        kernel = kernel[:, :, None]
    if kernel.ndim == 5:
        # laid out along one axis, far enough apart that the iterated autocorrelations do not meet
        room = 2**num_iterations * (kernel.shape[3] - 1) + 1
        kernel = F.pad(kernel, (0, 0, 0, room - kernel.shape[3])).flatten(2, 3)
    norms = torch.linalg.vector_norm(kernel.flatten(1), dim=1)
    factors = rescaling_factors(kernel.contiguous(), num_iterations)
    return torch.where(norms > 0, torch.maximum(factors, norms), 1.0)
