# SPDX-License-Identifier: Apache-2.0
"""Functions on tensors: spectral norm bounds, certificates and rescalings of dense and convolutional weights."""

from .certified import (
    certified_conv_norm,
    certified_row_distances,
    certified_row_norms,
    certified_spectral_norm,
    round_up,
)
from .conv import conv_frequency_blocks, conv_grid_norm, conv_kernel_norm, conv_spectral_norm
from .conv_interval import conv_norm
from .exact import conv_matrix, exact_conv_norm, exact_spectral_norm
from .gram import gram_interval, gram_iteration
from .interval import SpectralNorm, dense_norm, dense_norms, low_rank_norm
from .power import conv_spectral_norm_estimate, spectral_norm_estimate
from .rescale import rescaling_factors
from .simplex import ScoreMap, sparsemax_scores


__all__ = [
    "ScoreMap",
    "SpectralNorm",
    "certified_conv_norm",
    "certified_row_distances",
    "certified_row_norms",
    "certified_spectral_norm",
    "conv_frequency_blocks",
    "conv_grid_norm",
    "conv_kernel_norm",
    "conv_matrix",
    "conv_norm",
    "conv_spectral_norm",
    "conv_spectral_norm_estimate",
    "dense_norm",
    "dense_norms",
    "exact_conv_norm",
    "exact_spectral_norm",
    "gram_interval",
    "gram_iteration",
    "low_rank_norm",
    "rescaling_factors",
    "round_up",
    "sparsemax_scores",
    "spectral_norm_estimate",
]
