# SPDX-License-Identifier: Apache-2.0
"""What a results file says of a run: nothing of the machine's folders, and what a reader needs to run it again."""

import os
import shlex
import sys
from pathlib import Path

import pytest
import torch

import hf_lip
from hf_lip.training.run_record import command_line, hardware, public_path, public_value, versions


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/data/me/cifar10", "cifar10"),
        ("/data/me/cifar10/", "cifar10"),
        ("~/models/a", "a"),
        ("../shared/cifar10", "cifar10"),
        ("data/../../b", "b"),
        (r"C:\Users\me\data", "data"),
        ("C:/Users/me/data", "data"),
        ("/", "path"),
        ("runs/a", "runs/a"),
        ("uoft-cs/cifar10", "uoft-cs/cifar10"),
        ("36/255", "36/255"),
        ("0.25", "0.25"),
        ("--output_dir=/data/me/run", "--output_dir=run"),
        ("/data/me=you/run", "me=you/run"),
        ("hidden_sizes=[64,128]", "hidden_sizes=[64,128]"),
        ("a = b", "a = b"),
    ],
)
def test_paths_of_the_machine_become_their_last_part(text, shown):
    assert public_value(text) == shown
    assert public_value([text, {"x": (text, 3, None)}]) == [shown, {"x": [shown, 3, None]}]
    if "=" not in text:
        assert public_path(text) == shown


def test_paths_as_objects():
    assert public_value(Path("/data/me/x")) == "x"
    assert public_value({"a": Path("runs/x")}) == {"a": "runs/x"}


def test_a_command_has_neither_paths_nor_tokens(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/me/scripts/train.py", "--data", "/home/me/cifar 10", "--token", "hf_x"])
    assert shlex.split(command_line(secret="hf_x")) == ["train.py", "--data", "cifar 10", "--token", "***"]
    assert command_line(["certify", "/a/b"], program="hf-lip") == "hf-lip certify b"
    assert "me" not in command_line(["--out=/home/me/x"])


def test_hardware_is_that_of_this_process():
    found = hardware("cpu", torch.bfloat16, "bf16")
    assert (found["gpu"], found["dtype"], found["mixed_precision"]) == (None, "bfloat16", "bf16")
    assert found["torch_threads"] == torch.get_num_threads()
    assert 1 <= found["cores"] <= (os.cpu_count() or 1)
    assert found["cpu"].strip()
    assert hardware("meta", "float32")["gpu"] == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_by_name():
    assert hardware("cuda:0", torch.float32)["gpu"] == torch.cuda.get_device_name(0)


def test_versions():
    found = versions("torch")
    assert list(found) == ["python", "hf_lip", "torch"]
    assert found["hf_lip"] == hf_lip.__version__
    assert {"transformers", "accelerate", "datasets", "safetensors"} < set(versions())
