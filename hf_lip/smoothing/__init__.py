# SPDX-License-Identifier: Apache-2.0
"""Statistics of randomized smoothing on tensors and callables; knows no model class."""

from hf_lip.smoothing.certify import SmoothingResult, certify_image, certify_images, predict_images
from hf_lip.smoothing.denoise import DiffusionDenoiser, noise_timestep
from hf_lip.smoothing.engine import Sampler
from hf_lip.smoothing.exact_noise import GridNoise
from hf_lip.smoothing.intervals import clopper_pearson_lower, clopper_pearson_upper
from hf_lip.smoothing.noise import GaussianNoise, gaussian_noise, noisy_copies
from hf_lip.smoothing.radii import mono_radius
from hf_lip.smoothing.samples import ABSTAIN
from hf_lip.smoothing.settings import SmoothingSettings, samples_needed


__all__ = [
    "ABSTAIN",
    "DiffusionDenoiser",
    "GaussianNoise",
    "GridNoise",
    "Sampler",
    "SmoothingResult",
    "SmoothingSettings",
    "certify_image",
    "certify_images",
    "clopper_pearson_lower",
    "clopper_pearson_upper",
    "gaussian_noise",
    "mono_radius",
    "noise_timestep",
    "noisy_copies",
    "predict_images",
    "samples_needed",
]
