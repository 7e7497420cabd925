# SPDX-License-Identifier: Apache-2.0
"""A penalty on the spectral norms of the layers of any network, for training loops."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.conv import conv_frequency_blocks
from ..ops.geometry import Size, torus_problem
from ..ops.gram import gram_iteration
from .observed_layers import Layer, LayerSelection, find_layers


MODES = ("hinge", "mean", "log")
# on axes with more frequencies than this a coarser grid and its cosine take the place of the torus
LARGEST_GRID = 40
# a layer whose estimate is below this share of the target is taken to cost nothing
NEAR = 0.7
FIRST_STEPS = 8
# entries of the blocks that are held at once, unless one layer alone has more: 256 MB in complex64
LARGEST_STACK = 2**25

__all__ = ["LipschitzRegularizer"]


@dataclass
class _Stack:
    """Layers whose Fourier blocks have one shape, as one batch.

    Attributes:
        grid: frequencies on each axis.
        factors: of each layer, from a block's norm to the layer's.
        vector: (L, G, F, n) unit vectors of the power iteration, one a block; None before the first call.
    """

    layers: list[Layer]
    grid: tuple[int, ...]
    factors: list[float] = field(default_factory=list)
    vector: Tensor | None = None

    def kernels(self, chosen: Iterable[int]) -> Tensor:
        """(L, G, out, in, taps): the kernels of the chosen layers, differentiable."""
        return torch.stack([_kernel(self.layers[index])[0].flatten(3) for index in chosen])

    @torch.no_grad()
    def blocks(self) -> Tensor:
        """(L, G, F, out, in): every Fourier block of every layer."""
        kernels = torch.stack([_kernel(layer)[0] for layer in self.layers])
        if math.prod(self.grid) == 1:
            return kernels.flatten(4).sum(dim=-1)[:, :, None]
        count, groups, rows, columns = kernels.shape[:4]
        flat = conv_frequency_blocks(kernels.reshape(-1, columns, *kernels.shape[4:]), self.grid)
        return flat.view(len(flat), count, groups, rows, columns).movedim(0, 2)

    def chosen_blocks(self, chosen: list[int], groups: Tensor, frequencies: Tensor) -> Tensor:
        """(L, out, in): one Fourier block of each chosen layer, differentiable, its memory that of the block."""
        kernels = self.kernels(chosen)
        kernels = kernels[torch.arange(len(chosen), device=kernels.device), groups]
        if math.prod(self.grid) == 1:
            return kernels.sum(dim=-1)
        taps = _kernel(self.layers[0])[0].shape[3:]
        half = (*self.grid[:-1], self.grid[-1] // 2 + 1)
        angles = kernels.new_zeros((len(chosen), *taps))
        for axis, index in enumerate(torch.unravel_index(frequencies, half)):
            place = torch.arange(taps[axis], device=kernels.device)
            angle = 2.0 * math.pi / self.grid[axis] * ((index[:, None] * place) % self.grid[axis])
            shape = [1] * len(taps)
            shape[axis] = taps[axis]
            angles = angles + angle.to(kernels.dtype).view(-1, *shape)
        phases = torch.polar(torch.ones_like(angles), -angles).flatten(1)
        return (kernels * phases[:, None, None, :]).sum(dim=-1)


def _kernel(layer: Layer) -> tuple[Tensor, tuple[int, ...] | None, int]:
    """Kernel (G, out, in, *taps) of a stride-1 circular convolution, torus and copies, as in `torus_problem`."""
    weight = layer.weight()
    if layer.arguments is None:
        return weight[None, ..., None], (1,), 1
    problem = torus_problem(weight, layer.input_size, **layer.arguments)
    return problem.kernel, problem.grid, problem.copies


def _grid(taps: tuple[int, ...], torus: tuple[int, ...] | None) -> tuple[tuple[int, ...], float]:
    """Frequencies to look at, and the factor that makes their maximum a bound for all of them.

    A trigonometric polynomial with t taps stays above max * cos((t - 1) pi / (2 n)) at some point of an n-point grid
    (Riesz; Duffin and Schaeffer), one axis after the other.
    """
    grid, factor = [], 1.0
    for axis, count in enumerate(taps):
        coarse = 1 if count == 1 else max(LARGEST_GRID, 4 * count)
        if torus is not None and torus[axis] <= coarse:
            grid.append(torus[axis])
        else:
            grid.append(coarse)
            factor /= math.cos((count - 1) * math.pi / (2 * coarse))
    return tuple(grid), factor


class LipschitzRegularizer:
    """Differentiable penalty on the spectral norms of the linear and convolutional layers of a network.

    ```python
    regularizer = LipschitzRegularizer(model, input_size=32)
    loss = criterion(model(images), labels) + 0.1 * regularizer()
    ```

    With b the norm of a layer, found by Gram iteration over its Fourier blocks (strides, groups, dilation and padding
    as they are), the penalty is

    - `hinge`: the sum over the layers of max(b - target, 0). Its gradient is that of Delattre et al. (ICML 2023,
      arXiv 2305.16173), who add b itself where it exceeds the target;
    - `log`: the sum of max(log(b / target), 0), for layers of very different norms;
    - `mean`: the mean of b over the layers, without a target.

    It is meant for training and proves nothing: values are computed in float32 without a margin for rounding, and a
    layer that a power iteration places well below the target is not looked at. For a proof use `hf_lip.spectral_norm`.

    Layers of equal shape are computed in one batch. The gradient goes through the one Fourier block that has the
    largest norm, so its memory depends neither on the image size nor on the number of iterations. Weights are read
    from the model at each call: it may be wrapped for distributed training, compiled and run under autocast. Nothing
    is stored in the model; `state_dict` holds what an exact resume needs.

    Args:
        model: the network; distributed and compiled wrappers are looked through.
        input_size: size of the images, int or one a dimension. The layers' own sizes are learned by one forward pass
            of a zero image in evaluation mode. By default the size in the model's config; without one, convolutions
            are bounded for every image size.
        example_inputs: in place of `input_size`, a tensor or a dict of keyword arguments for that pass.
        target: norm that costs nothing, > 0.
        mode: `hinge`, `mean` or `log`.
        num_iterations: Gram iterations; 6 are within some per cent of the norm.
        layers: which layers: a pattern such as `"*.conv?"`, several of them, or a predicate (name, module) -> bool.
            By default every Linear, Conv1d to 3d, ConvTranspose1d to 3d and transformers' Conv1D.
        every: compute at every k-th call only, times k; the calls between return 0.
        batch_norm: scale each layer by the batch norm that directly follows it, |weight| / sqrt(running_var + eps),
            as in the folded network. The running variance is a constant for the gradient.

    Raises:
        ValueError: an argument out of range, no layer found, or layers that cannot be bounded.
    """

    def __init__(
        self,
        model: nn.Module,
        input_size: Size | None = None,
        *,
        example_inputs: Tensor | Mapping[str, Any] | None = None,
        target: float = 1.0,
        mode: str = "hinge",
        num_iterations: int = 6,
        layers: LayerSelection = None,
        every: int = 1,
        batch_norm: bool = False,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"`mode` must be one of {', '.join(MODES)}, got {mode!r}.")
        if not (math.isfinite(target) and target > 0):
            raise ValueError(f"`target` must be a positive number, got {target}.")
        for name, value, least in (("num_iterations", num_iterations, 0), ("every", every, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"`{name}` must be an int of at least {least}, got {value!r}.")
        self.target, self.mode = float(target), mode
        self.num_iterations, self.every = num_iterations, every
        self.calls = 0
        found = find_layers(model, input_size, example_inputs, layers, batch_norm)
        self._stacks = _stack(found)
        self.layers = [layer.name for layer in found]

    def __call__(self) -> Tensor:
        """The penalty for the weights as they are now, a float32 scalar."""
        self.calls += 1
        device = self._stacks[0].layers[0].weight().device
        if (self.calls - 1) % self.every:
            return torch.zeros((), device=device)
        terms = []
        with torch.autocast(device.type, enabled=False):
            for stack in self._stacks:
                bounds = self._stack_bounds(stack)
                if bounds is not None:
                    terms.append(self._terms(bounds).sum().to(device))
        total = torch.stack(terms).sum() if terms else torch.zeros((), device=device)
        if self.mode == "mean":
            total = total / len(self.layers)
        return total * self.every

    @torch.no_grad()
    def norm_estimates(self) -> dict[str, float]:
        """Norm of every layer by name, in float32: a bound up to rounding, not a certificate."""
        found: dict[str, float] = {}
        for stack in self._stacks:
            blocks = stack.blocks()
            norms = gram_iteration(blocks, self.num_iterations).flatten(1).amax(dim=1).tolist()
            names = [layer.name for layer in stack.layers]
            found |= {name: norm * factor for name, norm, factor in zip(names, norms, stack.factors)}
        return {name: found[name] for name in self.layers}

    def state_dict(self) -> dict[str, Tensor]:
        """Number of calls and vectors of the power iteration, for an exact resume; not needed for anything else.
        Real tensors, so that a safetensors file can hold them."""
        state = {"calls": torch.tensor(self.calls)}
        for index, stack in enumerate(self._stacks):
            if stack.vector is not None:
                vector = torch.view_as_real(stack.vector) if stack.vector.is_complex() else stack.vector
                state[f"vector.{index}"] = vector.contiguous()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` gave for the same model and arguments.

        Raises:
            ValueError: it belongs to a regularizer of other layers.
        """
        known = {"calls", *(f"vector.{index}" for index in range(len(self._stacks)))}
        if "calls" not in state or not set(state) <= known:
            raise ValueError(f"The saved state does not belong to this regularizer: it holds {sorted(state)[:5]}.")
        self.calls = int(state["calls"])
        for index, stack in enumerate(self._stacks):
            vector = state.get(f"vector.{index}")
            if vector is not None:
                # of the blocks: (L, G, F, n), and a last dimension for real and imaginary part
                vector = torch.view_as_complex(vector.contiguous()) if vector.ndim == 5 else vector
                vector = vector.to(stack.layers[0].weight().device)
            stack.vector = vector

    def _terms(self, bounds: Tensor) -> Tensor:
        if self.mode == "mean":
            return bounds
        if self.mode == "log":
            return torch.where(bounds > self.target, bounds / self.target, torch.ones_like(bounds)).log()
        return (bounds - self.target).clamp_min(0.0)

    def _stack_bounds(self, stack: _Stack) -> Tensor | None:
        """(L',) norms of the layers that may exceed the target, differentiable; None if there are none."""
        with torch.no_grad():
            blocks = stack.blocks()
            factors = torch.tensor(stack.factors, dtype=torch.float32, device=blocks.device)
            chosen = torch.arange(len(stack.layers), device=blocks.device)
            if self.mode != "mean":
                near = _power_step(stack, blocks) * factors >= NEAR * self.target
                chosen, blocks, factors = chosen[near], blocks[near], factors[near]
            if len(chosen) == 0:
                return None
            places = gram_iteration(blocks, self.num_iterations).flatten(1).argmax(dim=1)
            groups, frequencies = places // blocks.shape[2], places % blocks.shape[2]
        largest = stack.chosen_blocks(chosen.tolist(), groups, frequencies)
        return gram_iteration(largest, self.num_iterations) * factors


def _power_step(stack: _Stack, blocks: Tensor) -> Tensor:
    """(L,) lower estimates of the largest norm among the blocks of each layer; moves `stack.vector` on."""
    steps = 1
    if stack.vector is None:
        generator = torch.Generator().manual_seed(0)
        start = torch.randn((*blocks.shape[:3], blocks.shape[4]), generator=generator)
        stack.vector = nn.functional.normalize(start, dim=-1).to(blocks.device, blocks.dtype)
        steps = FIRST_STEPS
    vector = stack.vector[..., None]
    for _ in range(steps):
        image = blocks @ vector
        back = blocks.mH @ image
        length = torch.linalg.vector_norm(back, dim=-2, keepdim=True)
        # a vector that the block maps to zero, or so little that it cannot be normalised, stays
        usable = length > torch.finfo(torch.float32).tiny
        vector = torch.where(usable, back / torch.where(usable, length, torch.ones_like(length)), vector)
    stack.vector = vector[..., 0]
    return torch.linalg.vector_norm(blocks @ vector, dim=-2).flatten(1).amax(dim=1)


def _stack(layers: list[Layer]) -> list[_Stack]:
    stacks: dict[Any, _Stack] = {}
    counts: dict[Any, int] = {}
    for layer in layers:
        try:
            with torch.no_grad():
                kernel, torus, copies = _kernel(layer)
        except ValueError as error:
            raise ValueError(f"Layer {layer.name!r} cannot be bounded: {error}") from error
        grid, factor = _grid(tuple(kernel.shape[3:]), torus)
        fitting = max(1, LARGEST_STACK // (math.prod(kernel.shape[:3]) * math.prod(grid)))
        key = (tuple(kernel.shape), grid, kernel.device)
        number = counts[key] = counts.get(key, -1) + 1
        stack = stacks.setdefault((*key, number // fitting), _Stack([], grid))
        stack.layers.append(layer)
        stack.factors.append(factor * math.sqrt(copies))
    return list(stacks.values())
