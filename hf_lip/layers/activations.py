# SPDX-License-Identifier: Apache-2.0
"""1-Lipschitz activations. Channels are dimension 1 throughout; pairs are (first half, second half) of the
channels."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .base import ExactModule, LipschitzModule, gamma


# elementwise, non-decreasing, slope in [0, 1]: what a residual CPL or SLL layer allows inside (CPL paper, section 1.1)
MONOTONE_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": nn.functional.leaky_relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    # not torch's softplus, which jumps where it switches to the identity
    "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
}


def split_pairs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First halves, second halves and, for an odd number of channels, the channel left over."""
    half = x.shape[1] // 2
    return x[:, :half], x[:, half : 2 * half], x[:, 2 * half :]


class ReLU(ExactModule):
    """max(x, 0), elementwise; any shape."""

    proof = "elementwise with slopes 0 and 1"

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x)


class MaxMin(ExactModule):
    """(a, b) -> (max, min) on pairs of channels, (B, C, ...) -> (B, C, ...): GroupSort with groups of two.

    Gradient-norm preserving (Anil et al., 2019). With an odd number of channels the last one passes unchanged.
    """

    proof = "permutes its inputs"

    def forward(self, x: Tensor) -> Tensor:
        first, second, rest = split_pairs(x)
        return torch.cat([torch.maximum(first, second), torch.minimum(first, second), rest], dim=1)


class GroupSort(ExactModule):
    """Sorts each group of `group_size` neighbouring channels, (B, C, ...) -> (B, C, ...) (Anil et al., 2019).

    Raises:
        ValueError: if `group_size` < 2 or, in the forward pass, does not divide the number of channels.
    """

    proof = "permutes its inputs"

    def __init__(self, group_size: int = 2):
        super().__init__()
        if group_size < 2:
            raise ValueError(f"`group_size` must be at least 2, got {group_size}.")
        self.group_size = group_size

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] % self.group_size:
            raise ValueError(f"`group_size`={self.group_size} does not divide the {x.shape[1]} channels of the input.")
        return x.unflatten(1, (-1, self.group_size)).sort(dim=2).values.flatten(1, 2)

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}"


class Householder(LipschitzModule):
    """Learned reflection of pairs of channels, (B, C, ...) -> (B, C, ...); theta = pi / 2 gives (min, max).

    A pair (x, y) stays as it is where x sin(theta/2) <= y cos(theta/2), and is reflected by
    [[cos, sin], [sin, -cos]](theta) elsewhere (Singla et al., ICLR 2022). `theta` has shape (C // 2,).
    """

    proof = "continuous, each piece orthogonal"

    def __init__(self, num_channels: int):
        super().__init__()
        self.theta = nn.Parameter(torch.empty(num_channels // 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.theta, torch.pi / 2)

    def forward(self, x: Tensor) -> Tensor:
        first, second, rest = split_pairs(x)
        theta = self.theta.to(x.dtype).view(-1, *[1] * (x.ndim - 2))
        cos, sin = torch.cos(theta), torch.sin(theta)
        keep = first * torch.sin(theta / 2) <= second * torch.cos(theta / 2)
        reflected_first = first * cos + second * sin
        reflected_second = first * sin - second * cos
        return torch.cat(
            [torch.where(keep, first, reflected_first), torch.where(keep, second, reflected_second), rest], dim=1
        )

    def lipschitz_bound(self) -> float:
        return 1.0

    def propagate(self, norm: float, error: float, bound: float) -> tuple[float, float]:
        # cos and sin to 4 ulp, one product and one sum; a wrong side of the mirror moves a point by its rounding only
        return norm, error + gamma(32) * (norm + error)


ACTIVATIONS: dict[str, Callable[[int], LipschitzModule]] = {
    "relu": lambda num_channels: ReLU(),
    "maxmin": lambda num_channels: MaxMin(),
    "householder": Householder,
}
