# SPDX-License-Identifier: Apache-2.0
"""The chacal family: Auto classes, Llama at gamma = 0, masks, training, saving, compiling, bad input."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

from hf_lip.models.chacal.configuration_chacal import ChacalConfig
from hf_lip.models.chacal.gamma_chacal import GammaSchedule
from hf_lip.models.chacal.modeling_chacal import ChacalForCausalLM, ChacalModel
from hf_lip.ops.chain import naive_chained_attention


SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VARIANTS = {
    "strict": {},
    "keep": {"diagonal": "keep"},
    "normalize": {"normalize": True},
    "grouped": {"num_key_value_heads": 2, "gamma": [0.9, [-0.5, 0.0, 0.5, 0.99]]},
    "mixed": {"layer_types": ["full_attention", "chained_attention"]},
    "no rope, learnt": {"use_rope": False, "gamma_learnable": True},
    "ordinary": {"layer_types": ["full_attention", "full_attention"]},
}
every_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
# tracing transformers takes seconds: the rest with -m slow
some_variants = pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=() if name == "mixed" else pytest.mark.slow)
        for name, options in VARIANTS.items()
    ],
)


def config(**options) -> ChacalConfig:
    return ChacalConfig(**{**SIZES, **options})


def causal_lm(**options) -> ChacalForCausalLM:
    model = ChacalForCausalLM(config(initializer_range=0.2, **options))
    return model.eval()


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def tokens(batch=2, length=20):
    return torch.randint(3, 40, (batch, length))


def test_auto_classes():
    assert isinstance(AutoConfig.for_model("chacal"), ChacalConfig)
    for auto, name in (
        (AutoModel, "ChacalModel"),
        (AutoModelForCausalLM, "ChacalForCausalLM"),
        (AutoModelForSequenceClassification, "ChacalForSequenceClassification"),
        (AutoModelForTokenClassification, "ChacalForTokenClassification"),
    ):
        assert type(auto.from_config(config())).__name__ == name


@pytest.mark.parametrize("diagonal", ["strict", "keep"])
@pytest.mark.parametrize("normalize", [False, True])
def test_gamma_zero_is_llama(diagonal, normalize):
    shared = {**SIZES, "num_key_value_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(**shared)).eval()
    model = ChacalForCausalLM(ChacalConfig(**shared, gamma=0.0, diagonal=diagonal, normalize=normalize)).eval()
    model.load_state_dict(llama.state_dict())
    ids, mask = tokens(length=90), torch.ones(2, 90, dtype=torch.long)
    mask[0, :30] = 0
    got, expected = model(ids, attention_mask=mask).logits, llama(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(got[0, 30:], expected[0, 30:], rtol=0, atol=1e-6)


def test_a_layer_is_the_naive_operator():
    model = ChacalModel(config(num_hidden_layers=1, use_rope=False, gamma=[[0.2, 0.9, -0.4, 0.0]])).double().eval()
    attention, hidden = model.layers[0].self_attn, torch.randn(2, 70, 32, dtype=torch.float64)
    got, *_ = attention(hidden, chain_context=context_without_masks())
    heads = [
        p(hidden).view(2, 70, 4, 8).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    ]
    gamma = torch.tensor([0.2, 0.9, -0.4, 0.0], dtype=torch.float64)
    expected = attention.o_proj(naive_chained_attention(*heads, gamma).transpose(1, 2).flatten(2))
    # discounts are kept in float32
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def context_without_masks():
    from hf_lip.models.chacal.attention import ChainContext

    return ChainContext(0, None, None)


@every_variant
def test_causal_and_independent_of_padding_and_batch(options):
    model, ids = causal_lm(**options), tokens(length=24)
    expected = model(ids).logits
    changed = ids.clone()
    changed[:, 15] = (changed[:, 15] - 3 + 1) % 37 + 3
    assert torch.equal(model(changed).logits[:, :15], expected[:, :15])
    padded = torch.zeros(2, 31, dtype=torch.long)
    padded[0, 7:], padded[1, :24] = ids[0], ids[1]
    mask = (padded != 0).long()
    got = model(padded, attention_mask=mask).logits
    torch.testing.assert_close(got[0, 7:], expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(got[1, :24], expected[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(model(ids[:1]).logits, expected[:1], rtol=0, atol=1e-5)


@every_variant
def test_packed_sequences(options):
    model, ids = causal_lm(**options), tokens(length=25)
    positions = torch.cat([torch.arange(9), torch.arange(1), torch.arange(15)])[None]
    for use_cache in (False, True):
        got = model(ids, position_ids=positions, use_cache=use_cache).logits
        expected = torch.cat([model(part).logits for part in ids.split([9, 1, 15], 1)], 1)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@every_variant
def test_trains_with_and_without_checkpointing(options):
    ids, found = tokens(length=30), []
    for checkpointing, use_cache in ((False, False), (False, True), (True, False)):
        torch.manual_seed(1)
        model = causal_lm(**options).train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        loss = model(ids, labels=ids, use_cache=use_cache).loss
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    for loss, grads in found[1:]:
        torch.testing.assert_close(loss, found[0][0])
        for name, grad in grads.items():
            assert grad is not None, name
            torch.testing.assert_close(grad, found[0][1][name], rtol=1e-4, atol=1e-6)


def test_trains_after_a_look_in_inference_mode():
    model, ids = causal_lm(), torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        seen = model(input_ids=ids, labels=ids).loss
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.item() == seen.item()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_learnt_gamma_moves_and_is_saved(tmp_path):
    model = causal_lm(gamma_learnable=True, gamma=0.0).train()
    ids = tokens(batch=8, length=30)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    spread = torch.tensor(model.get_gamma())
    assert spread.shape == (2, 4)
    assert (spread != 0).all()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(torch.tensor(loaded.get_gamma()), spread)
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)


@every_variant
def test_save_and_load(tmp_path, options):
    model, ids = causal_lm(**options), tokens()
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_learnt_gamma_starts_at_the_config_when_the_checkpoint_has_none(tmp_path):
    causal_lm(gamma=0.3).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gamma_learnable=True)
    torch.testing.assert_close(torch.tensor(loaded.get_gamma()), torch.full((2, 4), 0.3))


def test_set_gamma_and_schedule(tmp_path):
    model, ids = causal_lm(gamma=0.0), tokens()
    before = model(ids).logits
    schedule = GammaSchedule(model, [0.9, [0.0, 0.2, 0.4, -0.5]], num_steps=4)
    for _ in range(3):
        schedule.step()
    torch.testing.assert_close(torch.tensor(model.get_gamma()[1]), torch.tensor([0.0, 0.15, 0.3, -0.375]))
    again = GammaSchedule(model, 0.1, num_steps=4, shape="cosine")
    again.load_state_dict(schedule.state_dict())
    for _ in range(3):
        again.step()
    assert model.get_gamma() == [[0.9] * 4, [0.0, 0.2, 0.4, -0.5]]
    assert not torch.allclose(model(ids).logits, before)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_gamma() == model.get_gamma()
    model.set_gamma(0.0)
    assert torch.equal(model(ids).logits, before)
    assert model.config.gamma == 0.0
    for bad in (1.0, [0.5], [[0.5] * 3, 0.5], float("nan")):
        with pytest.raises(ValueError, match="gamma"):
            model.set_gamma(bad)
    assert model.config.gamma == 0.0
    with pytest.raises(ValueError, match="num_steps"):
        GammaSchedule(model, 0.5, 0)
    with pytest.raises(ValueError, match="shape"):
        GammaSchedule(model, 0.5, 1, shape="sudden")


def test_bf16(tmp_path):
    model, ids = causal_lm(gamma=0.99), tokens(length=64)
    model.save_pretrained(tmp_path)
    low = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected, got = model(ids).logits, low(ids).logits
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() <= 0.03 * expected.norm()
    # a cast does not round the discount
    assert low.model.layers[0].self_attn.gamma(torch.device("cpu"))[0][0] == torch.tensor(0.99)
    low.train()(ids, labels=ids).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in low.parameters())


def test_device_map_offloads_to_disk(tmp_path):
    model, ids = causal_lm(), tokens()
    model.save_pretrained(tmp_path / "model")
    places = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "disk",
    }
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "offload")
    )
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@some_variants
def test_compiles_in_one_graph(options):
    model, ids = causal_lm(**options), tokens()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = compiled(ids, attention_mask=mask, labels=ids, use_cache=False)
    outputs.loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected = model(ids, attention_mask=mask, labels=ids, use_cache=False)
    expected.loss.backward()
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=0, atol=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-6)


def test_hidden_states_and_attentions():
    model, ids = causal_lm(), tokens()
    outputs = model(ids, output_hidden_states=True)
    assert len(outputs.hidden_states) == 3
    model.set_attn_implementation("eager")
    outputs = model(ids, output_attentions=True)
    assert [a.shape for a in outputs.attentions] == [(2, 4, 20, 20)] * 2
    sums = outputs.attentions[0].sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_classifiers():
    ids = torch.zeros(2, 12, dtype=torch.long)
    ids[0, 5:], ids[1, :9] = tokens(1, 7)[0], tokens(1, 9)[0]
    mask = (ids != 0).long()
    sequences = AutoModelForSequenceClassification.from_config(config(num_labels=3)).eval()
    outputs = sequences(ids, attention_mask=mask, labels=torch.tensor([0, 2]))
    assert outputs.logits.shape == (2, 3)
    torch.testing.assert_close(outputs.logits[0], sequences(ids[:1, 5:]).logits[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs.logits[1], sequences(ids[1:, :9]).logits[0], rtol=0, atol=1e-5)
    outputs.loss.backward()
    words = AutoModelForTokenClassification.from_config(config(num_labels=5)).eval()
    outputs = words(ids, attention_mask=mask, labels=torch.randint(0, 5, (2, 12)))
    assert outputs.logits.shape == (2, 12, 5)
    outputs.loss.backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 1.0}, "gamma"),
        ({"gamma": -1.1}, "gamma"),
        ({"gamma": float("nan")}, "gamma"),
        ({"gamma": -0.1, "diagonal": "keep"}, r"\[0, 1\)"),
        ({"gamma": 1.0, "diagonal": "keep"}, r"\[0, 1\)"),
        ({"gamma": -0.1, "diagonal": "keep", "gamma_learnable": True}, r"\[0, 1\)"),
        ({"gamma": 1.0, "normalize": True, "gamma_learnable": True}, "start inside"),
        ({"gamma": [0.5]}, "each of 2 layers"),
        ({"gamma": [0.5, [0.5, 0.5]]}, "each of 4 heads"),
        ({"gamma": [0.5, "high"]}, "numbers"),
        ({"diagonal": "upper"}, "diagonal"),
        ({"layer_types": ["chained_attention"]}, "layer_types"),
        ({"layer_types": ["chained_attention", "sliding_attention"]}, "layer_types"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"head_dim": 7}, "even"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"residual_dropout": 1.0}, "residual_dropout"),
    ],
)
def test_bad_configs(options, message):
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match=message):
        config(**options)


def test_bad_inputs():
    model, ids = causal_lm(), tokens()
    for bad in (40, -1):
        wrong = ids.clone()
        wrong[0, 3] = bad
        with pytest.raises(ValueError, match="input_ids"):
            model(wrong)
    embeds = model.model.embed_tokens(ids).detach()
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits)
    embeds[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(inputs_embeds=embeds)
    with pytest.raises(ValueError, match="exactly one"):
        model()
    with pytest.raises(ValueError, match="at least one token"):
        model(ids[:, :0])
    mask = torch.ones_like(ids)
    mask[1] = 0
    with pytest.raises(ValueError, match="sequence 1 is 0 everywhere"):
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(2, 19))
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(2, 1, 20, 20))
    with pytest.raises(ValueError, match="max_position_embeddings"):
        model(tokens(length=129))
    causal_lm(use_rope=False)(tokens(length=129))


def test_bad_caches():
    model, ids = causal_lm(), tokens()
    with pytest.raises(ValueError, match=r"0 layers.*DynamicCache\(config=model\.config\)"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(TypeError, match="cannot serve chained_attention"):
        model(ids, past_key_values=DynamicCache(config=LlamaConfig(**SIZES)))
    with pytest.raises(TypeError, match="cannot serve chained_attention"):
        model(ids, past_key_values=StaticCache(config=LlamaConfig(**SIZES), max_cache_len=30))
    with pytest.raises(TypeError, match="must be a transformers `Cache`"):
        model(ids, past_key_values=((torch.zeros(1), torch.zeros(1)),))
    with pytest.raises(TypeError, match="cannot serve full_attention"):
        causal_lm(**VARIANTS["mixed"])(ids, past_key_values=DynamicCache(config=config()))
    with pytest.raises(ValueError, match="another model or batch"):
        model(ids[:1], past_key_values=model(ids, use_cache=True).past_key_values)
    for options in ({"num_key_value_heads": 2}, {"head_dim": 16}, {"normalize": True}):
        foreign = causal_lm(**options)(ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="another model"):
            model(ids, past_key_values=foreign)
