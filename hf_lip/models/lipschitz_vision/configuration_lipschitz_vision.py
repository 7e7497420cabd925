# SPDX-License-Identifier: Apache-2.0
"""Configuration of the lipschitz_vision family and its named sizes."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

from ..shim import InstalledSettings


BLOCK_TYPES = ("cpl", "sll", "aol", "sr")
RESIDUAL_BLOCK_TYPES = ("cpl", "sll")
HEAD_TYPES = ("lln", "spectral", "truncation")
BLOCK_ACTIVATIONS = ("maxmin", "householder", "relu")
HIDDEN_ACTIVATIONS = ("relu", "leaky_relu", "tanh", "sigmoid", "softplus")
DOWNSAMPLE_TYPES = ("pool", "unshuffle")
PADDING_MODES = ("zeros", "circular")

# what defines the function, and therefore goes into the certificate word for word
ARCHITECTURE_FIELDS = (
    "block_type",
    "image_size",
    "num_channels",
    "hidden_sizes",
    "depths",
    "downsample_factors",
    "downsample_type",
    "kernel_size",
    "padding_mode",
    "conv_hidden_size",
    "pool_size",
    "dense_size",
    "num_dense_layers",
    "dense_hidden_size",
    "hidden_act",
    "activation",
    "num_iterations",
    "image_mean",
    "image_std",
    "head_type",
    "num_labels",
)

CIFAR10_MEAN = [0.4914, 0.4822, 0.4465]


def published_size(num_conv: int, width: int, num_dense: int) -> dict[str, Any]:
    """The pattern of Meunier et al. 2022 and Araujo et al. 2023, its equal convolutional blocks dealt out over four
    stages."""
    return {
        "depths": [num_conv // 4 + (stage < num_conv % 4) for stage in range(4)],
        "hidden_sizes": [width] * 4,
        "downsample_factors": [1] * 4,
        "conv_hidden_size": 5,
        "num_dense_layers": num_dense,
        "dense_hidden_size": 2048,
        "pool_size": 4,
        "image_size": 32,
        "image_mean": CIFAR10_MEAN,
    }


PUBLISHED_SIZES = {
    "s": published_size(20, 45, 7),
    "m": published_size(30, 60, 10),
    "l": published_size(50, 90, 10),
    "xl": published_size(70, 120, 15),
}
# CPL took the first features as logits for ten classes, SLL normalised rows (lipschitz-layers 1.5 and 2.5)
LIPSCHITZ_VISION_SIZES: dict[str, dict[str, Any]] = {
    **{
        f"cpl-{name}": {**size, "block_type": "cpl", "head_type": "truncation"}
        for name, size in PUBLISHED_SIZES.items()
    },
    **{f"sll-{name}": {**size, "block_type": "sll", "head_type": "lln"} for name, size in PUBLISHED_SIZES.items()},
    "tiny": {
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [8, 8, 16, 16],
        "downsample_factors": [1, 2, 2, 1],
        "conv_hidden_size": 5,
        "num_dense_layers": 2,
        "dense_hidden_size": 64,
        "pool_size": 2,
        "image_size": 32,
    },
}


@strict
class LipschitzVisionConfig(InstalledSettings, BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of a 1-Lipschitz image network: normalisation, convolutional stages, dense neck, linear head. The
    defaults give the published CPL network of size S.

    Args:
        block_type (`str`, *optional*, defaults to `"cpl"`): layer of every block: `cpl` and `sll` are residual, `aol`
            and `sr` linear followed by an activation.
        image_size (`int`, *optional*, defaults to 32): side of the square image the certificate holds for.
        num_channels (`int`, *optional*, defaults to 3): channels of the image.
        hidden_sizes (`list[int]`, *optional*, defaults to `[45, 45, 45, 45]`): channels of each stage; zero padding
            or projection joins stages of different width.
        depths (`list[int]`, *optional*, defaults to `[5, 5, 5, 5]`): convolutional blocks of each stage, 0 allowed.
        downsample_factors (`list[int]`, *optional*): shrinks the image before each stage; `None` is 1 everywhere.
        downsample_type (`str`, *optional*, defaults to `"pool"`): `pool` (sums over k x k windows, divided by k) or
            `unshuffle` (pixels to channels).
        kernel_size (`int`, *optional*, defaults to 3): odd.
        padding_mode (`str`, *optional*, defaults to `"zeros"`): `zeros` or `circular`; others stretch and are refused.
        conv_hidden_size (`int`, *optional*, defaults to 5): hidden channels of a residual convolution; `None` is the
            width of the stage.
        pool_size (`int`, *optional*, defaults to 4): window of the sum pooling before flattening.
        dense_size (`int`, *optional*): features after flattening; `None` keeps them, more are zeros, fewer dropped.
        num_dense_layers (`int`, *optional*, defaults to 7): dense blocks.
        dense_hidden_size (`int`, *optional*, defaults to 2048): hidden features of a residual dense block; `None` is
            the width.
        hidden_act (`str`, *optional*, defaults to `"relu"`): in residual blocks; elementwise with slopes in [0, 1].
        activation (`str`, *optional*): after every block; `None` is MaxMin for linear blocks, nothing for others.
        num_iterations (`int`, *optional*): Gram iterations of the rescaling of `sr` (default 3) and `sll` (default 1).
        initial_bias (`float`, *optional*): starts residual blocks with orthonormal rows and this bias. A negative
            value, such as -0.5, leaves most units off, which very deep stacks need. `None` is the published start.
        image_mean, image_std (`list[float]`, *optional*): subtracted and divided inside the model, in pixel units; the
            division multiplies the Lipschitz constant by 1 / min(std). `None` changes nothing.
        head_type (`str`, *optional*, defaults to `"lln"`): `lln` (rows of norm 1), `spectral` (the whole layer divided
            by its norm) or `truncation` (the first features are the logits).
    """

    model_type = "lipschitz_vision"

    block_type: str = "cpl"
    image_size: int = 32
    num_channels: int = 3
    hidden_sizes: list[int] | tuple[int, ...] = (45, 45, 45, 45)
    depths: list[int] | tuple[int, ...] = (5, 5, 5, 5)
    downsample_factors: list[int] | tuple[int, ...] | None = None
    downsample_type: str = "pool"
    kernel_size: int = 3
    padding_mode: str = "zeros"
    conv_hidden_size: int | None = 5
    pool_size: int = 4
    dense_size: int | None = None
    num_dense_layers: int = 7
    dense_hidden_size: int | None = 2048
    hidden_act: str = "relu"
    activation: str | None = None
    num_iterations: int | None = None
    initial_bias: int | float | None = None
    image_mean: list[int | float] | tuple[int | float, ...] | None = None
    image_std: list[int | float] | tuple[int | float, ...] | None = None
    head_type: str = "lln"

    def __post_init__(self, **kwargs):
        self.hidden_sizes = list(self.hidden_sizes)
        self.depths = list(self.depths)
        if self.downsample_factors is None:
            self.downsample_factors = [1] * len(self.depths)
        self.downsample_factors = list(self.downsample_factors)
        self.image_mean = [0.0] * self.num_channels if self.image_mean is None else [float(m) for m in self.image_mean]
        self.image_std = [1.0] * self.num_channels if self.image_std is None else [float(s) for s in self.image_std]
        if self.num_iterations is None:
            self.num_iterations = 3 if self.block_type == "sr" else 1
        self.stage_names = ["stem"] + [f"stage{index}" for index in range(1, len(self.depths) + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    @classmethod
    def from_size(cls, name: str, block_type: str | None = None, **overrides) -> "LipschitzVisionConfig":
        """A named configuration: `tiny`, `cpl-s` ... `cpl-xl`, `sll-s` ... `sll-xl`, or `S` ... `XL` with a
        `block_type`.

        Raises:
            ValueError: if the name is unknown.
        """
        key = name.lower()
        if key in PUBLISHED_SIZES:
            key = f"{block_type or 'cpl'}-{key}"
        if key not in LIPSCHITZ_VISION_SIZES:
            raise ValueError(f"`name` must be one of {', '.join(LIPSCHITZ_VISION_SIZES)}, got {name!r}.")
        fields = dict(LIPSCHITZ_VISION_SIZES[key])
        if block_type is not None:
            fields["block_type"] = block_type
        return cls(**{**fields, **overrides})

    @property
    def block_activation(self) -> str | None:
        """Activation after every block, the default resolved."""
        if self.activation is None and self.block_type not in RESIDUAL_BLOCK_TYPES:
            return "maxmin"
        return self.activation

    @property
    def feature_size(self) -> int:
        """Features that enter the head."""
        return self.dense_size or self.flattened_size

    @property
    def flattened_size(self) -> int:
        """Features after the last stage, pooling and flattening."""
        side = self.image_size // math.prod(self.downsample_factors) // self.pool_size
        return self.hidden_sizes[-1] * side * side

    def architecture(self) -> dict[str, Any]:
        """The fields that define the function, as plain JSON values."""
        fields = {name: getattr(self, name) for name in ARCHITECTURE_FIELDS}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    def validate_choices(self):
        for name, choices in (
            ("block_type", BLOCK_TYPES),
            ("downsample_type", DOWNSAMPLE_TYPES),
            ("padding_mode", PADDING_MODES),
            ("hidden_act", HIDDEN_ACTIVATIONS),
            ("activation", (*BLOCK_ACTIVATIONS, None)),
            ("head_type", HEAD_TYPES),
        ):
            value = getattr(self, name)
            if value not in choices:
                reason = ": reflect and replicate padding are not 1-Lipschitz" if name == "padding_mode" else ""
                raise ValueError(f"`{name}` must be one of {', '.join(map(str, choices))}, got {value!r}{reason}.")

    def validate_counts(self):
        for name in ("image_size", "num_channels", "pool_size", "num_iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("conv_hidden_size", "dense_size", "dense_hidden_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1 or None, got {getattr(self, name)}.")
        if self.num_dense_layers < 0:
            raise ValueError(f"`num_dense_layers` must not be negative, got {self.num_dense_layers}.")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"`kernel_size` must be odd, got {self.kernel_size}.")

    def validate_stages(self):
        lengths = {len(self.depths), len(self.hidden_sizes), len(self.downsample_factors)}
        if len(lengths) != 1 or not self.depths:
            raise ValueError(
                "`depths`, `hidden_sizes` and `downsample_factors` need one entry for each of at least one stage, got "
                f"{len(self.depths)}, {len(self.hidden_sizes)} and {len(self.downsample_factors)}."
            )
        if min(self.depths) < 0 or min(self.hidden_sizes) < 1 or min(self.downsample_factors) < 1:
            raise ValueError(
                "`depths` must not be negative, `hidden_sizes` and `downsample_factors` must be at least 1."
            )
        shrink = math.prod(self.downsample_factors) * self.pool_size
        if self.image_size % shrink:
            raise ValueError(
                f"`image_size`={self.image_size} must be divisible by `downsample_factors` times `pool_size`, "
                f"{shrink}."
            )

    def validate_normalization(self):
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if len(values) != self.num_channels:
                raise ValueError(f"`{name}` needs one entry for each of {self.num_channels} channels, got {values}.")
            if not all(math.isfinite(value) for value in values):
                raise ValueError(f"`{name}` must be finite, got {values}.")
        if min(self.image_std) <= 0:
            raise ValueError(f"`image_std` must be positive, got {self.image_std}.")


__all__ = ["LIPSCHITZ_VISION_SIZES", "LipschitzVisionConfig"]
