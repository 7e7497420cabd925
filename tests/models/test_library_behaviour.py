# SPDX-License-Identifier: Apache-2.0
"""What transformers' own common tests (tests/conformance) found our models to do otherwise than the library's."""

import pytest
import torch
from PIL import Image
from transformers import DynamicCache, LlamaForCausalLM, StaticCache, pipeline

from hf_lip.models.certified_model import CheckpointMismatchError
from hf_lip.models.chacal.configuration_chacal import ChacalConfig
from hf_lip.models.chacal.converted import ChacalLlamaConfig, ChacalLlamaForCausalLM
from hf_lip.models.chacal.modeling_chacal import ChacalForCausalLM
from hf_lip.models.lipschitz_vision.configuration_lipschitz_vision import LipschitzVisionConfig
from hf_lip.models.lipschitz_vision.image_processing_pil_lipschitz_vision import LipschitzVisionImageProcessorPil
from hf_lip.models.lipschitz_vision.modeling_lipschitz_vision import (
    LipschitzVisionBackbone,
    LipschitzVisionForImageClassification,
)


TINY = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def vision_config(**fields):
    return LipschitzVisionConfig(
        **{
            "image_size": 8,
            "hidden_sizes": [4, 6],
            "depths": [1, 1],
            "pool_size": 4,
            "num_dense_layers": 1,
            "dense_hidden_size": 8,
            "num_labels": 3,
            **fields,
        }
    )


def chacal(**fields):
    return ChacalForCausalLM(ChacalConfig(**{**TINY, "max_position_embeddings": 16, **fields})).eval()


def pixels(batch: int = 5):
    return torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def checkpointed(model, use_reentrant):
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})
    return model.train()


def tokens(length: int, batch: int = 2):
    return torch.randint(3, 20, (batch, length), generator=torch.Generator().manual_seed(1))


def test_weights_in_memory_are_loaded():
    model = LipschitzVisionForImageClassification(vision_config()).eval()
    weights = model.state_dict()
    again = LipschitzVisionForImageClassification.from_pretrained(None, config=vision_config(), state_dict=weights)
    assert torch.equal(again(pixels()).certified_radius, model(pixels()).certified_radius)
    del weights["classifier.weight"]
    with pytest.raises(CheckpointMismatchError, match=r"`state_dict` do not fit .*missing: classifier\.weight"):
        LipschitzVisionForImageClassification.from_pretrained(None, config=vision_config(), state_dict=weights)


def test_wrong_sizes_are_also_the_error_that_the_library_raises(tmp_path):
    LipschitzVisionForImageClassification(vision_config()).save_pretrained(tmp_path)
    for kind in (ValueError, RuntimeError):
        with pytest.raises(kind, match="mismatched: classifier"):
            LipschitzVisionForImageClassification.from_pretrained(tmp_path, num_labels=7)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("depths", [[1, 1], [0, 0]], ids=["stages", "neck only"])
def test_checkpointing_gives_the_first_block_its_gradient(use_reentrant, depths):
    # no layers that move their power iteration at every pass, the repeated one included
    model = LipschitzVisionForImageClassification(vision_config(block_type="aol", depths=depths)).train()
    labels = torch.tensor([0, 1, 2, 0, 1])
    model(pixels(), labels=labels).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    given = pixels()
    checkpointed(model, use_reentrant)(given, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)
    # the images are the caller's
    assert not given.requires_grad


def test_a_checkpointed_backbone_trains():
    model = checkpointed(LipschitzVisionBackbone(vision_config(out_features=["stage2"])), use_reentrant=True)
    model(pixels()).feature_maps[0].square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_image_classification_pipeline_takes_batches_apart():
    model = LipschitzVisionForImageClassification(vision_config()).eval()
    assert model(pixels()).lipschitz_constant.shape == (5,)
    images = [Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()) for image in pixels()]
    classify = pipeline(
        "image-classification",
        model=model,
        image_processor=LipschitzVisionImageProcessorPil(size={"height": 8, "width": 8}),
    )
    one_by_one = [classify(image) for image in images]
    assert classify(images, batch_size=2) == one_by_one


def test_new_tokens_of_resized_embeddings_are_known():
    model = chacal()
    model.resize_token_embeddings(25)
    assert model(torch.tensor([[3, 24]])).logits.shape == (1, 2, 25)
    with pytest.raises(ValueError, match=r"lie in \[0, 24\]"):
        model(torch.tensor([[3, 25]]))


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "default", "rope_theta": 10000.0}, 16),
        ({"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}, 32),
        ({"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 6}, 24),
    ],
    ids=["default", "linear", "yarn"],
)
def test_stretched_positions_can_be_used(rope, limit):
    model = chacal(rope_parameters=rope)
    assert model(tokens(limit)).logits.isfinite().all()
    with pytest.raises(ValueError, match=f"the model has {limit}"):
        model(tokens(limit + 1))


def test_attentions_of_a_static_cache_have_a_column_for_each_slot():
    model = chacal(layer_types=["chained_attention", "full_attention"], attn_implementation="eager")
    caches = [DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=10)]
    ids = tokens(8)
    seen = 0
    for length in (5, 1, 2):
        new = ids[:, seen : seen + length]
        seen += length
        dynamic, static = (
            model(new, past_key_values=cache, output_attentions=True, use_cache=True).attentions for cache in caches
        )
        for expected, found in zip(dynamic, static):
            assert found.shape == (2, 2, length, 10)
            torch.testing.assert_close(found[..., :seen], expected)
            assert not found[..., seen:].any()


def test_ordinary_attention_in_a_converted_model_is_said_and_generates(caplog):
    config = ChacalLlamaConfig(**TINY, intermediate_size=16, chain_gamma=0.9, pad_token_id=0)
    chained = ChacalLlamaForCausalLM(config).eval()
    assert "no effect" not in caplog.text
    with caplog.at_level("WARNING", logger="transformers"):
        config = ChacalLlamaConfig(**TINY, intermediate_size=16, chain_gamma=0.9, pad_token_id=0)
        ordinary = ChacalLlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    ordinary.load_state_dict(chained.state_dict())
    llama = LlamaForCausalLM(ordinary.config).eval()
    llama.load_state_dict(chained.state_dict())
    ids, greedy = tokens(6), {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(ordinary.generate(ids, **greedy), llama.generate(ids, **greedy))
    assert not torch.allclose(chained(ids).logits, ordinary(ids).logits)
