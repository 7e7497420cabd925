# SPDX-License-Identifier: Apache-2.0
"""CIFAR ResNets: the network of the paper, strict loading, the Auto classes, conversion of bare weights."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, pipeline

from hf_lip import LipschitzVisionImageProcessor
from hf_lip.data import dataset_to_tensors, load_image_dataset
from hf_lip.models.cifar_resnet.configuration_cifar_resnet import CifarResNetConfig
from hf_lip.models.cifar_resnet.modeling_cifar_resnet import CifarResNetForImageClassification, CifarResNetModel


ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
PUBLISHED = SHARED / "models" / "cifar10-resnet20"
SMALL = {"num_blocks": [1, 2], "hidden_sizes": [4, 7], "image_size": 8, "num_labels": 3}
needs_data = pytest.mark.skipif(not PUBLISHED.exists(), reason="needs the data folder beside the repository")


def make_model(**fields) -> CifarResNetForImageClassification:
    torch.manual_seed(0)
    return CifarResNetForImageClassification(CifarResNetConfig(**{**SMALL, **fields}))


def pixels(batch=3, channels=3, size=8):
    return torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("convert", ROOT / "scripts" / "convert_cifar_resnet.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def edit_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def reference_logits(state, config, x):
    """The network written out, from the tensors of a checkpoint."""

    def norm(x, name):
        statistics = (state[f"{name}.running_mean"], state[f"{name}.running_var"])
        return F.batch_norm(
            x, *statistics, state[f"{name}.weight"], state[f"{name}.bias"], training=False, eps=config.batch_norm_eps
        )

    x = (x - torch.tensor(config.image_mean)[:, None, None]) / torch.tensor(config.image_std)[:, None, None]
    x = F.relu(norm(F.conv2d(x, state["conv1.weight"], padding=1), "bn1"))
    for stage, blocks in enumerate(config.num_blocks, start=1):
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = F.conv2d(x, state[f"{name}.conv1.weight"], padding=1, stride=stride)
            y = F.conv2d(F.relu(norm(y, f"{name}.bn1")), state[f"{name}.conv2.weight"], padding=1)
            shortcut = torch.zeros_like(y)
            front = (y.shape[1] - x.shape[1]) // 2
            shortcut[:, front : front + x.shape[1]] = x[:, :, ::stride, ::stride]
            x = F.relu(norm(y, f"{name}.bn2") + shortcut)
    return x.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]


class TestNetwork:
    @pytest.mark.parametrize("size", [8, 9])
    def test_it_is_the_network_of_the_paper(self, size):
        model = make_model(batch_norm_eps=0.01)
        model.train()
        for _ in range(3):
            model(pixels(16))
        x = pixels(size=size)
        expected = reference_logits(model.state_dict(), model.config, x)
        torch.testing.assert_close(model.eval()(x).logits, expected)

    @pytest.mark.parametrize(
        ("depth", "parameters"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)]
    )
    def test_depths_have_the_published_numbers_of_parameters(self, depth, parameters):
        config = CifarResNetConfig.from_depth(depth, num_labels=10)
        assert config.depth == depth
        with torch.device("meta"):
            model = CifarResNetForImageClassification(config)
        assert model.num_parameters() == parameters

    def test_width_multiplier_and_every_gradient(self):
        config = CifarResNetConfig.from_depth(8, 0.5, num_labels=4)
        assert config.hidden_sizes == [8, 16, 32]
        model = CifarResNetForImageClassification(config)
        out = model(pixels(size=32), labels=torch.tensor([0, 1, 3]))
        torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, torch.tensor([0, 1, 3])))
        out.loss.backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())

    def test_hidden_states_tuples_half_precision_and_checkpointing(self):
        model = make_model().eval()
        out = model(pixels(), output_hidden_states=True)
        # what enters the stages and what leaves each
        assert [tuple(h.shape) for h in out.hidden_states] == [(3, 4, 8, 8), (3, 4, 8, 8), (3, 7, 4, 4)]
        assert torch.equal(model(pixels(), return_dict=False)[0], out.logits)
        half = make_model().to(torch.bfloat16).eval()(pixels()).logits
        torch.testing.assert_close(half.float(), out.logits, rtol=0.05, atol=0.05)
        gradients = []
        for checkpointing in (False, True):
            model = make_model().train()
            if checkpointing:
                getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
            model(pixels(), labels=torch.tensor([0, 1, 2])).loss.backward()
            gradients.append(model.conv1.weight.grad)
        torch.testing.assert_close(*gradients)

    @pytest.mark.parametrize(
        ("wrong", "error", "message"),
        [
            (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "uint8"),
            ([[0.0]], TypeError, "list"),
            (torch.zeros(1, 1, 8, 8), ValueError, r"\(batch, 3, height, width\)"),
            (torch.zeros(3, 8, 8), ValueError, r"\(3, 8, 8\)"),
            (torch.zeros(0, 3, 8, 8), ValueError, r"\(0, 3, 8, 8\)"),
        ],
    )
    def test_inputs_that_are_no_images(self, wrong, error, message):
        with pytest.raises(error, match=message):
            make_model().eval()(wrong)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"num_blocks": [1]}, "one entry for each"),
            ({"num_blocks": [1, 0]}, "at least 1"),
            ({"hidden_sizes": [8, 4]}, "must not decrease"),
            ({"image_std": [0.2, 0.2, 0.0]}, "must be positive"),
            ({"image_mean": [0.5]}, "each of 3 channels"),
            ({"batch_norm_eps": 0.0}, "batch_norm_eps"),
        ],
    )
    def test_configurations_that_make_no_network(self, fields, message):
        with pytest.raises((ValueError, StrictDataclassError), match=message):
            CifarResNetConfig(**{**SMALL, **fields})

    def test_depths_that_are_no_cifar_resnet(self):
        with pytest.raises(ValueError, match="6 n"):
            CifarResNetConfig.from_depth(18)


class TestCheckpoints:
    def test_round_trip_through_the_auto_classes(self, tmp_path):
        model = make_model().eval()
        model.save_pretrained(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
        config = AutoConfig.from_pretrained(tmp_path)
        assert isinstance(config, CifarResNetConfig)
        assert (config.num_blocks, config.hidden_sizes) == ([1, 2], [4, 7])
        loaded, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
        assert isinstance(loaded, CifarResNetForImageClassification)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert torch.equal(loaded(pixels()).logits, model(pixels()).logits)
        base = AutoModel.from_pretrained(tmp_path)
        assert isinstance(base, CifarResNetModel)
        pooled = base(pixels()).pooler_output
        torch.testing.assert_close(F.linear(pooled, model.linear.weight, model.linear.bias), model(pixels()).logits)

    def test_the_counter_of_batch_norm_may_be_absent_and_nothing_else(self, tmp_path):
        model = make_model().eval()
        model.save_pretrained(tmp_path / "whole")
        shutil.copytree(tmp_path / "whole", tmp_path / "public")
        edit_weights(
            tmp_path / "public",
            lambda state: [state.pop(name) for name in list(state) if name.endswith("num_batches_tracked")],
        )
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "public")
        assert torch.equal(loaded(pixels()).logits, model(pixels()).logits)
        assert int(loaded.bn1.num_batches_tracked) == 0
        for change, message in [
            (lambda state: state.pop("layer2.1.bn2.running_var"), "missing: layer2.1.bn2.running_var"),
            (lambda state: state.update(extra=torch.zeros(1)), "unexpected: extra"),
            (lambda state: state.update({"linear.bias": torch.zeros(4)}), "mismatched: linear.bias"),
            (lambda state: state["conv1.weight"].fill_(float("nan")), "NaN"),
        ]:
            folder = tmp_path / "broken"
            shutil.copytree(tmp_path / "whole", folder)
            edit_weights(folder, change)
            with pytest.raises(ValueError, match=message):
                AutoModelForImageClassification.from_pretrained(folder)
            shutil.rmtree(folder)

    def test_pickles_are_refused(self, tmp_path):
        make_model().save_pretrained(tmp_path)
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(ValueError, match="Pickles can run code"):
            CifarResNetForImageClassification.from_pretrained(tmp_path)

    def test_meta_initialisation_gives_finite_weights(self):
        with torch.device("meta"):
            model = make_model()
        model.to_empty(device="cpu")
        for module in model.modules():
            module._is_hf_initialized = False
        model.init_weights()
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
        assert 0.1 < model.layer2[0].conv1.weight.std() / (2 / 36) ** 0.5 < 2.0
        assert bool((model.bn1.running_var == 1).all())


class TestConversion:
    @pytest.fixture
    def bare(self, tmp_path):
        state = make_model().state_dict()
        state = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
        save_file(state, tmp_path / "bare.safetensors")
        return tmp_path / "bare.safetensors"

    def test_configuration_is_read_from_the_shapes(self, script, bare, tmp_path, capsys):
        options = ["--image_size", "8", "--labels", "a", "b", "c", "--image_std", "0.5", "0.5", "0.5"]
        script.main([str(bare), str(tmp_path / "out"), *options])
        assert "ResNet-8" in capsys.readouterr().out
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
        assert model.config.num_blocks == [1, 2]
        assert model.config.hidden_sizes == [4, 7]
        assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
        expected = make_model(image_std=[0.5] * 3).eval()(pixels()).logits
        assert torch.equal(model(pixels()).logits, expected)
        processor = LipschitzVisionImageProcessor.from_pretrained(tmp_path / "out")
        assert processor.size.height == 8

    @pytest.mark.parametrize(
        ("prepare", "message"),
        [
            (lambda folder, bare: (folder / "out").mkdir(), "exists already"),
            (lambda folder, bare: bare.unlink(), "does not exist"),
            (lambda folder, bare: bare.write_bytes(b"pickle"), "not in the safetensors format"),
            (lambda folder, bare: save_file({"x": torch.zeros(1)}, bare), "holds no CIFAR ResNet"),
            (lambda folder, bare: save_file(load_file(bare) | {"y": torch.zeros(1)}, bare), "do not fit"),
        ],
    )
    def test_what_cannot_be_converted(self, script, bare, tmp_path, capsys, prepare, message):
        prepare(tmp_path, bare)
        with pytest.raises(SystemExit):
            script.main([str(bare), str(tmp_path / "out")])
        assert message in capsys.readouterr().err

    def test_wrong_number_of_labels(self, script, bare, tmp_path, capsys):
        with pytest.raises(SystemExit):
            script.main([str(bare), str(tmp_path / "out"), "--labels", "a", "b"])
        assert "2 labels for 3 classes" in capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "resnet20"
    script.main([str(PUBLISHED), str(folder)])
    return folder


@needs_data
class TestPublishedWeights:
    def test_accuracy_on_real_images(self, folder):
        model = AutoModelForImageClassification.from_pretrained(folder)
        images, labels = dataset_to_tensors(
            load_image_dataset(SHARED / "cifar10", "test"), image_size=32, num_channels=3, limit=1000, progress=False
        )
        with torch.no_grad():
            found = torch.cat([model(part).logits.argmax(-1) for part in images.split(250)])
        stated = json.loads((PUBLISHED / "config.json").read_text())["measured_test_accuracy_10000"]
        assert (found == labels).double().mean().item() == pytest.approx(stated, abs=0.015)

    def test_certify_pipeline(self, folder, auto_image_processor):
        certify = pipeline("certify", model=str(folder))
        row = load_image_dataset(SHARED / "cifar10", "test")[0]
        result = certify(row["image"], method="mono", sigma=0.02, n=200, batch_size=100)
        assert result["method"] == "mono"
        assert result["label"] == "cat"
        assert result["radius"] > 0.03


def test_a_new_head_on_trained_features(tmp_path):
    small = CifarResNetConfig(num_blocks=[1], hidden_sizes=[4], num_labels=3)
    trained = CifarResNetForImageClassification(small)
    trained.save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match=r"mismatched: linear\.bias, linear\.weight"):
        CifarResNetForImageClassification.from_pretrained(tmp_path / "trained", num_labels=5)
    model = CifarResNetForImageClassification.from_pretrained(
        tmp_path / "trained", num_labels=5, ignore_mismatched_sizes=True
    )
    assert model.linear.weight.shape == (5, 4)
    assert torch.equal(model.conv1.weight, trained.conv1.weight)
