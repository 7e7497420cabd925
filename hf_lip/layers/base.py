# SPDX-License-Identifier: Apache-2.0
"""What every layer of the package promises: a certified Lipschitz bound and a bound on its own float64 rounding.

A layer is a real function fixed by the numbers it stores. `lipschitz_bound` bounds the l2 Lipschitz constant of that
function; `propagate` bounds how far a float64 evaluation of it can be from the exact value, so that a radius can pay
for rounding too.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..ops.certified import round_up


# unit roundoff of float64; every certificate of the package is evaluated in float64
UNIT_ROUNDOFF = 2.0**-53
# relative inflation of a stored rescaling: dominates the rounding of the float64 computation that made it
RESCALING_MARGIN = 2.0**-20


def gamma(num_operations: int) -> float:
    """Relative error bound of `num_operations` successive float64 operations, n u / (1 - n u) (Higham, section
    3.1)."""
    return num_operations * UNIT_ROUNDOFF / (1.0 - num_operations * UNIT_ROUNDOFF)


def product_up(*factors: float) -> float:
    """Product of non-negative floats, rounded up at every step."""
    product = 1.0
    for factor in factors:
        product = math.nextafter(product * factor, math.inf) if factor != 1.0 else product
    return product


class LipschitzModule(nn.Module):
    """A module with a certified l2 Lipschitz bound. Subclasses implement what follows; there is no default bound."""

    #: how the bound is proved, one line, printed in certificates
    proof: str = ""

    def lipschitz_bound(self) -> float:
        """Upper bound of the l2 Lipschitz constant of the evaluation-mode function, for the numbers as stored."""
        raise TypeError(f"{type(self).__name__} has no certified Lipschitz bound.")

    def propagate(self, norm: float, error: float, bound: float) -> tuple[float, float]:
        """Float64 error analysis of one layer.

        Args:
            norm: bound on the l2 norm of the exact input.
            error: bound on the l2 distance between the exact input and the one computed in float64.
            bound: the layer's `lipschitz_bound()`.

        Returns:
            The same two bounds for the output.
        """
        raise TypeError(f"{type(self).__name__} has no float64 error bound.")


class ExactModule(LipschitzModule):
    """A 1-Lipschitz map that fixes 0 and makes no rounding error: selections, permutations, zero padding, max and
    min."""

    def lipschitz_bound(self) -> float:
        return 1.0

    def propagate(self, norm: float, error: float, bound: float) -> tuple[float, float]:
        return norm, error


@contextmanager
def whole_parameters(module: nn.Module) -> Iterator[None]:
    """Inside, the module's own parameters are whole also where they are sharded (FSDP). All processes must enter."""
    sharded = {name: tensor for name, tensor in module._parameters.items() if hasattr(tensor, "full_tensor")}
    for name, tensor in sharded.items():
        module._parameters[name] = nn.Parameter(tensor.full_tensor(), requires_grad=False)  # type: ignore[union-attr]
    try:
        yield
    finally:
        module._parameters.update(sharded)


class RescaledModule(LipschitzModule):
    """A layer whose plain `weight` is divided by a positive `rescaling` so that the result is 1-Lipschitz.

    In training mode the rescaling is recomputed at every forward, differentiably and by the fast method of the layer
    (`training_rescaling`). In evaluation mode the stored buffer `rescaling` is used as it is: it was written by
    `freeze` from certified float64 bounds, it travels with the checkpoint, and `lipschitz_bound` checks it afresh
    against the weights as stored. A layer that has been in training mode is frozen again on its way to evaluation
    mode.
    """

    weight: nn.Parameter
    rescaling: Tensor

    def __init__(self) -> None:
        super().__init__()
        # true when the stored rescaling may not belong to the weights
        self._stale = False

    def training_rescaling(self) -> Tensor:
        """Differentiable rescaling from the current weights, in at least float32."""
        raise TypeError(f"{type(self).__name__} does not say how it is rescaled.")

    def certified_rescaling(self) -> Tensor:
        """Rescaling that is proved to make the layer 1-Lipschitz, computed in float64, same shape as `rescaling`."""
        raise TypeError(f"{type(self).__name__} does not say how it is rescaled.")

    @torch.no_grad()
    def freeze(self) -> None:
        """Write the certified rescaling of the current weights into the buffer that evaluation uses.

        Raises:
            ValueError: if the weights are not finite.
        """
        with whole_parameters(self):
            if not torch.isfinite(self.weight).all():
                raise ValueError(
                    f"The weight of {type(self).__name__} holds NaN or infinite values: training has diverged or the "
                    "checkpoint is damaged. Load an earlier checkpoint or train again with a smaller learning rate."
                )
            value = self.certified_rescaling() * (1.0 + RESCALING_MARGIN)
        stored = round_up(value, self.rescaling.dtype)
        if not torch.isfinite(stored).all():
            raise ValueError(
                f"The weight of {type(self).__name__} is so large that its rescaling overflows "
                f"{self.rescaling.dtype}: use bfloat16 or float32."
            )
        self.rescaling.copy_(stored.to(self.rescaling.device))
        # weights move on while training goes on
        self._stale = self.training

    def freeze_if_stale(self) -> None:
        """Freeze unless the stored rescaling was loaded, or computed, for the current weights."""
        if self._stale:
            self.freeze()

    def train(self, mode: bool = True) -> "RescaledModule":
        super().train(mode)
        if mode:
            self._stale = True
        else:
            self.freeze_if_stale()
        return self

    def current_rescaling(self) -> Tensor:
        """The rescaling that the forward pass of the current mode divides by."""
        if not self.training:
            return self.rescaling
        # low precision would under-estimate the norms, so autocast stops here
        with torch.autocast(self.weight.device.type, enabled=False):
            return self.training_rescaling()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if f"{prefix}rescaling" in state_dict and not self.training:
            self._stale = False
