# SPDX-License-Identifier: Apache-2.0
import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification
from typer.testing import CliRunner

import hf_lip.assets
from hf_lip import LipschitzVisionConfig, LipschitzVisionForImageClassification
from hf_lip.cli import app
from hf_lip.metrics import average_certified_radius, certified_accuracy


runner = CliRunner()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """An untrained Lipschitz network for the digits."""
    torch.manual_seed(0)
    config = LipschitzVisionConfig.from_size(
        "tiny", image_size=8, num_channels=1, id2label={digit: str(digit) for digit in range(10)}
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    LipschitzVisionForImageClassification(config).eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def resnet_folder(tmp_path_factory):
    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=10, layer_type="basic"
    )
    folder = tmp_path_factory.mktemp("models") / "resnet"
    ResNetForImageClassification(config).save_pretrained(folder)
    return folder


def run(*arguments):
    return runner.invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})


def read_tsv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_certify_with_the_deterministic_certificate(model_folder, tmp_path):
    result = run("certify", model_folder, "--out", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 0, result.output
    rows = read_tsv(tmp_path / "out" / "certificates.tsv")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(rows[0]) == ["idx", "label", "predict", "radius", "correct", "time"]
    assert [int(row["idx"]) for row in rows] == list(range(450))
    radii, correct = [float(row["radius"]) for row in rows], [row["correct"] == "1" for row in rows]
    assert correct == [row["label"] == row["predict"] for row in rows]
    assert summary["method"] == "lipschitz"
    assert summary["num_images"] == 450
    assert summary["clean_accuracy"] == np.mean(correct)
    assert summary["average_certified_radius"] == average_certified_radius(radii, correct)
    expected = {"36/255": 36 / 255, "72/255": 72 / 255, "108/255": 108 / 255, "1.0": 1.0}
    assert summary["certified_accuracy"] == {
        name: certified_accuracy(radii, correct, eps) for name, eps in expected.items()
    }
    assert summary["abstention_rate"] == 0.0
    certificate = json.loads((model_folder / "lipschitz_certificate.json").read_text())
    assert summary["lipschitz_constant"] == certificate["lipschitz_constant"]
    for text in ("clean accuracy", "certified accuracy at 36/255", "1.0", "ACR", "Lipschitz constant", "450 images"):
        assert text in result.output
    with Image.open(tmp_path / "out" / "certified_accuracy.png") as plot:
        assert plot.size == (960, 630)
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_certify_by_smoothing(resnet_folder, tmp_path):
    arguments = ("--method", "mono", "--sigma", "0.5", "--n0", "10", "--n", "100", "--limit", "4", "--seed", "3")
    outputs = []
    for batch_size in (16, 100):
        out = tmp_path / str(batch_size)
        result = run("certify", resnet_folder, *arguments, "--batch-size", batch_size, "--out", out)
        assert result.exit_code == 0, result.output
        outputs.append([{**row, "time": ""} for row in read_tsv(out / "certificates.tsv")])
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 4
    for row in outputs[0]:
        assert (row["predict"] == "-1") == (float(row["radius"]) == 0.0)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["method"] == "mono"
    assert summary["lipschitz_constant"] is None
    expected = {"method": "mono", "sigma": 0.5, "n0": 10, "n": 100, "alpha": 0.001, "seed": 3, "budget": "fixed"}
    assert {name: summary["settings"][name] for name in expected} == expected
    assert summary["images"] == [0, 1, 2, 3]
    assert summary["samples_per_image"] == 100
    assert "seconds per image" in result.output
    assert "wrong with probability at most 0.001" in result.output


def test_radii_of_the_table(model_folder, tmp_path):
    result = run("certify", model_folder, "--limit", "5", "--radii", "0.1, 1/2", "--out", tmp_path, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert list(json.loads((tmp_path / "summary.json").read_text())["certified_accuracy"]) == ["0.1", "1/2"]


def test_classes_in_another_order_are_matched_by_name(model_folder, tmp_path):
    digits = hf_lip.data.load_image_dataset("digits", "test").select(range(20))
    labels = [9 - label for label in digits["label"]]
    features = datasets.Features(
        {"image": digits.features["image"], "label": datasets.ClassLabel(names=list("9876543210"))}
    )
    reversed_digits = datasets.Dataset.from_dict({"image": list(digits["image"]), "label": labels}, features=features)
    reversed_digits.save_to_disk(tmp_path / "reversed")
    for data, split, out in (("digits", "test", "a"), (tmp_path / "reversed", "train", "b")):
        arguments = ("--data", data, "--split", split, "--limit", 20, "--out", tmp_path / out, "--device", "cpu")
        result = run("certify", model_folder, *arguments)
        assert result.exit_code == 0, result.output
    rows = [[{**row, "time": ""} for row in read_tsv(tmp_path / out / "certificates.tsv")] for out in "ab"]
    assert rows[0] == rows[1]


def test_no_model_is_the_embedded_one(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_lip.assets, "DEFAULT_MODEL_DIR", model_folder)
    result = run("certify", "--limit", "3", "--out", tmp_path, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "embedded default on digits" in result.output


def test_a_summary_says_of_which_weights_it_is_and_how_it_was_made(model_folder, tmp_path):
    options = ("--method", "auto", "--limit", "3", "--device", "cpu")
    assert run("certify", "--out", tmp_path / "out", model_folder, *options).exit_code == 0
    text = (tmp_path / "out" / "summary.json").read_text()
    assert str(tmp_path.parent) not in text
    summary = json.loads(text)
    certificate = json.loads((model_folder / "lipschitz_certificate.json").read_text())
    assert summary["weights_sha256"] == certificate["weights_sha256"]
    # in the order of the help, and no option that was not given
    assert summary["command"] == f"hf-lip certify {model_folder.name} --method auto --limit 3 --out out --device cpu"
    assert (summary["model"], summary["hardware"]["dtype"]) == (model_folder.name, "float64")
    assert {"python", "torch", "transformers", "hf_lip"} <= set(summary["versions"])
    result = run("certify", "--revision", "v2", "--out", tmp_path / "b")
    assert result.exit_code == 2
    assert "`--revision` is of a Hub repository: name it as MODEL." in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("/no/such/model",), "`MODEL` '/no/such/model' does not exist"),
        (("--data", "/no/such/data"), "`source` '/no/such/data' does not exist"),
        (("--split", "validation"), "no split 'validation'"),
        (("--method", "magic"), "Unknown `method` 'magic'"),
        (("--method", "mono", "--sigma", "0"), "`sigma` must be a positive number"),
        (("--method", "mono", "--alpha", "1"), "`alpha` must lie strictly between 0 and 1"),
        (("--method", "mono", "--n", "5"), "need n >= 10"),
        (("--limit", "0"), "`--limit` must be at least 1"),
        (("--batch-size", "0"), "`batch_size` must be at least 1"),
        (("--radii", "a/b"), "`--radii` holds 'a/b'"),
        (("--radii", "-1"), "`--radii` holds '-1'"),
        (("--radii", ","), "`--radii` is empty"),
        (("--revision", "v2"), "`--revision` 'v2' is of a Hub repository"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(model_folder, tmp_path, arguments, message):
    arguments = arguments if arguments[0].startswith("/") else (model_folder, *arguments)
    result = run("certify", *arguments, "--out", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 2
    assert not list(tmp_path.rglob("*.tsv"))
    lines = [line for line in result.output.splitlines() if line.strip()]
    assert len(lines) == 1
    assert lines[0].startswith("Error: ")
    assert message in lines[0]


def test_method_lipschitz_needs_a_certificate(resnet_folder, tmp_path):
    result = run("certify", resnet_folder, "--method", "lipschitz", "--out", tmp_path, "--device", "cpu")
    assert result.exit_code == 2
    assert "ResNetForImageClassification has none" in result.output


def test_output_must_be_a_folder(model_folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    result = run("certify", model_folder, "--out", tmp_path / "file")
    assert result.exit_code == 2
    assert "is a file: give a folder" in result.output
    assert (tmp_path / "file").read_text() == "mine"


def test_labels_beyond_the_models_classes(tmp_path):
    config = LipschitzVisionConfig.from_size("tiny", image_size=8, num_channels=1, num_labels=3)
    LipschitzVisionForImageClassification(config).eval().save_pretrained(tmp_path / "model")
    result = run("certify", tmp_path / "model", "--out", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 2
    assert "Unknown label 9: the model has 3 classes" in result.output


def test_missing_matplotlib_is_said_before_the_work(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run("certify", model_folder, "--out", tmp_path)
    assert result.exit_code == 2
    assert 'pip install "hf_lip[demo]"' in result.output


def test_a_bug_keeps_its_traceback(model_folder, tmp_path, monkeypatch):
    def bug(*arguments, **options):
        raise AttributeError("bug")

    monkeypatch.setattr("hf_lip.cli.certify_command.certify_images", bug)
    assert isinstance(run("certify", model_folder, "--out", tmp_path).exception, AttributeError)


def test_verify(model_folder, tmp_path):
    result = run("verify", model_folder)
    assert result.exit_code == 0, result.output
    assert "VERIFIED" in result.output
    assert "NOT" not in result.output
    assert "classifier" in result.output
    for file in model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "lipschitz_certificate.json"
    certificate = json.loads(path.read_text())
    certificate["lipschitz_constant"] *= 0.5
    path.write_text(json.dumps(certificate))
    result = run("verify", tmp_path)
    assert result.exit_code == 1
    assert "NOT VERIFIED" in result.output
    assert "lipschitz_constant" in result.output
    result = run("verify", tmp_path / "nothing")
    assert result.exit_code == 2
    assert result.output.startswith("Error: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--help",), ("certify", "verify", "--version")),
        (("certify", "--help"), ("--data", "--sigma", "--alpha", "--radii", "36/255,72/255,108/255,1.0", "--limit")),
        (("verify", "--help"), ("folder",)),
    ],
)
def test_help(arguments, words):
    result = run(*arguments)
    assert result.exit_code == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    for word in words:
        assert word.lower() in plain.lower()


def test_version():
    result = run("--version")
    assert result.exit_code == 0
    assert re.search(r"hf_lip .*, torch \d+\.\d+.*, transformers \d+\.\d+", result.output)


def test_a_real_process(model_folder, tmp_path):
    environment = {
        **os.environ,
        "COLUMNS": "120",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(Path(hf_lip.__file__).parents[1]),
    }
    process = subprocess.run(
        [sys.executable, "-m", "hf_lip.cli", "certify", str(model_folder), "--limit", "10", "--device", "cpu"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "certified accuracy at 36/255" in process.stdout
    assert "Traceback" not in process.stderr
    # only our own bar may have been drawn
    assert "Loading weights" not in process.stderr
    files = ["certificates.tsv", "certified_accuracy.png", "summary.json"]
    assert sorted(file.name for file in (tmp_path / "hf-lip-certify").iterdir()) == files
