# SPDX-License-Identifier: Apache-2.0
"""Classifier heads and the radius that a margin certifies.

A head is a linear map V of the features. Its certificate uses one constant per pair of classes, ||v_i - v_j||, which
is sharper than sqrt(2) times any bound on ||V|| and the only right one for unit rows (lipschitz-layers section 5.1).
"""

import math

import torch
from torch import Tensor, nn

from ..ops.certified import certified_row_distances, certified_row_norms, certified_spectral_norm
from ..ops.gram import gram_iteration
from .base import UNIT_ROUNDOFF, LipschitzModule, RescaledModule, gamma
from .operators import at_least_float32, fan_in_uniform_


class ClassifierHead(LipschitzModule):
    """Features (B, features) -> logits (B, num_labels), linear."""

    num_labels: int

    def stored_weight(self) -> Tensor:
        """The evaluation-mode effective weight in float64, (num_labels, features)."""
        raise TypeError(f"{type(self).__name__} has no weight.")

    def pair_distances(self) -> Tensor:
        """Certified upper bounds of ||v_i - v_j||, float64, (num_labels, num_labels)."""
        raise TypeError(f"{type(self).__name__} has no pair distances.")

    def logit_error(self, norm: float, error: float) -> float:
        """Bound on |float64 logit - exact logit| for features of norm <= `norm`, known up to `error` in l2."""
        raise TypeError(f"{type(self).__name__} has no float64 error bound.")


class RescaledHead(ClassifierHead, RescaledModule):
    """A head with a weight divided by `rescaling`: (num_labels,) or (1,)."""

    def __init__(self, features: int, num_labels: int, num_factors: int, bias: bool = True):
        super().__init__()
        self.num_labels = num_labels
        self.weight = nn.Parameter(torch.empty(num_labels, features))
        self.bias = nn.Parameter(torch.empty(num_labels)) if bias else None
        self.register_buffer("rescaling", torch.ones(num_factors))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_normal_(self.weight)
        if self.bias is not None:
            fan_in_uniform_(self.bias, self.weight)
        nn.init.ones_(self.rescaling)
        self._stale = not self.weight.is_meta

    def effective_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The rows that are applied, in `dtype` (default: the weight's, at least float32)."""
        weight = at_least_float32(self.weight) if dtype is None else self.weight.to(dtype)
        return weight / self.current_rescaling().to(weight.dtype).unsqueeze(1)

    def forward(self, features: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(features.dtype)
        return nn.functional.linear(features, self.effective_weight(features.dtype), bias)

    def stored_weight(self) -> Tensor:
        return self.weight.double() / self.rescaling.double().unsqueeze(1)

    @torch.no_grad()
    def lipschitz_bound(self) -> float:
        self.freeze_if_stale()
        if not (self.rescaling > 0).all():
            raise ValueError(f"`rescaling` of {type(self).__name__} must be positive: the checkpoint is damaged.")
        weight = self.stored_weight()
        return certified_spectral_norm(weight) + 4 * UNIT_ROUNDOFF * float(weight.norm())

    @torch.no_grad()
    def pair_distances(self) -> Tensor:
        self.freeze_if_stale()
        weight = self.stored_weight()
        # the division was rounded once per entry
        slack = 4 * UNIT_ROUNDOFF * certified_row_norms(weight).max()
        return certified_row_distances(weight) + slack

    @torch.no_grad()
    def logit_error(self, norm: float, error: float) -> float:
        weight = self.stored_weight()
        row = float(certified_row_norms(weight).max())
        bias = 0.0 if self.bias is None else float(self.bias.double().abs().max())
        return row * error + gamma(weight.shape[1] + 8) * (row * (norm + error) + bias)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, num_labels={self.num_labels}"


class NormalizedRowsHead(RescaledHead):
    """Rows of norm 1 ("last-layer normalisation", Singla et al., ICLR 2022). As a matrix its norm lies in [1,
    sqrt(K)]."""

    proof = "certified norm of the normalised rows; pairs by ||v_i - v_j||"

    def __init__(self, features: int, num_labels: int, bias: bool = True):
        super().__init__(features, num_labels, num_labels, bias)

    def training_rescaling(self) -> Tensor:
        norms = torch.linalg.vector_norm(at_least_float32(self.weight), dim=1)
        return torch.where(norms > 0, norms, torch.ones_like(norms))

    def certified_rescaling(self) -> Tensor:
        norms = certified_row_norms(self.weight)
        return torch.where(norms > 0, norms, torch.ones_like(norms))


class SpectralNormalizedHead(RescaledHead):
    """The whole last layer divided by a bound of its norm, so that pixels -> logits is 1-Lipschitz as a vector map."""

    proof = "certified norm of the divided weight; pairs by ||v_i - v_j||"

    def __init__(self, features: int, num_labels: int, bias: bool = True):
        super().__init__(features, num_labels, 1, bias)

    def training_rescaling(self) -> Tensor:
        norm = gram_iteration(at_least_float32(self.weight), num_iterations=6).reshape(1)
        return torch.where(norm > 0, norm, torch.ones_like(norm))

    def certified_rescaling(self) -> Tensor:
        norm = certified_spectral_norm(self.weight)
        return torch.full((1,), norm if norm > 0 else 1.0, dtype=torch.float64)


class TruncationHead(ClassifierHead):
    """The first `num_labels` features are the logits: a projection, no parameters; every pair is sqrt(2) apart."""

    proof = "drops coordinates; pairs sqrt(2) apart"

    def __init__(self, features: int, num_labels: int):
        super().__init__()
        if num_labels > features:
            raise ValueError(
                f"A truncation head needs at least `num_labels`={num_labels} features, got {features}: use head_type "
                "'lln' or a larger `dense_size`."
            )
        self.features = features
        self.num_labels = num_labels

    def effective_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Rows of the identity, (num_labels, features)."""
        return torch.eye(self.num_labels, self.features, dtype=dtype or torch.float32)

    def forward(self, features: Tensor) -> Tensor:
        return features[:, : self.num_labels]

    def stored_weight(self) -> Tensor:
        return self.effective_weight(torch.float64)

    def lipschitz_bound(self) -> float:
        return 1.0

    def pair_distances(self) -> Tensor:
        distances = torch.full(
            (self.num_labels, self.num_labels), math.nextafter(math.sqrt(2.0), 2.0), dtype=torch.float64
        )
        return distances.fill_diagonal_(0.0)

    def logit_error(self, norm: float, error: float) -> float:
        return error

    def extra_repr(self) -> str:
        return f"{self.features}, num_labels={self.num_labels}"


HEADS = {"lln": NormalizedRowsHead, "spectral": SpectralNormalizedHead, "truncation": TruncationHead}


def certified_radius(
    logits: Tensor,
    pair_distances: Tensor,
    feature_constant: float,
    evaluation_error: float,
    output_roundoff: float = UNIT_ROUNDOFF,
    head_norm: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Radius inside which no l2 perturbation changes the arg max: min over all j of margin_ij / (F ||v_i - v_j||).

    The minimum runs over every other class: the nearest boundary need not be that of the second largest logit.

    Args:
        logits: (B, num_labels), float64, as evaluated.
        pair_distances: (num_labels, num_labels), certified upper bounds of ||v_i - v_j||.
        feature_constant: certified Lipschitz constant F from pixels in [0, 1] to features.
        evaluation_error: bound on |evaluated logit - exact logit|, taken off every margin four times: two logits at
            this image and two at the changed one.
        output_roundoff: unit roundoff of the dtype the logits are handed out in, so that their arg max is the same.
        head_norm: bound on every ||v_i||; logits at the edge of the ball are larger by F ||v_i|| times the radius, and
            so is their rounding.

    Returns:
        Predicted classes (B,) and radii (B,) in pixel units, 0 where the margin does not exceed the rounding error.
        Logits that are not finite give radius 0.

    Raises:
        ValueError: if the logits are not float64.
    """
    if logits.dtype != torch.float64:
        raise ValueError(
            f"`logits` must be float64 to be certified, got {logits.dtype}: evaluate the model in float64."
        )
    prediction = logits.argmax(dim=1)
    margin = logits.gather(1, prediction[:, None]) - logits
    # the difference is rounded once, and both logits once more when they are handed out
    rounding = (4.0 * output_roundoff + 4.0 * UNIT_ROUNDOFF) * logits.abs().amax(dim=1, keepdim=True)
    margin = margin - 4.0 * evaluation_error - rounding
    # growth of the margin's loss per unit of distance; the floor keeps a vanishing constant from rounding to zero
    constants = feature_constant * (pair_distances.to(logits.device)[prediction] + 4.0 * output_roundoff * head_norm)
    radius = margin / constants.clamp_min(1e-300) * (1.0 - 8 * UNIT_ROUNDOFF)
    own = torch.nn.functional.one_hot(prediction, logits.shape[1]).bool()
    radius = radius.masked_fill(own, torch.inf).amin(dim=1)
    certified = torch.isfinite(logits).all(dim=1) & (radius > 0)
    return prediction, torch.where(certified, radius, torch.zeros_like(radius))
