# SPDX-License-Identifier: Apache-2.0
"""Pieces of the training scripts: losses, noise, schedules, batches, evaluated copies, the files of a run."""

from .augment import ImageBatches, compact_pixels, crop_and_flip, epoch_generator, to_float_pixels
from .averaging import EvaluationCopy
from .losses import emma_loss, margin_cross_entropy, multi_margin_loss, pairwise_row_distances
from .noise import consistency_loss, noisy_pixels, smoothed_attack, step_noise
from .schedules import LEARNING_RATE_SCHEDULES, constant, linear_ramp, one_cycle, triangular


__all__ = [
    "LEARNING_RATE_SCHEDULES",
    "EvaluationCopy",
    "ImageBatches",
    "compact_pixels",
    "consistency_loss",
    "constant",
    "crop_and_flip",
    "emma_loss",
    "epoch_generator",
    "linear_ramp",
    "margin_cross_entropy",
    "multi_margin_loss",
    "noisy_pixels",
    "one_cycle",
    "pairwise_row_distances",
    "smoothed_attack",
    "step_noise",
    "to_float_pixels",
    "triangular",
]
