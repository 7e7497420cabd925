# SPDX-License-Identifier: Apache-2.0
"""Checkpoints made by hand for the tests of the checker: numpy, explicit matrices and their SVDs, no model class."""

import hashlib
import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from scipy.signal import correlate2d


CONFIG: dict[str, Any] = {
    "block_type": "cpl",
    "image_size": 8,
    "num_channels": 2,
    "hidden_sizes": [3, 4],
    "depths": [1, 1],
    "downsample_factors": [1, 2],
    "downsample_type": "pool",
    "kernel_size": 3,
    "padding_mode": "zeros",
    "conv_hidden_size": 2,
    "pool_size": 2,
    "dense_size": 6,
    "num_dense_layers": 1,
    "dense_hidden_size": 5,
    "hidden_act": "relu",
    "activation": None,
    "num_iterations": 1,
    "image_mean": [0.5, 0.25],
    "image_std": [1.0, 1.0],
    "head_type": "lln",
    "num_labels": 4,
}
# covers the rounding of a rescaling to float32
UP = 1 + 2.0**-20


def conv_matrix(kernel: np.ndarray, side: int, wrap: bool) -> np.ndarray:
    """The operator of a "same" convolution on side x side, zero-padded or circular, entry by entry."""
    rows, columns, k, _ = kernel.shape
    matrix = np.zeros((rows, side, side, columns, side, side))
    for x, y, i, j in itertools.product(range(side), range(side), range(k), range(k)):
        u, v = x + i - k // 2, y + j - k // 2
        if wrap:
            u, v = u % side, v % side
        if 0 <= u < side and 0 <= v < side:
            matrix[:, x, y, :, u, v] += kernel[:, :, i, j]
    return matrix.reshape(rows * side**2, columns * side**2)


def operator(weight: np.ndarray, side: int | None, padding_mode: str) -> np.ndarray:
    """The matrix that the layer applies."""
    return weight if side is None else conv_matrix(weight, side, padding_mode == "circular")


def stated_norm(weight: np.ndarray, side: int | None, padding_mode: str) -> float:
    """The norm that the format asks for: dense, or on the torus that contains the zero-padded operator."""
    if side is None:
        return float(np.linalg.norm(weight, 2))
    torus = side + weight.shape[2] // 2 if padding_mode == "zeros" else side
    return float(np.linalg.norm(conv_matrix(weight, torus, wrap=True), 2))


def absolute_gram(weight: np.ndarray) -> np.ndarray:
    """|W W^T|, or for a kernel the absolute autocorrelation summed over space."""
    if weight.ndim == 2:
        return np.abs(weight @ weight.T)
    rows, columns = weight.shape[:2]
    gram = np.zeros((rows, rows))
    for i, j in itertools.product(range(rows), range(rows)):
        gram[i, j] = np.abs(sum(correlate2d(weight[i, c], weight[j, c]) for c in range(columns))).sum()
    return gram


def layers_of(config: dict[str, Any]) -> list[tuple[str, int, int, int | None]]:
    """(prefix, channels, hidden, side) of every block."""
    side, blocks = config["image_size"], []
    for i, width in enumerate(config["hidden_sizes"]):
        side //= config["downsample_factors"][i]
        for j in range(config["depths"][i]):
            hidden = config["conv_hidden_size"] or width
            blocks.append((f"lipschitz_vision.stages.{i}.blocks.{j}", width, hidden, side))
    width = features_of(config)
    for j in range(config["num_dense_layers"]):
        blocks.append((f"lipschitz_vision.neck.blocks.{j}", width, config["dense_hidden_size"] or width, None))
    return blocks


def features_of(config: dict[str, Any]) -> int:
    side = config["image_size"] // math.prod(config["downsample_factors"]) // config["pool_size"]
    return config["dense_size"] or config["hidden_sizes"][-1] * side**2


def scale(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """One number per output channel, shaped to multiply the weight."""
    return values.reshape(-1, *[1] * (weight.ndim - 1))


def effective(block_type: str, weight: np.ndarray, rescaling: np.ndarray) -> np.ndarray:
    """T^-1/2 K of the residual layers, W / R of the linear ones."""
    if block_type == "aol":
        return (weight.swapaxes(0, 1) / scale(rescaling, weight)).swapaxes(0, 1)
    return weight / scale(rescaling if block_type == "sr" else np.sqrt(rescaling), weight)


@dataclass
class Checkpoint:
    """What the files will hold; tests change it before `save`."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    certificate: dict[str, Any] = field(default_factory=dict)

    def array(self, name: str) -> np.ndarray:
        return self.tensors[name].double().numpy()

    def layer(self, name: str) -> dict[str, Any]:
        return next(layer for layer in self.certificate["layers"] if layer["name"] == name)

    def set_field(self, **fields: Any) -> None:
        """Change config and certificate alike."""
        self.config.update(fields)
        self.certificate["architecture"].update(fields)

    def rehash(self) -> None:
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            shape = ",".join(str(size) for size in tensor.shape)
            digest.update(f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{shape}\0".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        self.certificate["weights_sha256"] = digest.hexdigest()

    def save(self, folder: Path, rehash: bool = True) -> Path:
        if rehash:
            self.rehash()
        config = {key: value for key, value in self.config.items() if key != "num_labels"}
        labels = {str(i): f"LABEL_{i}" for i in range(self.config["num_labels"])}
        dtype = self.certificate["dtype"]
        config |= {"model_type": "lipschitz_vision", "id2label": labels, "dtype": dtype, "architectures": ["X"]}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "lipschitz_certificate.json").write_text(json.dumps(self.certificate))
        safetensors.torch.save_file(self.tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder


def make_tensors(config: dict[str, Any], dtype: torch.dtype, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}

    def store(name: str, values: np.ndarray) -> np.ndarray:
        tensors[name] = torch.tensor(values).to(dtype)
        return tensors[name].double().numpy()

    kind, k = config["block_type"], config["kernel_size"]
    for prefix, channels, hidden, side in layers_of(config):
        rows = hidden if kind in ("cpl", "sll") else channels
        shape = (rows, channels) if side is None else (rows, channels, k, k)
        # uneven rows and columns, so that the two axes can not be exchanged
        spread = np.exp(rng.normal(size=(rows, 1)) + rng.normal(size=(1, channels)))
        values = rng.normal(size=shape) * spread.reshape(rows, channels, *[1] * (len(shape) - 2))
        weight = store(f"{prefix}.layer.weight", values)
        store(f"{prefix}.layer.bias", rng.normal(size=rows))
        if kind == "cpl":
            rescaling = np.full(rows, stated_norm(weight, side, config["padding_mode"]) ** 2)
            store(f"{prefix}.layer.power_iteration_vector", rng.normal(size=channels))
        elif kind == "sll":
            q = np.exp(rng.normal(size=rows))
            rescaling = absolute_gram(weight) @ q / q
            store(f"{prefix}.layer.log_q", np.log(q))
        else:
            rescaling = np.sqrt(absolute_gram(weight.swapaxes(0, 1) if kind == "aol" else weight).sum(axis=1))
        store(f"{prefix}.layer.rescaling", rescaling * UP)
        if config["activation"] == "householder":
            store(f"{prefix}.activation.theta", rng.normal(size=channels // 2))
    if config["head_type"] != "truncation":
        weight = store("classifier.weight", rng.normal(size=(config["num_labels"], features_of(config))))
        store("classifier.bias", rng.normal(size=config["num_labels"]))
        rows_or_norm = np.linalg.norm(weight, axis=1) if config["head_type"] == "lln" else [np.linalg.norm(weight, 2)]
        store("classifier.rescaling", np.asarray(rows_or_norm) * UP)
    return tensors


def head_rows(checkpoint: Checkpoint) -> np.ndarray:
    if checkpoint.config["head_type"] == "truncation":
        return np.eye(checkpoint.config["num_labels"], features_of(checkpoint.config))
    return checkpoint.array("classifier.weight") / checkpoint.array("classifier.rescaling")[:, None]


def certify(checkpoint: Checkpoint, dtype: torch.dtype, lambda_max: bool) -> dict[str, Any]:
    """An honest certificate, from SVDs of explicit matrices of the tensors as stored."""
    config, layers = checkpoint.config, []

    def entry(name: str, bound: float, **more: float) -> None:
        layers.append({"name": name, "kind": "written by hand", "bound": bound, "method": "svd", **more})

    entry("lipschitz_vision.stem", max(1 / std for std in config["image_std"]))
    for i in range(len(config["hidden_sizes"])):
        entry(f"lipschitz_vision.stages.{i}.downsample", 1.0)
        entry(f"lipschitz_vision.stages.{i}.channels", 1.0)
    entry("lipschitz_vision.neck.pool", 1.0)
    entry("lipschitz_vision.neck.channels", 1.0)
    kind = config["block_type"]
    for prefix, _, _, side in layers_of(config):
        arrays = [checkpoint.array(f"{prefix}.layer.{name}") for name in ("weight", "rescaling")]
        norm = stated_norm(effective(kind, *arrays), side, config["padding_mode"])
        if kind in ("cpl", "sll"):
            more = {"lambda_max": norm**2} if lambda_max else {}
            entry(f"{prefix}.layer", max(1.0, 2 * norm**2 - 1), **more)
        else:
            entry(f"{prefix}.layer", norm)
        if config["activation"] or kind in ("aol", "sr"):
            entry(f"{prefix}.activation", 1.0)
    features = math.prod(layer["bound"] for layer in layers)
    rows = head_rows(checkpoint)
    norm = float(np.linalg.norm(rows, 2))
    entry("classifier", norm)
    return {
        "format": "hf_lip/lipschitz_certificate",
        "format_version": 1,
        "model_type": "lipschitz_vision",
        "lipschitz_constant": features * norm,
        "feature_constant": features,
        "head": {
            "type": config["head_type"],
            "rule": "per_pair_all_classes",
            "norm": norm,
            "max_pair_distance": max(float(np.linalg.norm(a - b)) for a in rows for b in rows),
        },
        "evaluation_error": 1e-9,
        "unit": "l2, pixels in [0, 1]",
        "input_shape": [config["num_channels"], config["image_size"], config["image_size"]],
        "dtype": str(dtype).removeprefix("torch."),
        "architecture": dict(config),
        "layers": layers,
        "versions": {},
    }


def honest_checkpoint(
    dtype: torch.dtype = torch.float32, lambda_max: bool = False, seed: int = 0, **overrides: Any
) -> Checkpoint:
    config = {**CONFIG, **overrides}
    checkpoint = Checkpoint(config, make_tensors(config, dtype, np.random.default_rng(seed)))
    checkpoint.certificate = certify(checkpoint, dtype, lambda_max)
    return checkpoint
