# SPDX-License-Identifier: Apache-2.0
"""The loss of one batch: noise, what the image processor does, the network, the loss, penalties."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..spectral.regularizer import LipschitzRegularizer
from .arguments import NoiseArguments, TrainingArguments
from .losses import emma_loss, margin_cross_entropy, multi_margin_loss, pairwise_row_distances
from .noise import consistency_loss, smoothed_attack, step_noise
from .schedules import linear_ramp


__all__ = ["Objective"]


class Objective:
    """What a training step minimises.

    Args:
        model: the network as it is trained, with its wrappers.
        plain_model: the same without the distributed wrapper; attacks and penalties go around that.
        transform: pixels in [0, 1], noise included, -> `pixel_values`; see `pipelines.transforms.pixel_transform`.
        args, noise: `args` resolved for the family.
        penalty: added with the weight `args.lipschitz_penalty`.
        process_index, num_processes: of this process; its images get their own rows of the global noise.
    """

    def __init__(
        self,
        model: nn.Module,
        plain_model: Any,
        transform: Callable[[Tensor], Tensor],
        args: TrainingArguments,
        noise: NoiseArguments,
        *,
        penalty: LipschitzRegularizer | None = None,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.model, self.plain_model, self.transform = model, plain_model, transform
        self.args, self.noise, self.penalty = args, noise, penalty
        self.process_index, self.num_processes = process_index, num_processes
        self.memory_format = torch.channels_last if args.channels_last else torch.contiguous_format

    def predict(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """Logits of pixels in [0, 1] with noise."""
        pixel_values = self.transform(pixels).contiguous(memory_format=self.memory_format)
        return model(pixel_values=pixel_values).logits

    def __call__(self, images: Tensor, labels: Tensor, *, step: int, progress: float) -> Tensor:
        """The loss of one process's share of the batch of `step`, a scalar.

        Args:
            images: (B, C, H, W), pixels in [0, 1].
            labels: (B,).
            progress: share of training done, in [0, 1].
        """
        noise, copies = self.noise, self.noise.copies
        if noise.noise_sd > 0:
            drawn = step_noise(
                images,
                sd=noise.noise_sd,
                copies=copies,
                seed=self.args.seed,
                step=step,
                process_index=self.process_index,
                num_processes=self.num_processes,
            )
            if noise.noise_method == "smoothadv":
                images = self._attack(images, labels, drawn, progress)
            images, labels = images.repeat(copies, 1, 1, 1) + drawn, labels.repeat(copies)
        logits = self.predict(self.model, images)
        loss = self._classification_loss(logits, labels, progress)
        if noise.noise_method == "consistency":
            loss = loss + consistency_loss(
                logits, copies, weight=noise.consistency_weight, entropy_weight=noise.entropy_weight
            )
        if self.penalty is not None:
            loss = loss + self.args.lipschitz_penalty * self.penalty()
        return loss

    def _attack(self, images: Tensor, labels: Tensor, drawn: Tensor, progress: float) -> Tensor:
        warmup, epsilon = self.noise.attack_warmup, self.noise.attack_epsilon
        if warmup > 0:
            epsilon = linear_ramp(progress, 0.0, epsilon, share=warmup)
        return smoothed_attack(
            self.plain_model,
            lambda pixels: self.predict(self.plain_model, pixels),
            images,
            labels,
            drawn,
            epsilon=epsilon,
            steps=self.noise.attack_steps,
        )

    def _classification_loss(self, logits: Tensor, labels: Tensor, progress: float) -> Tensor:
        args, model = self.args, self.plain_model
        if args.offset is None or args.temperature is None:
            raise ValueError("`args` must be resolved for the family of the model: call `args.resolve(...)`.")
        if args.loss == "hinge":
            return multi_margin_loss(logits, labels, margin=args.margin)
        if args.loss == "xent":
            return margin_cross_entropy(logits, labels, offset=args.offset, temperature=args.temperature)
        # the features are 1-Lipschitz but for the division by the standard deviation
        distances = pairwise_row_distances(model.classifier.effective_weight())
        constants = distances.to(logits.device) / min(model.config.image_std or [1.0])
        epsilon = linear_ramp(progress, args.epsilon / 30, args.epsilon)
        return emma_loss(logits, labels, constants, epsilon=epsilon, temperature=args.temperature)
