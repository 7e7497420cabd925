# SPDX-License-Identifier: Apache-2.0
"""Lipschitz constants (l2 to l2) of layers without weights: activations, pooling, changes of shape.

Each is a proved upper bound of the constant of the real function that the layer computes in evaluation mode. What
jumps (Hardshrink, Threshold, torch's Softplus, which switches to the identity) or grows without limit (ReLU squared,
gated products) has no constant and is not here.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import activations

from ..ops.certified import certified_spectral_norm
from ..ops.rounding import gamma, up
from .exact_class import is_plain


# suprema of |f'|, rounded up in the last digit. gelu' = Phi(x) + x phi(x) has its extrema where f'' = (2 - x^2) phi
# vanishes, at +-sqrt(2), and gelu'(x) + gelu'(-x) = 1: 1.128904145. The others likewise at the root of f'': x = 1.4185
# (1.128993069), 2.3994 (1.099839321; x sigmoid(a x) has the same supremum for every a) and 1.4906 (1.088498162).
# tests/checkpoints/test_composition.py brackets each on a grid, with a bound of f'' between the points.
GELU = 1.128905
GELU_TANH = 1.128994
SILU = 1.099840
MISH = 1.088499
# scale * alpha = 1.758099341, the slope to the left of 0
SELU = 1.758100

# room for the coefficients that torch's kernels hold in float32
FLOAT_COEFFICIENT = 1.0 + 2.0**-20

_SLOPES: dict[type[nn.Module], float] = {
    nn.ReLU: 1.0,
    nn.ReLU6: 1.0,
    nn.Tanh: 1.0,
    nn.Sigmoid: 0.25,
    nn.Softsign: 1.0,
    nn.LogSigmoid: 1.0,
    nn.Tanhshrink: 1.0,
    nn.Softshrink: 1.0,
    nn.Hardtanh: 1.0,
    nn.Hardsigmoid: FLOAT_COEFFICIENT / 6,
    # x relu6(x + 3) / 6 has slope (2 x + 3) / 6 on [-3, 3]
    nn.Hardswish: 1.5,
    nn.SELU: SELU,
    nn.SiLU: SILU,
    nn.Mish: MISH,
    activations.GELUActivation: GELU,
    activations.ClippedGELUActivation: GELU,
    activations.GELUTanh: GELU_TANH,
    # sqrt(2 / pi) is written with ten digits there, far closer than the last digit of the bound
    activations.FastGELUActivation: GELU_TANH,
    activations.NewGELUActivation: GELU_TANH,
    activations.AccurateGELUActivation: GELU_TANH,
    activations.QuickGELUActivation: SILU,
    activations.SiLUActivation: SILU,
    activations.MishActivation: MISH,
    activations.LinearActivation: 1.0,
}
_SELECTIONS = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.FeatureAlphaDropout, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle,
)  # fmt: skip
_CONSTANT_PADS = (
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d,
)  # fmt: skip
_MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_MEAN_POOLS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.AvgPool1d: F.avg_pool1d,
    nn.AvgPool2d: F.avg_pool1d,
    nn.AvgPool3d: F.avg_pool1d,
    nn.AdaptiveAvgPool1d: F.adaptive_avg_pool1d,
    nn.AdaptiveAvgPool2d: F.adaptive_avg_pool1d,
    nn.AdaptiveAvgPool3d: F.adaptive_avg_pool1d,
}


def elementary_bound(module: nn.Module, input_shape: tuple[int, ...]) -> tuple[float, str] | None:
    """Constant and proof of a layer without weights, None if it is none of those known.

    Args:
        module: in evaluation mode.
        input_shape: (C, *sizes) or (..., features), without the batch.
    """
    if not is_plain(module):
        return None
    kind = type(module)
    if kind in _SLOPES:
        return _SLOPES[kind], "elementwise, largest slope"
    if kind in _SELECTIONS:
        return 1.0, "moves its inputs"
    if kind in _CONSTANT_PADS:
        return 1.0, "appends constants"
    known = _activation(module) or _pooling(module, input_shape)
    return known


def _at_least_one(slope: float, kind: type) -> float:
    if not math.isfinite(slope):
        raise ValueError(f"{kind.__name__} has a slope that is not finite, no bound exists.")
    return max(1.0, abs(slope))


def _activation(module: Any) -> tuple[float, str] | None:
    """Activations with parameters of their own."""
    kind = type(module)
    proof = "elementwise, largest slope"
    if kind is nn.GELU:
        return (GELU if module.approximate == "none" else GELU_TANH), proof
    if kind is nn.LeakyReLU:
        return _at_least_one(module.negative_slope, kind), proof
    if kind is nn.RReLU:
        # in evaluation mode the slope is the mean of the two
        return _at_least_one(up(abs(module.lower + module.upper) / 2), kind), proof
    if kind is nn.ELU:
        return _at_least_one(FLOAT_COEFFICIENT * module.alpha, kind), proof
    if kind is nn.CELU and module.alpha > 0:
        return FLOAT_COEFFICIENT, proof
    if kind is nn.PReLU:
        return _at_least_one(module.weight.detach().double().abs().max().item(), kind), proof
    if kind is nn.Softmax:
        # rows of diag(p) - p p^T have absolute sums 2 p_i (1 - p_i) <= 1/2
        return 0.5, "Jacobian diag(p) - p p^T, Gershgorin"
    return None


def _per_dimension(value: Any, dimensions: int) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * dimensions


def _pooling(module: Any, input_shape: tuple[int, ...]) -> tuple[float, str] | None:
    kind = type(module)
    if kind in _MAX_POOLS:
        dimensions = _MAX_POOLS.index(kind) + 1
        options = (module.kernel_size, module.stride, module.dilation)
        shared = 1
        for taps, stride, dilation in zip(*(_per_dimension(option, dimensions) for option in options)):
            # windows that read one pixel: taps j with s o + d j fixed are s / gcd(s, d) apart
            shared *= -(-taps * math.gcd(stride, dilation) // stride)
        exact = math.isqrt(shared) ** 2 == shared
        root = float(math.isqrt(shared)) if exact else up(math.sqrt(shared))
        return root, f"at most {shared} windows share a pixel: sqrt({shared})"
    if kind in _MEAN_POOLS:
        if getattr(module, "divisor_override", None) is not None:
            return None
        return _mean_pooling(module, input_shape), "product of the norms of its matrices, one a dimension"
    return None


def _mean_pooling(module: Any, input_shape: tuple[int, ...]) -> float:
    """A mean over a box is a mean over its rows after one over its columns: the norm is a product over dimensions."""
    dimensions = int(type(module).__name__[-2])
    sizes = input_shape[-dimensions:]
    bound = 1.0
    for axis, size in enumerate(sizes):
        if hasattr(module, "output_size"):
            target = _per_dimension(module.output_size, dimensions)[axis]
            arguments: dict[str, Any] = {"output_size": size if target is None else target}
        else:
            names = ("kernel_size", "stride", "padding")
            arguments = {name: _per_dimension(getattr(module, name), dimensions)[axis] for name in names}
            arguments |= {"ceil_mode": module.ceil_mode, "count_include_pad": module.count_include_pad}
        pool = _MEAN_POOLS[type(module)]
        matrix = pool(torch.eye(size, dtype=torch.float64)[:, None], **arguments)[:, 0]
        # every entry is one rounded quotient
        bound = up(bound * (certified_spectral_norm(matrix) + 2 * gamma(2) * float(matrix.norm())))
    return bound


def mean_over_pixels(height: int, width: int) -> float:
    """Constant of the mean over all pixels: 1 / sqrt(H W)."""
    return up(1.0 / math.sqrt(height * width))
