# SPDX-License-Identifier: Apache-2.0
"""The discount of a chained layer: fixed, trained, or raised on a schedule."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init


class ChacalGamma(nn.Module):
    """Discounts (H,) of one layer.

    Fixed ones are plain numbers: a cast of the model to bfloat16 does not round them, and they are in no checkpoint
    but in its config. Trained ones are tanh (`strict`) or sigmoid (`keep`) of a parameter, and so always in range.
    """

    def __init__(self, values: list[float], learnable: bool, diagonal: str):
        super().__init__()
        self.values = list(values)
        self.diagonal = diagonal
        # the fixed values on the device last asked for: no buffer, which would be cast and moved with the model
        self.kept: tuple[Tensor, Tensor] | None = None
        self.weight: nn.Parameter | None
        self.register_parameter("weight", nn.Parameter(torch.empty(len(values))) if learnable else None)

    def raw(self) -> Tensor:
        """The parameter that gives `values`."""
        values = torch.tensor(self.values, dtype=torch.float64)
        return torch.logit(values) if self.diagonal == "keep" else torch.atanh(values)

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
                self.kept = self.with_prefactor(torch.tensor(self.values, device=device))
            return self.kept
        if self.weight is None:
            return self.with_prefactor(torch.tensor(self.values, device=device))
        raw = self.weight.float()
        return self.with_prefactor(torch.sigmoid(raw) if self.diagonal == "keep" else torch.tanh(raw))

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
        gamma: the goal, as `config.gamma`.
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


__all__ = ["ChacalGamma", "GammaSchedule"]
