# SPDX-License-Identifier: Apache-2.0
"""What `pipeline("certify", model=...)` says of checkpoints that cannot be trusted or loaded."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ResNetForImageClassification, pipeline
from typer.testing import CliRunner

import hf_lip
from hf_lip.assets import DEFAULT_MODEL_DIR
from hf_lip.cli import app
from hf_lip.pipelines.loading import load_certify_pipeline


@pytest.fixture
def tampered(tmp_path):
    """A checkpoint in the given dtype, a weight of which was changed after it was certified."""

    def make(dtype):
        folder = tmp_path / f"digits-{dtype}"
        shutil.copytree(DEFAULT_MODEL_DIR, folder)
        model = hf_lip.LipschitzVisionForImageClassification.from_pretrained(folder, dtype=dtype)
        model.save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["classifier.bias"] += 0.5
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


# in another dtype transformers would load it once more in float32, for which there is no certificate to compare
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tampered_weights(tampered, dtype):
    folder = tampered(dtype)
    messages = set()
    for load in (
        lambda: pipeline("certify", model=str(folder)),
        lambda: pipeline("certify", model=str(folder), device="cpu", method="mono", sigma=0.25),
        lambda: load_certify_pipeline(str(folder), "cpu", {}),
        lambda: hf_lip.LipschitzVisionForImageClassification.from_pretrained(folder),
    ):
        with pytest.raises(ValueError, match=r"have sha256 .*, its lipschitz_certificate.json is for") as refusal:
            load()
        messages.add(str(refusal.value))
    # the same in all places, and nothing besides
    assert len(messages) == 1
    assert "Traceback" not in next(iter(messages))


def test_tampered_weights_on_the_command_line(tampered, tmp_path):
    folder = tampered("bfloat16")
    result = CliRunner().invoke(app, ["certify", str(folder), "--out", str(tmp_path / "out"), "--limit", "2"])
    assert result.exit_code == 2
    assert result.output.startswith(f"Error: The weights in {folder} have sha256 ")
    assert "Could not load model" not in result.output
    assert not list((tmp_path / "out").iterdir())


def test_other_checkpoints_that_cannot_be_loaded(tmp_path, resnet):
    with pytest.raises(OSError, match="none"):
        pipeline("certify", model=str(tmp_path / "none"))
    resnet.save_pretrained(tmp_path / "resnet")
    assert isinstance(pipeline("certify", model=str(tmp_path / "resnet")).model, ResNetForImageClassification)
    weights = tmp_path / "resnet" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "resnet" / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(OSError, match=r"no file named model.safetensors"):
        pipeline("certify", model=str(tmp_path / "resnet"))


def test_a_revision_is_of_a_repository():
    with pytest.raises(ValueError, match=r"`--revision` 'v2' is of a Hub repository, and .* is a folder"):
        load_certify_pipeline(str(DEFAULT_MODEL_DIR), "cpu", {}, revision="v2")
