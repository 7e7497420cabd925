# SPDX-License-Identifier: Apache-2.0
"""The benchmark script of accuracies before and after, on an untrained network and scikit-learn's digits."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor

from hf_lip import LipschitzVisionImageProcessor
from hf_lip.models.cifar_resnet.configuration_cifar_resnet import CifarResNetConfig
from hf_lip.models.cifar_resnet.modeling_cifar_resnet import CifarResNetForImageClassification

from .tiny_checkpoints import stirred


SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks" / "rescaled_accuracy.py"


def test_predictions_stay_and_norms_fall(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    config = CifarResNetConfig(
        num_blocks=[1, 1], hidden_sizes=[4, 6], num_channels=1, image_size=8, num_labels=10
    )  # fmt: skip
    stirred(CifarResNetForImageClassification(config)).save_pretrained(tmp_path / "model")
    processor = LipschitzVisionImageProcessor(size={"height": 8, "width": 8}, num_channels=1)
    processor.save_pretrained(tmp_path / "model")
    try:
        AutoImageProcessor.from_pretrained(tmp_path / "model")
    except ImportError:
        pytest.skip("transformers 5.17 has no AutoImageProcessor without torchvision")
    words = ["--model", str(tmp_path / "model"), "--data", "digits", "--num_images", "60", "--batch_size", "25"]
    words += ["--variants", "preserve-logits", "preserve-logits sr", "fold-bn", "sn", "--to", "0.5"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words, "--output", str(tmp_path / "results.json")])
    assert runpy.run_path(str(SCRIPT))["main"]() == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["num_images"] == 60
    assert results["original"]["largest_norm"] > 0.5
    for name in ("preserve-logits", "preserve-logits sr"):
        assert results[name]["largest_difference"] == 0
        assert results[name]["agreement"] == 1
        assert results[name]["accuracy"] == results["original"]["accuracy"]
        assert results[name]["largest_norm"] <= 0.5
    assert results["fold-bn"]["largest_difference"] < 1e-3
    assert results["sn"]["largest_norm"] <= 0.5
    assert results["sn"]["largest_difference"] > 0.1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == ["original", *words[words.index("--variants") + 1 :][:4]]
