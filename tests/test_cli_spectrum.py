# SPDX-License-Identifier: Apache-2.0
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from typer.testing import CliRunner

from hf_lip.checkpoints.spectrum import spectrum
from hf_lip.cli import app
from hf_lip.plots import plot_spectrum


runner = CliRunner()


@pytest.fixture(scope="module")
def resnet_folder(tmp_path_factory):
    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=10, layer_type="basic"
    )
    folder = tmp_path_factory.mktemp("models") / "resnet"
    ResNetForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        vocab_size=64, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "llama"
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="10KB")
    return folder


def run(*arguments):
    return runner.invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "220", "NO_COLOR": "1"})


def require_refusal(result, *texts):
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    for text in texts:
        assert text in line
    assert "Traceback" not in result.output


def table_rows(output, names):
    """Lines of the tables that begin with one of the layers' names."""
    return [line.split() for line in output.splitlines() if line.split() and line.split()[0] in names]


def test_table_json_and_plot(resnet_folder, tmp_path):
    out = tmp_path / "out"
    result = run("spectrum", resnet_folder, "--input-size", "32", "--out", out, "--top", 5)
    assert result.exit_code == 0, result.output
    content = json.loads((out / "spectrum.json").read_text())
    layers = {layer["name"]: layer for layer in content["layers"]}
    assert (content["format"], content["format_version"]) == ("hf_lip/spectrum", 1)
    assert content["model"] == str(resnet_folder)
    assert content["architecture"] == "ResNetForImageClassification"
    rows = table_rows(result.output, layers)
    largest = sorted(layers.values(), key=lambda layer: -layer["upper"])
    assert [row[0] for row in rows] == [layer["name"] for layer in largest[:5]]
    for row in rows:
        layer = layers[row[0]]
        # the first two numbers after kind and shape
        upper, lower = [float(cell) for cell in row[1:] if re.fullmatch(r"\d+\.\d+", cell)][:2]
        # what is printed is still a bound
        assert lower <= layer["lower"] <= layer["upper"] <= upper <= layer["upper"] * 1.0001
    bound = content["global_lipschitz_bound"]
    assert bound["input_shape"] == [1, 32, 32]
    assert f"{len(layers) - 5} more layers are in spectrum.json" in result.output
    printed = re.search(r"certified global Lipschitz bound, l2 to l2: (\S+)", result.output)
    assert bound["upper"] <= float(printed[1]) <= bound["upper"] * 1.0001
    assert "images of 32 x 32" in result.output
    with Image.open(out / "spectrum.png") as plot:
        assert plot.format == "PNG"
    assert sorted(path.name for path in out.iterdir()) == ["spectrum.json", "spectrum.png"]
    # again, over the old files
    assert run("spectrum", resnet_folder, "--input-size", "32x48", "--out", out).exit_code == 0
    assert json.loads((out / "spectrum.json").read_text())["global_lipschitz_bound"]["input_shape"] == [1, 32, 48]


def test_sharded_transformer_in_the_order_of_its_depth(llama_folder, tmp_path):
    result = run("spectrum", llama_folder, "--sort", "depth", "--top", 0, "--rtol", "1e-2", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "spectrum.json").read_text())
    linear = [layer["name"] for layer in content["layers"] if layer["linear"]]
    others = [layer["name"] for layer in content["layers"] if not layer["linear"]]
    assert [row[0] for row in table_rows(result.output, {*linear, *others})] == [*linear, *others]
    assert linear[0] == "model.embed_tokens"
    assert re.search(r"lm_head \(tied\)", result.output)
    assert re.search(r"q_proj .* of 4\b", result.output)
    assert "Lipschitz constants of layers that are not linear" in result.output
    assert "3 of the norms are not certified" in result.output
    assert "no global Lipschitz bound: the composition of LlamaForCausalLM is not known here" in result.output
    assert content["rtol"] == 1e-2


def test_one_file_and_what_names_do_not_tell(tmp_path):
    tensors = {
        "conv.weight": torch.randn(3, 2, 3, 3),
        "fc.weight": torch.randn(4, 4),
        "quantised.weight": torch.ones(4, 4, dtype=torch.int8),
        "broken.weight": torch.full((2, 2), torch.nan),
        **{f"scale_{index}": torch.ones(3) for index in range(3)},
    }
    save_file(tensors, tmp_path / "weights.safetensors")
    result = run("spectrum", tmp_path / "weights.safetensors", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "stride, padding, dilation, groups, input size not known" in result.output
    assert "quantised.weight: stored as I8" in result.output
    assert "broken.weight: " in result.output
    assert "not finite" in result.output
    assert "3 tensors such as scale_0: what it is used for cannot be told from its name" in result.output
    assert "there is no config.json" in result.output


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (("--rtol", "0"), ("`rtol` must be between 0 and 1",)),
        (("--top", "-1"), ("`--top` must not be negative",)),
        (("--sort", "name"), ("`--sort` must be 'norm' or 'depth'",)),
        (("--input-size", "tall"), ("`--input-size` must be one size or HEIGHTxWIDTH", "'tall'")),
        (("--input-size", "0"), ("`--input-size` must be",)),
    ],
)
def test_options_that_make_no_sense(resnet_folder, tmp_path, arguments, texts):
    require_refusal(run("spectrum", resnet_folder, *arguments, "--out", tmp_path / "out"), *texts)
    assert not (tmp_path / "out" / "spectrum.json").exists()


def test_an_input_size_that_does_not_fit(llama_folder, tmp_path):
    result = run("spectrum", llama_folder, "--input-size", "32", "--out", tmp_path / "out")
    require_refusal(result, "`input_size` was given, but LlamaForCausalLM reads no images")
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    result = run("spectrum", tmp_path / "vit", "--input-size", "16", "--out", tmp_path / "out")
    require_refusal(result, "`input_size`", "does not run on pixel_values of shape (1, 3, 16, 16)")


def test_bad_checkpoints(tmp_path, resnet_folder):
    out = ("--out", tmp_path / "out")
    require_refusal(run("spectrum", tmp_path / "missing", *out), "does not exist", "Hub id")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    require_refusal(run("spectrum", tmp_path, *out), "pickles", "save_file")
    require_refusal(run("spectrum", tmp_path / "pytorch_model.bin", *out), "is a pickle")
    content = (resnet_folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-7])
    require_refusal(run("spectrum", tmp_path, *out), "truncated, damaged", "copy or download it again")
    (tmp_path / "out.txt").write_text("")
    require_refusal(run("spectrum", resnet_folder, "--out", tmp_path / "out.txt"), "is a file: give a folder")
    require_refusal(run("spectrum", "no/such-model", *out), "")


def test_no_space_for_the_report_leaves_the_old_one(resnet_folder, tmp_path):
    (tmp_path / "spectrum.json").write_text("old")

    def limit():
        # the kernel refuses to let any file grow beyond this
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    root = Path(__file__).resolve().parents[1]
    words = [sys.executable, "-m", "hf_lip.cli", "spectrum", resnet_folder, "--input-size", "16", "--out", tmp_path]
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        list(map(str, words)), env=environment, capture_output=True, text=True, preexec_fn=limit, timeout=300
    )
    assert result.returncode == 2, result.stderr
    assert "Error: " in result.stderr
    assert "Traceback" not in result.stderr
    assert (tmp_path / "spectrum.json").read_text() == "old"


def test_plot_has_a_point_for_every_linear_layer(llama_folder, tmp_path):
    report = spectrum(llama_folder)
    ax = plot_spectrum(report.layers, path=tmp_path / "a" / "spectrum.png", title="llama")
    assert ax.get_yscale() == "log"
    assert ax.get_title() == "llama"
    points = {}
    for container in ax.containers:
        line = container.lines[0]
        points[container.get_label()] = list(zip(line.get_xdata().tolist(), line.get_ydata().tolist()))
    linear = [row for row in report.layers if row.linear]
    assert sorted(points) == ["embedding (1)", "linear (8)"]
    assert sorted(point for kind in points.values() for point in kind) == sorted(
        (row.depth, row.upper) for row in linear
    )
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["spectrum.png"]


def test_plot_of_norms_that_have_no_place_on_the_scale(tmp_path):
    save_file({"a.weight": torch.zeros(2, 2), "b.weight": torch.eye(2)}, tmp_path / "model.safetensors")
    ax = plot_spectrum(spectrum(tmp_path).layers)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["linear (2, 1 not shown)"]
    empty = plot_spectrum([], path=tmp_path / "empty.png")
    assert empty.get_legend() is None
