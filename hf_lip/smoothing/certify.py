# SPDX-License-Identifier: Apache-2.0
"""Certification by randomized smoothing: the procedure CERTIFY of Cohen, Rosenfeld and Kolter 2019, section 3.2.

The certificate is about the smoothed classifier g(x) = argmax_k P(F(x + N(0, sigma^2 I)) = k), never about F itself:
with probability at least 1 - alpha over the noise, the call abstains or returns g(x) and a radius within which g is
constant.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lip.smoothing.intervals import check_alpha, clopper_pearson_lower
from hf_lip.smoothing.noise import noisy_copies
from hf_lip.smoothing.radii import check_sigma, mono_radius


ABSTAIN = -1
_SELECTION, _ESTIMATION = 0, 1

__all__ = ["ABSTAIN", "SmoothingResult", "certify_mono", "check_num_samples", "samples_needed"]


@dataclass(frozen=True)
class SmoothingResult:
    """One image's result.

    Attributes:
        predict: certified class, or -1 (`ABSTAIN`).
        radius: l2 radius in units of the image's values, 0.0 on abstention; the ball is open.
        p_lower: lower bound of the probability of `candidate`, which holds with probability 1 - alpha.
        candidate: class chosen on the n0 selection samples.
        selection_counts: votes (num_classes,) of the n0 selection samples.
        counts: votes (num_classes,) of the n estimation samples.
    """

    predict: int
    radius: float
    p_lower: float
    candidate: int
    selection_counts: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def abstained(self) -> bool:
        return self.predict == ABSTAIN


def certify_mono(
    base_classifier: Callable[[Tensor], Tensor],
    image: Tensor,
    *,
    sigma: float,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    num_classes: int,
    seed: int = 0,
    index: int = 0,
    batch_size: int = 256,
    progress: Callable[[int], None] | None = None,
) -> SmoothingResult:
    """CERTIFY of Cohen et al. 2019: class from n0 samples, Clopper-Pearson bound from n fresh ones, R of one class.

    The noise depends on (`seed`, `index`, sample) only. The votes are the same for any `batch_size` as far as the base
    classifier treats the rows of a batch independently of each other.

    Args:
        base_classifier: maps noisy images (B, *image.shape), float32 on the CPU, to logits (B, num_classes); it must
            be deterministic.
        image: one image without noise, any shape, usually (C, H, W) in [0, 1].
        sigma: standard deviation of the noise in the image's units.
        n0: number of samples that choose the class.
        n: number of samples that bound its probability.
        alpha: failure probability of this image's certificate.
        seed: seed of the run.
        index: position of the image in its data set.
        batch_size: noisy images a forward pass.
        progress: called with the number of noisy images done since the last call.

    Raises:
        ValueError: an argument out of range, `n` too small ever to certify, an image or logits with NaN or infinite
            values, logits of a wrong shape.
    """
    check_sigma(sigma)
    check_alpha(alpha)
    check_num_samples(n, alpha)
    for name, value in (("n0", n0), ("batch_size", batch_size), ("num_classes", num_classes)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if not torch.isfinite(image).all():
        raise ValueError("`image` has NaN or infinite values: repair it before certifying.")

    def votes(num_samples: int, phase: int) -> Tensor:
        counts = torch.zeros(num_classes, dtype=torch.int64)
        for start in range(0, num_samples, batch_size):
            size = min(batch_size, num_samples - start)
            batch = noisy_copies(
                image, sigma=sigma, seed=seed, index=index, first_draw=start, num_draws=size, phase=phase
            )
            counts += _count_votes(base_classifier(batch), size, num_classes)
            if progress is not None:
                progress(size)
        return counts

    selection_counts = votes(n0, _SELECTION)
    candidate = int(selection_counts.argmax())
    counts = votes(n, _ESTIMATION)
    p_lower = clopper_pearson_lower(int(counts[candidate]), n, alpha)
    radius = mono_radius(p_lower, sigma)
    # a ball of radius 0 holds no image: it abstains too
    certified = radius > 0.0
    return SmoothingResult(
        predict=candidate if certified else ABSTAIN,
        radius=radius,
        p_lower=p_lower,
        candidate=candidate,
        selection_counts=tuple(selection_counts.tolist()),
        counts=tuple(counts.tolist()),
    )


def samples_needed(alpha: float) -> int:
    """Smallest n for which n unanimous votes certify: alpha**(1/n) > 1/2, so 10 for alpha = 0.001.

    Raises:
        ValueError: `alpha` outside (0, 1).
    """
    check_alpha(alpha)
    n = max(1, math.floor(-math.log2(alpha)))
    while clopper_pearson_lower(n, n, alpha) <= 0.5:
        n += 1
    return n


def check_num_samples(n: int, alpha: float) -> None:
    """Raise a `ValueError` if even `n` unanimous votes can not certify at `alpha`; it says how many are needed."""
    needed = samples_needed(alpha)
    if n < needed:
        raise ValueError(
            f"`n`={n} samples can never certify at alpha={alpha}: even unanimous votes need n >= {needed} "
            f"(alpha**(1/n) > 1/2). Use n >= {needed}; 10,000 to 100,000 are usual."
        )


def _count_votes(logits: Tensor, batch_size: int, num_classes: int) -> Tensor:
    if logits.ndim != 2 or logits.shape[0] != batch_size:
        raise ValueError(
            f"The base classifier must return logits (B, num_classes) for B images, got shape {tuple(logits.shape)} "
            f"for {batch_size} images."
        )
    if logits.shape[1] != num_classes:
        raise ValueError(f"The base classifier returns {logits.shape[1]} classes, `num_classes` is {num_classes}.")
    if not torch.isfinite(logits).all():
        raise ValueError("The base classifier returned NaN or infinite logits, whose votes mean nothing: check it.")
    # counted where the logits are, in int64, one transfer a batch
    return torch.bincount(logits.argmax(dim=1), minlength=num_classes).cpu()
