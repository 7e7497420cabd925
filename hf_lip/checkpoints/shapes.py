# SPDX-License-Identifier: Apache-2.0
"""Shapes of what enters and leaves the modules of a network."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel


class UnknownCompositionError(ValueError):
    """A module for which it is not known what its forward pass does; the text names it."""


class Shapes:
    """Shapes of what enters and leaves each module, found by one forward pass on the meta device."""

    def __init__(self) -> None:
        self.inputs: dict[nn.Module, set[tuple[int, ...]]] = defaultdict(set)
        self.outputs: dict[nn.Module, set[tuple[int, ...]]] = defaultdict(set)

    @classmethod
    def of(cls, model: nn.Module, shape: tuple[int, ...]) -> "Shapes":
        """Run the model on one input of this shape.

        Raises:
            ValueError: it does not run on it.
        """
        shapes = cls()

        def remember(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if inputs and isinstance(inputs[0], Tensor):
                shapes.inputs[module].add(tuple(inputs[0].shape[1:]))
            if isinstance(output, Tensor):
                shapes.outputs[module].add(tuple(output.shape[1:]))

        tensors = {name: tensor.to("meta") for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        dtype = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)
        inputs = torch.empty((1, *shape), device="meta", dtype=dtype)
        arguments: tuple[Any, ...] = () if isinstance(model, PreTrainedModel) else (inputs,)
        keywords = {} if arguments else {"pixel_values": inputs}
        hooks = [module.register_forward_hook(remember) for module in model.modules()]
        try:
            with torch.no_grad():
                functional_call(model, tensors, arguments, keywords)
        # whatever a network raises over an input that does not fit it
        except Exception as error:
            cause = " ".join(str(error).split())
            raise ValueError(
                f"`input_size`: the model does not run on an input of shape {shape} ({cause})."
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        return shapes

    def input_of(self, name: str, module: nn.Module) -> tuple[int, ...]:
        """Shape of a module's input without the batch.

        Raises:
            UnknownCompositionError: it was not run, or met inputs of several shapes.
        """
        return self._single(name, self.inputs[module])

    def output_of(self, name: str, module: nn.Module) -> tuple[int, ...]:
        """Shape of a module's output; errors as `input_of`."""
        return self._single(name, self.outputs[module])

    def _single(self, name: str, shapes: set[tuple[int, ...]]) -> tuple[int, ...]:
        if len(shapes) != 1:
            met = "is not run by the forward pass" if not shapes else f"meets several shapes ({sorted(shapes)})"
            raise UnknownCompositionError(f"{name} {met}: there is no global bound.")
        return next(iter(shapes))

    def spatial_input_of(self, name: str, module: Any) -> tuple[int, ...]:
        """Image size that enters a convolution."""
        return self.input_of(name, module)[-len(module.kernel_size) :]
