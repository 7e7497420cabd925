# SPDX-License-Identifier: Apache-2.0
"""Models and data small enough for two processes on one core, the same in every process."""

import torch

from hf_lip import (
    ChacalConfig,
    ChacalForCausalLM,
    LipschitzVisionConfig,
    LipschitzVisionForImageClassification,
)


IMAGE_FIELDS = {
    "image_size": 8,
    "num_channels": 2,
    "hidden_sizes": [4, 6],
    "depths": [1, 1],
    "downsample_factors": [1, 2],
    "pool_size": 2,
    "num_dense_layers": 2,
    "dense_hidden_size": 12,
    "num_labels": 3,
    "image_mean": [0.3, 0.5],
}
TOKEN_FIELDS = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "layer_types": ["chained_attention", "full_attention"],
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def lipschitz(block_type: str = "cpl", **fields) -> LipschitzVisionForImageClassification:
    torch.manual_seed(0)
    return LipschitzVisionForImageClassification(
        LipschitzVisionConfig(**{**IMAGE_FIELDS, "block_type": block_type, **fields})
    ).eval()


def chacal(**fields) -> ChacalForCausalLM:
    torch.manual_seed(0)
    return ChacalForCausalLM(ChacalConfig(**{**TOKEN_FIELDS, **fields})).eval()


def pixels(batch: int = 5) -> torch.Tensor:
    return torch.rand(batch, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def tokens(batch: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(3, 40, (batch, length), generator=torch.Generator().manual_seed(1))


def images(count: int = 32) -> list[dict]:
    """Rows for `Trainer`."""
    return [{"pixel_values": image, "labels": index % 3} for index, image in enumerate(pixels(count))]


def image_batch() -> dict[str, torch.Tensor]:
    return {"pixel_values": pixels(8), "labels": torch.arange(8) % 3}


def token_rows(count: int = 32) -> list[dict]:
    return [{"input_ids": row, "labels": row} for row in tokens(count)]
