# SPDX-License-Identifier: Apache-2.0
"""Any safetensors checkpoint, one tensor at a time: a folder, a sharded folder, a single file, a Hub repository.

Nothing is unpickled and no code of a repository is run. Files are checked when they are opened: a truncated file, an
index that disagrees with its shards or a tensor stored twice is an error before the first tensor is read.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..models.certified_model import PICKLE_SUFFIXES, finish_interrupted_save


CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
SUFFIX = ".safetensors"
# name in the file -> torch's; what is not here (block formats, types torch does not have) is never read
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
# called as progress(files opened, number of files, name of the file)
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class StoredTensor:
    """Header entry of a tensor: where it lies, its dtype as the file names it ("F32", "BF16"), shape and size."""

    file: Path
    code: str
    shape: tuple[int, ...]
    num_bytes: int


class Checkpoint:
    """Names, shapes and dtypes of a checkpoint's tensors, and the tensors one by one.

    Made by `Checkpoint.open`. Between two calls nothing of the files is held in memory but their headers.

    Attributes:
        folder: where the files lie; for a Hub repository the snapshot in the local cache.
        files: the safetensors files, in the order of their names.
        names: tensor names in the order in which they are stored.
        config: content of config.json beside the files, None where there is none.
    """

    def __init__(self, folder: Path, files: list[Path], entries: dict[str, StoredTensor], config: dict | None):
        self.folder = folder
        self.files = files
        self.names = list(entries)
        self.config = config
        self._entries = entries

    @classmethod
    def open(
        cls,
        model: str | os.PathLike,
        revision: str | None = None,
        token: str | bool | None = None,
        progress: Progress | None = None,
    ) -> "Checkpoint":
        """Find the files, download them where needed, and check their headers.

        Args:
            model: a folder with model.safetensors, with shards and their index, or with one other safetensors file;
                a safetensors file; or the id of a Hub repository, of which safetensors and JSON files are fetched.
            revision: of the Hub repository: branch, tag or commit.
            token: for a private Hub repository; by default the one saved by `hf auth login`.
            progress: called as progress(opened, total, file) before each file and once at the end.

        Raises:
            FileNotFoundError: no such file or folder, or a shard is missing.
            ValueError: pickles only, several checkpoints in one folder, a file that is truncated or not safetensors,
                an index that disagrees with its shards, a tensor stored twice, no tensors at all.
            OSError: from `huggingface_hub`: no such repository or revision, no network.
        """
        path = Path(model).expanduser()
        if path.is_file():
            _require_safetensors(path)
            folder, files, weight_map = path.parent, [path], None
        else:
            folder = path if path.is_dir() else _download(str(model), revision, token)
            finish_interrupted_save(folder)
            files, weight_map = _find_files(folder)
        entries: dict[str, StoredTensor] = {}
        for index, file in enumerate(files):
            if progress is not None:
                progress(index, len(files), file.name)
            for name, entry in _read_header(file).items():
                if name in entries:
                    raise ValueError(
                        f"{name} is stored twice, in {entries[name].file.name} and in {file.name}: which one is meant "
                        "cannot be known. Save the model again."
                    )
                entries[name] = entry
        if progress is not None:
            progress(len(files), len(files), "")
        if weight_map is not None:
            _require_agreement(weight_map, entries, folder)
        if not entries:
            raise ValueError(f"{files[0]} holds no tensors: save the model again.")
        return cls(folder, files, entries, _read_config(folder))

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def _entry(self, name: str) -> StoredTensor:
        if name not in self._entries:
            raise KeyError(f"{name!r} is not a tensor of the checkpoint in {self.folder}.")
        return self._entries[name]

    def file(self, name: str) -> Path:
        """The safetensors file that holds the tensor."""
        return self._entry(name).file

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor, without reading it."""
        return self._entry(name).shape

    def stored_dtype(self, name: str) -> str:
        """The dtype as the file names it, such as "F32" or "F8_E4M3"; also for types that torch does not have."""
        return self._entry(name).code

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of the tensor, without reading it.

        Raises:
            ValueError: torch has no such type.
        """
        code = self._entry(name).code
        if code not in DTYPES:
            raise ValueError(f"{name} is stored as {code}, a type that torch cannot hold: convert the checkpoint.")
        return DTYPES[code]

    def num_bytes(self, name: str) -> int:
        """Bytes the tensor takes in its file."""
        return self._entry(name).num_bytes

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, on the CPU, in memory of its own.

        Raises:
            KeyError: no such tensor.
            ValueError: torch has no such type, or the file was damaged or replaced since it was opened.
        """
        self.dtype(name)
        file = self._entry(name).file
        try:
            # opened afresh each time: pages that a mapping has touched stay in memory as long as it lives
            with safe_open(file, framework="pt", device="cpu") as content:
                return content.get_tensor(name).clone()
        except SafetensorError as error:
            raise ValueError(f"{name} cannot be read from {file} ({error}): copy or download it again.") from error


def _require_safetensors(path: Path) -> None:
    if path.suffix in PICKLE_SUFFIXES:
        raise ValueError(
            f"{path} is a pickle, which can run code when it is read, so it is not opened: convert the weights with "
            "`safetensors.torch.save_file` in an environment you trust."
        )
    if path.name.endswith(INDEX_SUFFIX):
        raise ValueError(f"{path} is the index of a sharded checkpoint: give its folder.")
    if path.suffix != SUFFIX:
        raise ValueError(f"{path} is not named *{SUFFIX}: give a safetensors file, a folder or a Hub id.")


def _download(model: str, revision: str | None, token: str | bool | None) -> Path:
    """Fetch the JSON files of a Hub repository, then the weights that they name, all of one commit."""
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise FileNotFoundError(f"{model!r} does not exist: give a checkpoint's folder or file, or a Hub id.")

    commit = revision

    def fetch(*patterns: str) -> Path:
        kept: Any = {"allow_patterns": list(patterns), "ignore_patterns": ["*/*"]}
        return Path(snapshot_download(model, revision=commit, token=token, **kept))

    folder = fetch("*.json")
    # a snapshot is named after its commit: weights and index are of the same one whatever is pushed in between
    commit = folder.name
    index = folder / f"{WEIGHTS_FILE}.index.json"
    if index.is_file():
        return fetch(*sorted(set(_read_index(index).values())))
    folder = fetch(WEIGHTS_FILE)
    if not (folder / WEIGHTS_FILE).is_file():
        folder = fetch(f"*{SUFFIX}")
    if not any(folder.glob(f"*{SUFFIX}")):
        raise ValueError(
            f"{model} holds no safetensors file in its top folder: pickles can run code when they are read and are "
            "not fetched. Convert the weights with `safetensors.torch.save_file` in an environment you trust."
        )
    return folder


def _find_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a folder and, if they are shards, which tensor the index places where."""
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE], None
    preferred = folder / f"{WEIGHTS_FILE}.index.json"
    indices = [preferred] if preferred.is_file() else sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if len(indices) > 1:
        raise ValueError(f"{folder} holds several checkpoints ({_listing(indices)}): move the one you mean elsewhere.")
    if indices:
        weight_map = _read_index(indices[0])
        files = [folder / name for name in sorted(set(weight_map.values()))]
        if missing := [file for file in files if not file.is_file()]:
            raise FileNotFoundError(
                f"{indices[0].name} in {folder} names files that are not there: {_listing(missing)}. Copy or "
                "download them."
            )
        return files, weight_map
    files = sorted(folder.glob(f"*{SUFFIX}"))
    if len(files) == 1:
        return files, None
    if files:
        raise ValueError(f"{folder} holds several safetensors files without an index ({_listing(files)}): give one.")
    pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ValueError(
            f"{folder} holds no safetensors file, only pickles ({_listing(pickles)}), which can run code when they "
            "are read and are not opened: convert the weights with `safetensors.torch.save_file` in an environment "
            "you trust."
        )
    raise ValueError(f"{folder} holds no safetensors file: give the folder that `save_pretrained` wrote.")


def _listing(paths: Iterable[Path]) -> str:
    names = [path.name for path in paths]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): copy or download it again.") from error


def _read_config(folder: Path) -> dict | None:
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    config = _read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object: copy or download it again.")
    return config


def _read_index(path: Path) -> dict[str, str]:
    content = _read_json(path)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{path}: `weight_map` must map tensor names to file names.")
    if not weight_map:
        raise ValueError(f"{path} names no tensors: save the model again.")
    for file in set(weight_map.values()):
        # an index must not reach out of its folder, nor to a pickle
        if Path(file).name != file or not file.endswith(SUFFIX):
            raise ValueError(f"{path}: {file!r} is not the name of a safetensors file in the same folder.")
    return weight_map


def _require_agreement(weight_map: dict[str, str], entries: dict[str, StoredTensor], folder: Path) -> None:
    for name, file in weight_map.items():
        if name not in entries or entries[name].file.name != file:
            found = f"it is in {entries[name].file.name}" if name in entries else "no file has it"
            raise ValueError(f"The index in {folder} places {name} in {file}, but {found}: save the model again.")
    for name, entry in entries.items():
        if name not in weight_map:
            raise ValueError(
                f"{entry.file.name} holds {name}, which the index in {folder} does not name: save the model again."
            )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        # readers differ in which of two equal keys they take
        if key in result:
            raise ValueError(f"{key!r} is stored twice")
        result[key] = value
    return result


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Header entries in the order of the data; the library has checked them against the file's size before."""
    try:
        with safe_open(path, framework="pt", device="cpu"):
            pass
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size), object_pairs_hook=_unique)
    except (SafetensorError, ValueError) as error:
        with open(path, "rb") as file:
            pointer = file.read(64).startswith(b"version https://git-lfs")
        cause = "a pointer of git LFS, not the file itself" if pointer else "truncated, damaged or not safetensors"
        raise ValueError(f"{path} is {cause} ({error}): copy or download it again.") from error
    header.pop("__metadata__", None)
    ordered = sorted(header.items(), key=lambda item: (item[1]["data_offsets"], item[0]))
    return {
        name: StoredTensor(
            path, entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0]
        )
        for name, entry in ordered
    }
