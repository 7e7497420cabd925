# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints of real architectures, with weights and statistics that are not their initial values."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)


def stirred(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """The model with batch norms as after training, and layers whose norms differ widely."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                shape = module.running_mean.shape
                module.running_mean.copy_(torch.randn(shape, generator=generator))
                module.running_var.copy_(torch.rand(shape, generator=generator) + 0.5)
                module.weight.copy_(torch.randn(shape, generator=generator))
                module.bias.copy_(torch.randn(shape, generator=generator))
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.ndim > 1:
                parameter.mul_(1.7 ** (index % 5))
            elif name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def resnet(layer_type: str = "basic", **options) -> PreTrainedModel:
    torch.manual_seed(1)
    sizes = [8, 16] if layer_type == "basic" else [16, 32]
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=sizes, depths=[1, 2], layer_type=layer_type, num_labels=4, **options
    )
    return stirred(ResNetForImageClassification(config))


def vit() -> PreTrainedModel:
    torch.manual_seed(2)
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, image_size=16, patch_size=4
    )
    return stirred(ViTForImageClassification(config))


def gpt2() -> PreTrainedModel:
    torch.manual_seed(3)
    config = GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0)
    return stirred(GPT2LMHeadModel(config))


class PlainNet(nn.Sequential):
    """A network without a transformers class: convolutions and linear layers, positively homogeneous in between."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, 5),
        )  # fmt: skip


def save_plain(model: nn.Module, folder: Path) -> Path:
    """A folder with model.safetensors and no config."""
    folder.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        folder / "model.safetensors",
        {"format": "pt", "origin": "made for a test"},
    )
    return folder
