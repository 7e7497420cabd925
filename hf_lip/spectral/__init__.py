# SPDX-License-Identifier: Apache-2.0
"""Spectral norms of layers and models."""

from .norms import spectral_norm, spectral_norms


__all__ = ["spectral_norm", "spectral_norms"]
