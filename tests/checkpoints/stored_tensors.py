# SPDX-License-Identifier: Apache-2.0
"""Checkpoints made of bare tensors, and what every description of one has to hold."""

import json

import torch
from safetensors.torch import save_file

from hf_lip.checkpoints.source import Checkpoint


def stored(folder, tensors, config=None):
    """A checkpoint without a model: tensors given as shapes."""
    tensors = {
        name: value if isinstance(value, torch.Tensor) else torch.randn(value) for name, value in tensors.items()
    }
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(folder)


def by_name(layers):
    assert len({layer.name for layer in layers}) == len(layers)
    return {layer.name: layer for layer in layers}


def require_complete(checkpoint, description):
    """Every tensor in one layer, or in the rest with a reason."""
    counted = [tensor for layer in description.layers if not layer.tied for tensor in layer.tensors]
    assert len(counted) == len(set(counted))
    assert set(counted) | set(description.rest) == set(checkpoint.names)
    assert not set(counted) & set(description.rest)
    assert all(description.rest.values())
