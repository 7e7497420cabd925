# SPDX-License-Identifier: Apache-2.0
"""Linear 1-Lipschitz layers whose plain weight is divided per channel: AOL and spectral rescaling (SR).

With M = (W W^T)^m, m = 2^(N-1), the factors R_i = (sum_j |M|_ij)^(1 / 2m) make diag(1/R) W 1-Lipschitz for every N >=
1 (gram-iteration section 4). N = 1 is AOL (Prach and Lampert, ECCV 2022), which scales the input side; growing N tends
to division by the spectral norm. The proof is for the operator on the infinite grid, so it covers zero and circular
padding, every stride and every image size.
"""

import math

import torch
from torch import Tensor, nn

from ..ops.rescale import rescaling_factors
from .base import UNIT_ROUNDOFF, RescaledModule, gamma
from .operators import ConvOperator, DenseOperator, Operator, at_least_float32


class RescaledLayer(Operator, RescaledModule):
    """Common part: y = W_eff x + b, W_eff = diag(1/R) W (`side` "output") or W diag(1/R) (`side` "input")."""

    proof = "certified norm of the rescaled weight"
    side: str
    num_iterations: int
    bias: nn.Parameter | None

    def __init__(self, weight_shape: tuple[int, ...], bias: bool, side: str, num_iterations: int):
        super().__init__()
        if num_iterations < 1:
            raise ValueError(f"`num_iterations` must be at least 1, got {num_iterations}.")
        self.side = side
        self.num_iterations = num_iterations
        self.weight = nn.Parameter(torch.empty(weight_shape))
        if bias:
            self.bias = nn.Parameter(torch.empty(weight_shape[0]))
        else:
            self.register_parameter("bias", None)
        self.register_buffer("rescaling", torch.ones(weight_shape[0 if side == "output" else 1]))

    def reset_parameters(self) -> None:
        # the identity has rescaling 1, so deep stacks start as isometries instead of contracting to zero
        (nn.init.eye_ if self.weight.ndim == 2 else nn.init.dirac_)(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        nn.init.ones_(self.rescaling)
        self._stale = not self.weight.is_meta

    def divide(self, weight: Tensor, factors: Tensor) -> Tensor:
        axis = 0 if self.side == "output" else 1
        return weight / factors.view(*[-1 if dim == axis else 1 for dim in range(weight.ndim)])

    def training_rescaling(self) -> Tensor:
        return rescaling_factors(at_least_float32(self.weight), self.num_iterations, side=self.side)

    def certified_rescaling(self) -> Tensor:
        return rescaling_factors(self.weight.double(), self.num_iterations, side=self.side)

    def effective_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight that is applied, in `dtype` (default: the weight's, at least float32)."""
        weight = at_least_float32(self.weight) if dtype is None else self.weight.to(dtype)
        return self.divide(weight, self.current_rescaling().to(weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self.apply_operator(x, self.effective_weight(x.dtype), bias)

    def stored_weight(self) -> Tensor:
        """The evaluation-mode effective weight in float64."""
        return self.divide(self.weight.double(), self.rescaling.double())

    @torch.no_grad()
    def lipschitz_bound(self) -> float:
        self.freeze_if_stale()
        if not (self.rescaling > 0).all():
            raise ValueError(f"`rescaling` of {type(self).__name__} must be positive: the checkpoint is damaged.")
        weight = self.stored_weight()
        return self.certified_norm(weight) + 4 * UNIT_ROUNDOFF * self.absolute_gain(weight)

    @torch.no_grad()
    def propagate(self, norm: float, error: float, bound: float) -> tuple[float, float]:
        weight = self.stored_weight()
        offset = 0.0 if self.bias is None else math.sqrt(self.num_positions) * float(self.bias.double().norm())
        local = gamma(weight[0].numel() + 8) * (self.absolute_gain(weight) * (norm + error) + offset)
        return bound * norm + offset * (1.0 + 1e-12), bound * error + local


class SRLinear(DenseOperator, RescaledLayer):
    """Dense layer with spectral rescaling, (B, in_features) -> (B, out_features); weight (out_features, in_features).

    Args:
        num_iterations: N >= 1 Gram iterations; the larger, the closer the norm is to 1.
        side: "output" divides rows, "input" divides columns.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, num_iterations: int = 3, side: str = "output"
    ):
        super().__init__((out_features, in_features), bias, side, num_iterations)
        self.reset_parameters()

    def extra_repr(self) -> str:
        return (
            f"{self.weight.shape[1]}, {self.weight.shape[0]}, num_iterations={self.num_iterations}, side={self.side}"
        )


class AOLLinear(SRLinear):
    """Almost-orthogonal dense layer: one step of rescaling, on the input side."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias, num_iterations=1, side="input")


class SRConv2d(ConvOperator, RescaledLayer):
    """Convolution with spectral rescaling, (B, in, H, W) -> (B, out, H / stride, W / stride); kernel (out, in, k, k).

    Args:
        image_size: height and width of the input, which the certified norm belongs to.
        kernel_size: odd; padding is k // 2 of zeros or circular.
        num_iterations, side: as in `SRLinear`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_size: int | tuple[int, int],
        kernel_size: int = 3,
        padding_mode: str = "zeros",
        stride: int = 1,
        bias: bool = True,
        num_iterations: int = 3,
        side: str = "output",
    ):
        super().__init__((out_channels, in_channels, kernel_size, kernel_size), bias, side, num_iterations)
        self.set_geometry(kernel_size, image_size, padding_mode, stride)
        self.reset_parameters()

    def extra_repr(self) -> str:
        out, channels, side, _ = self.weight.shape
        return (
            f"{channels}, {out}, kernel_size={side}, num_iterations={self.num_iterations}, {self.describe_geometry()}"
        )


class AOLConv2d(SRConv2d):
    """Almost-orthogonal convolution: one step of rescaling, on the input side."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_size: int | tuple[int, int],
        kernel_size: int = 3,
        padding_mode: str = "zeros",
        stride: int = 1,
        bias: bool = True,
    ):
        super().__init__(
            in_channels,
            out_channels,
            image_size,
            kernel_size,
            padding_mode,
            stride,
            bias,
            num_iterations=1,
            side="input",
        )
