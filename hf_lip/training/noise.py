# SPDX-License-Identifier: Apache-2.0
"""Training with Gaussian noise, for networks that are to be certified by randomized smoothing.

Noise is in units of pixels in [0, 1] and comes before whatever an image processor does to the pixels. It is a function
of (seed, step), so that it is the same for any number of processes and after any interruption. Noisy copies of a
batch are stacked copy by copy: (m B, ...), row c B + i is copy c of image i.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from .augment import epoch_generator


__all__ = ["consistency_loss", "noisy_pixels", "smoothed_attack", "step_noise"]


def step_noise(
    images: Tensor, *, sd: float, copies: int, seed: int, step: int, process_index: int = 0, num_processes: int = 1
) -> Tensor:
    """Noise (copies B, C, H, W) float32 for one process's share `images` (B, C, H, W) of the batch of `step`.

    Every process draws the noise of the global batch and keeps the rows of its images, those that
    [`ImageBatches.batch`] gave it. It is drawn on the device of the images, and kinds of devices draw differently.
    """
    shape = (len(images) * num_processes, *images.shape[1:])
    parts = []
    for copy in range(copies):
        generator = epoch_generator(seed, step, f"noise {copy}", images.device)
        drawn = torch.randn(shape, generator=generator, device=images.device)
        parts.append(drawn[process_index::num_processes])
    return sd * torch.cat(parts)


def noisy_pixels(images: Tensor, index: Tensor, *, sd: float, seed: int) -> Tensor:
    """images + noise, the noise a function of (seed, index of the image): the same in every evaluation.

    Args:
        images: (B, C, H, W) float32.
        index: (B,) positions of the images in their data set.
    """
    noise = torch.stack(
        [
            torch.randn(images.shape[1:], generator=epoch_generator(seed, position, "evaluation noise"))
            for position in index.tolist()
        ]
    )
    return images + sd * noise.to(images.device)


def consistency_loss(logits: Tensor, copies: int, *, weight: float, entropy_weight: float) -> Tensor:
    """weight * mean_c KL(p || p_c) + entropy_weight * H(p), p the mean of the predictions p_c of the noisy copies.

    Source: Jeong and Shin, Consistency Regularization for Certified Robustness of Smoothed Classifiers (NeurIPS 2020),
    equation 7; published with weight 10 or 20 and entropy weight 0.5 for two copies on CIFAR-10.

    Args:
        logits: (copies B, K), copy by copy.

    Returns:
        The mean over the images, a scalar.
    """
    if logits.ndim != 2 or copies < 2 or len(logits) % copies:
        raise ValueError(
            f"`logits` must be (copies * batch, classes) with at least 2 `copies`, got {tuple(logits.shape)} for "
            f"{copies}."
        )
    log_p = F.log_softmax(logits.float(), dim=-1).view(copies, -1, logits.shape[-1])
    log_mean = log_p.logsumexp(dim=0) - torch.tensor(float(copies)).log().to(log_p.device)
    mean = log_mean.exp()
    divergence = (mean * (log_mean - log_p)).sum(dim=-1).mean()
    entropy = -(mean * log_mean).sum(dim=-1).mean()
    return weight * divergence + entropy_weight * entropy


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norm and dropout in evaluation mode, parameters without gradient; put back afterwards."""
    layers = [module for module in model.modules() if isinstance(module, (_BatchNorm, _DropoutNd)) and module.training]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for module in layers:
        module.training = False
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module in layers:
            module.training = True
        for parameter in parameters:
            parameter.requires_grad_(True)


def smoothed_attack(
    model: nn.Module,
    predict: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    noise: Tensor,
    *,
    epsilon: float,
    steps: int,
) -> Tensor:
    """Images (B, C, H, W) in [0, 1], within l2 distance `epsilon` of `images`, that the smoothed network gets wrong.

    Projected gradient ascent on -log of the mean over the noisy copies of the softmax of the label, steps of
    2 epsilon / steps along the normalised gradient, the same noise in every step.

    Source: SmoothAdv (Salman et al., NeurIPS 2019), the plug-in estimate S_PGD of equation 9 with its public settings.

    Args:
        model: the network, whose parameters get no gradient; its batch norm uses the running statistics meanwhile.
        predict: pixels (copies B, C, H, W) -> logits (copies B, K) of that network.
        noise: (copies B, C, H, W), copy by copy.
    """
    copies = len(noise) // len(images)
    targets = labels.repeat(copies)
    attacked = images.detach().clone()
    if epsilon == 0.0:
        return attacked
    with frozen_statistics(model), torch.enable_grad():
        for _ in range(steps):
            attacked.requires_grad_(True)
            logits = predict(attacked.repeat(copies, 1, 1, 1) + noise).float()
            log_p = -F.cross_entropy(logits, targets, reduction="none").view(copies, -1)
            loss = -log_p.logsumexp(dim=0).sum()
            (gradient,) = torch.autograd.grad(loss, attacked)
            with torch.no_grad():
                moved = attacked + (2.0 * epsilon / steps) * _unit(gradient)
                # clipping into [0, 1] brings a point nearer to the image, which lies there
                attacked = (images + _shrink(moved - images, epsilon)).clamp_(0.0, 1.0)
    return attacked.detach()


def _norms(images: Tensor) -> Tensor:
    return images.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def _unit(gradient: Tensor) -> Tensor:
    return gradient / _norms(gradient).clamp_min(torch.finfo(gradient.dtype).tiny)


def _shrink(shift: Tensor, epsilon: float) -> Tensor:
    return shift * (epsilon / _norms(shift).clamp_min(epsilon))
