# SPDX-License-Identifier: Apache-2.0
import pytest
from transformers import HfArgumentParser

from hf_lip.training.arguments import (
    FREE_ON_RESUME,
    DataArguments,
    ModelArguments,
    NoiseArguments,
    TrainingArguments,
    run_identity,
)


def make_parser():
    return HfArgumentParser((DataArguments, ModelArguments, NoiseArguments, TrainingArguments))


def parse(*words):
    return make_parser().parse_args_into_dataclasses(list(words))


def test_every_argument_parses_and_has_help():
    assert all(action.help for action in make_parser()._actions)
    data, model, noise, training = parse(
        *("--dataset", "folder", "--horizontal_flip", "false", "--depths", "1", "2", "--hidden_sizes", "4", "8"),
        *("--block_type", "sr", "--image_std", "0.5", "--adam_betas", "0.9", "0.99", "--cpu"),
        *("--noise_sd", "0.25", "--noise_method", "smoothadv"),
    )
    assert (noise.noise_sd, noise.noise_method, noise.copies) == (0.25, "smoothadv", 2)
    assert (data.dataset, data.horizontal_flip) == ("folder", False)
    assert (model.depths, model.hidden_sizes, model.block_type, model.image_std) == ([1, 2], [4, 8], "sr", [0.5])
    assert (training.adam_betas, training.cpu) == ([0.9, 0.99], True)


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        (DataArguments, "max_train_samples", 0, "> 0"),
        (DataArguments, "crop_padding", -1, ">= 0"),
        (DataArguments, "validation_share", 1.0, r"in \[0, 1\)"),
        (ModelArguments, "image_std", [0.5, 0.0], "> 0"),
        (ModelArguments, "depths", [1, -1], ">= 0"),
        (TrainingArguments, "offset", -0.1, ">= 0"),
        (TrainingArguments, "temperature", 0.0, "> 0"),
        (TrainingArguments, "learning_rate", float("nan"), "> 0"),
        (TrainingArguments, "epsilon", float("inf"), "> 0"),
        (TrainingArguments, "num_train_epochs", 0, "> 0"),
        (TrainingArguments, "ema_decay", 1.0, r"in \[0, 1\)"),
        (TrainingArguments, "adam_betas", [0.9, 1.0], r"in \[0, 1\)"),
        (TrainingArguments, "adam_betas", [0.9], "two numbers"),
        (TrainingArguments, "lipschitz_penalty", -1.0, ">= 0"),
        (TrainingArguments, "lipschitz_target", 0.0, "> 0"),
        (NoiseArguments, "noise_sd", -0.1, ">= 0"),
        (NoiseArguments, "noise_copies", 0, "> 0"),
        (NoiseArguments, "attack_epsilon", 0.0, "> 0"),
        (NoiseArguments, "attack_warmup", 1.0, r"in \[0, 1\)"),
        (TrainingArguments, "checkpointing_steps", "often", "'epoch'"),
        (TrainingArguments, "checkpointing_steps", "0", "'epoch'"),
    ],
)
def test_bad_values_are_refused_by_name(kind, name, value, message):
    with pytest.raises(ValueError, match=f"--{name} must be .*{message}"):
        kind(**{name: value})


def test_a_checkpoint_keeps_its_architecture():
    with pytest.raises(ValueError, match="--block_type cannot change"):
        ModelArguments(model_name_or_path="somewhere", block_type="sll")


def test_zero_widths_stand_for_none():
    model = ModelArguments(conv_hidden_size=0, dense_size=64, num_dense_layers=0, depths=[0], size="tiny")
    assert model.config_fields() == {
        "conv_hidden_size": None,
        "dense_size": 64,
        "num_dense_layers": 0,
        "depths": [0],
    }


def test_augmentation_defaults_spare_digits():
    assert DataArguments().augmentation(8) == {
        "crop_padding": 0,
        "crop_padding_mode": "zeros",
        "horizontal_flip": False,
    }
    natural = DataArguments(dataset="cifar10", crop_padding_mode="reflect").augmentation(32)
    assert natural == {"crop_padding": 4, "crop_padding_mode": "reflect", "horizontal_flip": True}
    asked = DataArguments(dataset="cifar10", crop_padding=1, horizontal_flip=False).augmentation(32)
    assert (asked["crop_padding"], asked["horizontal_flip"]) == (1, False)


@pytest.mark.parametrize("fields", [{"noise_method": "consistency"}, {"noise_copies": 2}])
def test_noise_methods_need_noise(fields):
    with pytest.raises(ValueError, match="need noise"):
        NoiseArguments(**fields)


def test_consistency_needs_two_copies():
    with pytest.raises(ValueError, match="at least 2"):
        NoiseArguments(noise_sd=0.1, noise_method="consistency", noise_copies=1)
    assert NoiseArguments(noise_sd=0.1).copies == 1


def test_defaults_depend_on_the_family_and_what_is_given_stays():
    args = TrainingArguments()
    args.resolve(certified=True)
    assert (args.offset, args.temperature, args.channels_last) == (pytest.approx(0.3993, abs=1e-4), 0.25, False)
    args = TrainingArguments()
    args.resolve(certified=False)
    assert (args.offset, args.temperature, args.channels_last) == (0.0, 1.0, True)
    args = TrainingArguments(offset=0.5, temperature=2.0, channels_last=False)
    args.resolve(certified=False)
    assert (args.offset, args.temperature, args.channels_last) == (0.5, 2.0, False)
    with pytest.raises(ValueError, match="emma"):
        TrainingArguments(loss="emma").resolve(certified=False)
    with pytest.raises(ValueError, match="ordinary networks"):
        TrainingArguments(lipschitz_penalty=0.1).resolve(certified=True)


def test_checkpoint_interval():
    assert TrainingArguments().checkpoint_interval(20) is None
    assert TrainingArguments(checkpointing_steps="epoch").checkpoint_interval(20) == 20
    assert TrainingArguments(checkpointing_steps="7").checkpoint_interval(20) == 7


def test_output_dir_is_not_shared_by_accident(tmp_path):
    TrainingArguments(output_dir=str(tmp_path / "new")).check_output_dir()
    TrainingArguments(output_dir=str(tmp_path)).check_output_dir()
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(FileExistsError, match="not empty"):
        TrainingArguments(output_dir=str(tmp_path)).check_output_dir()
    TrainingArguments(output_dir=str(tmp_path), overwrite_output_dir=True).check_output_dir()
    TrainingArguments(output_dir=str(tmp_path), resume_from_checkpoint="latest").check_output_dir()
    with pytest.raises(FileExistsError, match="is a file"):
        TrainingArguments(output_dir=str(tmp_path / "results.json")).check_output_dir()


def test_identity_leaves_out_what_does_not_change_weights():
    parts = parse("--output_dir", "a", "--hub_token", "secret", "--learning_rate", "0.1")
    identity = run_identity(*parts)
    assert identity["learning_rate"] == 0.1
    assert identity["depths"] is None
    assert not set(identity) & set(FREE_ON_RESUME)
    assert all(any(hasattr(part, name) for part in parts) for name in FREE_ON_RESUME)
