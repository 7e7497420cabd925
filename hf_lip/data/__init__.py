# SPDX-License-Identifier: Apache-2.0
"""Data sets as the scripts and the command line read them."""

from hf_lip.data.boxes import BoxesTask
from hf_lip.data.chains import ChainsTask, RandomChainsTask, embed_statements
from hf_lip.data.entity_files import load_babi, load_boxes, load_propara
from hf_lip.data.generation import tracking_dataset
from hf_lip.data.images import dataset_to_tensors, image_to_tensor, load_image_dataset
from hf_lip.data.permutations import PermutationsTask
from hf_lip.data.tracking_tokenizer import (
    TrackingCollator,
    add_words,
    encode_answers,
    tracking_tokenizer,
    unknown_words,
    words_of,
)


__all__ = [
    "BoxesTask",
    "ChainsTask",
    "PermutationsTask",
    "RandomChainsTask",
    "TrackingCollator",
    "add_words",
    "dataset_to_tensors",
    "embed_statements",
    "encode_answers",
    "image_to_tensor",
    "load_babi",
    "load_boxes",
    "load_image_dataset",
    "load_propara",
    "tracking_dataset",
    "tracking_tokenizer",
    "unknown_words",
    "words_of",
]
