# SPDX-License-Identifier: Apache-2.0
"""Saving and loading: nothing missing, nothing extra, nothing changed, nothing half-written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageClassification

from hf_lip import (
    LipschitzCertificate,
    LipschitzVisionBackbone,
    LipschitzVisionConfig,
    LipschitzVisionForImageClassification,
    LipschitzVisionImageProcessor,
    LipschitzVisionModel,
)
from hf_lip.models.certified_model import COMMITTED_NAME

from .test_lipschitz_vision import CASES, make_model, pixels


@pytest.fixture
def saved(tmp_path) -> Path:
    make_model("cpl").eval().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_weights(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("name", CASES)
def test_round_trip_through_the_auto_class(name, tmp_path):
    model = make_model(name).eval()
    out = model(pixels())
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "lipschitz_certificate.json", "model.safetensors"]
    loaded, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert isinstance(loaded, LipschitzVisionForImageClassification)
    assert loaded.certificate == model.certificate
    again = loaded(pixels())
    assert torch.equal(again.logits, out.logits)
    assert torch.equal(again.certified_radius, out.certified_radius)
    # what is recomputed from the loaded numbers is what was stored
    assert loaded.certify() == model.certificate


def test_a_model_saved_in_training_mode_is_frozen(tmp_path):
    model = make_model("cpl").train()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert loaded.certificate.feature_constant <= 1.0 + 1e-9


def test_base_model_and_backbone_read_a_classifier(saved):
    model = AutoModelForImageClassification.from_pretrained(saved)
    backbone = LipschitzVisionBackbone.from_pretrained(saved, out_features=["stage4"])
    expected = model.lipschitz_vision(pixels()).last_hidden_state
    torch.testing.assert_close(backbone(pixels()).feature_maps[0], expected)
    backbone.save_pretrained(saved.parent / "backbone")
    again = LipschitzVisionBackbone.from_pretrained(saved.parent / "backbone")
    assert torch.equal(again(pixels()).feature_maps[0], backbone(pixels()).feature_maps[0])


def test_base_model_round_trip(tmp_path):
    model = LipschitzVisionModel(make_model("sll").config).eval()
    model.save_pretrained(tmp_path)
    again = LipschitzVisionModel.from_pretrained(tmp_path)
    assert torch.equal(again(pixels()).pooler_output, model(pixels()).pooler_output)


def test_a_missing_certificate_is_computed(saved):
    stored = LipschitzCertificate.load(saved)
    (saved / "lipschitz_certificate.json").unlink()
    model = AutoModelForImageClassification.from_pretrained(saved)
    assert model.certificate is None
    assert model(pixels()).lipschitz_constant[0].item() == stored.lipschitz_constant


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_cast_models_are_frozen_and_certified_as_cast(saved, dtype):
    model = AutoModelForImageClassification.from_pretrained(saved, dtype=dtype)
    out = model(pixels())
    assert model.certificate.dtype == str(dtype).removeprefix("torch.")
    assert model.certificate.feature_constant <= 1.0 + 1e-6
    assert out.logits.isfinite().all()
    model.save_pretrained(saved.parent / "cast")
    again = AutoModelForImageClassification.from_pretrained(saved.parent / "cast")
    assert again.dtype == dtype
    assert torch.equal(again(pixels()).certified_radius, out.certified_radius)


KERNEL = "lipschitz_vision.stages.0.blocks.0.layer.weight"
DAMAGE = {
    "missing": (lambda f: edit_weights(f, lambda s: s.pop(KERNEL)), KERNEL),
    "missing-rescaling": (lambda f: edit_weights(f, lambda s: s.pop("classifier.rescaling")), "classifier.rescaling"),
    "unexpected": (lambda f: edit_weights(f, lambda s: s.update({"bn.weight": torch.ones(2)})), "bn.weight"),
    "shape": (lambda f: edit_weights(f, lambda s: s.update({"classifier.bias": torch.ones(7)})), "classifier.bias"),
    "nan": (lambda f: edit_weights(f, lambda s: s[KERNEL].view(-1)[0].fill_(torch.nan)), KERNEL),
    "changed": (lambda f: edit_weights(f, lambda s: s[KERNEL].mul_(1.01)), "lipschitz_certificate.json"),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
        "truncated",
    ),
    "not-safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04" * 200), "safetensors"),
    "certificate-hash": (
        lambda f: edit_json(f / "lipschitz_certificate.json", weights_sha256="0" * 64),
        "sha256",
    ),
    "certificate-json": (lambda f: (f / "lipschitz_certificate.json").write_text("{"), "not valid JSON"),
    "certificate-format": (
        lambda f: edit_json(f / "lipschitz_certificate.json", format="x"),
        "not a Lipschitz certificate",
    ),
    "certificate-version": (lambda f: edit_json(f / "lipschitz_certificate.json", format_version=9), "format_version"),
    "certificate-field": (lambda f: edit_json(f / "lipschitz_certificate.json", extra=1), "extra"),
    "certificate-constant": (
        lambda f: edit_json(f / "lipschitz_certificate.json", lipschitz_constant=-1.0),
        "lipschitz_constant",
    ),
    "certificate-unit": (lambda f: edit_json(f / "lipschitz_certificate.json", unit="l2, pixels in [0, 255]"), "unit"),
    "certificate-bool": (
        lambda f: edit_json(f / "lipschitz_certificate.json", feature_constant=True),
        "feature_constant",
    ),
    "config": (lambda f: edit_json(f / "config.json", image_std=[0.5, 0.5]), "image_std"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoints_are_errors(name, saved):
    damage, message = DAMAGE[name]
    damage(saved)
    with pytest.raises(ValueError, match=message) as caught:
        AutoModelForImageClassification.from_pretrained(saved)
    if name in ("nan", "changed", "truncated", "certificate-json"):
        assert str(saved) in str(caught.value)


@pytest.mark.parametrize("name", ["lipschitz_constant", "feature_constant", "evaluation_error"])
def test_a_constant_lowered_in_the_file_is_refuted_before_a_radius_is_issued(name, saved):
    path = saved / "lipschitz_certificate.json"
    edit_json(path, **{name: json.loads(path.read_text())[name] * 0.5})
    model = AutoModelForImageClassification.from_pretrained(saved)
    with pytest.raises(ValueError, match=f"{name}.*false"):
        model(pixels())
    with pytest.raises(ValueError, match=f"{name}.*false"):
        model.save_pretrained(saved.parent / "copy")
    assert model(pixels(), output_certified_radius=False).logits.isfinite().all()


def test_pickles_are_refused(saved):
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*safetensors"):
        AutoModelForImageClassification.from_pretrained(saved)
    with pytest.raises(ValueError, match="use_safetensors"):
        AutoModelForImageClassification.from_pretrained(saved, use_safetensors=False, config=make_model("cpl").config)


def test_new_head_for_fine_tuning(saved):
    with pytest.raises(ValueError, match="mismatched"):
        AutoModelForImageClassification.from_pretrained(saved, num_labels=6)
    model = AutoModelForImageClassification.from_pretrained(saved, num_labels=6, ignore_mismatched_sizes=True)
    assert model.certificate is None
    assert model(pixels()).logits.shape == (3, 6)
    assert model(pixels()).logits.isfinite().all()


def test_sharded_checkpoint(tmp_path):
    model = make_model("sll").eval()
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(
        AutoModelForImageClassification.from_pretrained(tmp_path)(pixels()).logits, model(pixels()).logits
    )
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("model-*.safetensors"))
    assert not (tmp_path / "model.safetensors.index.json").exists()
    AutoModelForImageClassification.from_pretrained(tmp_path)


def test_foreign_state_dict_is_refused(tmp_path):
    model = make_model("sll").eval()
    with pytest.raises(ValueError, match="state_dict"):
        model.save_pretrained(tmp_path, state_dict=make_model("sll").train().state_dict())
    assert not list(tmp_path.iterdir())


SAVE_FOREVER = """
import sys
sys.path.insert(0, sys.argv[2])
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1])
print("ready", flush=True)
scale = 1.0
while True:
    scale += 0.001
    model.classifier.bias.data.fill_(scale)
    model.certify()
    model.save_pretrained(sys.argv[1])
"""


def test_kill_during_save_leaves_a_whole_checkpoint(saved):
    root = str(Path(__file__).resolve().parents[2])
    for delay in (0.0, 0.011, 0.023, 0.037):
        process = subprocess.Popen(
            [sys.executable, "-c", "import hf_lip\n" + SAVE_FOREVER, str(saved), root],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": root},
        )
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.1 + delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        model = AutoModelForImageClassification.from_pretrained(saved)
        assert model.certificate is not None
    model.save_pretrained(saved)
    assert sorted(os.listdir(saved)) == ["config.json", "lipschitz_certificate.json", "model.safetensors"]


def test_kill_between_the_moves_is_completed_on_load(saved, tmp_path):
    other = tmp_path / "other"
    model = make_model("cpl").eval()
    model.classifier.bias.data.fill_(3.0)
    model.save_pretrained(other)
    shutil.move(str(other), saved / COMMITTED_NAME)
    # one file was already moved when the process died
    os.replace(saved / COMMITTED_NAME / "lipschitz_certificate.json", saved / "lipschitz_certificate.json")
    loaded = AutoModelForImageClassification.from_pretrained(saved)
    assert loaded.classifier.bias.eq(3.0).all()
    assert not (saved / COMMITTED_NAME).exists()


def test_image_processor_round_trip(auto_image_processor, tmp_path):
    import numpy as np
    from PIL import Image

    processor = LipschitzVisionImageProcessor(size={"height": 8, "width": 8}, num_channels=1)
    make_model("cpl", num_channels=1, image_mean=[0.5]).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["image_processor_type"] == (
        "LipschitzVisionImageProcessor"
    )
    loaded = auto_image_processor.from_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), LipschitzVisionConfig)
    grey = (np.arange(64).reshape(8, 8) * 4).astype(np.uint8)
    values = loaded(Image.fromarray(grey), return_tensors="pt").pixel_values
    assert values.shape == (1, 1, 8, 8)
    torch.testing.assert_close(values[0, 0], torch.from_numpy(grey / 255).float())
    floats = np.random.default_rng(0).random((1, 8, 8), dtype=np.float32)
    torch.testing.assert_close(loaded(floats, return_tensors="pt").pixel_values[0], torch.from_numpy(floats))
    assert loaded(Image.fromarray(grey).resize((20, 10)), return_tensors="pt").pixel_values.shape == (1, 1, 8, 8)
    colour = Image.fromarray(np.stack([grey] * 3, axis=-1))
    assert loaded(colour, return_tensors="pt").pixel_values.shape == (1, 1, 8, 8)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        loaded(floats * 2, return_tensors="pt")
    with pytest.raises(ValueError, match="num_channels"):
        loaded(np.zeros((3, 8, 8), dtype=np.uint8), return_tensors="pt")
