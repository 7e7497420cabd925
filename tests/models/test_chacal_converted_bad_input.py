# SPDX-License-Identifier: Apache-2.0
"""What converted Llama (with and without grouped heads), Qwen2 and GPT-2 refuse, and that it is said clearly."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, StaticCache

from hf_lip import ChacalLlamaConfig, ChacalLlamaForCausalLM
from hf_lip.models.chacal.interface import ChainedCache

from .test_chacal_converted import GREEDY, SIZES, every_family, tokens


def build(family, **options):
    model_class, config_class, _, sizes = family
    return model_class(config_class(**sizes, chain_gamma=0.9, **options)).eval()


@every_family
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chain_gamma": 1.0}, r"must lie in \[-1, 1\)"),
        ({"chain_gamma": -1.1}, r"must lie in \[-1, 1\)"),
        ({"chain_gamma": float("nan")}, r"must lie in \[-1, 1\)"),
        ({"chain_gamma": -0.1, "chain_diagonal": "keep"}, r"must lie in \[0, 1\)"),
        ({"chain_gamma": 1.0, "chain_diagonal": "keep"}, r"must lie in \[0, 1\)"),
        ({"chain_gamma": -1.0, "chain_normalize": True}, r"must lie in \(-1, 1\]"),
        ({"chain_gamma": [0.5]}, "one entry for each of 2 layers, got 1"),
        ({"chain_gamma": [0.5, [0.5, 0.5]]}, "of layer 1 needs one entry for each of 4 heads, got 2"),
        ({"chain_gamma": [0.5, "high"]}, "must hold numbers"),
        ({"chain_gamma": [0.5, True]}, "must hold numbers"),
    ],
)
def test_discounts_out_of_range(family, options, message):
    _, config_class, _, sizes = family
    with pytest.raises(ValueError, match=f"`chain_gamma`.*{message}"):
        config_class(**sizes, **options)


@every_family
def test_a_fully_masked_row(family):
    model, ids = build(family), tokens()
    mask = torch.ones_like(ids)
    mask[1] = 0
    with pytest.raises(ValueError, match="0 everywhere"):
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="0 everywhere"):
        model.generate(ids, attention_mask=mask, **GREEDY)


@every_family
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite(family, bad):
    model, ids = build(family), tokens()
    embeds = model.get_input_embeddings()(ids).detach()
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits)
    embeds[1, 2, 3] = bad
    with pytest.raises(ValueError, match="`inputs_embeds` holds NaN or infinite values"):
        model(inputs_embeds=embeds)


@every_family
def test_unknown_tokens_and_empty_inputs(family):
    model, ids = build(family), tokens()
    for bad in (40, -1):
        wrong = ids.clone()
        wrong[0, 3] = bad
        with pytest.raises(ValueError, match=r"`input_ids` must lie in \[0, 39\]"):
            model(wrong)
    with pytest.raises(ValueError, match="at least one token"):
        model(ids[:, :0])
    model.resize_token_embeddings(41)
    model(torch.full((1, 4), 40))


@every_family
def test_too_long_sequences(family):
    model, message = build(family), r"reaches position 64, but .* the model has 64"
    model(tokens(length=64))
    with pytest.raises(ValueError, match=message):
        model(tokens(length=65))
    cache = ChainedCache(model.config)
    model(tokens(length=60), past_key_values=cache)
    with pytest.raises(ValueError, match=message):
        model(tokens(length=5), past_key_values=cache)
    with pytest.raises(ValueError, match=message):
        model(tokens(length=4), position_ids=torch.arange(61, 65)[None])
    with pytest.raises(ValueError, match=message):
        model.generate(tokens(length=60), **GREEDY)
    # left padding has no positions
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[:, :20] = 0
    model.generate(tokens(length=70), attention_mask=mask, **GREEDY)


def test_stretched_positions_are_positions():
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    model = ChacalLlamaForCausalLM(ChacalLlamaConfig(**SIZES, rope_parameters=rope)).eval()
    model(tokens(length=128))
    with pytest.raises(ValueError, match="the model has 128"):
        model(tokens(length=129))


@every_family
def test_caches_that_cannot_serve(family):
    model, ids = build(family), tokens()
    plain = DynamicCache(config=model.config)
    model(ids, past_key_values=plain)
    with pytest.raises(ValueError, match=r"holds values, but chained attention needs Z.*ChainedCache"):
        model(ids[:, :1], past_key_values=plain)
    with pytest.raises(ValueError, match="static or sliding"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=30))
    with pytest.raises(TypeError, match=r"must be a transformers `Cache`, got tuple.*ChainedCache"):
        model(ids, past_key_values=((torch.zeros(1), torch.zeros(1)),))


@every_family
def test_caches_of_other_models(family):
    model, ids = build(family), tokens()
    for changes in ({"num_attention_heads": 2}, {"num_attention_heads": 8}, {"head_dim": 16}):
        cache = ChainedCache(model.config)
        foreign = ChacalLlamaForCausalLM(ChacalLlamaConfig(**{**SIZES, "num_key_value_heads": None, **changes}))
        foreign(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="another model or batch"):
            model(ids[:, :1], past_key_values=cache)
    cache = ChainedCache(LlamaConfig(**{**SIZES, "num_hidden_layers": 1}))
    with pytest.raises(ValueError, match="1 layers, the model has more"):
        model(ids, past_key_values=cache)
    cache = ChainedCache(model.config)
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="another model or batch"):
        model(ids[:1, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="room for 10 tokens, not for 20"):
        model(ids, past_key_values=ChainedCache(model.config, max_cache_len=10))
