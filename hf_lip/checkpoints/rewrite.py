# SPDX-License-Identifier: Apache-2.0
"""A copy of a checkpoint in which tensors are replaced by others of the same dtype and shape, all or nothing.

The safetensors files are copied as they are and patched in place: names, order, dtypes, shards and metadata are the
bytes of the original's headers, and one tensor at a time is in memory.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor

from ..models.certificate import CERTIFICATE_NAME
from .source import INDEX_SUFFIX, Checkpoint


CARD_NAME = "README.md"
# weights in other formats would still be the old ones
WEIGHT_PATTERNS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.npz"),
    *("*.ot", "*.tflite", "*.mlmodel", "*.index.json"),
)
# statements that were true of the old weights
_STALE = (CERTIFICATE_NAME, CARD_NAME, "rescale_report.json", "*results.json", "trainer_state.json", "*.log")


class CheckpointCopy:
    """The copy that is being made, in a hidden folder beside `out` until `commit` renames it.

    As a context manager it removes the hidden folder when an error, or no commit, ends the block.

    Attributes:
        folder: where the copy lies now.
        left_out: names of files and folders of the original that are not in the copy.
    """

    def __init__(self, checkpoint: Checkpoint, out: str | os.PathLike):
        """
        Raises:
            FileExistsError: something is at `out` already; nothing is ever overwritten.
            OSError: not enough room on the disk, or no right to write.
        """
        self.out = Path(out).expanduser().absolute()
        require_free(self.out)
        self.checkpoint = checkpoint
        self.left_out: list[str] = []
        self._offsets = {file: _data_offsets(file) for file in checkpoint.files}
        self.out.parent.mkdir(parents=True, exist_ok=True)
        _require_room(self.out.parent, sum(file.stat().st_size for file in checkpoint.files))
        self.folder = self.out.parent / f".{self.out.name}.{secrets.token_hex(4)}"

    def __enter__(self) -> "CheckpointCopy":
        self.folder.mkdir()
        try:
            self._copy_files()
            self.stored = Checkpoint.open(self.folder)
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # gone already if the copy was committed
        shutil.rmtree(self.folder, ignore_errors=True)

    def _copy_files(self) -> None:
        weights = {file.name for file in self.checkpoint.files}
        for path in sorted(self.checkpoint.folder.iterdir()):
            wanted = not any(fnmatch(path.name, pattern) for pattern in (*WEIGHT_PATTERNS, *_STALE, ".*"))
            if path.name in weights or (path.is_file() and (wanted or _is_index(path, weights))):
                # content only: files of the Hub's cache are links, and read-only
                shutil.copyfile(path, self.folder / path.name)
            elif not path.name.startswith("."):
                self.left_out.append(path.name)

    def write(self, name: str, tensor: Tensor) -> None:
        """Replace a tensor.

        Raises:
            ValueError: another shape or dtype than the stored one.
        """
        shape, dtype = self.checkpoint.shape(name), self.checkpoint.dtype(name)
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(f"{name} is {dtype} {shape}, not {tensor.dtype} {tuple(tensor.shape)}.")
        file = self.checkpoint.file(name)
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        with open(self.folder / file.name, "r+b") as target:
            target.seek(self._offsets[file][name])
            target.write(data)

    def read(self, name: str) -> Tensor:
        """The tensor as it now lies in the copy's file."""
        return self.stored.tensor(name)

    def hashes(self) -> dict[str, str]:
        """sha256 of each safetensors file of the copy."""
        result = {}
        for file in self.checkpoint.files:
            with open(self.folder / file.name, "rb") as content:
                result[file.name] = hashlib.file_digest(content, "sha256").hexdigest()
        return result

    def commit(self) -> None:
        """Put the finished folder in place with one rename.

        Raises:
            FileExistsError: something appeared at `out` in the meantime.
        """
        for path in self.folder.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        require_free(self.out)
        os.rename(self.folder, self.out)
        parent = os.open(self.out.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)


def require_free(out: Path) -> None:
    """Raise FileExistsError if there is anything at `out`."""
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"`out` {str(out)!r} exists, and nothing is overwritten: choose a new folder.")


def _require_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(
            errno.ENOSPC, f"The copy needs {size / 1e6:.0f} MB, but {folder} has {free / 1e6:.0f} MB left on its disk"
        )


def _data_offsets(file: Path) -> dict[str, int]:
    """Where the bytes of each tensor begin in a safetensors file."""
    with open(file, "rb") as content:
        size = int.from_bytes(content.read(8), "little")
        header = json.loads(content.read(size))
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _is_index(path: Path, weights: set[str]) -> bool:
    """Whether it is the index of these very shards."""
    if not path.name.endswith(INDEX_SUFFIX):
        return False
    return set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()) == weights
