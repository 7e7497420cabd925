# SPDX-License-Identifier: Apache-2.0
"""Two processes under torchrun on the CPU: `transformers.Trainer` by DDP, and FSDP by `fully_shard`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from hf_lip import verify_checkpoint

from .tiny import chacal, image_batch, images, lipschitz, token_rows, tokens
from .worker import trained, trained_by_sgd


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*command, "-m", "tests.integration.worker", str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-6000:]
    return folder


@pytest.fixture
def ddp(runs):
    return runs / "ddp"


@pytest.fixture
def fsdp(runs):
    return runs / "fsdp"


def assert_close(got: dict, expected: dict) -> None:
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            got[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name} {text}"
        )


@pytest.mark.parametrize("name", ["lipschitz", "chacal"])
def test_trainer_by_ddp(ddp, tmp_path, name):
    first, second = (load_file(ddp / f"{name}-{rank}.safetensors") for rank in (0, 1))
    assert set(first) == set(second)
    assert all(torch.equal(first[key], second[key]) for key in first)
    start = {"lipschitz": lipschitz, "chacal": chacal}[name]()
    rows = images() if name == "lipschitz" else token_rows()
    before = {key: tensor.clone() for key, tensor in start.state_dict().items()}
    assert any((first[key] - before[key]).abs().max() > 1e-2 for key in first)
    # one process with the batches of both
    assert_close(first, trained(start, rows, tmp_path, batch_size=8).state_dict())


def test_what_ddp_trained_is_saved_with_its_certificate(ddp):
    verify_checkpoint(ddp / "saved")
    model = AutoModelForImageClassification.from_pretrained(ddp / "saved")
    assert model.certificate is not None
    assert model(image_batch()["pixel_values"]).certified_radius.max() > 0


@pytest.mark.parametrize("block_type", ["cpl", "sll"])
def test_fsdp_of_the_lipschitz_classifier(fsdp, block_type):
    expected = trained_by_sgd(lipschitz(block_type), image_batch())
    loaded = AutoModelForImageClassification.from_pretrained(fsdp / block_type)
    assert_close(dict(loaded.named_parameters()), dict(expected.named_parameters()))
    # sharded: logits of the frozen layers, and no radius; the saved whole has both
    x = image_batch()["pixel_values"]
    for rank in (0, 1):
        assert "sharded or quantised" in (fsdp / f"{block_type}-{rank}.txt").read_text()
        logits = load_file(fsdp / f"{block_type}-{rank}.safetensors")["logits"]
        own = loaded(x[4 * rank : 4 * rank + 4], output_certified_radius=False).logits
        torch.testing.assert_close(logits, own, rtol=0, atol=1e-5)
    assert loaded.certificate is not None
    assert loaded(x).certified_radius.max() > 0
    verify_checkpoint(fsdp / block_type)


def test_fsdp_of_chacal(fsdp):
    rows = token_rows()[:8]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    expected = trained_by_sgd(chacal(), batch)
    loaded = AutoModelForCausalLM.from_pretrained(fsdp / "chacal")
    assert_close(dict(loaded.named_parameters()), dict(expected.named_parameters()))
    ids = tokens()
    torch.testing.assert_close(loaded(ids).logits, expected.eval()(ids).logits, rtol=1e-4, atol=1e-4)
