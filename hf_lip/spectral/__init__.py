# SPDX-License-Identifier: Apache-2.0
"""Spectral norms of layers and models."""

from .norms import spectral_norm, spectral_norms
from .regularizer import LipschitzRegularizer


__all__ = ["LipschitzRegularizer", "spectral_norm", "spectral_norms"]
