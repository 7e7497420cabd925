# SPDX-License-Identifier: Apache-2.0
"""Smoothing of a transformers model: base classifier, noise and sampler put together for many images."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_lip.pipelines.base_classifier import BaseClassifier, CertifiedBase
from hf_lip.pipelines.settings import RADIUS_UNIT, CertifySettings
from hf_lip.pipelines.transforms import pixel_transform
from hf_lip.smoothing.calibration import calibrate
from hf_lip.smoothing.certify import SmoothingResult, certify_images, predict_images
from hf_lip.smoothing.engine import CALIBRATION, Sampler, draws_of
from hf_lip.smoothing.exact_noise import GridNoise
from hf_lip.smoothing.noise import GaussianNoise, Noise


__all__ = ["SmoothingRunner", "has_certificate", "make_base"]


def has_certificate(model: Any) -> bool:
    """Whether the model can prove a Lipschitz constant of its own."""
    return hasattr(model, "certify")


def make_base(
    model: PreTrainedModel, image_processor: Any | None, device: torch.device, settings: CertifySettings
) -> BaseClassifier | CertifiedBase:
    """The base classifier that the settings ask for, a copy of the model.

    Raises:
        ValueError: `lipschitz_aware` for a model without a certificate, an image processor that smoothing does not
            know.
    """
    if settings.lipschitz_aware:
        if not has_certificate(model):
            raise ValueError(
                f"`lipschitz_aware` needs a model with a certificate (model_type 'lipschitz_vision'), "
                f"{type(model).__name__} has none: leave it out."
            )
        return CertifiedBase(model, device)
    transform = pixel_transform(image_processor)
    arguments = {}
    if has_certificate(model):
        # these models take pixels in [0, 1]: a processor is needed for another size only
        expected, resize = model.config.image_size, transform
        arguments = {"output_certified_radius": False}

        def transform(pixels: Tensor) -> Tensor:
            return pixels if tuple(pixels.shape[-2:]) == (expected, expected) else resize(pixels)

    return BaseClassifier(
        model,
        transform,
        device=device,
        dtype=settings.dtype,
        compiled=settings.compile,
        denoiser=settings.denoiser,
        arguments=arguments,
    )


class SmoothingRunner:
    """Certifies or predicts groups of images. Use as a context manager: it owns threads.

    Args:
        base: of `make_base`.
        num_classes: of the model.
        settings, method: arguments of the call, `method` resolved.
        batch_size: noisy copies a forward pass.
        progress: called with the number of noisy copies done; what adaptive sampling saves counts as done.
    """

    def __init__(
        self,
        base: BaseClassifier | CertifiedBase,
        num_classes: int,
        settings: CertifySettings,
        method: str,
        *,
        batch_size: int,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.base, self.mode, self.on_progress, self._done = base, settings.mode, progress, 0
        self.smoothing = settings.smoothing(method)
        if settings.lipschitz_aware:
            assert isinstance(base, CertifiedBase)
            factor = self.smoothing.score_map.lipschitz_factor(num_classes)
            lipschitz, score_error = base.score_constants(factor, num_classes)
            self.smoothing = settings.smoothing(method, lipschitz=lipschitz, score_error=score_error)
        self.noise: Noise
        if settings.grid is None:
            self.noise = GaussianNoise(settings.sigma, settings.seed)
        else:
            self.noise = GridNoise(settings.sigma, settings.seed, settings.grid)
        self.sampler = Sampler(
            base,
            self.noise,
            num_classes=num_classes,
            batch_size=batch_size,
            device=base.device,
            # functions of others need not bear several threads, nor need compiled graphs
            workers=1 if settings.denoiser is not None or settings.compile else torch.get_num_threads(),
            progress=self._advance,
        )

    def __enter__(self) -> "SmoothingRunner":
        return self

    def __exit__(self, *exception: object) -> None:
        self.sampler.close()

    @property
    def group_size(self) -> int:
        """Images whose selection samples share a batch."""
        return max(1, self.sampler.batch_size // self.smoothing.n0) if self.mode == "certify" else 1

    @property
    def copies_per_image(self) -> int:
        """Noisy copies of an image, at most."""
        return self.smoothing.n + (self.smoothing.n0 if self.mode == "certify" else 0)

    def run(self, images: Sequence[tuple[int, int, Tensor]]) -> Iterator[tuple[int, SmoothingResult]]:
        """(index, result) of a group of (place in the group, index, pixels (C, H, W)); see `certify_images`."""
        start, work = self._done, certify_images if self.mode == "certify" else predict_images
        for count, result in enumerate(work(self.sampler, self.smoothing, images), start=1):
            # images of a group have had their selection samples before the first is done
            ahead = (len(images) - count) * (self.copies_per_image - self.smoothing.n)
            self._advance(start + count * self.copies_per_image + ahead - self._done)
            yield result

    def warm_up(self, image: Tensor) -> None:
        """One batch that is not used: afterwards `base.description` is complete and a graph compiled."""
        with torch.inference_mode():
            self.base(torch.zeros((self.sampler.batch_size, *image.shape), device=self.base.device))

    def calibrate(self, images: Sequence[Tensor], draws: int) -> Any:
        """A score map for this base, sigma, alpha and n, from `draws` noisy copies of images of their own.

        Raises:
            ValueError: no images.
        """
        logits = []
        for index, image in enumerate(images):
            batches = draws_of(self.noise.prepare(image), index, CALIBRATION, draws, self.sampler.batch_size)
            logits.append(torch.cat([part[rows[0].place].cpu() for rows, part in self.sampler.run(batches)]))
        if not logits:
            raise ValueError("A calibration needs images of its own: give at least one, several dozen are usual.")
        settings = self.smoothing
        return calibrate(torch.stack(logits), sigma=settings.sigma, alpha=settings.alpha, n=settings.n)

    def describe(self, result: SmoothingResult) -> dict[str, Any]:
        """The fields of a result that smoothing knows, as plain Python values."""
        settings = self.smoothing
        return {
            "score": None if result.abstained else result.score,
            "radius": result.radius,
            "radius_unit": RADIUS_UNIT,
            "abstained": result.abstained,
            "method": result.method,
            "sigma": float(settings.sigma),
            "n0": int(settings.n0) if self.mode == "certify" else None,
            "n": result.n,
            "alpha": float(settings.alpha),
            "p_lower": result.p_lower,
            "p_upper_other": result.p_upper_other,
            "counts": None if result.counts is None else list(result.counts),
            "score_map": str(settings.score_map),
            "seed": int(settings.seed),
            "dtype": str(self.base.dtype).removeprefix("torch."),
            "base": self.base.description,
            "noise": self.noise.name,
            "details": result.details,
        }

    def _advance(self, count: int) -> None:
        self._done += count
        if self.on_progress is not None and count:
            self.on_progress(count)
