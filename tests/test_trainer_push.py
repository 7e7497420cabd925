# SPDX-License-Identifier: Apache-2.0
"""`transformers.Trainer` and the Hub: what its own push publishes of our models, and what `hf-lip push` adds."""

import json

import pytest
import torch
from transformers import Trainer, TrainingArguments
from typer.testing import CliRunner

import hf_lip
from hf_lip.cli import app
from hf_lip.models.certificate import CERTIFICATE_NAME
from hf_lip.models.lipschitz_vision.image_processing_pil_lipschitz_vision import LipschitzVisionImageProcessorPil
from hf_lip.models.shim import SHIM_NAME

from .hub_endpoint import HubEndpoint, connect, run_fresh


LOAD = """
import json, sys
import torch
from transformers import AutoModelForImageClassification

if sys.argv[1] == "import":
    import hf_lip
pixels = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
try:
    model = AutoModelForImageClassification.from_pretrained("owner/trained", trust_remote_code=True).eval()
except ValueError as error:
    print(json.dumps(["refused", str(error)]))
else:
    output = model(pixel_values=pixels)
    print(json.dumps([model.certificate.weights_sha256, output.certified_radius.tolist()]))
"""


@pytest.fixture(scope="module")
def hub():
    with HubEndpoint() as endpoint:
        yield endpoint


@pytest.fixture(autouse=True)
def online(hub, monkeypatch):
    connect(monkeypatch, hub, hub.token)


def loaded(hub, home, how):
    home.mkdir()
    done = run_fresh(hub, home, "-c", LOAD, how)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def trained(folder, **options):
    config = hf_lip.LipschitzVisionConfig(
        block_type="sll", depths=[0], hidden_sizes=[1], pool_size=1, dense_size=16, num_dense_layers=1,
        dense_hidden_size=8, image_size=8, num_channels=1, num_labels=10,
    )  # fmt: skip
    settings = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "max_steps": 2}
    trainer = Trainer(
        model=hf_lip.LipschitzVisionForImageClassification(config),
        args=TrainingArguments(output_dir=str(folder), **settings, **options),
        train_dataset=[{"pixel_values": torch.rand(1, 8, 8), "labels": 3} for _ in range(16)],
        processing_class=LipschitzVisionImageProcessorPil(size={"height": 8, "width": 8}),
    )
    trainer.train()
    return trainer


def test_trainers_own_push_and_what_hf_lip_push_makes_of_it(hub, tmp_path):
    folder = tmp_path / "trained"
    trainer = trained(folder, push_to_hub=True, hub_token=hub.token)
    trainer.push_to_hub()
    files = hub.find("owner/trained").files
    assert {"config.json", "model.safetensors", "preprocessor_config.json", CERTIFICATE_NAME, "README.md"} <= set(
        files
    )
    certificate = json.loads(files[CERTIFICATE_NAME])["weights_sha256"]
    with torch.no_grad():
        pixels = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        radii = trainer.model.eval()(pixel_values=pixels).certified_radius.tolist()
    assert loaded(hub, tmp_path / "imported", "import") == [certificate, radii]
    # Trainer uploads what it saved, and knows nothing of the shim
    assert SHIM_NAME not in files
    refusal = loaded(hub, tmp_path / "without", "nothing")
    assert refusal[0] == "refused"
    assert "lipschitz_vision" in refusal[1]
    result = CliRunner().invoke(app, ["push", str(folder), "owner/trained"])
    assert result.exit_code == 0, result.output
    assert "training_args.bin" in result.output.split("Left out: ")[1]
    after = hub.find("owner/trained").files
    assert after["model.safetensors"] == files["model.safetensors"]
    assert SHIM_NAME in after
    assert loaded(hub, tmp_path / "shim", "nothing") == [certificate, radii]


def test_the_models_own_push_has_the_shim(hub, tmp_path):
    trainer = trained(tmp_path / "trained")
    trainer.model.push_to_hub("owner/by-model")
    assert {SHIM_NAME, CERTIFICATE_NAME} < set(hub.find("owner/by-model").files)
