# SPDX-License-Identifier: Apache-2.0
"""The copy of a model that is evaluated and saved: its weights as they are, or their moving average."""

import copy
from collections.abc import Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn


Model = TypeVar("Model", bound=nn.Module)

__all__ = ["EvaluationCopy"]


class EvaluationCopy(Generic[Model]):
    """A second model for evaluation, so that evaluating never touches the one being trained.

    Take it before the model is wrapped for distributed or mixed-precision training: the copy has no wrapper, hence no
    autocast. With a decay it holds the exponential moving average of the weights,
    average <- d * average + (1 - d) * weights with d = min(decay, (1 + t) / (10 + t)) at step t, so that the initial
    weights are forgotten early. A model of this package with averaged weights is certified like any other: its
    rescalings are computed from the averages.

    Args:
        model: the model before training.
        decay: in [0, 1); None for no average.

    Raises:
        ValueError: `decay` outside [0, 1).
    """

    def __init__(self, model: Model, decay: float | None = None) -> None:
        if decay is not None and not 0.0 <= decay < 1.0:
            raise ValueError(f"`decay` must lie in [0, 1), got {decay}.")
        self.model = copy.deepcopy(model)
        self.decay = decay
        self._averages = [p.detach().clone() for p in model.parameters()] if decay is not None else None

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take the weights after optimiser step `step` (from 0) into the average."""
        if self.decay is not None and self._averages is not None:
            share = 1.0 - min(self.decay, (1.0 + step) / (10.0 + step))
            torch._foreach_lerp_(self._averages, [p.detach() for p in model.parameters()], share)

    @torch.no_grad()
    def refresh(self, model: nn.Module) -> Model:
        """The copy in evaluation mode, with the current weights of `model` or their average."""
        # from training mode, so that every layer knows that its rescaling is out of date
        self.model.train()
        self.model.load_state_dict(model.state_dict())
        if self._averages is not None:
            for parameter, average in zip(self.model.parameters(), self._averages):
                parameter.copy_(average)
        return self.model.eval()

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name; empty without a decay."""
        if self._averages is None:
            return {}
        return {name: average for (name, _), average in zip(self.model.named_parameters(), self._averages)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` gave.

        Raises:
            ValueError: names that differ from this model's.
        """
        own = self.state_dict()
        if set(own) != set(state):
            differing = sorted(set(own) ^ set(state))
            raise ValueError(f"The saved averages do not belong to this model: {differing[:5]} differ.")
        for name, average in own.items():
            average.copy_(state[name])
