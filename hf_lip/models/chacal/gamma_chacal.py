# SPDX-License-Identifier: Apache-2.0
"""The discount of a chained layer: fixed, trained, or raised on a schedule."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ...ops.chain import check_gamma


# the largest float32 below 1, where tanh of a large parameter would be 1 itself
LARGEST = 1.0 - 2.0**-24
# a checkpoint without trained discounts may be loaded into a model that trains them: they start at its config's
MISSING_GAMMA = r"\.gamma\.weight$"


def spread_gamma(
    gamma: Any, layers: int, heads: int, diagonal: str, normalize: bool, name: str = "gamma"
) -> list[list[float]]:
    """One discount for each layer and head, from a number or from a list with a number or a list for each layer.

    Raises:
        ValueError: naming `name`, if the lengths do not fit or a discount is outside its range.
    """
    entries = list(gamma) if isinstance(gamma, (list, tuple)) else [gamma] * layers
    if len(entries) != layers:
        raise ValueError(f"`{name}` needs one entry for each of {layers} layers, got {len(entries)}.")
    spread = []
    for index, entry in enumerate(entries):
        values = list(entry) if isinstance(entry, (list, tuple)) else [entry] * heads
        if len(values) != heads:
            raise ValueError(
                f"`{name}` of layer {index} needs one entry for each of {heads} heads, got {len(values)}."
            )
        for value in values:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"`{name}` must hold numbers, got {value!r} for layer {index}.")
            check_gamma(value, diagonal, normalize, name)
        spread.append([float(value) for value in values])
    return spread


def check_learnable(values: list[float], name: str = "gamma") -> None:
    """Raise ValueError unless training can start at these discounts: -1 and 1 are the ends of the tanh."""
    if max(map(abs, values)) > LARGEST:
        raise ValueError(f"`{name}` must start inside (-1, 1) where `{name}_learnable` is set, got {values}.")


class NotNegative(torch.autograd.Function):
    """max(x, 0). The gradient that would raise x passes at and below 0 too, so that what starts there can leave."""

    @staticmethod
    def forward(values: Tensor) -> Tensor:
        return values.clamp(min=0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (values,) = ctx.saved_tensors
        return torch.where((values > 0) | (grad < 0), grad, torch.zeros_like(grad))


class ChacalGamma(nn.Module):
    """Discounts (H,) of one layer.

    Fixed ones are plain numbers: a cast of the model to bfloat16 does not round them, and they are in no checkpoint
    but in its config. Trained ones are tanh of a parameter, with `keep` cut off below 0, and so always in range; at 0,
    where a converted softmax model starts, their gradient is that of the discount itself. A sigmoid would reach 0
    only at minus infinity, where nothing is learnt.
    """

    def __init__(self, values: list[float], learnable: bool, diagonal: str):
        super().__init__()
        if learnable:
            check_learnable(values)  # the config did too, unless the field was set afterwards
        self.values = list(values)
        self.diagonal = diagonal
        # the fixed values on the device last asked for: no buffer, which would be cast and moved with the model
        self.kept: tuple[Tensor, Tensor] | None = None
        self.weight: nn.Parameter | None
        self.register_parameter("weight", nn.Parameter(torch.empty(len(values))) if learnable else None)

    def raw(self) -> Tensor:
        """The parameter that gives `values`."""
        return torch.atanh(torch.tensor(self.values, dtype=torch.float64))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.weight is not None:
            init.copy_(self.weight, self.raw())

    @torch.no_grad()
    def set(self, values: list[float]) -> None:
        """Set the discounts, also of a trained layer."""
        self.values, self.kept = list(values), None
        if self.weight is not None:
            self.weight.copy_(self.raw())

    def forward(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The discounts (H,) and 1 - gamma (H, 1, 1), float32."""
        if self.weight is None and not torch.compiler.is_compiling():
            if self.kept is None or self.kept[0].device != device:
                # kept by a model in inference mode, they serve its training too
                with torch.inference_mode(False):
                    self.kept = self.with_prefactor(torch.tensor(self.values, device=device))
            return self.kept
        if self.weight is None:
            return self.with_prefactor(torch.tensor(self.values, device=device))
        gamma = torch.tanh(self.weight.float()).clamp(-LARGEST, LARGEST)
        if self.diagonal == "keep":
            gamma = NotNegative.apply(gamma)
        return self.with_prefactor(gamma)

    @staticmethod
    def with_prefactor(gamma: Tensor) -> tuple[Tensor, Tensor]:
        return gamma, (1.0 - gamma)[:, None, None]

    def extra_repr(self) -> str:
        return f"heads={len(self.values)}, learnable={self.weight is not None}, diagonal={self.diagonal!r}"


class GammaSchedule:
    """Moves the discounts of a model from where they are to `gamma`, step by step, as a learning-rate schedule does.

    Conversion of a pre-trained softmax model starts at 0, where nothing has changed, and raises the discount in
    training (chacal section 5).

    Args:
        model: any model with `get_gamma` and `set_gamma`.
        gamma: the goal, as `config.gamma`, or `config.chain_gamma` of a converted model.
        num_steps: calls of `step` until it is reached, at least 1.
        shape: `linear`, or `cosine`, which starts and ends slowly.
    """

    def __init__(self, model: Any, gamma: Any, num_steps: int, shape: str = "linear"):
        if num_steps < 1:
            raise ValueError(f"`num_steps` must be at least 1, got {num_steps}.")
        if shape not in ("linear", "cosine"):
            raise ValueError(f"`shape` must be linear or cosine, got {shape!r}.")
        self.model, self.num_steps, self.shape = model, num_steps, shape
        self.start: list[list[float]] = model.get_gamma()
        self.end: list[list[float]] = model.config.spread_gamma(gamma)
        self.last_step = 0

    def step(self) -> None:
        """Move on by one step; past the end it stays at the goal."""
        self.last_step += 1
        part = min(self.last_step / self.num_steps, 1.0)
        if self.shape == "cosine":
            part = 0.5 - 0.5 * math.cos(math.pi * part)
        mixed = [
            [first + part * (last - first) if part < 1.0 else last for first, last in zip(*pair)]
            for pair in zip(self.start, self.end)
        ]
        self.model.set_gamma(mixed)

    def state_dict(self) -> dict[str, Any]:
        return {"last_step": self.last_step, "start": self.start, "end": self.end}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last_step, self.start, self.end = state["last_step"], state["start"], state["end"]


__all__ = ["ChacalGamma", "GammaSchedule", "check_learnable", "spread_gamma"]
