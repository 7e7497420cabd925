# SPDX-License-Identifier: Apache-2.0
"""Data sets as the scripts and the command line read them."""

from hf_lip.data.images import dataset_to_tensors, image_to_tensor, load_image_dataset


__all__ = ["dataset_to_tensors", "image_to_tensor", "load_image_dataset"]
