# SPDX-License-Identifier: Apache-2.0
"""The independent checker on damaged, missing, sharded and contradictory files: reasons, never an exception."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from hf_lip.checkpoints.verify import verify_checkpoint

from .handmade_checkpoint import honest_checkpoint


def edit_json(folder: Path, name: str, change: Callable[[dict], None]) -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def change_file(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def make_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


WEIGHTS, CERTIFICATE = "model.safetensors", "lipschitz_certificate.json"
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickle": (make_pickle, "pytorch_model.bin: a pickle can run code"),
    "no-weights": (lambda f: (f / WEIGHTS).unlink(), "model.safetensors: missing"),
    "no-config": (lambda f: (f / "config.json").unlink(), "config.json: missing"),
    "no-certificate": (lambda f: (f / CERTIFICATE).unlink(), "lipschitz_certificate.json: missing; call"),
    "truncated": (change_file(WEIGHTS, lambda data: data[:-3]), "model.safetensors: truncated"),
    "truncated-header": (change_file(WEIGHTS, lambda data: data[:100]), "truncated in its header"),
    "empty": (change_file(WEIGHTS, lambda data: b""), "not a safetensors file"),
    "appended": (change_file(WEIGHTS, lambda data: data + b"\0"), "do not fill the file"),
    "garbage": (change_file(WEIGHTS, lambda data: data[:8] + b"\xff" + data[9:]), "not valid JSON"),
    "unknown-dtype": (change_file(WEIGHTS, lambda data: data.replace(b'"F32"', b'"F99"', 1)), "dtype 'F99'"),
    "header-entry": (change_file(WEIGHTS, lambda data: data.replace(b'"dtype"', b'"dtypo"', 1)), "malformed"),
    "header-shape": (change_file(WEIGHTS, lambda data: data.replace(b'"shape":[4', b'"shape":[5', 1)), "do not fit"),
    "bad-json": (change_file(CERTIFICATE, lambda data: data[:-1]), "lipschitz_certificate.json: not valid JSON"),
    "deep-json": (change_file("config.json", lambda data: b"[" * 10**5), "config.json: not valid JSON"),
    "not-an-object": (change_file("config.json", lambda data: b"[1]"), "config.json: must hold a JSON object"),
    "not-utf-8": (change_file("config.json", lambda data: b'{"a": "\xff"}'), "config.json: not valid JSON"),
    "key-twice": (change_file(CERTIFICATE, lambda data: b'{"unit": 1, ' + data[1:]), "key 'unit' appears twice"),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}") and None, "adapter_config.json"),
    "directory": (
        lambda f: (f / "config.json").unlink() or (f / "config.json").mkdir(),
        "config.json: cannot be read",
    ),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_folder_is_refused_with_a_reason(damage, reason, tmp_path):
    honest_checkpoint().save(tmp_path)
    damage(tmp_path)
    report = verify_checkpoint(tmp_path)
    assert not report.ok
    assert any(reason in line for line in report.reasons), report.reasons


CONFIG_CHANGES = {
    "quantized": (lambda c: c.update(quantization_config={"load_in_4bit": True}), "quantization_config"),
    "model-type": (lambda c: c.update(model_type="vit"), "model_type is 'vit'"),
    "labels": (lambda c: c.update(num_labels=7), "num_labels is 7"),
    "labels-type": (lambda c: c.update(id2label=[1]), "id2label must be an object"),
    "no-std": (lambda c: c.pop("image_std"), "'image_std' is missing"),
    "dtype": (lambda c: c.update(dtype="bfloat16"), "dtype is 'float32', but config.json has 'bfloat16'"),
    "default-labels": (lambda c: c.pop("id2label"), "classifier.weight has shape [4, 6], not [2, 6]"),
    "default-kernel": (lambda c: c.update(kernel_size=5), "has shape [2, 3, 3, 3], not [2, 3, 5, 5]"),
}


@pytest.mark.parametrize(("change", "reason"), CONFIG_CHANGES.values(), ids=CONFIG_CHANGES)
def test_change_of_the_config_alone_is_caught(change, reason, tmp_path):
    honest_checkpoint().save(tmp_path)
    edit_json(tmp_path, "config.json", change)
    assert any(reason in line for line in verify_checkpoint(tmp_path).reasons)


def test_defaults_of_absent_fields(tmp_path):
    """transformers leaves out what equals its own defaults, two labels among it."""
    honest_checkpoint(num_labels=2).save(tmp_path)
    fields = ("id2label", "hidden_act", "activation", "num_iterations", "kernel_size", "padding_mode", "head_type")
    edit_json(tmp_path, "config.json", lambda content: [content.pop(name) for name in fields])
    assert verify_checkpoint(tmp_path).reasons == []


def make_shards(folder: Path) -> dict[str, str]:
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    weight_map = {name: f"model-{1 + index % 2}.safetensors" for index, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        safetensors.torch.save_file(part, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_shards_are_read_through_their_index(tmp_path):
    weight_map = make_shards(honest_checkpoint().save(tmp_path))
    assert verify_checkpoint(tmp_path).reasons == []
    index = tmp_path / "model.safetensors.index.json"
    for changed, reason in (
        ({**weight_map, "x": "model-1.safetensors"}, "tensor x is missing"),
        ({**weight_map, "x": "../other.safetensors"}, "is not the name of a safetensors file"),
        ({**weight_map, "classifier.bias": "model-2.safetensors"}, "which model.safetensors.index.json places in"),
        (None, "weight_map must map"),
    ):
        index.write_text(json.dumps({"weight_map": changed}))
        assert any(reason in line for line in verify_checkpoint(tmp_path).reasons)
