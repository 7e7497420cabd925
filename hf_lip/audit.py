# SPDX-License-Identifier: Apache-2.0
"""Attacks on certificates: what they find is an upper bound of the true robust radius, and must lie outside every
certified one."""

from collections.abc import Callable

import torch
from torch import Tensor


def l2_pgd(
    logits_of: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    radii: Tensor,
    *,
    num_steps: int = 200,
    num_restarts: int = 3,
    clip: bool = False,
    seed: int = 0,
) -> Tensor:
    """Projected gradient ascent of the margin max_j f_j - f_label inside the l2 ball of each image's own radius.

    Normalised gradient steps that shrink linearly from 5 r / num_steps, momentum 0.9; the first start is the image,
    the others are random points on the sphere. Even restarts follow the largest other class, odd ones the second.

    Args:
        logits_of: differentiable, (B, C, H, W) -> (B, num_labels).
        images: (B, C, H, W) in [0, 1].
        labels: (B,), the labels that the certificates promise.
        radii: (B,), l2 in pixel units; one ball per image.
        num_steps, num_restarts: budget.
        clip: also keep the pixels in [0, 1]. Certificates hold without, so the default attack is the stronger one.
        seed: of the random starts.

    Returns:
        (B,) bool: a point in the ball with another label was found.

    Raises:
        ValueError: if the shapes do not agree or a radius is negative or not finite.
    """
    if images.ndim != 4 or labels.shape != (len(images),) or radii.shape != (len(images),):
        raise ValueError(
            f"`images` (B, C, H, W), `labels` (B,) and `radii` (B,) must agree, got {tuple(images.shape)}, "
            f"{tuple(labels.shape)} and {tuple(radii.shape)}."
        )
    if not torch.isfinite(radii).all() or (radii < 0).any():
        raise ValueError("`radii` must be finite and not negative.")
    generator = torch.Generator().manual_seed(seed)
    num_labels = logits_of(images[:1]).shape[1]
    found = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    for restart in range(num_restarts):
        rest = torch.nonzero(~found).flatten()
        start = torch.zeros_like(images)
        if restart:
            start = torch.randn(images.shape, generator=generator, dtype=torch.float64).to(images)
        if len(rest) == 0:
            break
        own = torch.nn.functional.one_hot(labels[rest], num_labels).bool()
        rank = min(restart % 2, num_labels - 2)
        bound = radii[rest].to(images.dtype).view(-1, 1, 1, 1)
        found[rest] = _one_start(logits_of, images[rest], own, bound, start[rest], rank, num_steps, clip)
    return found


def _one_start(
    logits_of: Callable[[Tensor], Tensor],
    images: Tensor,
    own: Tensor,
    bound: Tensor,
    delta: Tensor,
    rank: int,
    num_steps: int,
    clip: bool,
) -> Tensor:
    """(B,) bool: this start reached another label. `own` (B, num_labels) marks the labels, `rank` whom to follow."""

    def norms(tensor: Tensor) -> Tensor:
        return tensor.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, 1, 1, 1)

    def project(tensor: Tensor) -> Tensor:
        if clip:
            tensor = (images + tensor).clamp(0, 1) - images
        return tensor * (bound / norms(tensor)).clamp_max(1.0)

    delta = project(delta / norms(delta) * bound)
    velocity = torch.zeros_like(images)
    found = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    for step in range(num_steps):
        delta = delta.detach().requires_grad_()
        logits = logits_of(images + delta)
        found |= logits.detach().argmax(dim=1) != own.to(torch.uint8).argmax(dim=1)
        margin = logits.masked_fill(own, -torch.inf).topk(rank + 1, dim=1).values[:, rank] - logits[own]
        (gradient,) = torch.autograd.grad(margin.sum(), delta)
        velocity = 0.9 * velocity + 0.1 * gradient / norms(gradient)
        size = 5.0 / num_steps * (1.0 - step / num_steps) * bound
        delta = project(delta.detach() + size * velocity / norms(velocity))
    with torch.no_grad():
        return found | (logits_of(images + delta).argmax(dim=1) != own.to(torch.uint8).argmax(dim=1))
