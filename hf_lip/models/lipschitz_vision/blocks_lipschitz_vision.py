# SPDX-License-Identifier: Apache-2.0
"""The parts of a lipschitz_vision network: blocks, stages, neck. Each names its nodes in forward order."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ...layers.activations import ACTIVATIONS
from ...layers.base import LipschitzModule
from ...layers.linear import AOLConv2d, AOLLinear, SRConv2d, SRLinear
from ...layers.residual import CPLConv2d, CPLLinear, SLLConv2d, SLLLinear
from ...layers.shape import Flatten, PixelUnshuffle, SumPool2d, match_channels
from .configuration_lipschitz_vision import LipschitzVisionConfig


Nodes = Iterator[tuple[str, LipschitzModule]]


def conv_layer(config: LipschitzVisionConfig, channels: int, image_size: int) -> LipschitzModule:
    """The convolutional layer of a block, channels -> channels at `image_size`."""
    geometry: dict[str, Any] = {"kernel_size": config.kernel_size, "padding_mode": config.padding_mode}
    hidden = config.conv_hidden_size or channels
    if config.block_type == "cpl":
        return CPLConv2d(channels, hidden, image_size, activation=config.hidden_act, **geometry)
    if config.block_type == "sll":
        iterations = config.num_iterations
        return SLLConv2d(
            channels, hidden, image_size, activation=config.hidden_act, num_iterations=iterations, **geometry
        )
    if config.block_type == "aol":
        return AOLConv2d(channels, channels, image_size, **geometry)
    return SRConv2d(channels, channels, image_size, num_iterations=config.num_iterations, **geometry)


def dense_layer(config: LipschitzVisionConfig, features: int) -> LipschitzModule:
    """The dense layer of a block, features -> features."""
    hidden = config.dense_hidden_size or features
    if config.block_type == "cpl":
        return CPLLinear(features, hidden, activation=config.hidden_act)
    if config.block_type == "sll":
        return SLLLinear(features, hidden, activation=config.hidden_act, num_iterations=config.num_iterations)
    if config.block_type == "aol":
        return AOLLinear(features, features)
    return SRLinear(features, features, num_iterations=config.num_iterations)


class LipschitzVisionBlock(GradientCheckpointingLayer):
    """A layer, then the activation if the config has one."""

    def __init__(self, config: LipschitzVisionConfig, layer: LipschitzModule, num_channels: int):
        super().__init__()
        self.layer = layer
        name = config.block_activation
        self.activation = None if name is None else ACTIVATIONS[name](num_channels)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.layer(hidden_states)
        return hidden_states if self.activation is None else self.activation(hidden_states)

    def nodes(self) -> Nodes:
        yield "layer", self.layer
        if self.activation is not None:
            yield "activation", self.activation


def block_nodes(blocks: nn.ModuleList) -> Nodes:
    for index, block in enumerate(blocks):
        for name, node in block.nodes():  # type: ignore[operator]
            yield f"blocks.{index}.{name}", node


class LipschitzVisionStage(nn.Module):
    """Downsampling, change of width, blocks: (B, C, H, W) -> (B, hidden_sizes[i], H / f, W / f)."""

    def __init__(self, config: LipschitzVisionConfig, index: int, in_channels: int, in_size: int):
        super().__init__()
        factor = config.downsample_factors[index]
        channels = config.hidden_sizes[index]
        self.downsample: LipschitzModule | None = None
        if factor > 1:
            pool = config.downsample_type == "pool"
            self.downsample = SumPool2d(factor) if pool else PixelUnshuffle(factor)
            in_channels *= 1 if pool else factor**2
        self.channels = match_channels(in_channels, channels)
        self.blocks = nn.ModuleList(
            LipschitzVisionBlock(config, conv_layer(config, channels, in_size // factor), channels)
            for _ in range(config.depths[index])
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.downsample is not None:
            hidden_states = self.downsample(hidden_states)
        if self.channels is not None:
            hidden_states = self.channels(hidden_states)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states

    def nodes(self) -> Nodes:
        if self.downsample is not None:
            yield "downsample", self.downsample
        if self.channels is not None:
            yield "channels", self.channels
        yield from block_nodes(self.blocks)


class LipschitzVisionNeck(nn.Module):
    """Sum pooling, flattening, change of width, dense blocks: (B, C, H, W) -> (B, feature_size)."""

    def __init__(self, config: LipschitzVisionConfig):
        super().__init__()
        self.pool = SumPool2d(config.pool_size) if config.pool_size > 1 else None
        self.flatten = Flatten()
        features = config.feature_size
        self.channels = match_channels(config.flattened_size, features)
        self.blocks = nn.ModuleList(
            LipschitzVisionBlock(config, dense_layer(config, features), features)
            for _ in range(config.num_dense_layers)
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.pool is not None:
            hidden_states = self.pool(hidden_states)
        hidden_states = self.flatten(hidden_states)
        if self.channels is not None:
            hidden_states = self.channels(hidden_states)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states

    def nodes(self) -> Nodes:
        if self.pool is not None:
            yield "pool", self.pool
        yield "flatten", self.flatten
        if self.channels is not None:
            yield "channels", self.channels
        yield from block_nodes(self.blocks)


def build_stages(config: LipschitzVisionConfig) -> nn.ModuleList:
    stages = nn.ModuleList()
    channels, size = config.num_channels, config.image_size
    for index, factor in enumerate(config.downsample_factors):
        stages.append(LipschitzVisionStage(config, index, channels, size))
        channels, size = config.hidden_sizes[index], size // factor
    return stages
