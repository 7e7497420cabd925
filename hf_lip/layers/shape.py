# SPDX-License-Identifier: Apache-2.0
"""Parts without weights: input normalisation, pooling, changes of shape and of the number of channels."""

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from .base import ExactModule, LipschitzModule, gamma


class InputNormalization(LipschitzModule):
    """(pixels - mean) / std per channel, (B, C, H, W) -> (B, C, H, W), counted with its constant max 1 / std.

    Args:
        mean, std: one number per channel, in pixel units of [0, 1].

    Raises:
        ValueError: if the lengths differ, or a std is not positive.
    """

    proof = "largest 1 / std"

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        if len(mean) != len(std):
            raise ValueError(
                f"`mean` has {len(mean)} entries and `std` {len(std)}: one per channel is needed in each."
            )
        if not all(math.isfinite(value) and value > 0 for value in std):
            raise ValueError(f"`std` must be positive and finite, got {std}.")
        self.mean = [float(value) for value in mean]
        self.std = [float(value) for value in std]

    def forward(self, x: Tensor) -> Tensor:
        mean = x.new_tensor(self.mean).view(-1, 1, 1)
        std = x.new_tensor(self.std).view(-1, 1, 1)
        return (x - mean) / std

    def lipschitz_bound(self) -> float:
        smallest = min(self.std)
        return 1.0 if smallest == 1.0 else math.nextafter(1.0 / smallest, math.inf)

    def input_bounds(self, pixels_per_channel: int) -> tuple[float, float]:
        """Norm and float64 error of the normalised input, for any image with pixels in [0, 1]."""
        largest = [max(abs(mean), abs(1.0 - mean)) / std for mean, std in zip(self.mean, self.std)]
        norm = math.sqrt(pixels_per_channel * math.fsum(value * value for value in largest)) * (1.0 + 1e-12)
        return norm, gamma(4) * norm

    def extra_repr(self) -> str:
        return f"mean={self.mean}, std={self.std}"


class SumPool2d(LipschitzModule):
    """Sums over disjoint k x k windows, divided by k: (B, C, H, W) -> (B, C, H / k, W / k), norm exactly 1.

    Raises:
        ValueError: in the forward pass, if k does not divide the image.
    """

    proof = "disjoint k x k windows, sum / k"

    def __init__(self, kernel_size: int):
        super().__init__()
        if kernel_size < 1:
            raise ValueError(f"`kernel_size` must be at least 1, got {kernel_size}.")
        self.kernel_size = kernel_size

    def forward(self, x: Tensor) -> Tensor:
        k = self.kernel_size
        if x.shape[-2] % k or x.shape[-1] % k:
            raise ValueError(f"`kernel_size`={k} does not divide the image of {tuple(x.shape[-2:])}.")
        # not `divisor_override`, which torch's ONNX exporter drops without a word
        return F.avg_pool2d(x, k) * k

    def lipschitz_bound(self) -> float:
        return 1.0

    def propagate(self, norm: float, error: float, bound: float) -> tuple[float, float]:
        # k^2 - 1 sums, one division, one product
        return norm, error + gamma(self.kernel_size**2 + 1) * (norm + error)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}"


class MaxPool2d(ExactModule):
    """Maximum over disjoint k x k windows: (B, C, H, W) -> (B, C, H // k, W // k). Windows that overlap are not
    offered: their constant is the square root of the number of windows that share a pixel."""

    proof = "maximum over disjoint windows"

    def __init__(self, kernel_size: int):
        super().__init__()
        self.kernel_size = kernel_size

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, self.kernel_size)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}"


class PixelUnshuffle(ExactModule):
    """Moves f x f pixels into channels: (B, C, H, W) -> (B, C f^2, H / f, W / f), a permutation."""

    proof = "permutes its inputs"

    def __init__(self, factor: int):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x, self.factor)

    def extra_repr(self) -> str:
        return f"factor={self.factor}"


class ChannelPadding(ExactModule):
    """Appends zero channels (or features): (B, C, ...) -> (B, num_channels, ...)."""

    proof = "appends zeros"

    def __init__(self, num_channels: int):
        super().__init__()
        self.num_channels = num_channels

    def forward(self, x: Tensor) -> Tensor:
        missing = self.num_channels - x.shape[1]
        if missing < 0:
            raise ValueError(f"The input has {x.shape[1]} channels, more than `num_channels`={self.num_channels}.")
        return F.pad(x, [0, 0] * (x.ndim - 2) + [0, missing])

    def extra_repr(self) -> str:
        return f"num_channels={self.num_channels}"


class ChannelProjection(ExactModule):
    """Keeps the first channels (or features): (B, C, ...) -> (B, num_channels, ...)."""

    proof = "drops coordinates"

    def __init__(self, num_channels: int):
        super().__init__()
        self.num_channels = num_channels

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] < self.num_channels:
            raise ValueError(f"The input has {x.shape[1]} channels, fewer than `num_channels`={self.num_channels}.")
        return x[:, : self.num_channels]

    def extra_repr(self) -> str:
        return f"num_channels={self.num_channels}"


class Flatten(ExactModule):
    """(B, C, H, W) -> (B, C H W)."""

    proof = "permutes its inputs"

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def match_channels(num_channels: int, target: int) -> ExactModule | None:
    """Zero padding or projection from `num_channels` to `target` channels; None where they agree."""
    if target > num_channels:
        return ChannelPadding(target)
    if target < num_channels:
        return ChannelProjection(target)
    return None
