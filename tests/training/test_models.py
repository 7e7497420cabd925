# SPDX-License-Identifier: Apache-2.0
"""Which model, which classes and which image processor a run gets."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_lip import LipschitzVisionImageProcessor
from hf_lip.models.certified_model import COMMITTED_NAME
from hf_lip.training.arguments import ModelArguments
from hf_lip.training.models import plan_model, save_model
from hf_lip.training.splits import Split


NAMES = ["cat", "dog", "owl"]
SHAPE = (3, 8, 8)


def split():
    images = (
        torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1.0, 0.5, 0.25])[:, None, None]
    )
    return Split(images, torch.arange(50) % 3, NAMES)


def stock(folder, names=("cat", "dog", "owl"), **processor):
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic", **(labels if names else {"num_labels": 3})
    )
    ResNetForImageClassification(config).save_pretrained(folder)
    options = {"size": {"height": 16, "width": 16}, "image_mean": [0.4] * 3, "image_std": [0.2] * 3, **processor}
    ViTImageProcessorPil(**options).save_pretrained(folder)
    return str(folder)


class TestFromScratch:
    def test_lipschitz_vision_is_the_default(self):
        plan = plan_model(ModelArguments(size="tiny"), NAMES, SHAPE)
        model, processor = plan.finish(split())
        assert model.config.model_type == "lipschitz_vision"
        assert model.config.image_mean == split().channel_means()
        assert model.config.image_std == [1.0, 1.0, 1.0]
        assert isinstance(processor, LipschitzVisionImageProcessor)
        assert model.config.id2label == dict(enumerate(NAMES))

    def test_cifar_resnet_normalises_inside_with_measured_constants(self):
        args = ModelArguments(architecture="cifar_resnet", depth=14, width_multiplier=0.25)
        model, processor = plan_model(args, NAMES, SHAPE).finish(split())
        assert (model.config.depth, model.config.hidden_sizes, model.num_labels) == (14, [4, 8, 16], 3)
        assert model.config.image_mean == split().channel_means()
        deviations = split().images.double().flatten(2).transpose(0, 1).flatten(1).std(dim=1, correction=0)
        assert model.config.image_std == pytest.approx(deviations.tolist(), abs=1e-6)
        assert not processor.do_normalize

    def test_any_architecture_of_transformers(self):
        overrides = ["hidden_sizes=[4,8]", "depths=[1,1]", "layer_type=basic", "embedding_size=4"]
        args = ModelArguments(architecture="resnet", config_overrides=overrides, image_std=[0.5, 0.5, 0.5])
        plan = plan_model(args, NAMES, SHAPE)
        model, processor = plan.finish(split())
        assert isinstance(model, ResNetForImageClassification)
        assert (model.config.hidden_sizes, model.config.layer_type, model.num_labels) == ([4, 8], "basic", 3)
        # normalisation is the processor's
        assert list(processor.image_mean) == split().channel_means()
        assert list(processor.image_std) == [0.5, 0.5, 0.5]
        assert processor.size.height == 8

    def test_image_size_goes_into_configurations_that_have_one(self):
        overrides = ["hidden_size=8", "num_attention_heads=2", "num_hidden_layers=1", "intermediate_size=8"]
        args = ModelArguments(architecture="vit", config_overrides=[*overrides, "patch_size=4"])
        model, _ = plan_model(args, NAMES, SHAPE).finish(split())
        assert model.config.image_size == 8
        assert model(torch.zeros(1, 3, 8, 8)).logits.shape == (1, 3)

    def test_a_configuration_from_a_folder_with_overrides(self, tmp_path):
        ResNetConfig(hidden_sizes=[4], depths=[1], embedding_size=4, num_labels=7).save_pretrained(tmp_path)
        args = ModelArguments(config_name=str(tmp_path), config_overrides=["layer_type=basic"])
        model, _ = plan_model(args, NAMES, SHAPE).finish(split())
        assert (model.config.hidden_sizes, model.config.layer_type) == ([4], "basic")
        assert model.config.id2label == dict(enumerate(NAMES))
        assert model(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 3)

    def test_a_constant_channel_is_not_divided_by_zero(self):
        images = split().images
        images[:, 1] = 0.5
        args = ModelArguments(architecture="cifar_resnet", depth=8)
        model, _ = plan_model(args, NAMES, SHAPE).finish(Split(images, torch.arange(50) % 3, NAMES))
        assert model.config.image_std[1] == 1.0

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"architecture": "perceptron"}, "no model type"),
            ({"architecture": "gpt2"}, "no image classifier"),
            ({"architecture": "resnet", "config_overrides": ["widths=[1]"]}, "ResNetConfig has no such field"),
            ({"architecture": "cifar_resnet", "depth": 18}, "6 n"),
        ],
    )
    def test_unknown_architectures_and_fields(self, fields, message):
        with pytest.raises(ValueError, match=message):
            plan_model(ModelArguments(**fields), NAMES, SHAPE)


class TestFromACheckpoint:
    def test_its_processor_is_kept_and_images_stay_as_they_are(self, tmp_path, auto_image_processor):
        plan = plan_model(ModelArguments(model_name_or_path=stock(tmp_path)), NAMES, SHAPE)
        model, processor = plan.finish(split())
        assert (plan.image_size, plan.resize) == (8, False)
        assert (list(processor.image_mean), processor.size.height) == ([0.4] * 3, 16)
        assert model.dtype == torch.float32

    def test_classes_are_matched_by_name(self, tmp_path, auto_image_processor):
        order = ("owl", "yak", "dog", "cat")
        plan = plan_model(ModelArguments(model_name_or_path=stock(tmp_path, order)), NAMES, SHAPE)
        assert plan.names == list(order)

    def test_classes_without_names_take_those_of_the_data(self, tmp_path, auto_image_processor):
        plan = plan_model(ModelArguments(model_name_or_path=stock(tmp_path, ())), NAMES, SHAPE)
        assert plan.names == NAMES
        assert plan.model.config.id2label == dict(enumerate(NAMES))

    def test_a_new_head_only_when_asked_for(self, tmp_path, auto_image_processor):
        folder = stock(tmp_path, ("yak", "gnu"))
        assert plan_model(ModelArguments(model_name_or_path=folder), NAMES, SHAPE).names == ["yak", "gnu"]
        args = ModelArguments(model_name_or_path=folder, ignore_mismatched_sizes=True)
        plan = plan_model(args, NAMES, SHAPE)
        assert plan.names == NAMES
        assert plan.model.num_labels == 3
        before = AutoModelForImageClassification.from_pretrained(folder).state_dict()
        after = plan.model.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("classifier"))

    def test_a_checkpoint_without_a_head_is_told_so(self, tmp_path, auto_image_processor):
        folder = stock(tmp_path)
        AutoModelForImageClassification.from_pretrained(folder).resnet.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"lack classifier\.1\.bias"):
            plan_model(ModelArguments(model_name_or_path=folder), NAMES, SHAPE)
        args = ModelArguments(model_name_or_path=folder, ignore_mismatched_sizes=True)
        assert plan_model(args, NAMES, SHAPE).model.num_labels == 3

    def test_own_checkpoints_keep_their_size(self, tmp_path):
        args = ModelArguments(architecture="cifar_resnet", depth=8)
        model, processor = plan_model(args, NAMES, SHAPE).finish(split())
        save_model(model, processor, tmp_path)
        plan = plan_model(ModelArguments(model_name_or_path=str(tmp_path)), NAMES, (3, 20, 30))
        assert (plan.image_size, plan.resize, plan.names) == (8, True, NAMES)
        again, _ = plan.finish(split())
        assert again.config.image_mean == model.config.image_mean
        with pytest.raises(ValueError, match="--image_size cannot change"):
            plan_model(ModelArguments(model_name_or_path=str(tmp_path), image_size=9), NAMES, SHAPE)

    def test_images_that_are_not_square_need_a_size(self, tmp_path, auto_image_processor):
        folder = stock(tmp_path)
        with pytest.raises(ValueError, match="8x6, not square"):
            plan_model(ModelArguments(model_name_or_path=folder), NAMES, (3, 8, 6))
        plan = plan_model(ModelArguments(model_name_or_path=folder, image_size=12), NAMES, (3, 8, 6))
        assert (plan.image_size, plan.resize) == (12, True)


class TestArguments:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"model_name_or_path": "a", "architecture": "resnet"}, "--architecture cannot change"),
            ({"model_name_or_path": "a", "conv_hidden_size": 0}, "--conv_hidden_size cannot change"),
            ({"ignore_mismatched_sizes": True}, "is for a checkpoint"),
            ({"architecture": "resnet", "config_name": "a"}, "exclude each other"),
            ({"architecture": "resnet", "block_type": "sll"}, "--block_type is no option of --architecture resnet"),
            ({"config_name": "a", "size": "tiny"}, "--size is no option"),
            ({"depth": 20}, "--depth is no option of --architecture lipschitz_vision"),
            ({"config_overrides": ["hidden_sizes"]}, "name=value"),
        ],
    )
    def test_what_does_not_go_together(self, fields, message):
        with pytest.raises(ValueError, match=message):
            ModelArguments(**fields)

    def test_overrides_are_json_or_words(self):
        args = ModelArguments(config_overrides=["a=[1,2]", "b=basic", "c=0.5", "d=null", "e=x=y", 'f="3"'])
        assert args.overrides() == {"a": [1, 2], "b": "basic", "c": 0.5, "d": None, "e": "x=y", "f": "3"}


def test_saving_replaces_the_files_of_a_foreign_model_at_once(tmp_path, monkeypatch, auto_image_processor):
    plan = plan_model(ModelArguments(model_name_or_path=stock(tmp_path / "a")), NAMES, SHAPE)
    model, processor = plan.finish(split())
    save_model(model, processor, tmp_path / "b")
    written = {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert {path.name for path in (tmp_path / "b").iterdir()} == written
    before = (tmp_path / "b" / "model.safetensors").read_bytes()

    def full(self, folder, **kwargs):
        (folder / "half").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(type(processor), "save_pretrained", full)
    with torch.no_grad():
        model.classifier[1].weight.add_(1.0)
    with pytest.raises(OSError, match="No space left"):
        save_model(model, processor, tmp_path / "b")
    assert {path.name for path in (tmp_path / "b").iterdir()} == written
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "b" / COMMITTED_NAME).exists()
    assert AutoConfig.from_pretrained(tmp_path / "b").model_type == "resnet"
