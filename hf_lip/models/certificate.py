# SPDX-License-Identifier: Apache-2.0
"""The Lipschitz certificate of a model: what was proved, for which bytes, and how to check it again."""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


CERTIFICATE_NAME = "lipschitz_certificate.json"
FORMAT = "hf_lip/lipschitz_certificate"
FORMAT_VERSION = 1
UNIT = "l2, pixels in [0, 1]"


def weights_sha256(state_dict: Mapping[str, Tensor]) -> str:
    """Hash of names, dtypes, shapes and bytes of all tensors, sorted by name; independent of file layout and
    sharding."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        shape = ",".join(map(str, tensor.shape))
        digest.update(f"{name}\0{dtype}\0{shape}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_text_atomically(path: str | os.PathLike, text: str) -> None:
    """Write a file so that a kill at any moment leaves either the old or the new content."""
    target = Path(path)
    staging = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with open(staging, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, target)
    except BaseException:
        # a full disk must not keep half a file
        staging.unlink(missing_ok=True)
        raise


@dataclasses.dataclass(frozen=True)
class LipschitzCertificate:
    """Proved constants of an image classifier, for the weights with the given hash.

    Attributes:
        lipschitz_constant: bound of the map from pixels in [0, 1] to logits, l2 to l2.
        feature_constant: bound F of the map from pixels to the features that enter the head. The radius of class i is
            the minimum over all j of (f_i - f_j) / (F ||v_i - v_j||), v the effective rows of the head.
        head: type, rule, `norm` and `max_pair_distance` of the head.
        evaluation_error: bound on |float64 logit - exact logit| over all images with pixels in [0, 1].
        unit: of every radius.
        input_shape: (C, H, W) that the constants belong to.
        dtype: of the stored weights.
        weights_sha256: see `weights_sha256`.
        architecture: the config fields that define the function.
        layers: name, kind, bound and method of proof of every node, in the order of the forward pass.
        versions: of the packages that computed it.
    """

    model_type: str
    lipschitz_constant: float
    feature_constant: float
    head: dict[str, Any]
    evaluation_error: float
    input_shape: list[int]
    dtype: str
    weights_sha256: str
    architecture: dict[str, Any]
    layers: list[dict[str, Any]]
    versions: dict[str, str]
    unit: str = UNIT
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    def __post_init__(self):
        for name in ("lipschitz_constant", "feature_constant", "evaluation_error"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
                raise ValueError(
                    f"`{name}` of a Lipschitz certificate must be finite and not negative, got {value!r}."
                )
        if self.unit != UNIT:
            raise ValueError(f"`unit` of a Lipschitz certificate must be {UNIT!r}, got {self.unit!r}.")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"

    def save(self, folder: str | os.PathLike) -> Path:
        """Write `lipschitz_certificate.json` into `folder`, atomically."""
        path = Path(folder) / CERTIFICATE_NAME
        write_text_atomically(path, self.to_json())
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> "LipschitzCertificate":
        """Read a certificate file, or the one in a folder.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is not a certificate of a known format.
        """
        path = Path(path)
        path = path / CERTIFICATE_NAME if path.is_dir() else path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid JSON ({error}). Delete it and save the model again.") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path} is not a Lipschitz certificate (format {FORMAT!r} expected).")
        if content.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format_version {content.get('format_version')!r}, this version of hf_lip reads "
                f"{FORMAT_VERSION}. Update hf_lip, or delete the file and save the model again."
            )
        names = {field.name for field in dataclasses.fields(cls)}
        if set(content) != names:
            difference = ", ".join(sorted(set(content) ^ names))
            raise ValueError(f"{path} has missing or unknown fields: {difference}.")
        return cls(**content)

    def require_covers(self, proved: "LipschitzCertificate", source: str) -> None:
        """Raise if a constant is stated lower than it was just proved, by more than rounding.

        Raises:
            ValueError: naming the constant and the remedy.
        """
        for name in ("lipschitz_constant", "feature_constant", "evaluation_error"):
            stated, bound = getattr(self, name), getattr(proved, name)
            if stated < bound * (1.0 - 1e-6):
                raise ValueError(
                    f"{CERTIFICATE_NAME} in {source} states {name}={stated!r}, proved is {bound!r}: the certificate "
                    "is false. Fetch the checkpoint again, or delete the file and save the model to certify it afresh."
                )

    def require_match(self, other_hash: str, architecture: Mapping[str, Any], source: str) -> None:
        """Raise unless the certificate belongs to these weights and this architecture.

        Raises:
            ValueError: naming the file and the remedy.
        """
        remedy = (
            f"Either the weights or {CERTIFICATE_NAME} were changed after saving. Fetch the checkpoint again, or, if "
            f"the weights are what you want, delete {CERTIFICATE_NAME}, load, and `save_pretrained` to certify afresh."
        )
        if self.weights_sha256 != other_hash:
            raise ValueError(
                f"The weights in {source} have sha256 {other_hash[:16]}..., its {CERTIFICATE_NAME} is for "
                f"{self.weights_sha256[:16]}.... {remedy}"
            )
        for name in sorted(set(self.architecture) | set(architecture)):
            if self.architecture.get(name) != architecture.get(name):
                raise ValueError(
                    f"config.json in {source} says {name}={architecture.get(name)!r}, its {CERTIFICATE_NAME} is for "
                    f"{name}={self.architecture.get(name)!r}. {remedy}"
                )
