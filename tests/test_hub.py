# SPDX-License-Identifier: Apache-2.0
"""`hf_lip.hub` and `hf-lip push`: what is published, and what is refused before anything is sent."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from typer.testing import CliRunner

import hf_lip
from hf_lip.assets import DEFAULT_MODEL_DIR
from hf_lip.cli import app
from hf_lip.hub import push_folder, require_pushable
from hf_lip.models.certificate import CERTIFICATE_NAME
from hf_lip.models.cifar_resnet.configuration_cifar_resnet import CifarResNetConfig
from hf_lip.models.shim import CLASSES, SHIM_NAME, shim_files

from .hub_endpoint import HubEndpoint, connect


MODEL_FILES = {"config.json", "model.safetensors", "preprocessor_config.json", CERTIFICATE_NAME}
PUBLISHED = {*MODEL_FILES, "README.md", "results.json", "plots/curve.png", SHIM_NAME}
PRIVATE = [
    *(
        "checkpoint-20/optimizer.bin",
        "checkpoint-20/model.safetensors",
        ".saving-x/config.json",
        "logs/events",
        ".lock",
    ),
    *("runs/Jan01/events.out.tfevents.1", "training_args.bin", "optimizer.pt", "train.log", "trainer_state.json"),
]


@pytest.fixture(scope="module")
def hub():
    with HubEndpoint() as endpoint:
        yield endpoint


@pytest.fixture(autouse=True)
def online(hub, monkeypatch):
    connect(monkeypatch, hub, hub.token)
    yield
    hub.faults.clear()


@pytest.fixture
def folder(tmp_path):
    """A finished run: the embedded model, its card, results and a plot, and what training leaves behind."""
    path = tmp_path / "run"
    shutil.copytree(DEFAULT_MODEL_DIR, path, ignore=shutil.ignore_patterns("__pycache__"))
    (path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# digits\n")
    for name in ("plots/curve.png", *PRIVATE):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"content")
    return path


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changed(folder, name="classifier.bias"):
    """Other weights, certified."""
    model = hf_lip.LipschitzVisionForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        model.get_parameter(name).add_(0.125)
    model.save_pretrained(folder)
    return folder


def sharded(folder):
    model = hf_lip.LipschitzVisionForImageClassification.from_pretrained(folder)
    model.save_pretrained(folder, max_shard_size="100KB")
    return folder


def test_one_commit_of_what_is_for_others(hub, folder):
    before = contents(folder)
    report = push_folder(folder, "digits")
    assert contents(folder) == before
    assert report.repo == "owner/digits"
    assert set(report.files) == PUBLISHED
    tops = {
        name.split("/")[0] if name.startswith(("checkpoint", ".saving", "logs", "runs")) else name for name in PRIVATE
    }
    assert set(report.left_out) == tops
    initial, commit = hub.repos["owner/digits"]
    assert set(initial.files) == {".gitattributes"}
    assert commit.message == "Upload a certified image classifier"
    assert report.url == f"{hub.url}/owner/digits/commit/{commit.sha}"
    assert set(commit.files) == {".gitattributes", *PUBLISHED}
    for name in PUBLISHED - {SHIM_NAME, "config.json", "preprocessor_config.json"}:
        assert commit.files[name] == before[name]
    for name in ("config.json", "preprocessor_config.json"):
        published = json.loads(commit.files[name])
        assert all(target.startswith("modeling_hf_lip.") for target in published.pop("auto_map").values())
        assert published == json.loads(before[name])
    # the weights went by LFS
    assert [path.split("/")[1] for method, path, _ in hub.requests if method == "PUT"] == ["lfs-upload"]
    assert not any(hub.token.encode() in content for content in commit.files.values())


def test_interrupted_saves_and_links(hub, folder, tmp_path):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / ".saved").mkdir()
    (folder / "model.safetensors").rename(folder / ".saved" / "model.safetensors")
    (folder / "README.md").rename(tmp_path / "card.md")
    (folder / "README.md").symlink_to(tmp_path / "card.md")
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    report = push_folder(folder, "owner/linked")
    assert "loop" in report.left_out
    files = hub.find("owner/linked").files
    assert set(files) == {".gitattributes", *PUBLISHED}
    assert files["model.safetensors"] == weights
    assert files["README.md"] == (tmp_path / "card.md").read_bytes()


def test_the_shim_is_three_lines_that_import_every_registered_class(folder):
    lines = shim_files(folder)[SHIM_NAME].decode().splitlines()
    assert len(lines) == 3
    autos = [name for name in dir(transformers) if name.startswith("AutoModel") or name == "AutoBackbone"]
    for model_type, (module, classes) in CLASSES.items():
        config = type(transformers.AutoConfig.for_model(model_type))
        registered = {"AutoConfig": config.__name__}
        for auto in autos:
            mapping = getattr(getattr(transformers, auto), "_model_mapping", None)
            if mapping is not None and config in mapping:
                registered[auto] = mapping[config].__name__
        assert classes == registered
        for name in classes.values():
            assert getattr(__import__(module, fromlist=[name]), name).__name__ == name
    known = {name for name in dir(hf_lip.registration) if name.endswith("Config") and name not in ("AutoConfig",)}
    assert {getattr(hf_lip.registration, name).model_type for name in known} == set(CLASSES)


def test_a_second_branch_leaves_main_as_it_is(hub, folder):
    push_folder(folder, "owner/two")
    first = hub.find("owner/two")
    report = push_folder(changed(folder), "owner/two", revision="v2", commit_message="better")
    assert hub.find("owner/two") == first
    second = hub.find("owner/two", "v2")
    assert (second.sha, second.message) == (report.commit.oid, "better")
    assert second.files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert second.files["model.safetensors"] != first.files["model.safetensors"]
    # to a branch that is there, and with nothing new in it
    assert push_folder(folder, "owner/two", revision="v2").commit.oid == second.sha
    assert [commit.message for commit in hub.repositories["owner/two"].branches["v2"]][1:] == [first.message, "better"]


def test_shards_and_certificates_of_an_earlier_push_do_not_stay(hub, folder, tmp_path):
    hub.faults.part_size = 50_000
    push_folder(sharded(folder), "owner/replaced")
    first = set(hub.find("owner/replaced").files)
    assert len([name for name in first if name.startswith("model-0")]) > 1
    assert any(path.startswith("/lfs-part/") for _, path, _ in hub.requests)
    hub.commit("owner/replaced", {"LICENSE": b"someone's"}, "on the website")
    plain = tmp_path / "plain"
    hf_lip.CifarResNetForImageClassification(
        CifarResNetConfig(num_blocks=[1], hidden_sizes=[4], num_labels=2)
    ).save_pretrained(plain)
    push_folder(plain, "owner/replaced", commit_message="another")
    kept = {".gitattributes", "LICENSE", "README.md", "plots/curve.png", "preprocessor_config.json"}
    assert set(hub.find("owner/replaced").files) == {*kept, "config.json", "model.safetensors", SHIM_NAME}


def test_models_of_transformers_get_no_shim(hub, tmp_path):
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic")
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
    push_folder(tmp_path, "owner/plain")
    files = hub.find("owner/plain").files
    assert set(files) == {".gitattributes", "config.json", "model.safetensors"}
    assert files["config.json"] == (tmp_path / "config.json").read_bytes()


@pytest.mark.parametrize(
    "name", ["a/b/c", "owner/with space", "-x", "owner/a--b", "x" * 97, "owner/.git", "", None, 7]
)
def test_names_that_are_none(hub, folder, name):
    seen = len(hub.requests)
    for call in (lambda: push_folder(folder, name), lambda: require_pushable(name)):
        with pytest.raises(ValueError, match="is not the name of a Hub repository"):
            call()
    assert len(hub.requests) == seen


def test_branches_that_are_none(hub, folder):
    seen = len(hub.requests)
    for revision in ("", "0" * 40):
        with pytest.raises(ValueError, match="is not a branch"):
            push_folder(folder, "owner/x", revision=revision)
    with pytest.raises(ValueError, match="pull request against main"):
        push_folder(folder, "owner/x", revision="v2", create_pr=True)
    assert len(hub.requests) == seen


def tampered(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.bias"] += 2**-10
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def reconfigured(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_std": [2.0]}))


def retyped(folder):
    CifarResNetConfig(architectures=["X"]).save_pretrained(folder)


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / CERTIFICATE_NAME).unlink(), f"has no {CERTIFICATE_NAME}"),
        (lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"), "pytorch_model.bin: pickles can run code"),
        (lambda folder: (folder / "plots" / "data.pkl").write_bytes(b"x"), "plots/data.pkl: pickles can run code"),
        (tampered, "The weights in .* have sha256"),
        (reconfigured, "image_std"),
        (retyped, "is of a lipschitz_vision, its config.json of a cifar_resnet"),
        (truncated, "truncated"),
        (lambda folder: (folder / "preprocessor_config.json").write_text("[]"), "must hold a JSON object"),
    ],
)
def test_folders_that_cannot_be_published(hub, folder, damage, message):
    damage(folder)
    seen = len(hub.requests)
    with pytest.raises(ValueError, match=message):
        push_folder(folder, "owner/damaged")
    assert len(hub.requests) == seen


def test_a_shard_or_the_folder_is_missing(hub, folder):
    next(iter(sharded(folder).glob("model-*"))).unlink()
    seen = len(hub.requests)
    with pytest.raises(FileNotFoundError, match="names files that are not there"):
        push_folder(folder, "owner/x")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        push_folder(folder / "absent", "owner/x")
    assert len(hub.requests) == seen


def test_tokens(hub, folder, monkeypatch):
    before = dict(hub.repos)
    monkeypatch.setenv("HF_TOKEN", "")
    for call in (lambda: push_folder(folder, "owner/x"), lambda: require_pushable("owner/x")):
        with pytest.raises(ValueError, match="needs a token"):
            call()
    for call in (lambda: push_folder(folder, "owner/x", token="hf_wrong"), lambda: require_pushable("x", "hf_wrong")):
        with pytest.raises(OSError, match="Invalid user token"):
            call()
    with pytest.raises(OSError, match="403"):
        push_folder(folder, "owner/x", token=hub.add_user("guest"))
    assert hub.repos == before
    push_folder(folder, "owner/by-argument", token=hub.token)


def test_private_repositories(hub, folder):
    push_folder(folder, "owner/secret", private=True)
    assert hub.repositories["owner/secret"].private
    push_folder(changed(folder), "owner/secret")
    push_folder(folder, "owner/open")
    head = hub.find("owner/open")
    with pytest.raises(ValueError, match="exists and is public: nothing was sent"):
        push_folder(changed(folder), "owner/open", private=True)
    assert hub.find("owner/open") == head


def test_pull_requests_of_others(hub, folder):
    push_folder(folder, "owner/shared")
    head = hub.find("owner/shared")
    guest = hub.add_user("contributor")
    with pytest.raises(OSError, match="403"):
        push_folder(changed(folder), "owner/shared", token=guest)
    report = push_folder(folder, "owner/shared", token=guest, create_pr=True)
    assert report.url == f"{hub.url}/owner/shared/discussions/1"
    assert hub.find("owner/shared") == head
    proposed = hub.find("owner/shared", "refs/pr/1")
    assert proposed.files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    push_folder(changed(folder), "owner/shared", revision="refs/pr/1")
    assert len(hub.repositories["owner/shared"].pulls[0]) == len(hub.repos["owner/shared"]) + 2


def test_a_card_whose_metadata_are_refused(hub, folder):
    (folder / "README.md").write_text("---\nlicense: [apache\n---\n")
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        push_folder(folder, "owner/bad-card")
    assert len(hub.repos["owner/bad-card"]) == 1


def test_command(hub, folder):
    def run(*words, **environment):
        result = CliRunner().invoke(app, ["push", *map(str, words)], env={"COLUMNS": "500", **environment})
        return result.exit_code, result.output

    code, output = run(folder, "owner/told", "--private", "--revision", "v1", "--message", "first")
    assert code == 0, output
    commit = hub.find("owner/told", "v1")
    assert commit.message == "first"
    assert hub.repositories["owner/told"].private
    assert "Pushed 8 files to owner/told" in output
    assert "Left out: .lock" in output
    assert f"{hub.url}/owner/told/commit/{commit.sha} holds what was sent" in output
    code, output = run(changed(folder), "owner/told", "--create-pr")
    assert (code, "owner/told/discussions/1 holds" in output) == (0, True)
    for words, message, environment in [
        ((folder, "not a name"), "is not the name of a Hub repository", {}),
        ((folder / "plots", "owner/told"), "has no config.json", {}),
        ((folder, "owner/told"), "Invalid user token", {"HF_TOKEN": "hf_wrong"}),
        ((folder, "someone/else"), "403 Forbidden", {}),
    ]:
        code, output = run(*words, **environment)
        assert (code, len(output.splitlines())) == (2, 1)
        assert message in output
    assert hub.find("owner/told", "v1") == commit


def test_every_model_class_is_pushed_the_same_way():
    for name in hf_lip.__all__:
        found = getattr(hf_lip, name)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            assert found.push_to_hub is not PreTrainedModel.push_to_hub
            found.register_for_auto_class("AutoModel")
            assert found._auto_class is None
