# SPDX-License-Identifier: Apache-2.0
"""Accuracy of the evaluated copy: clean, certified where the model has a certificate, and under noise."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..metrics import STANDARD_RADII, average_certified_radius, certified_accuracy
from .augment import to_float_pixels
from .noise import noisy_pixels


if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["average_statistics", "describe", "evaluate"]


@torch.no_grad()
def average_statistics(model: torch.nn.Module, accelerator: "Accelerator") -> None:
    """Make the running statistics of batch norm, which each process collects on its own images, their mean."""
    if accelerator.num_processes == 1:
        return
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            for statistic in (module.running_mean, module.running_var):
                statistic.copy_(accelerator.reduce(statistic.clone(), reduction="mean"))


@torch.no_grad()
def evaluate(
    model: Any,
    loader: DataLoader,
    accelerator: "Accelerator",
    transform: Callable[[Tensor], Tensor],
    *,
    noise_sd: float = 0.0,
    seed: int = 0,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> dict[str, Any]:
    """Shares of images that are right.

    Args:
        model: in evaluation mode. One with a certificate answers in float64 with radii, others in their own dtype.
        loader: batches of (images, labels, position in the data set).
        transform: pixels in [0, 1], noise included, -> `pixel_values`.
        noise_sd: adds `noisy_accuracy` under noise of this standard deviation, one draw an image, the same in every
            evaluation of this seed.
    """
    certified = hasattr(model, "certify")
    columns: dict[str, list[Tensor]] = {"right": [], "radius": [], "noisy_right": []}
    constant = float("nan")
    for images, labels, index in tqdm(loader, desc="evaluating", leave=False, disable=not accelerator.is_main_process):
        pixels = to_float_pixels(images)
        pixel_values = transform(pixels).contiguous(memory_format=memory_format)
        output = model(pixel_values=pixel_values)
        found = {"right": output.logits.argmax(dim=-1) == labels}
        if certified:
            constant = output.lipschitz_constant[0].item()
            found["radius"] = output.certified_radius
        if noise_sd > 0:
            noisy = transform(noisy_pixels(pixels, index, sd=noise_sd, seed=seed))
            plain = {"output_certified_radius": False} if certified else {}
            logits = model(pixel_values=noisy.contiguous(memory_format=memory_format), **plain).logits
            found["noisy_right"] = logits.argmax(dim=-1) == labels
        for name, value in zip(found, accelerator.gather_for_metrics(tuple(found.values()))):
            columns[name].append(value.cpu())
    arrays = {name: torch.cat(parts).numpy() for name, parts in columns.items() if parts}
    right = arrays["right"]
    metrics: dict[str, Any] = {"eval_samples": len(right), "clean_accuracy": float(right.mean())}
    if noise_sd > 0:
        metrics |= {"noise_sd": noise_sd, "noisy_accuracy": float(arrays["noisy_right"].mean())}
    if certified:
        radius = arrays["radius"]
        metrics |= {
            "certified_accuracy": {
                name: certified_accuracy(radius, right, eps) for name, eps in STANDARD_RADII.items()
            },
            "average_certified_radius": average_certified_radius(radius, right),
            "lipschitz_constant": constant,
        }
    return metrics


def describe(metrics: dict[str, Any]) -> str:
    """One line for the terminal."""
    words = [f"clean {100 * metrics['clean_accuracy']:.2f} %"]
    if "noisy_accuracy" in metrics:
        words.append(f"noise {metrics['noise_sd']:g}: {100 * metrics['noisy_accuracy']:.2f} %")
    if "certified_accuracy" in metrics:
        shares = metrics["certified_accuracy"].items()
        words.append("certified " + "  ".join(f"{100 * share:.2f} at {name}" for name, share in shares))
        words.append(f"constant {metrics['lipschitz_constant']:.6g}")
    if "layer_norm_estimates" in metrics:
        words.append(f"largest layer norm about {max(metrics['layer_norm_estimates'].values()):.4g}")
    return "  ".join(words)
