# SPDX-License-Identifier: Apache-2.0
"""Configuration of the CIFAR ResNets."""

import math

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from ..shim import InstalledSettings


PUBLISHED_WIDTHS = (16, 32, 64)
# the usual constants of the public CIFAR checkpoints (those of ImageNet)
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


@strict
class CifarResNetConfig(InstalledSettings, PreTrainedConfig):
    r"""
    Configuration of a ResNet for small images: normalisation, a 3x3 convolution, three stages of basic blocks with
    parameter-free shortcuts, global average pooling, a linear head. The defaults give ResNet-20.

    Source: He et al., Deep Residual Learning, 2016, section 4.2.

    Args:
        num_channels (`int`, *optional*, defaults to 3): channels of the image.
        image_size (`int`, *optional*, defaults to 32): side of the images it was trained on; others run too.
        num_blocks (`list[int]`, *optional*, defaults to `[3, 3, 3]`): basic blocks of each stage; n in each of three
            stages are 6 n + 2 layers.
        hidden_sizes (`list[int]`, *optional*, defaults to `[16, 32, 64]`): channels of each stage, not decreasing, as
            the shortcuts can only add channels. The first is also the width of the first convolution.
        batch_norm_eps (`float`, *optional*, defaults to 1e-5): added to the variances.
        image_mean, image_std (`list[float]`, *optional*): subtracted and divided inside the model, in pixel units of
            [0, 1]. Default: for three channels the constants of the public checkpoints, else 0.5 and 0.25.
    """

    model_type = "cifar_resnet"

    num_channels: int = 3
    image_size: int = 32
    num_blocks: list[int] | tuple[int, ...] = (3, 3, 3)
    hidden_sizes: list[int] | tuple[int, ...] = PUBLISHED_WIDTHS
    batch_norm_eps: float = 1e-5
    image_mean: list[int | float] | tuple[int | float, ...] | None = None
    image_std: list[int | float] | tuple[int | float, ...] | None = None

    def __post_init__(self, **kwargs):
        self.num_blocks = list(self.num_blocks)
        self.hidden_sizes = list(self.hidden_sizes)
        if self.image_mean is None:
            self.image_mean = IMAGE_MEAN if self.num_channels == 3 else [0.5] * self.num_channels
        if self.image_std is None:
            self.image_std = IMAGE_STD if self.num_channels == 3 else [0.25] * self.num_channels
        self.image_mean = [float(value) for value in self.image_mean]
        self.image_std = [float(value) for value in self.image_std]
        super().__post_init__(**kwargs)

    @classmethod
    def from_depth(cls, depth: int, width_multiplier: int | float = 1, **overrides) -> "CifarResNetConfig":
        """The published ResNet of 20, 32, 44, 56, 110 or any 6 n + 2 layers, its 16, 32 and 64 channels multiplied.

        Raises:
            ValueError: another depth, or a multiplier that leaves a stage without channels.
        """
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"`depth` must be 6 n + 2 (such as 20, 32, 44, 56 or 110), got {depth}.")
        widths = [round(width * width_multiplier) for width in PUBLISHED_WIDTHS]
        return cls(**{"num_blocks": [(depth - 2) // 6] * 3, "hidden_sizes": widths, **overrides})

    @property
    def depth(self) -> int:
        """Layers with weights on the longest path: 20 for ResNet-20."""
        return 2 * sum(self.num_blocks) + 2

    def validate_stages(self):
        if len(self.num_blocks) != len(self.hidden_sizes) or not self.num_blocks:
            raise ValueError(
                "`num_blocks` and `hidden_sizes` need one entry for each of at least one stage, got "
                f"{len(self.num_blocks)} and {len(self.hidden_sizes)}."
            )
        if min(self.num_blocks) < 1 or min(self.hidden_sizes) < 1:
            raise ValueError(
                f"`num_blocks` and `hidden_sizes` must be at least 1, got {self.num_blocks}, {self.hidden_sizes}."
            )
        if sorted(self.hidden_sizes) != self.hidden_sizes:
            raise ValueError(
                f"`hidden_sizes` must not decrease, got {self.hidden_sizes}: the shortcuts can only add channels."
            )

    def validate_numbers(self):
        for name in ("num_channels", "image_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not (math.isfinite(self.batch_norm_eps) and self.batch_norm_eps > 0):
            raise ValueError(f"`batch_norm_eps` must be positive and finite, got {self.batch_norm_eps}.")

    def validate_normalization(self):
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if len(values) != self.num_channels or not all(math.isfinite(value) for value in values):
                raise ValueError(f"`{name}` needs a finite number for each of {self.num_channels} channels: {values}.")
        if min(self.image_std) <= 0:
            raise ValueError(f"`image_std` must be positive, got {self.image_std}.")


__all__ = ["CifarResNetConfig"]
