# SPDX-License-Identifier: Apache-2.0
"""The same script on ordinary networks: any architecture, noise, penalties, and what it writes about them."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, pipeline

from hf_lip import LipschitzVisionImageProcessor
from hf_lip.data import dataset_to_tensors, load_image_dataset
from hf_lip.pipelines.transforms import pixel_transform
from hf_lip.training import noisy_pixels
from hf_lip.training.run_folder import list_checkpoints

from .runs import SCRIPT, SMALL_DATA, made_images, subprocess_environment, weights


SGD = ("--optimizer", "sgd", "--learning_rate", "0.1", "--lr_schedule", "one_cycle")
RESNET = ("--cpu", "--architecture", "cifar_resnet", "--depth", "8", "--width_multiplier", "0.25", *SGD)
STOCK = [
    *("--cpu", "--architecture", "resnet", "--config_overrides", "hidden_sizes=[8,16]", "depths=[1,1]"),
    *("embedding_size=8", "layer_type=basic", *SGD),
]


def accuracies(folder, processor, data, sd):
    """Clean and noisy accuracy of a saved model, from the images up."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    dataset = load_image_dataset(data, "test")
    images, labels = dataset_to_tensors(dataset, image_size=8, num_channels=3, progress=False)
    transform = pixel_transform(processor)
    with torch.no_grad():
        clean = model(pixel_values=transform(images)).logits.argmax(-1)
        noisy = noisy_pixels(images, torch.arange(len(images)), sd=sd, seed=0)
        found = model(pixel_values=transform(noisy)).logits.argmax(-1)
    return (clean == labels).double().mean().item(), (found == labels).double().mean().item()


@pytest.fixture
def data(tmp_path):
    return made_images(tmp_path / "data", {"train": 120, "test": 30})


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--mixed_precision", "bf16", "--ema_decay", "0.5"],
        ["--noise_method", "consistency", "--noise_copies", "2"],
        ["--noise_method", "smoothadv", "--attack_epsilon", "0.3", "--attack_steps", "2"],
        ["--loss", "hinge", "--channels_last", "false", "--max_grad_norm", "1"],
    ],
    ids=["gaussian", "bf16-ema", "consistency", "smoothadv", "hinge"],
)
def test_cifar_resnet_with_noise(run, tmp_path, data, words):
    words = (*words, "--dataset", data, "--train_batch_size", 20, "--num_train_epochs", 5, "--noise_sd", 0.2)
    results = run("run", *words, base=RESNET)
    assert results["model_type"] == "cifar_resnet"
    assert results["noise_sd"] == 0.2
    assert results["noisy_accuracy"] > 0.8
    assert results["history"][-1]["noisy_accuracy"] == results["noisy_accuracy"]
    assert results["train_samples_per_second"] > 0
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert written == {"config.json", "model.safetensors", "preprocessor_config.json", "results.json"}
    processor = LipschitzVisionImageProcessor.from_pretrained(tmp_path / "run")
    found = accuracies(tmp_path / "run", processor, data, 0.2)
    assert found == (results["clean_accuracy"], results["noisy_accuracy"])


def test_noise_training_is_what_makes_the_difference(run, data):
    words = ("--dataset", data, "--train_batch_size", 20, "--num_train_epochs", 5, "--loss", "xent")
    noisy = run("noisy", *words, "--noise_sd", 0.6, base=RESNET)
    clean = run("clean", *words, base=RESNET)
    assert "noisy_accuracy" not in clean
    assert clean["clean_accuracy"] == 1.0
    assert noisy["noisy_accuracy"] > 0.7


def test_stock_resnet_from_scratch_then_trained_on(run, tmp_path, data, auto_image_processor):
    words = ("--dataset", data, "--train_batch_size", 20, "--noise_sd", 0.2)
    results = run("first", *words, "--num_train_epochs", 4, "--mixed_precision", "bf16", base=STOCK)
    processor = auto_image_processor.from_pretrained(tmp_path / "first")
    train, _ = dataset_to_tensors(load_image_dataset(data, "train"), image_size=8, num_channels=3, progress=False)
    assert processor.image_mean == pytest.approx(train.mean((0, 2, 3)).tolist(), abs=1e-5)
    assert processor.image_std == pytest.approx(train.transpose(0, 1).flatten(1).std(dim=1).tolist(), rel=1e-3)
    figures = (results["clean_accuracy"], results["noisy_accuracy"])
    assert accuracies(tmp_path / "first", processor, data, 0.2) == figures
    # weights that do not move: the script evaluates the saved model again, with its processor
    words = (*words, "--model_name_or_path", tmp_path / "first", "--learning_rate", 1e-30, "--num_train_epochs", 1)
    again = run("again", *words, "--optimizer", "sgd", base=["--cpu"])
    assert again["model_type"] == "resnet"
    saved = json.loads((tmp_path / "again" / "preprocessor_config.json").read_text())
    assert saved == json.loads((tmp_path / "first" / "preprocessor_config.json").read_text())
    # only the statistics of batch norm have moved
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "again"))
    fixed = [name for name in before if not name.endswith(("_mean", "_var", "_tracked"))]
    assert all(torch.equal(before[name], after[name]) for name in fixed)
    # and any pipeline can use it
    image = load_image_dataset(data, "test")[1]["image"]
    answer = pipeline("image-classification", model=str(tmp_path / "first"))(image)[0]
    assert answer["label"] == "light"
    certify = pipeline("certify", model=str(tmp_path / "first"))
    assert certify(image, method="mono", sigma=0.1, n=100, batch_size=50)["label"] == "light"


def test_a_processor_that_resizes_and_normalises_is_used_in_training(run, tmp_path, data, auto_image_processor):
    run("first", "--dataset", data, "--train_batch_size", 20, "--num_train_epochs", 1, base=STOCK)
    path = tmp_path / "first" / "preprocessor_config.json"
    fields = {"size": {"height": 12, "width": 12}, "image_mean": [0.7] * 3, "image_std": [0.1] * 3}
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    results = run(
        "second",
        *("--dataset", data, "--train_batch_size", 20, "--num_train_epochs", 4, "--noise_sd", 0.1),
        *("--model_name_or_path", tmp_path / "first", *SGD),
        base=["--cpu"],
    )
    processor = auto_image_processor.from_pretrained(tmp_path / "second")
    assert (processor.size.height, list(processor.image_mean)) == (12, [0.7] * 3)
    figures = (results["clean_accuracy"], results["noisy_accuracy"])
    assert accuracies(tmp_path / "second", processor, data, 0.1) == figures
    assert results["clean_accuracy"] > 0.8


def test_lipschitz_backbone_with_noise_has_both_kinds_of_figures(run):
    results = run("run", "--block_type", "sll", "--num_train_epochs", 8, "--noise_sd", 0.1)
    assert 0.5 < results["noisy_accuracy"] <= 1.0
    assert results["average_certified_radius"] > 0
    assert results["arguments"]["temperature"] == 0.25


def test_penalty_lowers_the_norms(run):
    words = ("--num_train_epochs", 4, *SMALL_DATA)
    base = ("--cpu", "--architecture", "cifar_resnet", "--depth", "8", "--width_multiplier", "0.5", *SGD)
    plain = run("plain", *words, "--lipschitz_penalty", 1e-12, base=base)
    penalised = run("penalised", *words, "--lipschitz_penalty", 0.1, "--lipschitz_iterations", 5, base=base)
    norms, lower = plain["layer_norm_estimates"], penalised["layer_norm_estimates"]
    assert set(norms) == set(lower)
    assert len(lower) == 8
    assert max(lower.values()) < 0.7 * max(norms.values())
    assert "layer_norm_estimates" not in run("none", *words, "--num_train_epochs", 1, base=base)


def test_resume_with_batch_norm_noise_and_penalty_gives_the_same_weights(run, tmp_path):
    words = (
        *(
            "--noise_sd",
            "0.2",
            "--noise_method",
            "smoothadv",
            "--lipschitz_penalty",
            "0.01",
            "--num_train_epochs",
            "2",
        ),
        *("--mixed_precision", "bf16", *SMALL_DATA),
    )
    expected = run("whole", *words, "--checkpointing_steps", 5, "--checkpoints_total_limit", 9, base=RESNET)
    copy = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole", copy)
    for path in list_checkpoints(copy):
        if path.name != "checkpoint-5":
            shutil.rmtree(path)
    (copy / "model.safetensors").unlink()
    results = run("resumed", *words, "--resume_from_checkpoint", "latest", base=RESNET)
    assert weights(copy) == weights(tmp_path / "whole")
    assert results["noisy_accuracy"] == expected["noisy_accuracy"]
    assert results["layer_norm_estimates"] == expected["layer_norm_estimates"]


def test_two_processes_agree_on_batch_norm_and_on_the_noise(run, tmp_path):
    words = ["--num_train_epochs", "2", "--noise_sd", "0.2", "--lipschitz_penalty", "0.01", *SMALL_DATA]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    command += [*RESNET, *words, "--output_dir", str(tmp_path / "two")]
    done = subprocess.run(command, env=subprocess_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    two, one = json.loads((tmp_path / "two" / "results.json").read_text()), run("one", *words, base=RESNET)
    assert (two["num_processes"], two["eval_samples"]) == (2, 67)
    # batch norm sees half of the batch on each process: near, not equal
    assert two["history"][0]["loss"] == pytest.approx(one["history"][0]["loss"], rel=0.2)
    state = load_file(tmp_path / "two" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())
    expected = load_file(tmp_path / "one" / "model.safetensors")
    means = [np.corrcoef(state[name], expected[name])[0, 1] for name in state if name.endswith("running_mean")]
    assert min(means) > 0.5


class TestBadInput:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--noise_sd", "-1"], "--noise_sd must be >= 0"),
            (["--noise_method", "smoothadv"], "need noise"),
            (["--block_type", "sll"], "no option of --architecture cifar_resnet"),
            (["--config_overrides", "depth"], "name=value"),
            (["--ignore_mismatched_sizes"], "give --model_name_or_path"),
        ],
    )
    def test_arguments_are_refused_before_any_work(self, run, capsys, tmp_path, words, message):
        with pytest.raises(SystemExit) as exit_info:
            run("run", *words, base=RESNET)
        assert exit_info.value.code == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--cpu", "--architecture", "bert"], "no image classifier"),
            (["--cpu", "--architecture", "resnet", "--config_overrides", "x=1"], "no such field"),
            ([*RESNET, "--loss", "emma"], "emma needs"),
            (["--cpu", "--lipschitz_penalty", "1", "--size", "tiny", "--image_size", "8"], "ordinary networks"),
        ],
    )
    def test_models_that_cannot_be_trained_so(self, run, tmp_path, words, message):
        with pytest.raises(ValueError, match=message):
            run("run", *words, *SMALL_DATA, base=())
        assert not (tmp_path / "run").exists()

    def test_classes_of_another_checkpoint(self, run, tmp_path, data, auto_image_processor):
        run("first", "--dataset", data, "--train_batch_size", 20, "--num_train_epochs", 1, base=STOCK)
        other = made_images(tmp_path / "other", {"train": 40, "test": 8}, names=("red", "blue", "green"))
        words = ("--dataset", other, "--train_batch_size", 20, "--num_train_epochs", 1)
        with pytest.raises(ValueError, match="not among the 2 classes"):
            run("second", *words, "--model_name_or_path", tmp_path / "first", base=["--cpu"])
        words = (*words, "--model_name_or_path", tmp_path / "first", "--ignore_mismatched_sizes")
        run("third", *words, base=["--cpu"])
        config = AutoModelForImageClassification.from_pretrained(tmp_path / "third").config
        assert list(config.id2label.values()) == ["red", "blue", "green"]

    def test_divergence_stops_the_run(self, run):
        words = ("--learning_rate", 1e30, "--lr_schedule", "constant", "--num_train_epochs", 2, "--logging_steps", 1)
        with pytest.raises(RuntimeError, match="Training has diverged"):
            run("run", *words, *SMALL_DATA, base=RESNET)
