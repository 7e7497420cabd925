# SPDX-License-Identifier: Apache-2.0
"""Reading the files of a checkpoint for the independent checker: JSON, the config, safetensors, the weights' hash.

The safetensors layout is read here byte by byte (8 bytes of header size, a JSON header, the data), so that bfloat16 is
exact, the hash is over the bytes on disk, and a damaged file is a reason instead of an exception.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


MODEL = "lipschitz_vision"
CONFIG_FILE = "config.json"
FLOAT_TYPES = ("float64", "float32", "bfloat16", "float16")
_LARGEST_IMAGE = 4096
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LARGEST_HEADER = 100_000_000
# name in the file: (torch's name, which the hash uses, and the numpy type of the raw items)
_DTYPES = {
    "F64": ("float64", "<f8"),
    "F32": ("float32", "<f4"),
    "F16": ("float16", "<f2"),
    "BF16": ("bfloat16", "<u2"),
    "I64": ("int64", "<i8"),
    "I32": ("int32", "<i4"),
    "I16": ("int16", "<i2"),
    "I8": ("int8", "i1"),
    "U8": ("uint8", "u1"),
    "BOOL": ("bool", "?"),
}
_NUMPY_TYPES = dict(_DTYPES.values())


class Refusal(Exception):  # noqa: N818
    """Why a checkpoint is not verified; the text names the file, field or tensor and what is wrong with it."""


class Reasons(list[str]):
    """The reasons found so far; the checkpoint is verified if there are none at the end."""

    def attempt(self, step: Callable[..., Any], *arguments: Any) -> Any:
        """The step's result, or None with its refusal noted."""
        try:
            return step(*arguments)
        except Refusal as refusal:
            self.append(str(refusal))
            return None

    def require(self, condition: bool, reason: str) -> None:
        """Note the reason unless the condition holds."""
        if not condition:
            self.append(reason)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in `file`: `dtype` is torch's name, `data` the raw little-endian bytes."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray

    def float64(self) -> np.ndarray:
        """The exact stored values in float64."""
        values = self.data.view(_NUMPY_TYPES[self.dtype])
        if self.dtype == "bfloat16":
            # a bfloat16 is the upper half of a float32
            values = (values.astype("<u4") << 16).view("<f4")
        return values.astype(np.float64).reshape(self.shape)


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    # readers differ in which of two equal keys they take, so none is taken
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r} appears twice")
        result[key] = value
    return result


def _parse_object(text: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{name}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise Refusal(f"{name}: must hold a JSON object")
    return value


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file; the refusal of a missing file ends with the remedy."""
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        raise Refusal(f"{path.name}: missing; {remedy}") from error
    except OSError as error:
        raise Refusal(f"{path.name}: cannot be read ({error.strerror})") from error
    return _parse_object(text, path.name)


def read_weights(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of model.safetensors, or of the shards that its index names, by name."""
    if (folder / "adapter_config.json").exists():
        raise Refusal(
            "adapter_config.json: transformers would add an adapter to these weights; merge it and certify again"
        )
    if (folder / WEIGHTS_FILE).exists():
        return _read_safetensors(folder / WEIGHTS_FILE)
    if (folder / INDEX_FILE).exists():
        return _read_shards(folder)
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickles:
        raise Refusal(
            f"{pickles[0]}: a pickle can run code when it is read, so it is not opened; load the model yourself and "
            f"save it with `save_pretrained`, which writes {WEIGHTS_FILE}"
        )
    raise Refusal(f"{WEIGHTS_FILE}: missing; save the model with `save_pretrained`")


def _read_shards(folder: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(folder / INDEX_FILE, "").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise Refusal(f"{INDEX_FILE}: weight_map must map tensor names to file names")
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise Refusal(f"{INDEX_FILE}: {file!r} is not the name of a safetensors file in the same folder")
        for name, tensor in _read_safetensors(folder / file).items():
            if weight_map.get(name) != file:
                raise Refusal(f"{file}: holds {name}, which {INDEX_FILE} places in {weight_map.get(name)!r}")
            tensors[name] = tensor
    if missing := sorted(set(weight_map) - set(tensors)):
        raise Refusal(f"{weight_map[missing[0]]}: tensor {missing[0]} is missing, {INDEX_FILE} places it there")
    return tensors


def _read_safetensors(path: Path) -> dict[str, StoredTensor]:
    try:
        content = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
    except OSError as error:
        raise Refusal(f"{path.name}: cannot be read ({error.strerror})") from error
    size = int.from_bytes(content[:8].tobytes(), "little")
    if len(content) < 8 or size > min(len(content) - 8, _LARGEST_HEADER):
        raise Refusal(f"{path.name}: not a safetensors file, or truncated in its header; copy or download it again")
    header = _parse_object(content[8 : 8 + size].tobytes(), f"{path.name} (header)")
    header.pop("__metadata__", None)
    data = content[8 + size :]
    tensors: dict[str, StoredTensor] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        start, end, dtype, shape = _parse_entry(entry, f"{path.name}: {name}")
        if end > len(data):
            raise Refusal(
                f"{path.name}: truncated, {name} ends at byte {end} of {len(data)}; copy or download it again"
            )
        spans.append((start, end))
        tensors[name] = StoredTensor(path.name, dtype, shape, np.ascontiguousarray(data[start:end]))
    spans.sort()
    ends = [0, *(end for _, end in spans)]
    if [start for start, _ in spans] != ends[:-1] or ends[-1] != len(data):
        raise Refusal(f"{path.name}: the tensors overlap or do not fill the file; copy or download it again")
    return tensors


def _sizes(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, list) or not all(type(size) is int and size >= 0 for size in value):
        return None
    return tuple(value)


def _parse_entry(entry: Any, where: str) -> tuple[int, int, str, tuple[int, ...]]:
    """Start, end, torch dtype name and shape of a header entry."""
    fields = entry if isinstance(entry, dict) else {}
    shape, offsets, code = _sizes(fields.get("shape")), _sizes(fields.get("data_offsets")), fields.get("dtype")
    if shape is None or offsets is None or len(offsets) != 2 or not isinstance(code, str):
        raise Refusal(f"{where} has a malformed header entry")
    if code not in _DTYPES:
        raise Refusal(f"{where} has dtype {code!r}, which the checker does not read")
    dtype, numpy_type = _DTYPES[code]
    if offsets[1] - offsets[0] != np.dtype(numpy_type).itemsize * math.prod(shape):
        raise Refusal(f"{where} has shape {list(shape)}, which its {offsets[1] - offsets[0]} bytes do not fit")
    return offsets[0], offsets[1], dtype, shape


def weights_hash(tensors: dict[str, StoredTensor]) -> str:
    """sha256 over the tensors sorted by name: name, dtype and shape, each ended by a zero byte, then the raw bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        for text in (name, tensor.dtype, ",".join(str(size) for size in tensor.shape)):
            digest.update(text.encode("utf-8") + b"\0")
        digest.update(tensor.data.data)
    return digest.hexdigest()


def _integer(minimum: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"an integer >= {minimum}")
        return value

    return parse


def _choice(*choices: str | None) -> Callable[[Any], str | None]:
    def parse(value: Any) -> str | None:
        if not (value is None or isinstance(value, str)) or value not in choices:
            raise ValueError("one of " + ", ".join("null" if choice is None else choice for choice in choices))
        return value

    return parse


def _optional(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else parse(value)


def _list(parse: Callable[[Any], Any]) -> Callable[[Any], tuple]:
    def parse_all(value: Any) -> tuple:
        if not isinstance(value, list) or not value:
            raise ValueError("a list with at least one entry")
        return tuple(parse(entry) for entry in value)

    return parse_all


def finite(value: Any) -> float:
    """A JSON number as a finite float; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("a number")
    try:
        number = float(value)
    except OverflowError as error:
        raise ValueError("a finite number") from error
    if not math.isfinite(number):
        raise ValueError("a finite number")
    return number


_NO_DEFAULT = object()
_FIELDS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "block_type": ("cpl", _choice("cpl", "sll", "aol", "sr")),
    "image_size": (32, _integer(1)),
    "num_channels": (3, _integer(1)),
    "hidden_sizes": ([45, 45, 45, 45], _list(_integer(1))),
    "depths": ([5, 5, 5, 5], _list(_integer(0))),
    "downsample_factors": ([1, 1, 1, 1], _list(_integer(1))),
    "downsample_type": ("pool", _choice("pool", "unshuffle")),
    "kernel_size": (3, _integer(1)),
    "padding_mode": ("zeros", _choice("zeros", "circular")),
    "conv_hidden_size": (5, _optional(_integer(1))),
    "pool_size": (4, _integer(1)),
    "dense_size": (None, _optional(_integer(1))),
    "num_dense_layers": (7, _integer(0)),
    "dense_hidden_size": (2048, _optional(_integer(1))),
    "hidden_act": ("relu", _choice("relu", "leaky_relu", "tanh", "sigmoid", "softplus")),
    "activation": (None, _choice(None, "maxmin", "householder", "relu")),
    "num_iterations": (None, _optional(_integer(1))),
    "image_mean": (_NO_DEFAULT, _list(finite)),
    "image_std": (_NO_DEFAULT, _list(finite)),
    "head_type": ("lln", _choice("lln", "spectral", "truncation")),
    "num_labels": (2, _integer(1)),
}


def parse_architecture(fields: Mapping[str, Any], source: str, complete: bool) -> dict[str, Any]:
    """The function-defining fields, validated; `source` names the file in reasons.

    With `complete` (the certificate's block) every field must be there and no other; without it (config.json) absent
    fields take the format's defaults, and fields that do not define the function are left alone.

    Raises:
        Refusal: a field is missing, unknown, or has a value that no rule covers.
    """
    if complete and (unknown := sorted(set(fields) - set(_FIELDS))):
        raise Refusal(f"{source}: unknown field {unknown[0]!r}, the checker has no rule for what it changes")
    values: dict[str, Any] = {}
    for name, (default, parse) in _FIELDS.items():
        if name not in fields and (complete or default is _NO_DEFAULT):
            raise Refusal(f"{source}: field {name!r} is missing")
        value = fields.get(name, default)
        try:
            values[name] = parse(value)
        except ValueError as error:
            raise Refusal(f"{source}: {name} is {value!r}, the checker has rules for {error} only") from error
    if values["num_iterations"] is None:
        values["num_iterations"] = 3 if values["block_type"] == "sr" else 1
    stages = len(values["hidden_sizes"])
    colours = values["num_channels"]
    lengths = {"depths": stages, "downsample_factors": stages, "image_mean": colours, "image_std": colours}
    for name, length in lengths.items():
        if len(values[name]) != length:
            raise Refusal(f"{source}: {name} has {len(values[name])} entries, {length} are needed")
    if min(values["image_std"]) <= 0.0:
        raise Refusal(f"{source}: image_std must be positive, got {list(values['image_std'])}")
    if values["kernel_size"] % 2 == 0:
        raise Refusal(f"{source}: kernel_size must be odd, got {values['kernel_size']}")
    if values["image_size"] > _LARGEST_IMAGE:
        raise Refusal(f"{source}: image_size {values['image_size']} is above the checker's limit of {_LARGEST_IMAGE}")
    return values


def read_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The function-defining fields of config.json, see `parse_architecture`."""
    if config.get("model_type") != MODEL:
        raise Refusal(f"{CONFIG_FILE}: model_type is {config.get('model_type')!r}, the checker walks {MODEL!r} only")
    if config.get("quantization_config") is not None:
        raise Refusal(f"{CONFIG_FILE}: quantization_config changes the weights on loading, so others would run")
    values = dict(config)
    # transformers writes the number of labels as the length of id2label, and neither for its default of 2
    if (labels := config.get("id2label")) is not None:
        if not isinstance(labels, dict):
            raise Refusal(f"{CONFIG_FILE}: id2label must be an object")
        if config.get("num_labels", len(labels)) != len(labels):
            raise Refusal(f"{CONFIG_FILE}: num_labels is {config['num_labels']!r}, id2label has {len(labels)} entries")
        values["num_labels"] = len(labels)
    return parse_architecture(values, CONFIG_FILE, complete=False)
