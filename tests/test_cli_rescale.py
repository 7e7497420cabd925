# SPDX-License-Identifier: Apache-2.0
"""`hf-lip rescale`, its script, and pushes to a real Hub protocol on loopback."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from hf_lip.cli import app
from hf_lip.models.cifar_resnet.configuration_cifar_resnet import CifarResNetConfig
from hf_lip.models.cifar_resnet.modeling_cifar_resnet import CifarResNetForImageClassification
from hf_lip.models.shim import SHIM_NAME

from .checkpoints.tiny_checkpoints import PlainNet, resnet, save_plain, stirred, vit
from .hub_endpoint import HubEndpoint


ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "rescale_checkpoint.py"
runner = CliRunner()

PREDICT = """
import sys
import torch
from transformers import AutoModelForImageClassification

images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
for source in sys.argv[1:]:
    model = AutoModelForImageClassification.from_pretrained(source).eval()
    with torch.no_grad():
        print(model(images).logits.argmax(dim=1).tolist())
"""


REFUSED = """
import json, os, sys
from typer.testing import CliRunner
from hf_lip.cli import app

seen = {}
model, bare, out, right = sys.argv[1:]
cases = {
    "no token": ("", model, "owner/new"),
    "wrong token": ("hf_wrong", model, "owner/new"),
    "occupied": (right, model, "owner/occupied"),
    "occupied, without its owner": (right, model, "occupied"),
    "no name": (right, model, "a/b/c"),
    "no config": (right, bare, "owner/new"),
}
for case, (token, source, name) in cases.items():
    os.environ["HF_TOKEN"] = token
    words = ["rescale", source, "--out", out, "--push-to", name]
    result = CliRunner().invoke(app, words)
    seen[case] = [result.exit_code, result.output]
print(json.dumps(seen))
"""


def run(*arguments):
    return runner.invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("original") / "model"
    resnet().save_pretrained(path)
    (path / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessorPil"}')
    return path


def test_table_files_and_exit_code(folder, tmp_path):
    result = run("rescale", folder, "--to", "0.5", "--preserve-logits", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "rescale_report.json").read_text())
    for row in report["layers"]:
        assert row["name"] in result.output
        assert row["after"]["upper"] <= 0.5
    exponent = report["logits_exponent"]
    assert f"divided by 2^{exponent} (read off the network)" in result.output
    assert f"Wrote {tmp_path / 'out'}" in result.output.replace("\n", "")
    command = "hf-lip rescale model --mode sn --to 0.5 --preserve-logits --out OUT"
    assert report["command"] == command
    assert command in (tmp_path / "out" / "README.md").read_text()


def test_all_options_reach_the_settings(folder, tmp_path):
    words = ["--mode", "sr", "--to", "2", "--layers", "*.stages.0.*", "--layers", "classifier*", "--fold-bn"]
    words += ["--enlarge", "--iterations", "2", "--bn-eps", "0.001", "--image-size", "48", "--rtol", "0.01"]
    result = run("rescale", folder, *words, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "rescale_report.json").read_text())
    assert report["settings"] == {
        "mode": "sr", "to": 2.0, "layers": ["*.stages.0.*", "classifier*"], "fold_bn": True, "preserve_logits": False,
        "enlarge": True, "num_iterations": 2, "chain": [], "bn_eps": 0.001, "image_size": 48,
        "rtol": 0.01,
    }  # fmt: skip
    assert report["layers"][0]["input_size"] == [12, 12]
    said = " ".join(words).replace("--to 2 ", "--to 2.0 ").replace("*.stages.0.*", "'*.stages.0.*'")
    said = said.replace("classifier*", "'classifier*'")
    assert report["command"] == f"hf-lip rescale model {said} --out OUT"
    assert any(row["folded"] is not None for row in report["layers"])


def test_without_a_size_norms_hold_for_all_sizes(folder, tmp_path):
    assert run("rescale", folder, "--out", tmp_path / "out").exit_code == 0
    report = json.loads((tmp_path / "out" / "rescale_report.json").read_text())
    assert all(row["input_size"] is None for row in report["layers"])
    assert not any("assumed" in note for note in report["notes"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mode", "qr"], "`mode` must be 'sn'"),
        (["--to", "-1"], "`to` must be a positive"),
        (["--layers", "nowhere"], "matches nothing that can be rescaled"),
        (["--private"], "`--private` is of the repository of `--push-to`"),
        (["--chain", "a,b"], "`chain` says where scales may move"),
    ],
)
def test_errors_are_one_line(folder, words, message, tmp_path):
    result = run("rescale", folder, *words, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_refusals(folder, tmp_path):
    vit().save_pretrained(tmp_path / "vit")
    result = run("rescale", tmp_path / "vit", "--to", "0.01", "--preserve-logits", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "`preserve_logits` cannot divide vit.embeddings.patch_embeddings.projection" in result.output
    result = run("rescale", folder, "--out", tmp_path / "vit")
    assert result.exit_code == 2
    assert "nothing is overwritten" in result.output
    result = run("rescale", tmp_path / "absent", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "does not exist" in result.output
    assert not (tmp_path / "out").exists()


def test_chain_of_a_network_without_a_class(tmp_path):
    torch.manual_seed(9)
    model = stirred(PlainNet())
    save_plain(model, tmp_path / "model")
    result = run("rescale", tmp_path / "model", "--preserve-logits", "--chain", "0, 2,6,8", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "told from names or stated, not proved" in result.output
    again = PlainNet().eval()
    again.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    images = torch.randn(20, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(images).argmax(1), model(images).argmax(1))


@pytest.fixture(scope="module")
def hub():
    with HubEndpoint() as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def python(hub, tmp_path_factory):
    """Run Python in a fresh process with a fresh cache and the hub as its only Hub."""

    def call(*words, token=hub.token):
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment = {
            **inherited,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path_factory.mktemp("hf_home")),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            **({"HF_TOKEN": token} if token else {}),
        }
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    return call


def test_script_pushes_one_commit_that_loads_again(hub, python, folder, tmp_path):
    words = ["--to", "0.5", "--preserve-logits", "--push-to", "owner/unit"]
    done = python(SCRIPT, folder, "--out", tmp_path / "out", *words)
    assert done.returncode == 0, done.stderr
    initial, *content = hub.repos["owner/unit"]
    assert set(initial.files) == {".gitattributes"}
    assert [commit.message for commit in content] == ["Upload a rescaled checkpoint with certified norms"]
    expected = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {name: data for name, data in content[0].files.items() if name != ".gitattributes"} == expected
    assert f"{hub.url}/owner/unit/commit/{content[0].sha}" in done.stdout
    assert not any(hub.token.encode() in data for data in expected.values())
    done = python("-c", PREDICT, "owner/unit", folder)
    assert done.returncode == 0, done.stderr
    pushed, original = done.stdout.splitlines()
    assert pushed == original


def test_from_the_hub_with_everything_a_model_needs(hub, python, folder, tmp_path):
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    commit = hub.commit("owner/source", {**files, "vocab.txt": b"a\n", "pytorch_model.bin": b"old"}, "first")
    hub.commit("owner/source", {"vocab.txt": b"newer\n"}, "second")
    done = python(
        "-m", "hf_lip.cli", "rescale", "owner/source", "--revision", commit.sha, "--out", tmp_path / "out"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "vocab.txt").read_text() == "a\n"
    assert (tmp_path / "out" / "preprocessor_config.json").read_bytes() == files["preprocessor_config.json"]
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    report = json.loads((tmp_path / "out" / "rescale_report.json").read_text())
    assert (report["source"], report["commit"]) == ("owner/source", commit.sha)
    assert "base_model: owner/source" in (tmp_path / "out" / "README.md").read_text()


def test_pushes_that_cannot_work_are_refused_before_the_work(hub, python, folder, tmp_path):
    hub.commit("owner/occupied", {"model.safetensors": b"someone's"}, "first")
    before = {name: list(history) for name, history in hub.repos.items()}
    (tmp_path / "bare").mkdir()
    shutil.copy(folder / "model.safetensors", tmp_path / "bare")
    done = python("-c", REFUSED, folder, tmp_path / "bare", tmp_path / "out", hub.token, token=None)
    assert done.returncode == 0, done.stderr
    expected = {
        "no token": "A push needs a token: run `hf auth login`",
        "wrong token": "Invalid user token",
        "occupied": "owner/occupied holds model.safetensors already, and nothing is overwritten",
        "occupied, without its owner": "occupied holds model.safetensors already",
        "no name": "'a/b/c' is not the name of a Hub repository",
        "no config": "there is no config.json beside the weights of ",
    }
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen.keys() == expected.keys()
    for case, (code, output) in seen.items():
        assert code == 2
        assert expected[case] in output
    assert {name: list(history) for name, history in hub.repos.items()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]


def test_a_model_of_ours_is_pushed_with_its_shim_and_privately(hub, python, tmp_path):
    torch.manual_seed(0)
    config = CifarResNetConfig.from_depth(8, num_channels=1, image_size=8, num_labels=10)
    CifarResNetForImageClassification(config).eval().save_pretrained(tmp_path / "model")
    words = ["rescale", tmp_path / "model", "--to", "0.5", "--out", tmp_path / "out", "--push-to", "ours", "--private"]
    done = python("-m", "hf_lip.cli", *words)
    assert done.returncode == 0, done.stderr
    assert hub.repositories["owner/ours"].private
    files = hub.find("owner/ours").files
    assert set(files) == {".gitattributes", SHIM_NAME, *(path.name for path in (tmp_path / "out").iterdir())}
    assert SHIM_NAME.removesuffix(".py") in json.loads(files["config.json"])["auto_map"]["AutoConfig"]
    done = python(
        "-m", "hf_lip.cli", "rescale", tmp_path / "model", "--out", tmp_path / "b", "--push-to", "owner/ours"
    )
    assert done.returncode == 2
    assert "nothing is overwritten" in done.stderr
