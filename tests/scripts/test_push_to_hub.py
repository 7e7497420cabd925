# SPDX-License-Identifier: Apache-2.0
"""`--push_to_hub` of the training scripts, against a Hub on loopback; how it loads again is in test_hub_pull.py."""

import json

import pytest
from safetensors.torch import load

from hf_lip.models.certificate import CERTIFICATE_NAME, weights_sha256
from hf_lip.models.shim import SHIM_NAME

from ..hub_endpoint import HubEndpoint, connect
from .runs import SMALL_MLP


WORDS = [
    *SMALL_MLP,
    *("--num_train_epochs", "1", "--max_train_samples", "72", "--max_eval_samples", "16", "--train_batch_size", "24"),
]
RUN_FILES = {"config.json", "model.safetensors", "preprocessor_config.json", "results.json", CERTIFICATE_NAME}


@pytest.fixture
def hub(monkeypatch):
    with HubEndpoint() as endpoint:
        connect(monkeypatch, endpoint, endpoint.token)
        yield endpoint


def test_one_commit_of_the_finished_run(hub, run, tmp_path, capsys):
    run("digits", "--checkpointing_steps", "2", "--push_to_hub", base=WORDS)
    trained = tmp_path / "digits"
    initial, commit = hub.repos["owner/digits"]
    assert set(initial.files) == {".gitattributes"}
    assert commit.message == "Upload a certified image classifier"
    assert f"Pushed {hub.url}/owner/digits/commit/{commit.sha}" in capsys.readouterr().out
    assert list(trained.glob("checkpoint-*"))
    assert set(commit.files) == {".gitattributes", SHIM_NAME, *RUN_FILES}
    for name in RUN_FILES - {"config.json", "preprocessor_config.json"}:
        assert commit.files[name] == (trained / name).read_bytes()
    certificate = json.loads(commit.files[CERTIFICATE_NAME])
    assert certificate["weights_sha256"] == weights_sha256(load(commit.files["model.safetensors"]))
    assert not any(hub.token.encode() in content for content in commit.files.values())


def test_token_of_the_command_line_stays_out_of_the_files(hub, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    words = ["--push_to_hub", "--hub_model_id", "owner/chosen", "--hub_token", hub.token]
    run("another", *words, base=[*WORDS, "--max_train_samples", "24"])
    files = hub.find("owner/chosen").files
    assert b"--hub_token ***" in files["results.json"].replace(b"'", b"")
    assert not any(hub.token.encode() in content for content in files.values())


@pytest.mark.parametrize(
    ("words", "token", "message"),
    [
        (["--hub_model_id", "owner/other"], "hf_wrong", "Invalid user token"),
        (["--hub_model_id", "owner/other"], "", "--push_to_hub needs a token"),
        (["--hub_model_id", "not a name"], None, "'not a name' is not the name of a Hub repository"),
        (["--hub_model_id", "a/b/c"], None, "'a/b/c' is not the name of a Hub repository"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_training(
    hub, run, words, token, message, tmp_path, monkeypatch, capsys
):
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SystemExit) as refusal:
        run("run", "--push_to_hub", *words, base=WORDS)
    assert refusal.value.code == 2
    assert message in capsys.readouterr().err
    assert hub.repos == {}
    assert not (tmp_path / "run").exists()
