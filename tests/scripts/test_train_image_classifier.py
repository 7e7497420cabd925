# SPDX-License-Identifier: Apache-2.0
"""Runs the real script on the digits and on made images: what it writes, resume, several processes, bad input."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hf_lip import LipschitzVisionImageProcessor
from hf_lip.checkpoints.stored_weights import stored_weights_sha256
from hf_lip.data import dataset_to_tensors, load_image_dataset
from hf_lip.metrics import STANDARD_RADII, certified_accuracy
from hf_lip.training.run_folder import list_checkpoints, unfinished_folder
from hf_lip.training.run_record import hardware

from .runs import SCRIPT, SMALL_DATA, SMALL_MLP, made_images, subprocess_environment, weights


class TestWhatARunWrites:
    def test_saved_model_reproduces_the_figures_in_results(self, run, tmp_path):
        results = run("run", "--block_type", "sll", "--num_train_epochs", 4, "--hub_token", "hf_secret")
        folder = tmp_path / "run"
        written = {path.name for path in folder.iterdir()}
        assert written == {
            *("config.json", "model.safetensors", "preprocessor_config.json", "lipschitz_certificate.json"),
            "results.json",
        }
        assert "hf_secret" not in (folder / "results.json").read_text()

        model = AutoModelForImageClassification.from_pretrained(folder).eval()
        assert model.certificate is not None
        assert results["lipschitz_constant"] == model.certificate.lipschitz_constant
        assert results["num_parameters"] == sum(parameter.numel() for parameter in model.parameters())
        # weights that do not move: the script evaluates the saved model again
        again = run("again", "--model_name_or_path", folder, *SMALL_DATA, "--learning_rate", 1e-30, base=["--cpu"])
        assert again["certified_accuracy"] == results["certified_accuracy"]
        assert again["average_certified_radius"] == pytest.approx(results["average_certified_radius"], abs=1e-9)
        # of which weights, where it ran, and no folder of the machine
        assert results["weights_sha256"] == model.certificate.weights_sha256 == stored_weights_sha256(folder)
        assert results["hardware"] == hardware("cpu", "float32", "no")
        assert {"python", "torch", "transformers", "hf_lip"} <= set(results["versions"])
        assert "--output_dir run " in f"{results['command']} "
        assert again["arguments"]["model_name_or_path"] == "run"
        assert str(tmp_path) not in (tmp_path / "again" / "results.json").read_text()

    def test_figures_are_those_of_the_whole_test_part(self, run, tmp_path):
        results = run("run", "--block_type", "sll", "--num_train_epochs", 2, base=SMALL_MLP)
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "run").eval()
        images, labels = dataset_to_tensors(
            load_image_dataset("digits", "test"), image_size=8, num_channels=1, progress=False
        )
        with torch.no_grad():
            output = model(pixel_values=images)
        correct = output.logits.argmax(-1) == labels
        assert results["eval_samples"] == 450
        assert results["clean_accuracy"] == pytest.approx(correct.double().mean().item())
        for name, eps in STANDARD_RADII.items():
            assert results["certified_accuracy"][name] == certified_accuracy(output.certified_radius, correct, eps)
        history = results["history"]
        assert [entry["epoch"] for entry in history] == [1, 2]
        assert history[1]["loss"] < history[0]["loss"]
        assert history[-1]["certified_accuracy"] == results["certified_accuracy"]
        assert results["train_samples_seen"] == results["steps"] * 64
        # the image processor makes the same pixels from a PIL image as training saw
        processor = LipschitzVisionImageProcessor.from_pretrained(tmp_path / "run")
        image = Image.fromarray((images[0, 0].numpy() * 255).astype(np.uint8))
        assert processor(image, return_tensors="pt")["pixel_values"].shape == (1, 1, 8, 8)
        assert model.config.id2label[3] == "3"
        train_mean = np.mean(load_image_dataset("digits", "train").with_format("numpy")["image"][:])
        assert model.config.image_mean == [pytest.approx(train_mean, abs=1e-6)]

    @pytest.mark.parametrize(
        "words",
        [
            ["--block_type", "cpl", "--loss", "hinge", "--learning_rate", "0.003", "--head_type", "truncation"],
            [
                "--block_type",
                "aol",
                "--loss",
                "emma",
                "--optimizer",
                "sgd",
                "--learning_rate",
                "0.2",
                "--ema_decay",
                "0.9",
            ],
            ["--block_type", "sr", "--lr_schedule", "one_cycle", "--max_grad_norm", "1", "--image_std", "0.5"],
            ["--block_type", "sll", "--loss", "emma", "--head_type", "truncation", "--mixed_precision", "bf16"],
        ],
        ids=["cpl-hinge", "aol-emma-sgd-ema", "sr-one-cycle-clip-std", "sll-emma-bf16"],
    )
    def test_recipes_learn(self, run, words):
        results = run("run", *words, "--num_train_epochs", 8, "--eval_epochs", 8)
        assert results["clean_accuracy"] > 0.5
        assert results["history"][-1]["loss"] < results["history"][0]["loss"]
        # normalised rows have a joint norm in (1, sqrt(10)]; dividing pixels by 0.5 doubles it
        assert 0 < results["lipschitz_constant"] < 2 * 10**0.5

    def test_convolutions_on_a_parquet_folder_with_augmentation_and_held_out_images(self, run, tmp_path):
        folder = made_images(tmp_path / "data", {"train": 100, "test": 21})
        results = run(
            "run",
            *("--dataset", folder, "--cpu", "--block_type", "cpl", "--depths", 1, 1, "--hidden_sizes", 4, 8),
            *("--downsample_factors", 1, 2, "--pool_size", 2, "--num_dense_layers", 1, "--dense_hidden_size", 8),
            *(
                "--validation_share",
                0.2,
                "--num_train_epochs",
                4,
                "--train_batch_size",
                16,
                "--crop_padding_mode",
                "reflect",
            ),
            *("--report_to", "tensorboard", "--logging_steps", 2),
            base=(),
        )
        assert (results["train_samples"], results["eval_samples"]) == (80, 21)
        assert {entry["eval_samples"] for entry in results["history"]} == {20}
        assert results["clean_accuracy"] == 1.0
        assert list((tmp_path / "run" / "logs").rglob("events.out.tfevents*"))

    def test_a_held_token_is_needed_to_push(self, run, monkeypatch, capsys):
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nonexistent")
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(SystemExit):
            run("run", "--push_to_hub")
        assert "--push_to_hub needs a token" in capsys.readouterr().err


class TestResume:
    recipe = ("--block_type", "cpl", "--crop_padding", "1", "--horizontal_flip", "true", "--ema_decay", "0.9")

    def test_from_the_middle_and_the_end_of_an_epoch_gives_the_same_weights(self, run, tmp_path):
        words = (*self.recipe, "--num_train_epochs", 3)
        expected = run("whole", *words, "--checkpointing_steps", 5, "--checkpoints_total_limit", 9)
        assert [path.name for path in list_checkpoints(tmp_path / "whole")] == [
            f"checkpoint-{step}" for step in (5, 10, 15, 20, 25, 30)
        ]
        for step in (10, 15):
            copy = tmp_path / f"from-{step}"
            shutil.copytree(tmp_path / "whole", copy)
            for path in list_checkpoints(copy):
                if int(path.name.split("-")[1]) > step:
                    shutil.rmtree(path)
            (copy / "model.safetensors").unlink()
            # a save that was killed
            unfinished_folder(copy, step + 5).mkdir()
            (unfinished_folder(copy, step + 5) / "model.safetensors").write_bytes(b"half")
            results = run(
                f"from-{step}", *words, "--resume_from_checkpoint", "latest", "--checkpointing_steps", "epoch"
            )
            assert weights(copy) == weights(tmp_path / "whole")
            for before, after in zip(expected["history"], results["history"], strict=True):
                assert {**before, "seconds": 0} == {**after, "seconds": 0}
            assert [path.name for path in list_checkpoints(copy)] == ["checkpoint-20", "checkpoint-30"]
            assert not unfinished_folder(copy, step + 5).exists()

    def test_time_limit_saves_and_the_run_goes_on_later(self, run, tmp_path):
        words = (*self.recipe, "--num_train_epochs", 2)
        run("whole", *words)
        stopped = run("stopped", *words, "--max_train_seconds", 1e-9)
        assert stopped["stopped_early"]
        assert stopped["steps"] == 0
        resumed = run("stopped", *words, "--resume_from_checkpoint", "latest")
        assert not resumed["stopped_early"]
        assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")

    def test_kill_9_in_the_middle_of_an_epoch_then_resume_gives_bit_identical_weights(self, tmp_path):
        words = [*SMALL_MLP, *SMALL_DATA, *self.recipe, "--num_train_epochs", "12", "--checkpointing_steps", "7"]

        def start(name, *more):
            command = [sys.executable, str(SCRIPT), *words, "--output_dir", str(tmp_path / name), *more]
            return subprocess.Popen(
                command, env=subprocess_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )

        whole, killed = start("whole"), start("killed")
        try:
            deadline = time.monotonic() + 300
            while not any(int(path.name.split("-")[1]) >= 21 for path in list_checkpoints(tmp_path / "killed")):
                assert killed.poll() is None, killed.stderr.read().decode()
                assert time.monotonic() < deadline
                time.sleep(0.005)
            killed.send_signal(signal.SIGKILL)
            assert killed.wait() == -signal.SIGKILL
            assert not (tmp_path / "killed" / "model.safetensors").exists()
            resumed = start("killed", "--resume_from_checkpoint", "latest")
            for process in (whole, resumed):
                _, errors = process.communicate(timeout=300)
                assert process.returncode == 0, errors.decode()
        finally:
            for process in (whole, killed):
                process.kill()
        assert weights(tmp_path / "killed") == weights(tmp_path / "whole")

    def test_other_arguments_are_refused(self, run):
        run("run", "--num_train_epochs", 1, "--checkpointing_steps", "epoch")
        with pytest.raises(ValueError, match=r"other arguments; resume it with \{'learning_rate': 0.01\}"):
            run("run", "--num_train_epochs", 1, "--resume_from_checkpoint", "latest", "--learning_rate", 0.02)

    def test_overwriting_deletes_the_checkpoints_of_the_earlier_run(self, run, tmp_path):
        run("run", "--num_train_epochs", 2, "--checkpointing_steps", "epoch")
        run("run", "--num_train_epochs", 1, "--checkpointing_steps", "epoch", "--overwrite_output_dir")
        assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-10"]


class TestProcesses:
    def test_two_processes_train_as_one_and_count_each_image_once(self, run, tmp_path):
        words = ["--block_type", "sll", "--num_train_epochs", "2", "--crop_padding", "1", "--ema_decay", "0.9"]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
        command += [*SMALL_MLP, *SMALL_DATA, *words, "--output_dir", str(tmp_path / "two")]
        done = subprocess.run(command, env=subprocess_environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        two, one = json.loads((tmp_path / "two" / "results.json").read_text()), run("one", *words)
        assert (two["num_processes"], one["num_processes"]) == (2, 1)
        assert two["eval_samples"] == one["eval_samples"] == 67
        # the same global batches: equal up to the order of summation
        for entry, reference in zip(two["history"], one["history"], strict=True):
            assert entry["loss"] == pytest.approx(reference["loss"], rel=1e-3)
        expected = load_file(tmp_path / "one" / "model.safetensors")
        for name, tensor in load_file(tmp_path / "two" / "model.safetensors").items():
            torch.testing.assert_close(
                tensor, expected[name], rtol=2e-2, atol=2e-3, msg=lambda m, name=name: f"{name}: {m}"
            )

    @pytest.mark.skipif(torch.cuda.is_available(), reason="CPU launch")
    def test_processes_that_would_train_alone_are_refused(self, run, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        words = [word for word in SMALL_MLP if word != "--cpu"]
        with pytest.raises(RuntimeError, match="2 processes were launched but each would train alone"):
            run("run", base=words)


class TestBadInput:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--block_type", "resnet"], "argument --block_type"),
            (["--offset", "-1"], "--offset must be >= 0"),
            (["--temperature", "0"], "--temperature must be > 0"),
            (["--no_such_argument", "1"], "no_such_argument"),
            (["--resume_from_checkpoint", "latest"], "no whole checkpoint"),
            (["--resume_from_checkpoint", "elsewhere/checkpoint-3"], "only the run's own"),
            (["--report_to", "wandb"], "needs a package: pip install wandb"),
        ],
    )
    def test_arguments_are_refused_before_any_work(self, run, capsys, tmp_path, words, message):
        with pytest.raises(SystemExit) as exit_info:
            run("run", *words)
        assert exit_info.value.code == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()

    def test_a_full_output_dir_is_refused(self, run, capsys, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "notes.txt").write_text("mine")
        with pytest.raises(SystemExit):
            run("run")
        assert "is not empty" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("words", "error", "message"),
        [
            (["--dataset", "/no/such/folder"], FileNotFoundError, "/no/such/folder"),
            (["--eval_split", "nothing"], ValueError, "no split 'nothing'"),
            (["--train_batch_size", "241"], ValueError, r"must lie in 1..240"),
            (["--hidden_sizes", "1", "2"], StrictDataclassClassValidationError, "hidden_sizes"),
            (["--size", "enormous"], ValueError, "enormous"),
            (["--validation_share", "0.001"], ValueError, "empty part"),
        ],
    )
    def test_data_and_model_errors_name_their_cause(self, run, tmp_path, words, error, message):
        with pytest.raises(error, match=message):
            run("run", *words)
        assert not (tmp_path / "run").exists()

    def test_labels_unknown_to_training_are_refused(self, run, tmp_path):
        folder = made_images(tmp_path / "data", {"train": 24})
        made_images(tmp_path / "more", {"test": 6}, names=("dark", "blue"))
        shutil.copy(tmp_path / "more" / "test-0.parquet", folder)
        with pytest.raises(ValueError, match=r"\['blue'\] are not among the 2 classes"):
            run("run", "--dataset", folder)

    def test_empty_data_and_images_that_are_not_square_are_refused(self, run, tmp_path):
        with pytest.raises(ValueError, match=r"empty|no data"):
            run("run", "--dataset", made_images(tmp_path / "empty", {"train": 0, "test": 4}))
        with pytest.raises(ValueError, match="8x6, not square"):
            run("run", "--dataset", made_images(tmp_path / "oblong", {"train": 24, "test": 4}, size=(8, 6)))

    @pytest.mark.parametrize("block_type", ["cpl", "sll", "aol", "sr"])
    def test_divergence_stops_the_run(self, run, tmp_path, block_type):
        words = (
            "--block_type",
            block_type,
            "--optimizer",
            "sgd",
            "--learning_rate",
            1e38,
            "--lr_schedule",
            "constant",
            "--num_train_epochs",
            3,
        )
        with pytest.raises(RuntimeError, match="Training has diverged"):
            run("run", *words, "--logging_steps", 1, "--checkpointing_steps", 1)
        for checkpoint in list_checkpoints(tmp_path / "run"):
            assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "model.safetensors").values())


def test_digits_gate(run):
    """SLL x3, 40 epochs, fixed seed, as in lipschitz-layers.md 7.2."""
    results = run(
        "run",
        *("--cpu", "--block_type", "sll", "--depths", 0, "--hidden_sizes", 1, "--pool_size", 1, "--dense_size", 256),
        *("--num_dense_layers", 3, "--dense_hidden_size", 256, "--offset", 0.5, "--eval_epochs", 40),
        base=(),
    )
    assert results["clean_accuracy"] >= 0.965
    assert results["certified_accuracy"]["36/255"] >= 0.94
    assert results["cpu_seconds"] < 60
