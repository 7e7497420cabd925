# SPDX-License-Identifier: Apache-2.0
import torch
from torch import nn

from hf_lip.checkpoints.layer_info import natural_order
from hf_lip.checkpoints.layers import describe, describe_layers

from .stored_tensors import by_name, require_complete, stored


def test_natural_order():
    names = ["layer.10.w", "layer.9.w", "layer.9.a", "conv1", "layer.w"]
    assert sorted(names, key=natural_order) == ["conv1", "layer.9.a", "layer.9.w", "layer.10.w", "layer.w"]


def test_names_and_shapes(tmp_path):
    tensors = {
        "tok_embeddings.weight": (20, 4),
        "wpe.weight": (8, 4),
        "patch_embed.proj.weight": (4, 3, 2, 2),
        "embeddings.projection.weight": (4, 6),
        "blocks.2.mlp.fc1.weight": (6, 4),
        "blocks.2.mlp.fc1.bias": (6,),
        "blocks.10.mlp.fc1.weight": (6, 4),
        "blocks.2.attn.in_proj_weight": (12, 4),
        "blocks.2.attn.in_proj_bias": (12,),
        "blocks.2.norm1.weight": (4,),
        "blocks.2.norm1.bias": (4,),
        "blocks.2.mlp.experts.gate_up_proj": (2, 4, 6),
        "sound.weight": (5, 4, 3),
        "video.weight": (5, 4, 3, 3, 3),
        "head.gain.weight": (4,),
        "cls_token": (1, 1, 4),
        "temperature": (1,),
        "lonely.bias": (4,),
    }
    checkpoint = stored(tmp_path, tensors)
    description = describe(checkpoint)
    require_complete(checkpoint, description)
    layers = by_name(description.layers)
    assert {name: layer.kind for name, layer in layers.items()} == {
        "blocks.2.attn.in_proj": "linear",
        "blocks.2.mlp.experts.gate_up_proj": "experts",
        "blocks.2.mlp.fc1": "linear",
        "blocks.10.mlp.fc1": "linear",
        "embeddings.projection": "linear",
        "patch_embed.proj": "conv",
        "sound": "conv",
        "tok_embeddings": "embedding",
        "video": "conv",
        "wpe": "embedding",
    }
    assert list(layers).index("blocks.2.mlp.fc1") < list(layers).index("blocks.10.mlp.fc1")
    assert layers["blocks.2.mlp.fc1"].bias == "blocks.2.mlp.fc1.bias"
    assert layers["blocks.2.attn.in_proj"].bias == "blocks.2.attn.in_proj_bias"
    assert layers["sound"].unknown == ("stride", "padding", "dilation", "groups", "input size")
    assert "shifts and does not stretch" in description.rest["lonely.bias"]
    assert "which need the model" in description.rest["blocks.2.norm1.weight"]
    assert "1 dimensions" in description.rest["head.gain.weight"]
    assert any("its lower end need not" in note for note in description.notes)


def test_heads_of_a_config_without_a_model(tmp_path):
    config = {"hidden_size": 8, "num_attention_heads": 2}
    layers = by_name(describe_layers(stored(tmp_path, {"a.q_proj.weight": (8, 8), "a.o_proj.weight": (8, 8)}, config)))
    assert (layers["a.q_proj"].head_size, layers["a.o_proj"].head_size) == (4, None)


def test_batch_norm_by_its_running_statistics(tmp_path):
    tensors = {
        "bn.weight": (4,),
        "bn.bias": (4,),
        "bn.running_mean": (4,),
        "bn.running_var": torch.rand(4),
        "bn.num_batches_tracked": torch.tensor(3),
        "plain.running_var": torch.rand(4),
    }
    checkpoint = stored(tmp_path / "without", tensors)
    description = describe(checkpoint)
    require_complete(checkpoint, description)
    layers = by_name(description.layers)
    assert layers["bn"].tensors == ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    assert (layers["bn"].arguments, layers["bn"].unknown) == ({"eps": 0.0}, ("eps, taken as 0",))
    assert layers["plain"].weight == "plain.running_var"
    layers = by_name(describe_layers(stored(tmp_path / "with", tensors, {"bn_eps": 1e-3})))
    assert (layers["bn"].arguments, layers["bn"].unknown) == ({"eps": 1e-3}, ())


def test_low_rank_factors(tmp_path):
    prefix = "base_model.model.h.0.attn"
    tensors = {
        f"{prefix}.q_proj.lora_A.weight": (2, 6),
        f"{prefix}.q_proj.lora_B.weight": (4, 2),
        f"{prefix}.v_proj.lora_A.default.weight": (2, 6),
        f"{prefix}.v_proj.lora_B.default.weight": (4, 2),
        "wte.lora_embedding_A": (2, 20),
        "wte.lora_embedding_B": (6, 2),
        "half.lora_A.weight": (2, 6),
        "conv.lora_A.weight": (2, 3, 3, 3),
        "conv.lora_B.weight": (4, 2, 1, 1),
        "dora.lora_magnitude_vector": (4,),
    }
    checkpoint = stored(tmp_path, tensors)
    description = describe(checkpoint)
    require_complete(checkpoint, description)
    layers = by_name(description.layers)
    low_rank = {name: layer for name, layer in layers.items() if layer.kind == "low_rank"}
    assert sorted(low_rank) == [f"{prefix}.q_proj.lora", f"{prefix}.v_proj.lora.default", "wte.lora"]
    layer = low_rank[f"{prefix}.q_proj.lora"]
    assert (layer.weight, layer.others) == (
        f"{prefix}.q_proj.lora_B.weight",
        (f"{prefix}.q_proj.lora_A.weight",),
    )
    assert "lora_alpha / r" in layer.unknown[0]
    assert "half.lora_B.weight is missing" in description.rest["half.lora_A.weight"]
    assert layers["conv.lora_A"].kind == "conv"


def test_weight_norm_in_both_spellings(tmp_path):
    model = nn.ModuleDict({"old": nn.Conv1d(3, 4, 5), "new": nn.Linear(3, 4), "all": nn.Linear(3, 4)})
    nn.utils.parametrizations.weight_norm(model["new"])
    nn.utils.parametrizations.weight_norm(model["all"], dim=None)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # as `torch.nn.utils.weight_norm`, now deprecated, names them
    weight = tensors.pop("old.weight")
    tensors |= {"old.weight_g": weight.flatten(1).norm(dim=1).view(4, 1, 1), "old.weight_v": weight}
    checkpoint = stored(tmp_path, tensors)
    description = describe(checkpoint)
    require_complete(checkpoint, description)
    layers = by_name(description.layers)
    assert {name: (layer.kind, layer.magnitude_dim) for name, layer in layers.items()} == {
        "old": ("conv", 0),
        "new": ("linear", 0),
        "all": ("linear", -1),
    }
    assert layers["old"].bias == "old.bias"
