# SPDX-License-Identifier: Apache-2.0
"""The checker against checkpoints that the models write themselves."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_lip import verify_checkpoint
from hf_lip.models.certificate import weights_sha256

from ..models.test_lipschitz_vision import CASES, make_model


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_models_hold(name, dtype, tmp_path):
    model = make_model(name).to(dtype).eval()
    model.save_pretrained(tmp_path)
    report = verify_checkpoint(tmp_path)
    assert report.ok, report.reasons
    assert report.stated_lipschitz_constant == pytest.approx(model.certificate.lipschitz_constant)


def rehash(folder, change) -> None:
    """Change tensors and put the hash of the changed ones into the certificate, so that only the bounds can object."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "lipschitz_certificate.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "weights_sha256": weights_sha256(state)}))


@pytest.mark.parametrize("layer", ["lipschitz_vision.stages.0.blocks.0.layer", "lipschitz_vision.neck.blocks.1.layer"])
def test_a_scaled_kernel_is_refuted(layer, tmp_path):
    make_model("cpl").eval().save_pretrained(tmp_path)
    rehash(tmp_path, lambda state: state[f"{layer}.weight"].mul_(1.01))
    report = verify_checkpoint(tmp_path)
    assert not report.ok
    assert any(layer in reason for reason in report.reasons)


def test_a_batch_norm_is_refused(tmp_path):
    make_model("cpl").eval().save_pretrained(tmp_path)
    rehash(tmp_path, lambda state: state.update({"lipschitz_vision.stages.0.bn.running_var": torch.ones(6)}))
    report = verify_checkpoint(tmp_path)
    assert not report.ok
    assert any("bn.running_var" in reason for reason in report.reasons)
