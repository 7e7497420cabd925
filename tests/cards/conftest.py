# SPDX-License-Identifier: Apache-2.0
"""Runs that the tests of cards share."""

import pytest
import torch
from typer.testing import CliRunner

from hf_lip.cli import app
from hf_lip.models.cifar_resnet.configuration_cifar_resnet import CifarResNetConfig
from hf_lip.models.cifar_resnet.modeling_cifar_resnet import CifarResNetForImageClassification

from .runs import CHAINS, DIGITS, TEXT, copied, trained


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    return trained("train_image_classifier", DIGITS, tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture(scope="session")
def smoothed_run(tmp_path_factory):
    """An untrained ResNet, certified by smoothing on every 60th digit."""
    folder = tmp_path_factory.mktemp("runs") / "resnet"
    torch.manual_seed(0)
    config = CifarResNetConfig.from_depth(8, num_channels=1, image_size=8, num_labels=10)
    CifarResNetForImageClassification(config).eval().save_pretrained(folder)
    words = ("--method", "cpm", "--sigma", "0.5", "--n0", "20", "--n", "200", "--stride", "60", "--device", "cpu")
    result = CliRunner().invoke(app, ["certify", str(folder), *words, "--out", str(folder / "sigma-0.5")])
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="session")
def chains_run(tmp_path_factory):
    return trained("train_entity_tracking", CHAINS, tmp_path_factory.mktemp("runs") / "chains")


@pytest.fixture(scope="session")
def story(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("the cat sat on the mat. a dog ran to the cat. " * 30)
    return path


@pytest.fixture(scope="session")
def text_run(story, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "language"
    return trained("train_causal_lm", [*TEXT, "--train_file", str(story)], folder)


@pytest.fixture
def digits(digits_run, tmp_path):
    return copied(digits_run, tmp_path, license="apache-2.0")
