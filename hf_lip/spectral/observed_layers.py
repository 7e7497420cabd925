# SPDX-License-Identifier: Apache-2.0
"""The linear and convolutional layers of a model, the image sizes that reach them, the batch norm after them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parallel import DistributedDataParallel
from transformers.pytorch_utils import Conv1D

from ..ops.geometry import Size, as_tuple


LayerSelection = str | Sequence[str] | Callable[[str, nn.Module], bool] | None

__all__ = ["Layer", "LayerSelection", "find_layers"]


@dataclass
class Layer:
    """One layer, read from its module whenever it is asked for.

    Attributes:
        arguments: of `hf_lip.ops.geometry.torus_problem`, None for a matrix.
        input_size: image size that enters the convolution (that leaves a transposed one), None for every size.
        norm: batch norm to be folded in.
    """

    name: str
    module: Any
    arguments: dict[str, Any] | None
    input_size: tuple[int, ...] | None = None
    norm: Any = None

    def weight(self) -> Tensor:
        """Float32 matrix (out, in) or kernel (out, in / groups, *k), the batch norm folded in, differentiable."""
        weight = self.module.weight.float()
        if self.norm is not None:
            scale = (self.norm.running_var.float() + self.norm.eps).rsqrt()
            if self.norm.weight is not None:
                scale = scale * self.norm.weight.float()
            weight = self._scaled(weight, scale)
        return weight.mT if isinstance(self.module, Conv1D) else weight

    def _scaled(self, weight: Tensor, scale: Tensor) -> Tensor:
        ones = [1] * (weight.ndim - 2)
        if isinstance(self.module, Conv1D):
            return weight * scale
        if isinstance(self.module, _ConvTransposeNd):
            # (in, out / groups, *k): the output channel is the group's, then the column
            groups = self.module.groups
            parts = weight.view(groups, -1, *weight.shape[1:]) * scale.view(groups, 1, -1, *ones)
            return parts.view(weight.shape)
        return weight * scale.view(-1, 1, *ones)


def find_layers(
    model: nn.Module,
    input_size: Size | None,
    example_inputs: Tensor | Mapping[str, Any] | None,
    selection: LayerSelection,
    batch_norm: bool,
) -> list[Layer]:
    """The selected layers, in the order of the model.

    Raises:
        ValueError: no layer is selected, or both sizes and inputs are given.
    """
    model = _without_wrappers(model)
    layers = [
        Layer(name, module, _conv_arguments(module))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D, _ConvNd)) and _selected(selection, name, module)
    ]
    if not layers:
        raise ValueError(
            "`layers` selects none of the linear and convolutional layers of the model: "
            f"{[name for name, module in model.named_modules() if isinstance(module, (nn.Linear, _ConvNd))][:5]} ..."
        )
    if input_size is not None and example_inputs is not None:
        raise ValueError("`input_size` and `example_inputs` exclude each other: give one.")
    if example_inputs is None:
        if input_size is None:
            input_size = getattr(getattr(model, "config", None), "image_size", None)
        if input_size is not None:
            example_inputs = _zero_image(model, input_size)
    if example_inputs is not None:
        _observe(model, example_inputs, layers, batch_norm)
    elif batch_norm:
        raise ValueError("`batch_norm` is found by a forward pass: give `input_size` or `example_inputs`.")
    return layers


def _without_wrappers(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, (DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _selected(selection: LayerSelection, name: str, module: nn.Module) -> bool:
    if selection is None:
        return True
    if callable(selection):
        return bool(selection(name, module))
    patterns = [selection] if isinstance(selection, str) else selection
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _conv_arguments(module: nn.Module) -> dict[str, Any] | None:
    if not isinstance(module, _ConvNd):
        return None
    dimensions = len(module.kernel_size)
    padding: Any = module.padding
    if padding == "valid":
        padding = 0
    elif padding == "same":
        spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size)]
        padding = tuple((span // 2, span - span // 2) for span in spans)
    else:
        padding = as_tuple(tuple(padding), dimensions, "padding", 0)
    return {
        "padding_mode": module.padding_mode,
        "padding": padding,
        "stride": tuple(module.stride),
        "dilation": tuple(module.dilation),
        "groups": module.groups,
    }


def _zero_image(model: nn.Module, input_size: Size) -> Tensor:
    first = next((module for module in model.modules() if isinstance(module, _ConvNd)), None)
    if first is None:
        raise ValueError("`input_size` is for convolutional networks: this model has no convolution, leave it out.")
    dimensions = len(first.kernel_size)
    sizes = as_tuple(input_size if isinstance(input_size, int) else tuple(input_size), dimensions, "input_size", 1)
    return torch.zeros((1, first.in_channels, *sizes), dtype=first.weight.dtype, device=first.weight.device)


@torch.no_grad()
def _observe(model: nn.Module, inputs: Tensor | Mapping[str, Any], layers: list[Layer], batch_norm: bool) -> None:
    """One forward pass in evaluation mode that fills in image sizes and batch norms."""
    by_module = {id(layer.module): layer for layer in layers}
    outputs: list[tuple[Tensor, Layer]] = []

    def conv_hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        layer = by_module[id(module)]
        outputs.append((output, layer))
        if layer.arguments is not None:
            image = output if isinstance(module, _ConvTransposeNd) else arguments[0]
            seen = tuple(image.shape[-len(layer.arguments["stride"]) :])
            sizes.setdefault(layer.name, set()).add(seen)

    def norm_hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        for output, layer in outputs:
            if output is arguments[0]:
                layer.norm = module

    sizes: dict[str, set[tuple[int, ...]]] = {}
    handles = [layer.module.register_forward_hook(conv_hook) for layer in layers]
    if batch_norm:
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        handles += [module.register_forward_pre_hook(norm_hook) for module in norms if module.running_var is not None]
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    for layer in layers:
        seen = sizes.get(layer.name, set())
        if len(seen) == 1:
            layer.input_size = next(iter(seen))
        elif seen and layer.arguments is not None and layer.arguments["padding_mode"] == "zeros":
            # with zero padding the operator of a smaller image is a part of that of a larger one
            layer.input_size = tuple(max(axis) for axis in zip(*seen))
