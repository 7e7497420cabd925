# SPDX-License-Identifier: Apache-2.0
"""The benchmark of all procedures on shared samples must give what each gives by itself."""

import json
from pathlib import Path

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification

from hf_lip.data.images import load_image_dataset
from hf_lip.pipelines.loading import load_certify_pipeline

from .runs import loaded_script


SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmarks" / "compare_procedures.py"
SETTINGS = {"sigma": 0.5, "n0": 20, "n": 300, "alpha": 0.001, "seed": 0}


@pytest.fixture(scope="module")
def script():
    with loaded_script(SCRIPT) as module:
        yield module


@pytest.fixture(scope="module")
def compared(script, tmp_path_factory):
    """(model, folder of the results, arguments)"""
    folder = tmp_path_factory.mktemp("compare")
    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=10, layer_type="basic"
    )
    network = ResNetForImageClassification(config)
    with torch.no_grad():
        network.classifier[1].weight.mul_(20.0)
    network.save_pretrained(folder / "model")
    arguments = [
        *("--model", str(folder / "model"), "--data", "digits", "--out", str(folder / "out"), "--sigma", "0.5"),
        *("--n0", "20", "--samples", "300", "--calibrate", "4", "--stride", "100", "--batch_size", "50"),
    ]
    script.main([*arguments, "--limit", "2"])
    script.main(arguments)
    return folder / "model", folder / "out", arguments


def test_each_procedure_gives_what_it_gives_by_itself(compared):
    model, out, _ = compared
    lines = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]
    assert [line["idx"] for line in lines[1:]] == [0, 100, 200, 300, 400]
    row = lines[1]
    image = load_image_dataset("digits", "test")[0]["image"]
    for method in ("mono", "bonferroni", "cpm", "auto", "lvm", "betting"):
        settings = {**SETTINGS, "method": method}
        if method in ("lvm", "betting"):
            settings["score_map"] = lines[0]["score_map"]
        # the first of a list has index 0, the image's in its data set
        alone = load_certify_pipeline(str(model), None, settings)([image], batch_size=50)[0]
        assert row["methods"][method]["radius"] == pytest.approx(alone["radius"], rel=1e-12, abs=0.0)
        if alone["counts"] is not None:
            assert row["counts"] == alone["counts"]
    assert row["adaptive_samples"] <= 300


def test_table(compared):
    results = json.loads((compared[1] / "results.json").read_text())
    assert results["num_images"] == 5
    table = results["procedures"]
    assert table["mono"]["radius_over_mono"]["larger"] == table["mono"]["radius_over_mono"]["smaller"] == 0.0
    for row in table.values():
        assert 0.0 <= row["certified_accuracy"]["1.0"] <= row["accuracy"] <= 1.0
    assert results["adaptive_saving"] >= 1.0


def test_other_settings_are_refused(script, compared):
    with pytest.raises(ValueError, match="another `--alpha`"):
        script.main([*compared[2], "--alpha", "0.01"])
