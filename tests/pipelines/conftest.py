# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification


@pytest.fixture(scope="session")
def resnet():
    """Four classes, 3 channels, any size; a classifier that is sensitive enough for votes to differ."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=4, layer_type="basic")
    model = ResNetForImageClassification(config)
    with torch.no_grad():
        model.classifier[1].weight.mul_(20.0)
    return model.eval()


@pytest.fixture(scope="session")
def vit():
    """Four classes, 3 channels, 8x8."""
    torch.manual_seed(1)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_labels=4, initializer_range=0.5,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


@pytest.fixture
def images():
    """Three images (3, 8, 8) in [0, 1]."""
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
