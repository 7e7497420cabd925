# SPDX-License-Identifier: Apache-2.0
"""Runs the real script: one process and two, killed and taken up again, on the digits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.state import PartialState
from transformers import ResNetConfig, ResNetForImageClassification

from hf_lip.smoothing.logs import PARTS_NAME, read_log

from .runs import loaded_script


ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "certify.py"
# three images share a batch of selection samples; bfloat16 rounds coarsely, so that a vote can depend on its row
SETTINGS = [
    *("--cpu", "--method", "cpm", "--sigma", "0.5", "--n0", "10", "--samples", "400", "--batch_size", "32"),
    *("--dtype", "bfloat16", "--stride", "20", "--limit", "14"),
]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=10, layer_type="basic"
    )
    network = ResNetForImageClassification(config)
    with torch.no_grad():
        network.classifier[1].weight.mul_(20.0)
    folder = tmp_path_factory.mktemp("models") / "resnet"
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def script():
    with loaded_script(SCRIPT) as module:
        yield module


@pytest.fixture(scope="module")
def run(script, model):
    def run_in(folder, *words):
        PartialState._reset_state()
        script.main([*SETTINGS, "--model", str(model), "--out", str(folder), *map(str, words)])
        return folder

    return run_in


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """A run of one process without interruption."""
    return run(tmp_path_factory.mktemp("runs") / "whole")


def start(model, folder, *words, processes=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(SCRIPT), *SETTINGS]
    return subprocess.Popen(
        [*command, "--model", str(model), "--out", str(folder), *words],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(process):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()


def same(folder, expected):
    """The logs are equal, byte for byte but for the times."""

    def lines(path):
        head, *rest = path.read_text().splitlines()
        return [head, *(json.dumps({**json.loads(line), "time": 0}) for line in rest)]

    assert lines(folder / "counts.jsonl") == lines(expected / "counts.jsonl")
    tables = [(path / "certificates.tsv").read_text().splitlines() for path in (folder, expected)]
    assert [line.rpartition("\t")[0] for line in tables[0]] == [line.rpartition("\t")[0] for line in tables[1]]
    assert not (folder / PARTS_NAME).exists()


def test_what_a_run_writes(whole, model):
    settings, records = read_log(whole / "counts.jsonl")
    for name in ("counts.jsonl", "summary.json"):
        assert str(model.parent) not in (whole / name).read_text()
    assert [record.idx for record in records] == list(range(0, 280, 20))
    assert settings["batch_size"] == 32
    assert all(sum(record.counts) == 400 for record in records)
    # a test of equal logs needs votes that differ
    assert len({tuple(record.counts) for record in records}) > 10
    assert sum(max(record.counts) < 400 for record in records) > 5
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["images"] == list(range(0, 280, 20))
    assert "--dtype bfloat16" in summary["command"]
    assert (whole / "certified_accuracy.png").stat().st_size > 1000


def test_two_processes_write_the_log_of_one(model, whole, tmp_path):
    process = start(model, tmp_path / "two", processes=2)
    finish(process)
    same(tmp_path / "two", whole)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_kill_9_then_resume_with_another_number_of_processes(model, run, whole, tmp_path, processes):
    folder = tmp_path / "killed"
    process = start(model, folder, processes=processes)
    try:
        deadline = time.monotonic() + 200

        def certified():
            parts = list((folder / PARTS_NAME).glob("rank-*.jsonl"))
            return sum(max(0, path.read_bytes().count(b"\n") - 1) for path in parts)

        while certified() < 3:
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        # the launcher's processes are in groups of their own
        if process.poll() is None:
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                child.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (folder / "certificates.tsv").exists()
    if processes == 1:
        # and the last line is cut off as well
        part = next((folder / PARTS_NAME).glob("rank-*.jsonl"))
        part.write_bytes(part.read_bytes()[:-20])
    run(folder, "--resume")
    same(folder, whole)


def test_resuming_needs_the_same_settings_and_leaves_the_log(run, whole):
    before = (whole / "counts.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"other settings \(n: 400 there, 500 now\)"):
        run(whole, "--resume", "--samples", 500)
    with pytest.raises(ValueError, match="resume it, overwrite it"):
        run(whole)
    with pytest.raises(ValueError, match=r"other settings.*batch_size: 32 there, 16 now"):
        run(whole, "--resume", "--batch_size", 16)
    assert (whole / "counts.jsonl").read_bytes() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU launch")
def test_processes_that_would_each_do_everything_are_refused(script, model, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    PartialState._reset_state()
    words = [word for word in SETTINGS if word != "--cpu"]
    with pytest.raises(RuntimeError, match="2 processes were launched but each would certify everything"):
        script.main([*words, "--model", str(model), "--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--sigma", "-1"], ValueError, "`sigma`"),
        (["--limit", "0"], ValueError, "`--limit` must be at least 1"),
        (["--data", "/no/such/folder"], FileNotFoundError, "/no/such/folder"),
        (["--method", "lvm"], ValueError, "give --score-map"),
        (["--method", "lipschitz"], SystemExit, "2"),
    ],
)
def test_arguments_are_refused_before_any_work(run, tmp_path, words, error, message):
    with pytest.raises(error, match=message):
        run(tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()
