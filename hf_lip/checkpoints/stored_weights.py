# SPDX-License-Identifier: Apache-2.0
"""The tensors of a checkpoint on disk as a mapping, and their hash."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from ..models.certificate import weights_sha256
from .source import Checkpoint


__all__ = ["StoredTensors", "stored_weights_sha256"]


class StoredTensors(Mapping[str, Tensor]):
    """Tensors of a checkpoint by name, each read when it is asked for."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint

    def __getitem__(self, name: str) -> Tensor:
        return self.checkpoint.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint.names)

    def __len__(self) -> int:
        return len(self.checkpoint.names)


def stored_weights_sha256(folder: str | Path) -> str:
    """The hash by which certificates and results files know weights, of those in a folder.

    See `hf_lip.models.certificate.weights_sha256`: of names, dtypes, shapes and bytes, the same for any shards.

    Raises:
        FileNotFoundError, ValueError: as `Checkpoint.open`.
    """
    return weights_sha256(StoredTensors(Checkpoint.open(folder)))
