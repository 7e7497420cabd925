# SPDX-License-Identifier: Apache-2.0
"""What a rescaling writes, and that it writes all of it or nothing."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from hf_lip.checkpoints.rescale import rescale_checkpoint
from hf_lip.checkpoints.rewrite import CheckpointCopy
from hf_lip.checkpoints.source import Checkpoint

from .tiny_checkpoints import PlainNet, gpt2, resnet, save_plain, stirred


ROOT = Path(__file__).resolve().parents[2]


def header_of(path):
    with open(path, "rb") as file:
        return file.read(8 + int.from_bytes(file.read(8), "little"))


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def test_shards_index_and_metadata_stay(tmp_path):
    model = gpt2()
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    shards = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 3
    report = rescale_checkpoint(tmp_path / "model", tmp_path / "out", to=0.5)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == shards
    for name in shards:
        assert header_of(tmp_path / "out" / name) == header_of(tmp_path / "model" / name)
        content = (tmp_path / "out" / name).read_bytes()
        assert report.files[name] == hashlib.sha256(content).hexdigest()
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_bytes() == (tmp_path / "model" / index).read_bytes()
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is type(model)


def test_metadata_of_a_single_file_stays(tmp_path):
    save_plain(stirred(PlainNet()), tmp_path / "model")
    rescale_checkpoint(tmp_path / "model" / "model.safetensors", tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as content:
        assert content.metadata() == {"format": "pt", "origin": "made for a test"}
    assert names_in(tmp_path / "out") == {"model.safetensors", "README.md", "rescale_report.json"}


def test_other_files_are_copied_and_old_weights_are_not(tmp_path):
    resnet().save_pretrained(tmp_path / "model")
    kept = {"preprocessor_config.json": "{}", "vocab.txt": "a\nb\n", "tokenizer_config.json": "{}", "LICENSE": "mine"}
    left = dict.fromkeys(["pytorch_model.bin", "model.onnx", "results.json", "pytorch_model.bin.index.json"], "{}")
    for name, text in {**kept, **left, ".gitattributes": "", "README.md": "old"}.items():
        (tmp_path / "model" / name).write_text(text)
    (tmp_path / "model" / "checkpoint-5").mkdir()
    (tmp_path / "model" / "vocab.txt").chmod(0o400)
    report = rescale_checkpoint(tmp_path / "model", tmp_path / "out")
    own = {"config.json", "model.safetensors", "README.md", "rescale_report.json"}
    assert names_in(tmp_path / "out") == {*own, *kept}
    assert set(report.left_out) == {*left, "README.md", "checkpoint-5"}
    for name, text in kept.items():
        assert (tmp_path / "out" / name).read_text() == text
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "model" / "config.json").read_bytes()
    modes = {(tmp_path / "out" / name).stat().st_mode & 0o777 for name in names_in(tmp_path / "out")}
    umask = os.umask(0o022)
    os.umask(umask)
    assert modes == {0o666 & ~umask}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "dangling link", "the model itself"])
def test_nothing_is_overwritten(kind, tmp_path):
    save_plain(stirred(PlainNet()), tmp_path / "model")
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "precious.txt").write_text("x")
    elif kind == "empty folder":
        out.mkdir()
    elif kind == "file":
        out.write_text("x")
    elif kind == "dangling link":
        out.symlink_to(tmp_path / "nowhere")
    else:
        out = tmp_path / "model"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        rescale_checkpoint(tmp_path / "model", out)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing(error, tmp_path):
    save_plain(stirred(PlainNet()), tmp_path / "model")
    seen = []

    def interrupt(done, total, name):
        seen.append(names_in(tmp_path))
        if done == 2:
            raise error

    with pytest.raises(error):
        rescale_checkpoint(tmp_path / "model", tmp_path / "out", progress=interrupt)
    assert names_in(tmp_path) == {"model"}
    # it was under way, out of sight
    assert any(name.startswith(".out.") for name in seen[-1])


def test_what_appears_meanwhile_is_not_overwritten(tmp_path):
    save_plain(stirred(PlainNet()), tmp_path / "model")

    def occupy(done, total, name):
        if done == total:
            (tmp_path / "out").write_text("someone else's")

    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        rescale_checkpoint(tmp_path / "model", tmp_path / "out", progress=occupy)
    assert names_in(tmp_path) == {"model", "out"}
    assert (tmp_path / "out").read_text() == "someone else's"


LIMITED = """
import resource, sys
import hf_lip
from typer.testing import CliRunner
from hf_lip.cli import app

for limit in (100, 3000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    result = CliRunner().invoke(app, ["rescale", sys.argv[1], "--out", sys.argv[2]])
    print(result.exit_code, result.output)
"""


def test_a_full_disk_leaves_nothing(tmp_path):
    """A limit on the size of files stands for the disk: writes fail half-way, by EFBIG where a disk gives ENOSPC."""
    save_plain(nn.Sequential(nn.Linear(30, 30)), tmp_path / "model")
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "model"), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for line in filter(None, done.stdout.splitlines()):
        assert line.startswith("2 Error: ")
        assert "File too large" in line
    assert names_in(tmp_path) == {"model"}


def test_a_disk_without_room_is_noticed_before_the_work(tmp_path, monkeypatch):
    save_plain(stirred(PlainNet()), tmp_path / "model")
    usage = __import__("shutil").disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(OSError, match="left on its disk"):
        rescale_checkpoint(tmp_path / "model", tmp_path / "deep" / "out")
    assert names_in(tmp_path) <= {"model", "deep"}


def test_a_folder_that_cannot_be_written_to(tmp_path):
    save_plain(stirred(PlainNet()), tmp_path / "model")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        rescale_checkpoint(tmp_path / "model", tmp_path / "file" / "out")


@pytest.mark.parametrize("damage", ["truncated", "pickle", "missing"])
def test_damaged_originals(damage, tmp_path):
    folder = save_plain(stirred(PlainNet()), tmp_path / "model")
    file = folder / "model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "pickle":
        torch.save(load_file(file), folder / "pytorch_model.bin")
        file.unlink()
    else:
        file.unlink()
    messages = {"truncated": "truncated", "pickle": "pickles", "missing": "no safetensors"}
    with pytest.raises(ValueError, match=messages[damage]):
        rescale_checkpoint(folder, tmp_path / "out")
    assert names_in(tmp_path) == {"model"}


def test_parents_are_made_and_the_original_is_untouched(tmp_path):
    resnet().save_pretrained(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    rescale_checkpoint(tmp_path / "model", tmp_path / "a" / "b" / "out", fold_bn=True, preserve_logits=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert names_in(tmp_path / "a" / "b") == {"out"}
    AutoModelForImageClassification.from_pretrained(tmp_path / "a" / "b" / "out")
    assert json.loads((tmp_path / "a" / "b" / "out" / "rescale_report.json").read_text())["source"] == "model"


def test_a_replacement_must_fit(tmp_path):
    save_plain(nn.Sequential(nn.Linear(3, 2)), tmp_path / "model")
    with CheckpointCopy(Checkpoint.open(tmp_path / "model"), tmp_path / "out") as copy:
        for wrong in (torch.zeros(2, 2), torch.zeros(2, 3, dtype=torch.float64)):
            with pytest.raises(ValueError, match=r"0\.weight is torch\.float32 \(2, 3\)"):
                copy.write("0.weight", wrong)
        copy.write("0.weight", torch.arange(6.0).reshape(3, 2).T)
        assert copy.read("0.weight").tolist() == [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]
    # never committed
    assert names_in(tmp_path) == {"model"}
