# SPDX-License-Identifier: Apache-2.0
"""What a normalisation layer computes: torch's own by their class, others by running them once on small inputs."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_EPS_NAMES = ("eps", "variance_epsilon", "epsilon", "variance_eps")
# what public classes without such an attribute have written into their forward
_USUAL_EPS = (1e-5, 1e-6)
_STATISTICS = {"running_mean", "running_var"}


@dataclass(frozen=True)
class Normalisation:
    """kind as in `LayerInfo`; `arguments` hold `eps` and the `offset` that is added to the weight."""

    kind: str
    arguments: dict[str, Any]
    leaves: tuple[str, ...]
    unknown: tuple[str, ...] = field(default=())


def describe_normalisation(module: nn.Module) -> Normalisation | None:
    """The normalisation that a module (on any device, also meta) computes, None if it is none that is known.

    A class of torch is known by its code. Any other module with one vector of weights is run on random inputs in
    float64, small enough for eps to matter, and recognised if it agrees with batch, layer or root-mean-square
    normalisation, the latter also with 1 + weight.
    """
    leaves = tuple(name for name, _ in (*module.named_parameters(), *module.named_buffers()))
    if type(module) in _BATCH_NORMS:
        known = module.running_var is not None
        return Normalisation("batch_norm", {"eps": module.eps}, leaves) if known else None
    if type(module) is nn.LayerNorm:
        return Normalisation("layer_norm", {"eps": module.eps}, leaves)
    if type(module) is nn.GroupNorm:
        return Normalisation("group_norm", {"eps": module.eps, "num_groups": module.num_groups}, leaves)
    if any(True for _ in module.children()) or "weight" not in leaves:
        return None
    if not set(leaves) <= {"weight", "bias", "num_batches_tracked", *_STATISTICS}:
        return None
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if tensors["weight"].ndim != 1 or tensors["weight"].numel() == 0:
        return None
    return _recognise(module, leaves)


def _recognise(module: nn.Module, leaves: tuple[str, ...]) -> Normalisation | None:
    probe = copy.deepcopy(module).to_empty(device="cpu").double().eval()
    generator = torch.Generator().manual_seed(0)
    size = probe.weight.numel()  # type: ignore[operator]
    with torch.no_grad():
        for name, tensor in (*probe.named_parameters(), *probe.named_buffers()):
            # variances are positive; where eps stands beside them, values near it tell its size
            values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5
            tensor.copy_(values * (1e-5 if name == "running_var" else 1.0))
        named = [getattr(module, name) for name in _EPS_NAMES if isinstance(getattr(module, name, None), float)]
        for eps in named or _USUAL_EPS:
            for axes in ((), (2, 3)):
                inputs = torch.randn(3, size, *axes, generator=generator, dtype=torch.float64) * eps**0.5
                try:
                    outputs = probe(inputs)
                # a module of another kind, which does not run on such an input
                except Exception:
                    continue
                if not isinstance(outputs, Tensor) or outputs.shape != inputs.shape:
                    continue
                found = _compare(probe, inputs, outputs, eps)
                if found is not None:
                    kind, offset = found
                    return Normalisation(kind, {"eps": eps, "offset": offset}, leaves)
    return None


def _compare(probe: Any, inputs: Tensor, outputs: Tensor, eps: float) -> tuple[str, float] | None:
    """Kind and offset of the formula that gives these outputs, up to float32 rounding inside the module."""

    def along(vector: Tensor) -> Tensor:
        return vector.view(-1, *[1] * (inputs.ndim - 2))

    weight = along(probe.weight)
    bias = along(probe.bias) if getattr(probe, "bias", None) is not None else 0.0
    candidates: dict[tuple[str, float], Tensor] = {}
    if getattr(probe, "running_var", None) is not None:
        centred = inputs - along(probe.running_mean)
        candidates["batch_norm", 0.0] = centred / (along(probe.running_var) + eps).sqrt() * weight + bias
    else:
        centred = inputs - inputs.mean(1, keepdim=True)
        layer = centred / (centred.square().mean(1, keepdim=True) + eps).sqrt()
        root = inputs / (inputs.square().mean(1, keepdim=True) + eps).sqrt()
        candidates["layer_norm", 0.0] = layer * weight + bias
        candidates["rms_norm", 0.0] = root * weight + bias
        candidates["rms_norm", 1.0] = root * (1.0 + weight) + bias
    for key, expected in candidates.items():
        if torch.allclose(outputs.double(), expected, rtol=1e-4, atol=1e-5):
            return key
    return None
