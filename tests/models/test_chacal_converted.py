# SPDX-License-Identifier: Apache-2.0
"""Chained attention in Llama (with and without grouped heads), Qwen2 and GPT-2."""

import copy

import pytest
import torch
import typer
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    StaticCache,
)
from typer.testing import CliRunner

import hf_lip  # noqa: F401
from hf_lip.cli.convert_attention_command import convert_attention as convert_attention_command
from hf_lip.models.chacal.configuration_chacal import ChacalConfig
from hf_lip.models.chacal.convert import convert_attention
from hf_lip.models.chacal.converted import (
    ChacalGPT2Config,
    ChacalGPT2LMHeadModel,
    ChacalLlamaConfig,
    ChacalLlamaForCausalLM,
    ChacalQwen2Config,
    ChacalQwen2ForCausalLM,
)
from hf_lip.models.chacal.interface import ChainedCache
from hf_lip.models.chacal.modeling_chacal import ChacalForCausalLM


TOKENS = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
SIZES = {
    **TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT2 = {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
FAMILIES = {
    "llama": (ChacalLlamaForCausalLM, ChacalLlamaConfig, LlamaConfig, SIZES),
    "llama grouped": (ChacalLlamaForCausalLM, ChacalLlamaConfig, LlamaConfig, GROUPED),
    "qwen2": (ChacalQwen2ForCausalLM, ChacalQwen2Config, Qwen2Config, GROUPED),
    "gpt2": (ChacalGPT2LMHeadModel, ChacalGPT2Config, GPT2Config, GPT2),
}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
every_variant = pytest.mark.parametrize(
    "options", [{}, {"chain_diagonal": "keep"}, {"chain_normalize": True}], ids=["strict", "keep", "normalize"]
)
GREEDY = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def tokens(batch=2, length=20):
    return torch.randint(3, 40, (batch, length))


def padded():
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    return ids, mask


@every_family
@every_variant
def test_ordinary_checkpoints_start_with_their_own_logits(tmp_path, family, options):
    model_class, config_class, plain_config, sizes = family
    plain = AutoModelForCausalLM.from_config(plain_config(**sizes)).eval()
    plain.save_pretrained(tmp_path)
    config = config_class(**sizes, chain_gamma=0.0, **options)
    model, report = model_class.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert not report["missing_keys"]
    ids, mask = padded()
    for attention_mask in (None, mask):
        got = model(ids, attention_mask=attention_mask).logits
        expected = plain(ids, attention_mask=attention_mask).logits
        seen = torch.ones_like(mask).bool() if attention_mask is None else mask.bool()
        scale = expected.abs().max().item()
        torch.testing.assert_close(got[seen], expected[seen], rtol=0, atol=2e-6 * max(scale, 1.0))


@every_family
@every_variant
@torch.no_grad()
def test_causal_and_independent_of_padding_and_batch(family, options):
    model_class, config_class, _, sizes = family
    model, ids = model_class(config_class(**sizes, chain_gamma=0.9, **options)).eval(), tokens(length=24)
    expected = model(ids).logits
    changed = ids.clone()
    changed[:, 15] = (changed[:, 15] - 3 + 1) % 37 + 3
    got = model(changed).logits
    assert torch.equal(got[:, :15], expected[:, :15])
    assert not torch.allclose(got[:, 15:], expected[:, 15:])
    filled = torch.zeros(2, 31, dtype=torch.long)
    filled[0, 7:], filled[1, :24] = ids[0], ids[1]
    mask = (filled != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = model(filled, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(got[0, 7:], expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(got[1, :24], expected[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(model(ids[:1]).logits, expected[:1], rtol=0, atol=1e-5)


@every_family
@every_variant
def test_cached_static_padded_beam_and_uncached_generation_agree(family, options):
    model_class, config_class, _, sizes = family
    model = model_class(config_class(**sizes, chain_gamma=0.9, **options)).eval()
    ids, mask = padded()
    for more in ({}, {"num_beams": 3}):
        inputs = {"input_ids": ids, "attention_mask": mask, **GREEDY, **more}
        expected = model.generate(**inputs, use_cache=False)
        assert torch.equal(model.generate(**inputs), expected)
        assert torch.equal(model.generate(**inputs, cache_implementation="static"), expected)
        if not more:
            assert torch.equal(model.generate(ids[:1, 6:], **GREEDY)[0], expected[0, 6:])
    assisted = model.generate(ids[:1], prompt_lookup_num_tokens=3, **GREEDY)
    assert torch.equal(assisted, model.generate(ids[:1], use_cache=False, **GREEDY))


@pytest.mark.parametrize("sizes", [SIZES, GROUPED], ids=["equal", "grouped"])
def test_llama_is_the_chacal_model(sizes):
    gamma = [0.5, [0.9, 0.0, -0.3, 0.7]]
    model = ChacalLlamaForCausalLM(ChacalLlamaConfig(**sizes, chain_gamma=gamma)).eval()
    own = ChacalForCausalLM(ChacalConfig(**sizes, gamma=gamma)).eval()
    own.load_state_dict(model.state_dict())
    ids, mask = padded()
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, own(ids, attention_mask=mask).logits)
    positions = torch.cat([torch.arange(12), torch.arange(8)])[None]
    packed = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed, own(ids, position_ids=positions).logits)


@every_family
def test_the_choice_survives_saving(tmp_path, family):
    model_class, config_class, _, sizes = family
    model = model_class(config_class(**sizes, chain_gamma=0.9)).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is model_class
    ids = tokens()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.chain_gamma == 0.9


@every_family
def test_trains(family):
    model_class, config_class, _, sizes = family
    model = model_class(config_class(**sizes, chain_gamma=0.9)).train()
    ids = tokens()
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_any_model_by_its_attention_implementation():
    config = LlamaConfig(**GROUPED)
    model = LlamaForCausalLM._from_config(config, attn_implementation="chacal").eval()
    ids, mask = padded()
    with pytest.raises(ValueError, match="chain_gamma"):
        model(ids)
    model.config.chain_gamma = 0.9
    inputs = {"input_ids": ids, "attention_mask": mask, **GREEDY}
    expected = model.generate(**inputs, use_cache=False)
    assert torch.equal(model.generate(**inputs, past_key_values=ChainedCache(config)), expected)
    with pytest.raises(ValueError, match=r"ChainedCache\(model\.config\)"):
        model.generate(**inputs)
    with pytest.raises(ValueError, match="static or sliding"):
        model(ids, past_key_values=StaticCache(config=config, max_cache_len=30))
    with pytest.raises(ValueError, match="0 everywhere"):
        model(ids, attention_mask=torch.tensor([[0] * 20, [1] * 20]))
    cache = DynamicCache(config=config)
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="holds values"):
        model(ids[:, :1], past_key_values=cache)


def test_bad_settings():
    for bad in ({"chain_gamma": 1.0}, {"chain_gamma": -0.1, "chain_diagonal": "keep"}, {"chain_gamma": [0.5]}):
        with pytest.raises(ValueError, match="chain_gamma"):
            ChacalLlamaConfig(**SIZES, **bad)
    with pytest.raises(ValueError, match="chain_diagonal"):
        ChacalLlamaConfig(**SIZES, chain_diagonal="upper")
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    model = ChacalQwen2ForCausalLM(ChacalQwen2Config(**GROUPED, **window))
    with pytest.raises(ValueError, match="sliding window"):
        model(tokens())
    model = ChacalLlamaForCausalLM(ChacalLlamaConfig(**SIZES))
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(tokens(), cache_implementation="quantized", **GREEDY)
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(tokens(), cache_implementation="static")


@every_family
@pytest.mark.parametrize("max_cache_len", [None, 30])
def test_a_cache_that_is_cropped_copied_and_reordered(family, max_cache_len):
    model_class, config_class, _, sizes = family
    model = model_class(config_class(**sizes, chain_gamma=0.9)).eval()
    ids = tokens(length=30)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, -1]
        cache = ChainedCache(model.config, max_cache_len)
        model(ids[:, :20], past_key_values=cache)
        kept = copy.deepcopy(cache)
        model(tokens(length=9), past_key_values=cache)
        cache.crop(-9)
        got = model(ids[:, 20:], past_key_values=cache).logits[:, -1]
        kept.reorder_cache(torch.tensor([1, 0]))
        swapped = model(ids.flip(0)[:, 20:], past_key_values=kept).logits[:, -1]
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(swapped.flip(0), expected, rtol=0, atol=2e-5)


def test_a_static_cache_stays_where_it_is_and_is_not_exceeded():
    model = ChacalLlamaForCausalLM(ChacalLlamaConfig(**GROUPED, chain_gamma=0.9)).eval()
    cache = ChainedCache(model.config, max_cache_len=23)
    places = set()
    with torch.no_grad():
        for count in (20, 1, 2):
            model(tokens(length=count), past_key_values=cache)
            layer = cache.layers[1]
            places.add((layer.keys.data_ptr(), layer.values.data_ptr()))
            assert layer.keys.untyped_storage().nbytes() == 2 * 2 * 23 * 8 * 4
            assert layer.values.untyped_storage().nbytes() == 2 * 4 * 23 * 8 * 4
        assert len(places) == 1
        with pytest.raises(ValueError, match="room for 23 tokens, not for 24"):
            model(tokens(length=1), past_key_values=cache)
        cache.reset()
        ids = tokens(length=21)
        got = [model(part, past_key_values=cache).logits for part in ids.split([20, 1], 1)]
        torch.testing.assert_close(torch.cat(got, 1), model(ids, use_cache=False).logits, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="max_cache_len"):
        ChainedCache(model.config, max_cache_len=0)


def test_caches_of_other_models():
    model, ids = ChacalLlamaForCausalLM(ChacalLlamaConfig(**GROUPED)).eval(), tokens()
    with pytest.raises(ValueError, match="1 layers, the model has more"):
        model(ids, past_key_values=ChainedCache(LlamaConfig(**{**GROUPED, "num_hidden_layers": 1})))
    for options in ({"num_key_value_heads": 4}, {"head_dim": 16}):
        other = ChacalLlamaForCausalLM(ChacalLlamaConfig(**{**GROUPED, **options}))
        cache = ChainedCache(other.config)
        other(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="another model or batch"):
            model(ids[:, :1], past_key_values=cache)
    cache = ChainedCache(model.config)
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="another model or batch"):
        model(ids[:1, :1], past_key_values=cache)
    own = ChacalForCausalLM(ChacalConfig(**GROUPED)).eval()
    with pytest.raises(TypeError, match="cannot serve chained_attention"):
        own(ids, past_key_values=cache)
    model = ChacalLlamaForCausalLM(ChacalLlamaConfig(**SIZES)).eval()
    own = ChacalForCausalLM(ChacalConfig(**SIZES)).eval()
    with pytest.raises(ValueError, match="holds values"):
        model(ids[:, :1], past_key_values=own(ids, use_cache=True).past_key_values)


@every_family
def test_convert_attention(tmp_path, family):
    model_class, config_class, plain_config, sizes = family
    plain = AutoModelForCausalLM.from_config(plain_config(**sizes)).bfloat16().eval()
    plain.save_pretrained(tmp_path / "plain")
    report = convert_attention(tmp_path / "plain", tmp_path / "chained")
    assert report.model_type == config_class.model_type
    assert report.num_layers == 2
    assert report.largest_difference <= 2e-6 * max(report.largest_logit, 1.0)
    assert not report.tokenizer
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "chained")
    assert type(loaded) is model_class
    assert loaded.dtype == torch.bfloat16
    for name, weight in plain.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chained", "plain"]
    report = convert_attention(tmp_path / "plain", tmp_path / "raised", gamma=0.9, diagonal="keep")
    assert report.largest_difference > 1e-3
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "raised").config.chain_diagonal == "keep"


def test_convert_attention_refuses(tmp_path):
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "plain")
    ChacalForCausalLM(ChacalConfig(**SIZES)).save_pretrained(tmp_path / "chacal")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        convert_attention(tmp_path / "plain", tmp_path / "chacal")
    with pytest.raises(ValueError, match="'chacal'; attention can be converted for gpt2, llama, qwen2"):
        convert_attention(tmp_path / "chacal", tmp_path / "out")
    with pytest.raises(ValueError, match="chain_gamma"):
        convert_attention(tmp_path / "plain", tmp_path / "out", gamma=1.0)
    assert not (tmp_path / "out").exists()


def test_convert_attention_command(tmp_path):
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "plain")
    app = typer.Typer()
    app.command()(convert_attention_command)
    arguments = [str(tmp_path / "plain"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "chacal_llama, 2 chained layers, gamma 0" in result.output
    learnable = CliRunner().invoke(app, [*arguments[:2], str(tmp_path / "learnable"), "--learnable-gamma"])
    assert "chacal_llama, 2 chained layers, gamma 0, learnt from there." in learnable.output
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "learnable").config.chain_gamma_learnable
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2
    assert "not an empty folder" in again.output
