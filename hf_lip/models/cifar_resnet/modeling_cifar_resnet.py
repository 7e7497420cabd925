# SPDX-License-Identifier: Apache-2.0
"""ResNets for small images (He et al. 2016, section 4.2), pixels in [0, 1] in, logits out.

They carry no Lipschitz certificate: `pipeline("certify")` certifies them by randomized smoothing. Tensors are named
as in the widely used public checkpoints: `conv1`, `bn1`, `layer1.0.conv1`, ..., `linear`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from ...layers.shape import InputNormalization
from ..certified_model import CertifiedPreTrainedModel
from .configuration_cifar_resnet import CifarResNetConfig


class CifarResNetShortcut(nn.Module):
    """Option A of the paper: every stride-th pixel, new channels zero, half of them in front and half behind."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.front = (out_channels - in_channels) // 2
        self.back = out_channels - in_channels - self.front

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.stride > 1:
            hidden_states = hidden_states[:, :, :: self.stride, :: self.stride]
        if self.front or self.back:
            hidden_states = F.pad(hidden_states, (0, 0, 0, 0, self.front, self.back))
        return hidden_states

    def extra_repr(self) -> str:
        return f"stride={self.stride}, new_channels={self.front + self.back}"


class CifarResNetBlock(GradientCheckpointingLayer):
    """relu(shortcut(x) + bn2(conv2(relu(bn1(conv1(x))))))."""

    def __init__(self, config: CifarResNetConfig, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels, eps=config.batch_norm_eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels, eps=config.batch_norm_eps)
        self.shortcut = CifarResNetShortcut(in_channels, out_channels, stride)

    def forward(self, hidden_states: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(hidden_states)))
        residual = self.bn2(self.conv2(residual))
        return F.relu(residual + self.shortcut(hidden_states))


class CifarResNetStage(nn.Sequential):
    """Blocks of one width; the first halves the image, except in the first stage."""

    def __init__(self, config: CifarResNetConfig, index: int):
        channels = config.hidden_sizes[index]
        before = config.hidden_sizes[max(index - 1, 0)]
        first = CifarResNetBlock(config, before, channels, stride=1 if index == 0 else 2)
        rest = (CifarResNetBlock(config, channels, channels, stride=1) for _ in range(config.num_blocks[index] - 1))
        super().__init__(first, *rest)


class CifarResNetPreTrainedModel(CertifiedPreTrainedModel):
    """Loading and saving are strict, as for the certified models: safetensors only, nothing missing, nothing extra,
    written atomically."""

    config: CifarResNetConfig
    base_model_prefix = "cifar_resnet"
    head_prefix = "linear."
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _no_split_modules = ["CifarResNetBlock"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": CifarResNetStage}  # noqa: RUF012
    # a counter that batch norm with a fixed momentum never reads; public checkpoints leave it out
    _keys_to_ignore_on_load_missing = [r"num_batches_tracked$"]  # noqa: RUF012

    def __init__(self, config: CifarResNetConfig):
        super().__init__(config)
        self.normalization = InputNormalization(config.image_mean, config.image_std)
        self.conv1 = nn.Conv2d(config.num_channels, config.hidden_sizes[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(config.hidden_sizes[0], eps=config.batch_norm_eps)
        self.stage_names = [f"layer{index + 1}" for index in range(len(config.num_blocks))]
        for index, name in enumerate(self.stage_names):
            self.add_module(name, CifarResNetStage(config, index))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            # He et al. 2015
            init.kaiming_normal_(module.weight)

    def features(self, pixel_values: Tensor) -> Tensor:
        """Pixels in [0, 1] (B, C, H, W) -> feature map (B, hidden_sizes[-1], H / 4, W / 4).

        Raises:
            TypeError, ValueError: not a non-empty floating-point batch with the model's channels.
        """
        channels = self.config.num_channels
        if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
            kind = pixel_values.dtype if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
            raise TypeError(
                f"`pixel_values` must be a floating-point tensor of pixels in [0, 1], got {kind}: use the model's "
                "image processor."
            )
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels or 0 in pixel_values.shape:
            raise ValueError(
                f"`pixel_values` must have shape (batch, {channels}, height, width), got {tuple(pixel_values.shape)}: "
                "use the model's image processor."
            )
        hidden_states = F.relu(self.bn1(self.conv1(self.normalization(pixel_values.to(self.dtype)))))
        for name in self.stage_names:
            hidden_states = getattr(self, name)(hidden_states)
        return hidden_states


class CifarResNetModel(CifarResNetPreTrainedModel):
    """Pixels in [0, 1] (B, C, H, W) -> `last_hidden_state` (B, C', H', W') and `pooler_output` (B, C')."""

    _keys_to_ignore_on_load_unexpected = [r"^linear\."]  # noqa: RUF012

    def __init__(self, config: CifarResNetConfig):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        hidden_states = self.features(pixel_values)
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=hidden_states, pooler_output=hidden_states.mean(dim=(2, 3))
        )


class CifarResNetForImageClassification(CifarResNetPreTrainedModel):
    """Image classifier: pixels in [0, 1] (B, C, H, W) -> `logits` (B, num_labels), cross-entropy with `labels`."""

    accepts_loss_kwargs = False

    def __init__(self, config: CifarResNetConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.linear = nn.Linear(config.hidden_sizes[-1], config.num_labels)
        self.post_init()

    @can_return_tuple
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> ImageClassifierOutputWithNoAttention:
        """
        Args:
            pixel_values: (B, C, H, W), pixels in [0, 1], noise included if there is any.
            labels: (B,) class indices; adds the cross-entropy loss.
        """
        logits = self.linear(self.features(pixel_values).mean(dim=(2, 3)))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


__all__ = ["CifarResNetForImageClassification", "CifarResNetModel", "CifarResNetPreTrainedModel"]
