# SPDX-License-Identifier: Apache-2.0
"""Norms of layers by writing out their matrices: the layer is run on every basis vector."""

import math
from typing import Any

import torch
from torch import Tensor, nn


def explicit_norm(layer: nn.Module, input_shape: tuple[int, ...]) -> float:
    """Largest singular value of the linear part of a layer on inputs of this shape, in float64."""
    layer = layer.double().eval()
    basis = torch.eye(math.prod(input_shape), dtype=torch.float64).reshape(-1, *input_shape)
    with torch.no_grad():
        images = layer(basis) - layer(torch.zeros_like(basis[:1]))
    return float(torch.linalg.matrix_norm(images.flatten(1), 2))


def convolution(weight: Tensor, **arguments: Any) -> nn.Module:
    """A convolution without bias from a kernel (out, in / groups, *k)."""
    kind = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[weight.ndim]
    groups = arguments.get("groups", 1)
    layer = kind(weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), bias=False, **arguments)
    layer.weight = nn.Parameter(weight)
    return layer
