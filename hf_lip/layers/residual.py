# SPDX-License-Identifier: Apache-2.0
"""Residual 1-Lipschitz layers  y = x - 2 K^T T^-1 act(K x + b),  with a diagonal T that dominates K K^T.

For every slope matrix D in [0, 1] of the activation the Jacobian I - 2 K^T T^-1 D K is symmetric with eigenvalues in
[-1, 1] as soon as lambda = ||T^-1/2 K||^2 <= 1; in general the constant is max(1, 2 lambda - 1) (CPL: Meunier et al.,
ICML 2022; SLL: Araujo et al., ICLR 2023). CPL takes T = ||K||^2 I, SLL takes T_i = sum_j |K K^T|_ij q_j / q_i.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..ops.power import conv_spectral_norm_estimate, spectral_norm_estimate
from ..ops.rescale import rescaling_factors
from .activations import MONOTONE_ACTIVATIONS
from .base import UNIT_ROUNDOFF, RescaledModule, gamma
from .operators import ConvOperator, DenseOperator, Operator, at_least_float32, fan_in_uniform_


# value of each activation at 0, for the growth of norms
ACTIVATION_AT_ZERO = {"relu": 0.0, "leaky_relu": 0.0, "tanh": 0.0, "sigmoid": 0.5, "softplus": math.log(2.0)}
WARM_UP_ITERATIONS = 30
# below this Gram size an eigenvalue routine costs less than a warm power step and is exact
SMALL_GRAM = 64


class ResidualLayer(Operator, RescaledModule):
    """Common part: parameters, forward pass, certificate. `rescaling` is T, one positive number per hidden channel.

    `initial_bias`, if set before `reset_parameters`, starts K with orthonormal rows and all biases at this value. A
    negative one leaves most hidden units off, so that a stack of a thousand layers starts near the identity; with the
    usual start each layer folds the space and a thousand of them map all images to one point.
    """

    bias: nn.Parameter
    initial_bias: float | None = None

    def __init__(self, weight_shape: tuple[int, ...], activation: str):
        super().__init__()
        if activation not in MONOTONE_ACTIVATIONS:
            raise ValueError(
                f"`activation` must be one of {', '.join(MONOTONE_ACTIVATIONS)} (elementwise with slopes in [0, 1]), "
                f"got {activation!r}."
            )
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(weight_shape))
        self.bias = nn.Parameter(torch.empty(weight_shape[0]))
        self.register_buffer("rescaling", torch.ones(weight_shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        hidden = self.apply_operator(x, weight, bias)
        hidden = MONOTONE_ACTIVATIONS[self.activation](hidden)
        hidden = hidden / self.per_channel(self.current_rescaling().to(x.dtype))
        return x - 2.0 * self.apply_adjoint(hidden, weight)

    def initialise(self, usual: Callable[[Tensor], Tensor]) -> None:
        """Start the weight as `usual` does and the bias as torch does, or both as `initial_bias` asks."""
        if self.initial_bias is None:
            usual(self.weight)
            fan_in_uniform_(self.bias, self.weight)
        else:
            nn.init.orthogonal_(self.weight)
            nn.init.constant_(self.bias, self.initial_bias)
        nn.init.ones_(self.rescaling)

    def scaled_weight(self) -> Tensor:
        """T^-1/2 K in float64, for the numbers as stored."""
        root = self.rescaling.double().sqrt()
        return self.weight.double() / root.view(-1, *[1] * (self.weight.ndim - 1))

    def effective_weight(self) -> Tensor:
        """T^-1/2 K, whose norm is at most 1, in the weight's dtype (at least float32)."""
        weight = at_least_float32(self.weight)
        root = self.current_rescaling().to(weight.dtype).sqrt()
        return weight / root.view(-1, *[1] * (weight.ndim - 1))

    @torch.no_grad()
    def lipschitz_bound(self) -> float:
        self.freeze_if_stale()
        if not (self.rescaling > 0).all():
            raise ValueError(f"`rescaling` of {type(self).__name__} must be positive: the checkpoint is damaged.")
        weight = self.scaled_weight()
        norm = self.certified_norm(weight) + 4 * UNIT_ROUNDOFF * self.absolute_gain(weight)
        contraction = norm * norm * (1.0 + 8 * UNIT_ROUNDOFF)
        return max(1.0, (2.0 * contraction - 1.0) * (1.0 + 8 * UNIT_ROUNDOFF))

    @torch.no_grad()
    def propagate(self, norm: float, error: float, bound: float) -> tuple[float, float]:
        weight = self.scaled_weight()
        gain = self.absolute_gain(weight)
        root = self.rescaling.double().sqrt()
        spread = math.sqrt(self.num_positions)
        # |act(z)| <= |act(0)| + |z|, all of it divided by sqrt(T)
        shift = spread * float((self.bias.double().abs() / root).norm())
        constant = spread * ACTIVATION_AT_ZERO[self.activation] * float((1.0 / root).norm())
        reach = norm + error
        terms = weight[0].numel() + weight.shape[0] * (weight[0, 0].numel() if weight.ndim > 2 else 1)
        hidden_error = gamma(terms + 32) * (gain * reach + shift + constant)
        hidden_norm = gain * reach + shift + constant
        local = 2.0 * gain * (gamma(terms + 8) * hidden_norm + hidden_error) + gamma(4) * (
            reach + 2.0 * gain * hidden_norm
        )
        return bound * norm + 2.0 * (shift + constant) * max(1.0, bound), bound * error + local


class ConvexPotentialLayer(ResidualLayer):
    """T = ||K||^2 I. Training follows the norm by a power step that is warm-started; what is frozen is a certified
    bound."""

    proof = "certified ||T^-1/2 K||, then max(1, 2 lambda - 1)"
    power_iteration_vector: Tensor

    def reset_parameters(self) -> None:
        self.initialise(partial(nn.init.kaiming_uniform_, a=math.sqrt(5)))
        nn.init.ones_(self.power_iteration_vector)
        if not self.weight.is_meta:
            with torch.no_grad():
                self.estimate_squared_norm(WARM_UP_ITERATIONS)
        self._stale = not self.weight.is_meta

    def estimate_squared_norm(self, num_iterations: int) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not estimate its norm.")

    @torch.no_grad()
    def remember(self, vector: Tensor) -> None:
        self.power_iteration_vector.copy_(vector)

    def training_rescaling(self) -> Tensor:
        squared = self.estimate_squared_norm(1)
        # an all-zero kernel is the identity whatever it is divided by
        return torch.where(squared > 0, squared, torch.ones_like(squared)).expand(self.rescaling.shape)

    def certified_rescaling(self) -> Tensor:
        norm = self.certified_norm(self.weight)
        squared = norm * norm
        return torch.full(self.rescaling.shape, squared if squared > 0 else 1.0, dtype=torch.float64)


class CPLLinear(DenseOperator, ConvexPotentialLayer):
    """Convex potential layer, (B, features) -> (B, features); weight (hidden_features, features).

    Args:
        features: width of input and output.
        hidden_features: number of rows of K; few rows keep very deep networks from contracting.
        activation: elementwise, slopes in [0, 1].

    Source: Meunier et al., ICML 2022; certified step as in lipschitz-layers 1.4.
    """

    def __init__(self, features: int, hidden_features: int, activation: str = "relu"):
        super().__init__((hidden_features, features), activation)
        self.register_buffer("power_iteration_vector", torch.ones(features))
        self.reset_parameters()

    def estimate_squared_norm(self, num_iterations: int) -> Tensor:
        weight = at_least_float32(self.weight)
        if min(weight.shape) <= SMALL_GRAM:
            gram = weight @ weight.mT if weight.shape[0] <= weight.shape[1] else weight.mT @ weight
            return torch.linalg.eigvalsh(gram)[-1]
        sigma, vector = spectral_norm_estimate(weight, self.power_iteration_vector.to(weight.dtype), num_iterations)
        self.remember(vector)
        return sigma.square()

    def extra_repr(self) -> str:
        return f"features={self.weight.shape[1]}, hidden_features={self.weight.shape[0]}, activation={self.activation}"


class CPLConv2d(ConvOperator, ConvexPotentialLayer):
    """Convex potential layer, (B, channels, H, W) -> (B, channels, H, W); kernel (hidden_channels, channels, k, k).

    Args:
        channels: channels of input and output.
        hidden_channels: channels of K x.
        image_size: height and width, which the certified step belongs to.
        kernel_size: odd.
        padding_mode: "zeros" or "circular".
        activation: elementwise, slopes in [0, 1].
    """

    def __init__(
        self,
        channels: int,
        hidden_channels: int,
        image_size: int | tuple[int, int],
        kernel_size: int = 3,
        padding_mode: str = "zeros",
        activation: str = "relu",
    ):
        super().__init__((hidden_channels, channels, kernel_size, kernel_size), activation)
        self.set_geometry(kernel_size, image_size, padding_mode)
        self.register_buffer("power_iteration_vector", torch.ones(channels, *self.image_size))
        self.reset_parameters()

    def estimate_squared_norm(self, num_iterations: int) -> Tensor:
        weight = at_least_float32(self.weight)
        sigma, vector = conv_spectral_norm_estimate(
            weight,
            self.power_iteration_vector.to(weight.dtype),
            padding_mode=self.padding_mode,
            padding=self.padding,
            num_iterations=num_iterations,
        )
        self.remember(vector)
        return sigma.square()

    def extra_repr(self) -> str:
        hidden, channels, side, _ = self.weight.shape
        return f"{channels}, hidden_channels={hidden}, kernel_size={side}, {self.describe_geometry()}"


class SDPLipschitzLayer(ResidualLayer):
    """T_i = (sum_j |(K K^T)^m|_ij q_j / q_i)^(1/m), m = 2^(num_iterations - 1), with q = exp(log_q) learned.

    One iteration is the published SLL; more give SLL with spectral rescaling (gram-iteration section 4). The bound
    holds for every padding of zeros or torus and every image size, whatever the parameters.
    """

    proof = "certified ||T^-1/2 K||, then max(1, 2 lambda - 1)"
    num_iterations: int
    log_q: nn.Parameter

    def reset_parameters(self) -> None:
        self.initialise(nn.init.xavier_normal_)
        nn.init.normal_(self.log_q)
        self._stale = not self.weight.is_meta

    def rescaling_of(self, weight: Tensor) -> Tensor:
        q = self.log_q.to(weight.dtype).exp()
        return rescaling_factors(weight, self.num_iterations, q=q).square()

    def training_rescaling(self) -> Tensor:
        return self.rescaling_of(at_least_float32(self.weight))

    def certified_rescaling(self) -> Tensor:
        return self.rescaling_of(self.weight.double())


class SLLLinear(DenseOperator, SDPLipschitzLayer):
    """SDP-based Lipschitz layer, (B, features) -> (B, features); weight (hidden_features, features), q
    (hidden_features,).

    Source: Araujo et al., ICLR 2023, corrected release (q = exp of the parameter).
    """

    def __init__(self, features: int, hidden_features: int, activation: str = "relu", num_iterations: int = 1):
        super().__init__((hidden_features, features), activation)
        self.num_iterations = num_iterations
        self.log_q = nn.Parameter(torch.empty(hidden_features))
        self.reset_parameters()

    def extra_repr(self) -> str:
        return f"features={self.weight.shape[1]}, hidden_features={self.weight.shape[0]}, activation={self.activation}"


class SLLConv2d(ConvOperator, SDPLipschitzLayer):
    """SDP-based Lipschitz layer, (B, channels, H, W) -> (B, channels, H, W); kernel (hidden_channels, channels, k, k).

    Arguments as in `CPLConv2d`; `num_iterations` as in `SDPLipschitzLayer`. q has shape (hidden_channels,) and acts on
    the summed axis of |K K^T|, so it does not cancel (gram-iteration section 4).
    """

    def __init__(
        self,
        channels: int,
        hidden_channels: int,
        image_size: int | tuple[int, int],
        kernel_size: int = 3,
        padding_mode: str = "zeros",
        activation: str = "relu",
        num_iterations: int = 1,
    ):
        super().__init__((hidden_channels, channels, kernel_size, kernel_size), activation)
        self.set_geometry(kernel_size, image_size, padding_mode)
        self.num_iterations = num_iterations
        self.log_q = nn.Parameter(torch.empty(hidden_channels))
        self.reset_parameters()

    def extra_repr(self) -> str:
        hidden, channels, side, _ = self.weight.shape
        return f"{channels}, hidden_channels={hidden}, kernel_size={side}, {self.describe_geometry()}"
