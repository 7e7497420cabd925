# SPDX-License-Identifier: Apache-2.0
"""Pushes that break off, are overtaken or arrive damaged: a clear error, and nothing half published."""

import shutil
import time

import pytest
import torch

import hf_lip
from hf_lip.assets import DEFAULT_MODEL_DIR
from hf_lip.hub import push_folder

from .hub_endpoint import Fault, Handler, HubEndpoint, connect


REPO = "owner/digits"
BROKEN = "broke off .* nothing is half published: repeat the push"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """With a repository that holds the embedded model, and a client that does not wait between its tries."""
    with HubEndpoint() as endpoint:
        connect(monkeypatch, endpoint, endpoint.token)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        push_folder(shutil.copytree(DEFAULT_MODEL_DIR, tmp_path / "first"), REPO)
        endpoint.requests.clear()
        yield endpoint


@pytest.fixture
def folder(tmp_path):
    """The embedded model with other weights, certified."""
    path = shutil.copytree(DEFAULT_MODEL_DIR, tmp_path / "second")
    model = hf_lip.LipschitzVisionForImageClassification.from_pretrained(path)
    with torch.no_grad():
        model.get_parameter("classifier.bias").add_(0.125)
    model.save_pretrained(path)
    return path


def uploads(hub):
    return [status for method, _, status in hub.requests if method == "PUT"]


def test_one_dropped_connection_is_taken_up_by_the_client(hub, folder):
    hub.faults.uploads.append(Fault("PUT /lfs-upload/", after=100_000))
    report = push_folder(folder, REPO)
    assert uploads(hub) == [0, 200]
    assert hub.find(REPO).sha == report.commit.oid
    assert hub.find(REPO).files["model.safetensors"] == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("part_size", [1 << 30, 100_000])
def test_a_connection_that_keeps_dropping_in_the_middle_of_the_weights(hub, folder, part_size):
    head = hub.find(REPO)
    hub.faults.part_size = part_size
    # in one piece: half of it arrives; in parts: the first arrives, the second never
    broken = "PUT /lfs-upload/" if part_size > 1 << 20 else "PUT /lfs-part/[0-9a-f]+/2"
    hub.faults.uploads.append(Fault(broken, after=50_000, times=100))
    with pytest.raises(ConnectionError, match=f"The push to {REPO} {BROKEN}"):
        push_folder(folder, REPO)
    assert hub.find(REPO) == head
    assert len(hub.repos[REPO]) == 2
    assert not any("/commit/" in path for _, path, _ in hub.requests)
    hub.faults.clear()
    hub.faults.part_size = part_size
    push_folder(folder, REPO)
    assert len(hub.repos[REPO]) == 3
    assert hub.find(REPO).files["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_commit_that_does_not_arrive(hub, folder):
    head = hub.find(REPO)
    hub.faults.uploads.append(Fault("POST /api/models/.*/commit/", after=1000))
    with pytest.raises(ConnectionError, match=BROKEN):
        push_folder(folder, REPO)
    assert hub.find(REPO) == head
    assert uploads(hub) == [200]
    # what has arrived is not sent again
    push_folder(folder, REPO)
    assert uploads(hub) == [200]
    assert hub.find(REPO).files["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, folder):
    hub.faults.downloads.append(Fault("POST /api/models/.*/commit/", after=0))
    with pytest.raises(ConnectionError, match=BROKEN):
        push_folder(folder, REPO)
    made = hub.find(REPO)
    assert len(hub.repos[REPO]) == 3
    assert push_folder(folder, REPO).commit.oid == made.sha
    assert hub.find(REPO) == made


@pytest.mark.parametrize(
    ("request_line", "message"),
    [
        ("GET /api/whoami", "cannot be reached"),
        ("POST /api/repos/create", "could not be made"),
        ("GET /api/models/", "could not be made"),
        ("POST /api/models/.*/preupload", BROKEN),
        ("POST /.*/objects/batch", BROKEN),
    ],
)
def test_every_other_request_may_drop_too(hub, folder, request_line, message):
    head = hub.find(REPO)
    hub.faults.uploads.append(Fault(request_line, times=100))
    with pytest.raises(ConnectionError, match=message):
        push_folder(folder, REPO)
    assert hub.find(REPO) == head


def test_a_push_that_cannot_be_checked_says_that_it_was_made(hub, folder):
    hub.faults.uploads.append(Fault("POST /api/models/.*/paths-info", times=100))
    with pytest.raises(ConnectionError, match=r"/commit/[0-9a-f]{40} was made, but could not be checked"):
        push_folder(folder, REPO)
    assert hub.find(REPO).files["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_storage_that_damages_what_it_gets(hub, folder):
    hub.faults.corrupt = True
    with pytest.raises(OSError, match=r"holds other content than was sent, or none, for model\.safetensors: do not"):
        push_folder(folder, REPO)


def test_files_that_the_repository_ignores(hub, folder):
    hub.commit(REPO, {".gitignore": b"results.json\n"}, "on the website")
    (folder / "results.json").write_text("{}")
    with pytest.raises(OSError, match=r"or none, for results\.json.*\.gitignore"):
        push_folder(folder, REPO)


def test_another_push_in_between(hub, folder, monkeypatch):
    batch = Handler.lfs_batch

    def commit_first(handler, repo):
        hub.commit(REPO, {"model-00001-of-00002.safetensors": b"another's"}, "in between")
        return batch(handler, repo)

    monkeypatch.setattr(Handler, "lfs_batch", commit_first)
    with pytest.raises(OSError, match="Another commit was made in owner/digits during this push: nothing of this one"):
        push_folder(folder, REPO)
    assert [commit.message for commit in hub.repos[REPO]][2:] == ["in between"]
    monkeypatch.setattr(Handler, "lfs_batch", batch)
    push_folder(folder, REPO)
    assert "model-00001-of-00002.safetensors" not in hub.find(REPO).files
