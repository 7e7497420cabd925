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
from .exact import conv_matrix, exact_conv_norm, exact_spectral_norm
from .gram import gram_iteration
from .power import conv_spectral_norm_estimate, spectral_norm_estimate
from .rescale import rescaling_factors


__all__ = [
    "certified_conv_norm",
    "certified_row_distances",
    "certified_row_norms",
    "certified_spectral_norm",
    "conv_frequency_blocks",
    "conv_grid_norm",
    "conv_kernel_norm",
    "conv_matrix",
    "conv_spectral_norm",
    "conv_spectral_norm_estimate",
    "exact_conv_norm",
    "exact_spectral_norm",
    "gram_iteration",
    "rescaling_factors",
    "round_up",
    "spectral_norm_estimate",
]
