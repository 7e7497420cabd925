# SPDX-License-Identifier: Apache-2.0
"""1-Lipschitz layers: plain weights, certified bounds."""

from .activations import GroupSort, Householder, MaxMin, ReLU
from .base import LipschitzModule, RescaledModule
from .heads import NormalizedRowsHead, SpectralNormalizedHead, TruncationHead, certified_radius
from .linear import AOLConv2d, AOLLinear, SRConv2d, SRLinear
from .residual import CPLConv2d, CPLLinear, SLLConv2d, SLLLinear
from .shape import ChannelPadding, ChannelProjection, Flatten, InputNormalization, MaxPool2d, PixelUnshuffle, SumPool2d


__all__ = [
    "AOLConv2d",
    "AOLLinear",
    "CPLConv2d",
    "CPLLinear",
    "ChannelPadding",
    "ChannelProjection",
    "Flatten",
    "GroupSort",
    "Householder",
    "InputNormalization",
    "LipschitzModule",
    "MaxMin",
    "MaxPool2d",
    "NormalizedRowsHead",
    "PixelUnshuffle",
    "ReLU",
    "RescaledModule",
    "SLLConv2d",
    "SLLLinear",
    "SRConv2d",
    "SRLinear",
    "SpectralNormalizedHead",
    "SumPool2d",
    "TruncationHead",
    "certified_radius",
]
