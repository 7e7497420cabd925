# SPDX-License-Identifier: Apache-2.0
"""Statistics of randomized smoothing on tensors and callables; knows no model class."""

from hf_lip.smoothing.certify import ABSTAIN, SmoothingResult, certify_mono, samples_needed
from hf_lip.smoothing.intervals import clopper_pearson_lower, clopper_pearson_upper
from hf_lip.smoothing.noise import gaussian_noise, noisy_copies
from hf_lip.smoothing.radii import mono_radius


__all__ = [
    "ABSTAIN",
    "SmoothingResult",
    "certify_mono",
    "clopper_pearson_lower",
    "clopper_pearson_upper",
    "gaussian_noise",
    "mono_radius",
    "noisy_copies",
    "samples_needed",
]
