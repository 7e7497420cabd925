# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BitConfig,
    BitForImageClassification,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from hf_lip import LipschitzVisionConfig, LipschitzVisionForImageClassification
from hf_lip.checkpoints.layers import describe, describe_layers
from hf_lip.checkpoints.source import Checkpoint

from .stored_tensors import by_name, require_complete, stored


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 4}


def saved(folder, model, **options):
    model.save_pretrained(folder, **options)
    return Checkpoint.open(folder)


@pytest.mark.parametrize("size", [None, 64, (48, 80)])
def test_resnet_has_the_strides_and_sizes_that_its_forward_pass_meets(tmp_path, size):
    model = ResNetForImageClassification(ResNetConfig(**RESNET)).eval()
    checkpoint = saved(tmp_path, model)
    description = describe(checkpoint, size)
    require_complete(checkpoint, description)
    layers = by_name(description.layers)
    assert description.architecture == "ResNetForImageClassification"
    assert ("assumed" in "".join(description.notes)) == (size is None)
    shape = (224, 224) if size is None else (size, size) if isinstance(size, int) else size
    met = {}
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    for name, module in convolutions.items():
        module.register_forward_pre_hook(lambda _, inputs, name=name: met.update({name: inputs[0].shape[-2:]}))
    with torch.no_grad():
        model(torch.zeros(1, 3, *shape))
    assert len(convolutions) == 6
    for name, module in convolutions.items():
        layer = layers[name]
        assert (layer.kind, layer.source, layer.unknown) == ("conv", "model", ())
        assert layer.input_size == tuple(met[name])
        assert layer.arguments["stride"] == module.stride
        assert layer.arguments["padding"] == module.padding
    norm = layers["resnet.embedder.embedder.normalization"]
    assert (norm.kind, norm.arguments) == ("batch_norm", {"eps": 1e-5})
    assert {name.rpartition(".")[2] for name in norm.others} == {"running_mean", "running_var"}
    assert layers["classifier.1"].bias == "classifier.1.bias"
    # in the order of the network
    assert next(iter(layers)) == "resnet.embedder.embedder.convolution"
    assert list(layers)[-1] == "classifier.1"
    assert {reason for name, reason in description.rest.items() if "batches" in name} == {"a counter"}


def test_an_input_size_that_the_model_does_not_take(tmp_path):
    config = ViTConfig(**SMALL, image_size=32, patch_size=8)
    checkpoint = saved(tmp_path, ViTForImageClassification(config))
    with pytest.raises(ValueError, match=r"`input_size`: ViT\w+ does not run on pixel_values of shape \(1, 3, 40, 40"):
        describe(checkpoint, 40)


def test_an_input_size_for_a_model_that_reads_no_images(tmp_path):
    config = Wav2Vec2Config(**SMALL, num_conv_pos_embedding_groups=4, conv_dim=(8,) * 7)
    checkpoint = saved(tmp_path, Wav2Vec2Model(config))
    with pytest.raises(ValueError, match="reads no images"):
        describe(checkpoint, 40)
    layers = by_name(describe_layers(checkpoint))
    first = layers["feature_extractor.conv_layers.0.conv"]
    assert (first.arguments["stride"], first.input_size, first.unknown) == ((5,), None, ("input size",))
    weight_normed = layers["encoder.pos_conv_embed.conv"]
    assert (weight_normed.kind, weight_normed.magnitude_dim, weight_normed.arguments["groups"]) == ("conv", 2, 4)
    assert weight_normed.weight.endswith("original1")


def test_vit_under_the_names_of_its_checkpoint(tmp_path):
    config = ViTConfig(**SMALL, image_size=(32, 16), patch_size=8)
    checkpoint = saved(tmp_path, ViTForImageClassification(config))
    description = describe(checkpoint)
    require_complete(checkpoint, description)
    layers = by_name(description.layers)
    patches = layers["vit.embeddings.patch_embeddings.projection"]
    assert (patches.input_size, patches.arguments["stride"]) == ((32, 16), (8, 8))
    # tensors keep the names of the file, whatever the model calls them
    assert all(layer.weight in checkpoint.names for layer in description.layers)
    heads = {name.rpartition(".")[2]: layer.head_size for name, layer in layers.items() if layer.head_size}
    assert heads == {"query": 8, "key": 8, "value": 8}
    assert "cls_token" in description.rest["vit.embeddings.cls_token"]


def test_gpt2_stores_its_matrices_transposed_and_shares_its_embedding(tmp_path):
    config = GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=64, n_positions=16)
    checkpoint = saved(tmp_path, GPT2LMHeadModel(config))
    description = describe(checkpoint)
    require_complete(checkpoint, description)
    layers = by_name(description.layers)
    fused = layers["transformer.h.0.attn.c_attn"]
    assert (fused.transposed_weight, fused.head_size, fused.kind) == (True, 8, "linear")
    assert not layers["transformer.wte"].transposed_weight
    assert layers["transformer.wte"].kind == "embedding"
    head = layers["lm_head"]
    assert (head.kind, head.tied, head.weight) == ("linear", True, "transformer.wte.weight")
    assert layers["transformer.h.0.ln_1"].arguments == {"eps": 1e-5}
    # each stored weight once
    weights = [layer.weight for layer in describe_layers(checkpoint)]
    assert len(weights) == len(set(weights)) == len(layers) - 1


@pytest.mark.parametrize("tie", [True, False])
def test_llama(tmp_path, tie):
    config = LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=64, tie_word_embeddings=tie, rms_norm_eps=1e-3)
    checkpoint = saved(tmp_path, LlamaForCausalLM(config), max_shard_size="20KB")
    assert len(checkpoint.files) > 1
    description = describe(checkpoint)
    require_complete(checkpoint, description)
    layers = by_name(description.layers)
    assert layers["lm_head"].tied == tie
    assert layers["model.norm"].kind == "rms_norm"
    assert layers["model.norm"].arguments == {"eps": 1e-3, "offset": 0.0}
    assert layers["model.layers.0.self_attn.k_proj"].head_size == 8


def test_normalisation_with_one_plus_weight_is_recognised(tmp_path):
    config = GemmaConfig(**SMALL, vocab_size=64, num_key_value_heads=1, head_dim=8)
    layers = by_name(describe_layers(saved(tmp_path, GemmaForCausalLM(config))))
    assert layers["model.norm"].arguments["offset"] == 1.0
    assert layers["model.embed_tokens"].unknown == ("how GemmaTextScaledWordEmbedding uses its weight",)


def test_a_convolution_that_changes_its_weight_is_said_so(tmp_path):
    config = BitConfig(embedding_size=32, hidden_sizes=[128], depths=[1], num_labels=4)
    layers = by_name(describe_layers(saved(tmp_path, BitForImageClassification(config)), 64))
    assert layers["bit.embedder.convolution"].unknown == ("how WeightStandardizedConv2d uses its weight",)
    assert layers["classifier.1"].unknown == ()


def test_depthwise_convolutions_and_normalisation_over_channels(tmp_path):
    config = ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_labels=4)
    layers = by_name(describe_layers(saved(tmp_path, ConvNextForImageClassification(config))))
    depthwise = layers["convnext.encoder.stages.1.layers.0.dwconv"]
    assert (depthwise.arguments["groups"], depthwise.input_size) == (16, (28, 28))
    # a class of its own, channels first
    assert layers["convnext.embeddings.layernorm"].kind == "layer_norm"


def test_both_towers_of_clip(tmp_path):
    vision = {**SMALL, "hidden_size": 24, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config={**SMALL, "vocab_size": 64}, vision_config=vision)
    checkpoint = saved(tmp_path, CLIPModel(config))
    description = describe(checkpoint)
    require_complete(checkpoint, description)
    layers = by_name(description.layers)
    assert layers["vision_model.embeddings.patch_embedding"].input_size == (32, 32)
    assert layers["vision_model.encoder.layers.0.self_attn.q_proj"].head_size == 12
    assert layers["text_model.encoder.layers.0.self_attn.q_proj"].head_size == 8


def test_base_model_and_model_with_a_head_fit_each_other(tmp_path):
    config = BertConfig(**SMALL, vocab_size=64)
    base = saved(tmp_path / "base", BertModel(config))
    text = (tmp_path / "base" / "config.json").read_text()
    (tmp_path / "base" / "config.json").write_text(text.replace('"BertModel"', '"BertForSequenceClassification"'))
    layers = by_name(describe_layers(Checkpoint.open(tmp_path / "base")))
    assert layers["encoder.layer.0.attention.self.query"].source == "model"
    assert base.names == Checkpoint.open(tmp_path / "base").names
    head = saved(tmp_path / "head", BertForSequenceClassification(config))
    text = (tmp_path / "head" / "config.json").read_text()
    (tmp_path / "head" / "config.json").write_text(text.replace('"BertForSequenceClassification"', '"BertModel"'))
    description = describe(Checkpoint.open(tmp_path / "head"))
    require_complete(head, description)
    layers = by_name(description.layers)
    assert layers["bert.encoder.layer.0.attention.self.query"].source == "model"
    # the head is no part of the base model
    assert layers["classifier"].source == "names"
    assert any("2 tensors do not fit BertModel" in note for note in description.notes)


def test_tensors_that_are_merged_on_loading_are_read_by_name(tmp_path):
    config = MixtralConfig(**SMALL, num_key_value_heads=2, vocab_size=64, num_local_experts=2)
    checkpoint = saved(tmp_path, MixtralForCausalLM(config))
    description = describe(checkpoint)
    require_complete(checkpoint, description)
    expert = by_name(description.layers)["model.layers.0.block_sparse_moe.experts.1.w1"]
    assert (expert.kind, expert.source) == ("linear", "names")


def test_layers_of_the_package(tmp_path):
    config = LipschitzVisionConfig.from_size("tiny", image_size=8, num_channels=1, block_type="sll")
    checkpoint = saved(tmp_path, LipschitzVisionForImageClassification(config).eval())
    description = describe(checkpoint)
    require_complete(checkpoint, description)
    assert description.rest == {}
    assert {layer.kind for layer in description.layers} == {"lipschitz"}
    assert not any(layer.linear for layer in description.layers)


def test_code_of_a_repository_is_never_run(tmp_path):
    (tmp_path / "custom.py").write_text("raise SystemExit('the code of the checkpoint was run')\n")
    for kind in ("my_own", "bert"):
        config = {
            "model_type": kind,
            "architectures": ["MyModel"],
            "auto_map": {"AutoConfig": "custom.MyConfig", "AutoModel": "custom.MyModel"},
        }
        checkpoint = stored(tmp_path, {"fc.weight": (3, 2)}, config)
        description = describe(checkpoint)
        assert description.architecture is None
        assert by_name(description.layers)["fc"].kind == "linear"
        expected = "no model that transformers knows" if kind == "my_own" else "has no model class 'MyModel'"
        assert expected in description.notes[0]


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": "wide"},
        {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 30, "num_attention_heads": 4},
        {"model_type": 3},
        {"architectures": ["BertModel"]},
        {"architecture": "words", "input": "more words"},
    ],
)
def test_configs_that_give_no_model(tmp_path, config):
    description = describe(stored(tmp_path, {"fc.weight": (3, 2)}, config))
    assert [layer.source for layer in description.layers] == ["names"]
    assert description.notes[0].startswith("layers are described by names and shapes: ")


def test_an_input_size_without_a_model_is_said_to_be_unused(tmp_path):
    description = describe(stored(tmp_path, {"conv.weight": (3, 2, 3, 3)}), 32)
    assert any("the input size was not used" in note for note in description.notes)
    assert description.layers[0].input_size is None


def test_values_that_cannot_be_read(tmp_path):
    tensors = {
        "int8.weight": torch.ones(4, 4, dtype=torch.int8),
        "fp8.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "empty.weight": torch.empty(0, 4),
        "half.weight": torch.ones(4, 4, dtype=torch.float16),
    }
    checkpoint = stored(tmp_path, tensors)
    description = describe(checkpoint)
    require_complete(checkpoint, description)
    assert [layer.name for layer in description.layers] == ["half"]
    assert "stored as I8" in description.rest["int8.weight"]
    assert "stored as F8_E4M3" in description.rest["fp8.weight"]
    assert description.rest["empty.weight"] == "has no entries"


def test_weights_of_another_shape_than_the_config_says(tmp_path):
    saved(tmp_path, ResNetForImageClassification(ResNetConfig(**RESNET)))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["classifier.1.weight"] = torch.randn(7, 16)
    save_file(tensors, tmp_path / "model.safetensors")
    description = describe(Checkpoint.open(tmp_path))
    layer = by_name(description.layers)["classifier.1"]
    assert (layer.source, layer.kind) == ("names", "linear")
    assert any("1 tensors do not fit" in note for note in description.notes)
