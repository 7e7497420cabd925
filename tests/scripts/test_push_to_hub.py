# SPDX-License-Identifier: Apache-2.0
"""Push and load over HTTP: the unmodified client in fresh processes with fresh caches, against `HubEndpoint`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load, save

from hf_lip.models.certificate import CERTIFICATE_NAME, weights_sha256

from ..hub_endpoint import Handler, HubEndpoint


ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "train_image_classifier.py"
WORDS = [
    *("--cpu", "--depths", "0", "--hidden_sizes", "1", "--pool_size", "1", "--dense_size", "32"),
    *("--num_dense_layers", "2", "--dense_hidden_size", "16", "--num_train_epochs", "1"),
    *("--max_train_samples", "72", "--max_eval_samples", "16", "--train_batch_size", "24"),
]
MODEL_FILES = {"config.json", "model.safetensors", CERTIFICATE_NAME}
RUN_FILES = {*MODEL_FILES, "preprocessor_config.json", "results.json"}
REPO = "owner/digits"

LOAD = """
import json, sys
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline
import hf_lip

pixels = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
seen = []
for source in sys.argv[1:]:
    model = AutoModelForImageClassification.from_pretrained(source).eval()
    certificate = model.certificate
    with torch.no_grad():
        output = model(pixel_values=pixels)
    seen.append([certificate and certificate.weights_sha256, output.logits.tolist(), output.certified_radius.tolist()])
    image = Image.new("L", (8, 8), 77)
    seen[-1].append(pipeline("certify", model=source, device="cpu")(image))
print(json.dumps(seen))
"""

PUSH = """
import sys
from hf_lip import LipschitzVisionForImageClassification

model = LipschitzVisionForImageClassification.from_pretrained(sys.argv[1])
model.push_to_hub("owner/pushed", commit_message="by push_to_hub")
model.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="owner/saved", commit_message="by save_pretrained")
"""

LOAD_CLASS = """
import sys
from hf_lip import LipschitzVisionForImageClassification

print(LipschitzVisionForImageClassification.from_pretrained(sys.argv[1]).certificate.weights_sha256)
"""

LOAD_TAMPERED = """
import sys
from transformers import AutoModelForImageClassification
from hf_lip import LipschitzVisionForImageClassification

for cls in (AutoModelForImageClassification, LipschitzVisionForImageClassification):
    try:
        cls.from_pretrained(sys.argv[1])
    except ValueError as error:
        print(error)
    else:
        sys.exit("tampered weights were loaded")
"""


@pytest.fixture(scope="module")
def hub():
    with HubEndpoint() as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def python(hub, tmp_path_factory):
    """Run Python in a fresh process with a fresh cache and the hub as its only Hub."""

    def run(*words, token=hub.token):
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment = {
            **inherited,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path_factory.mktemp("hf_home")),
            "HF_TOKEN": token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture(scope="module")
def trained(hub, python, tmp_path_factory):
    """The folder of a run of the script that was pushed to `REPO`."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = ["--checkpointing_steps", "2", "--push_to_hub", "--hub_model_id", REPO]
    done = python(SCRIPT, *WORDS, "--output_dir", folder, *words)
    assert done.returncode == 0, done.stderr
    return folder


def test_script_pushes_one_commit_of_the_finished_run(hub, trained):
    initial, *content = hub.repos[REPO]
    assert set(initial.files) == {".gitattributes"}
    assert [commit.message for commit in content] == ["Upload a certified image classifier"]
    files = content[0].files
    assert set(files) == {".gitattributes", *RUN_FILES}
    assert list(trained.glob("checkpoint-*"))
    for name in RUN_FILES:
        assert files[name] == (trained / name).read_bytes()
    assert json.loads(files[CERTIFICATE_NAME])["weights_sha256"] == weights_sha256(load(files["model.safetensors"]))
    assert not any(hub.token.encode() in content for content in files.values())
    # the weights went by LFS
    assert [status for method, path, status in hub.requests if method == "PUT"] == [200]


def test_fresh_process_loads_the_same_certified_model(python, trained):
    done = python("-c", LOAD, REPO, trained)
    assert done.returncode == 0, done.stderr
    from_hub, from_folder = json.loads(done.stdout.splitlines()[-1])
    assert from_hub == from_folder
    digest, _, _, result = from_hub
    assert digest == json.loads((trained / CERTIFICATE_NAME).read_text())["weights_sha256"]
    assert result["method"] == "lipschitz"
    assert result["radius"] >= 0


def test_push_to_hub_and_save_pretrained_upload_the_certificate(hub, python, trained, tmp_path):
    done = python("-c", PUSH, trained, tmp_path / "saved")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "saved").iterdir()} == MODEL_FILES
    for repo, message in (("owner/pushed", "by push_to_hub"), ("owner/saved", "by save_pretrained")):
        assert [commit.message for commit in hub.repos[repo]] == ["initial commit", message]
        files = hub.repos[repo][-1].files
        assert set(files) == {".gitattributes", "README.md", *MODEL_FILES}
        certificate = json.loads(files[CERTIFICATE_NAME])
        assert certificate["weights_sha256"] == weights_sha256(load(files["model.safetensors"]))
        assert files["model.safetensors"] == (trained / "model.safetensors").read_bytes()


def test_wrong_token_is_refused_before_training(hub, python, tmp_path):
    before, seen = dict(hub.repos), len(hub.requests)
    words = ["--output_dir", tmp_path / "run", "--push_to_hub", "--hub_model_id", "owner/other"]
    done = python(SCRIPT, *WORDS, *words, token="hf_wrong")
    assert done.returncode == 2
    assert "Invalid user token" in done.stderr
    assert "Traceback" not in done.stderr
    assert hub.repos == before
    assert {status for _, _, status in hub.requests[seen:]} == {401}
    assert not (tmp_path / "run").exists()


def test_a_push_during_a_load_does_not_mix_two_commits(hub, python, trained, monkeypatch):
    repo = "owner/moving"
    hub.commit(repo, {name: (trained / name).read_bytes() for name in MODEL_FILES}, "first")
    certificate = json.loads((trained / CERTIFICATE_NAME).read_text())
    other = json.dumps({**certificate, "weights_sha256": "0" * 64}).encode()
    download = Handler.lfs_download

    def download_then_push(handler, oid):
        hub.commit(repo, {CERTIFICATE_NAME: other}, "second")
        return download(handler, oid)

    monkeypatch.setattr(Handler, "lfs_download", download_then_push)
    done = python("-c", LOAD_CLASS, repo)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == certificate["weights_sha256"]
    assert [commit.message for commit in hub.repos[repo]] == ["first", "second"]


def test_weights_tampered_with_on_the_hub_are_refused(hub, python, trained):
    tensors = load((trained / "model.safetensors").read_bytes())
    tensors["classifier.bias"] = tensors["classifier.bias"] + 2**-10
    files = {name: (trained / name).read_bytes() for name in MODEL_FILES}
    hub.commit("owner/tampered", {**files, "model.safetensors": save(tensors, {"format": "pt"})}, "tampered")
    done = python("-c", LOAD_TAMPERED, "owner/tampered")
    assert done.returncode == 0, done.stderr
    messages = [line for line in done.stdout.splitlines() if CERTIFICATE_NAME in line]
    assert len(messages) == 2
    assert all("The weights in owner/tampered have sha256" in message for message in messages)
