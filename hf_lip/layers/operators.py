# SPDX-License-Identifier: Apache-2.0
"""The two kinds of linear operator that the layers are built on: dense maps and convolutions with an exact adjoint."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.certified import certified_conv_norm, certified_spectral_norm


PADDING_MODES = ("zeros", "circular")


def at_least_float32(weight: Tensor) -> Tensor:
    """Norms are never computed in half precision: it under-estimates them by up to 0.5 %."""
    return weight if weight.dtype in (torch.float32, torch.float64) else weight.float()


def fan_in_uniform_(bias: Tensor, weight: Tensor) -> None:
    """Bias uniform in +-1/sqrt(fan_in), torch's own default for linear and convolutional layers."""
    bound = 1.0 / math.sqrt(max(1, weight[0].numel()))
    nn.init.uniform_(bias, -bound, bound)


class Operator:
    """A linear operator made from a weight; what the layers need to know of it."""

    #: number of positions at which a bias entry is added
    num_positions: int

    def apply_operator(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise TypeError(f"{type(self).__name__} is no operator.")

    def apply_adjoint(self, y: Tensor, weight: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} has no adjoint.")

    def per_channel(self, values: Tensor) -> Tensor:
        """One value per channel in the shape that broadcasts over positions."""
        raise TypeError(f"{type(self).__name__} has no channels.")

    def certified_norm(self, weight: Tensor) -> float:
        """Certified upper bound of the operator norm."""
        raise TypeError(f"{type(self).__name__} has no certified norm.")

    def absolute_gain(self, weight: Tensor) -> float:
        """Upper bound of the norm of the operator whose entries are |w|: what rounding errors are multiplied by."""
        raise TypeError(f"{type(self).__name__} has no certified gain.")


class DenseOperator(Operator):
    """x (B, in) -> W x (B, out) and its adjoint, for a weight of shape (out, in)."""

    num_positions = 1

    def apply_operator(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def apply_adjoint(self, y: Tensor, weight: Tensor) -> Tensor:
        return F.linear(y, weight.mT)

    def per_channel(self, values: Tensor) -> Tensor:
        return values

    def certified_norm(self, weight: Tensor) -> float:
        return certified_spectral_norm(weight)

    def absolute_gain(self, weight: Tensor) -> float:
        return float(torch.linalg.vector_norm(weight.double())) * (1.0 + 1e-9)


class ConvOperator(Operator):
    """x (B, in, H, W) -> K * x (B, out, H', W') and, for stride 1, its adjoint; kernel (out, in, k, k) with odd k.

    Zero or circular padding by k // 2. Reflect and replicate padding are refused: the padding itself stretches
    (up to 1.41 measured), so bounds made from the kernel do not hold for them.

    Args:
        image_size: height and width the layer is certified for; other sizes are an error in the forward pass.
    """

    image_size: tuple[int, int]
    padding: int
    padding_mode: str
    stride: int

    def set_geometry(self, kernel_size: int, image_size: int | tuple[int, int], padding_mode: str, stride: int = 1):
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"`kernel_size` must be odd, got {kernel_size}.")
        if padding_mode not in PADDING_MODES:
            raise ValueError(
                f"`padding_mode` must be one of {', '.join(PADDING_MODES)}, got {padding_mode!r}: reflect and "
                "replicate padding are not 1-Lipschitz maps, so the layer could not be certified."
            )
        if stride < 1:
            raise ValueError(f"`stride` must be at least 1, got {stride}.")
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)  # type: ignore[assignment]
        self.padding = kernel_size // 2
        if padding_mode == "circular" and min(self.image_size) < kernel_size:
            raise ValueError(
                f"circular padding needs an image of at least {kernel_size} x {kernel_size}, got {self.image_size}."
            )
        self.padding_mode = padding_mode
        self.stride = stride
        self.num_positions = math.prod(-(-size // stride) for size in self.image_size)

    def wrap(self, x: Tensor) -> Tensor:
        return F.pad(x, [self.padding] * 4, mode="circular")

    def apply_operator(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.shape[-2:] != self.image_size:
            raise ValueError(
                f"The layer is certified for images of {self.image_size[0]} x {self.image_size[1]}, got "
                f"{x.shape[-2]} x {x.shape[-1]}. Build it with another `image_size` or resize the input."
            )
        if self.padding_mode == "circular":
            return F.conv2d(self.wrap(x), weight, bias, stride=self.stride)
        return F.conv2d(x, weight, bias, stride=self.stride, padding=self.padding)

    def apply_adjoint(self, y: Tensor, weight: Tensor) -> Tensor:
        if self.padding_mode == "circular":
            return F.conv2d(self.wrap(y), weight.transpose(0, 1).flip(2, 3))
        return F.conv_transpose2d(y, weight, padding=self.padding)

    def per_channel(self, values: Tensor) -> Tensor:
        return values.view(-1, 1, 1)

    def certified_norm(self, weight: Tensor) -> float:
        return certified_conv_norm(
            weight, self.image_size, padding_mode=self.padding_mode, padding=self.padding, stride=self.stride
        )

    def absolute_gain(self, weight: Tensor) -> float:
        # every input pixel is read by at most k x k output positions
        side = 2 * self.padding + 1
        return side * float(torch.linalg.vector_norm(weight.double())) * (1.0 + 1e-9)

    def describe_geometry(self) -> str:
        height, width = self.image_size
        stride = f", stride={self.stride}" if self.stride > 1 else ""
        return f"image_size=({height}, {width}), padding_mode={self.padding_mode}{stride}"
