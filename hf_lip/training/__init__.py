# SPDX-License-Identifier: Apache-2.0
"""Pieces of the training scripts: losses, schedules, batches from memory, the evaluated copy, the files of a run."""

from .augment import ImageBatches, compact_pixels, crop_and_flip, epoch_generator, to_float_pixels
from .averaging import EvaluationCopy
from .losses import emma_loss, margin_cross_entropy, multi_margin_loss, pairwise_row_distances
from .schedules import LEARNING_RATE_SCHEDULES, constant, linear_ramp, one_cycle, triangular


__all__ = [
    "LEARNING_RATE_SCHEDULES",
    "EvaluationCopy",
    "ImageBatches",
    "compact_pixels",
    "constant",
    "crop_and_flip",
    "emma_loss",
    "epoch_generator",
    "linear_ramp",
    "margin_cross_entropy",
    "multi_margin_loss",
    "one_cycle",
    "pairwise_row_distances",
    "to_float_pixels",
    "triangular",
]
