# SPDX-License-Identifier: Apache-2.0
"""Trained discounts of converted Llama (with and without grouped heads), Qwen2 and GPT-2, and with `keep`."""

import itertools
import logging

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_lip import ChacalConfig, ChacalForCausalLM, ChacalLlamaConfig, ChacalLlamaForCausalLM, GammaSchedule
from hf_lip.models.chacal.convert import convert_attention
from hf_lip.models.chacal.gamma_chacal import ChacalGamma
from hf_lip.models.chacal.provenance import provenance

from .test_chacal_converted import FAMILIES, GREEDY, GROUPED, SIZES, every_family, every_variant, padded, tokens


SPREAD = [0.5, [0.9, 0.0, 0.3, 0.7]]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


@pytest.fixture
def warnings_of_transformers(monkeypatch):
    """Messages at warning level and above, which the library does not hand on to the root logger."""
    found = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def learnable(family, gamma=0.0, **options):
    model_class, config_class, _, sizes = family
    return model_class(config_class(**sizes, chain_gamma=gamma, chain_gamma_learnable=True, **options))


def gammas(model):
    return {name: p for name, p in model.named_parameters() if name.endswith(".gamma.weight")}


def moved(model):
    """The model in evaluation mode, each head with another discount than it started with."""
    with torch.no_grad():
        for index, parameter in enumerate(gammas(model).values()):
            parameter += torch.linspace(0.1, 0.6, len(parameter)) + 0.1 * index
    return model.eval()


@every_family
@every_variant
def test_ordinary_checkpoints_start_at_zero_with_their_logits_and_a_gradient(
    tmp_path, family, options, warnings_of_transformers
):
    model_class, config_class, plain_config, sizes = family
    plain = AutoModelForCausalLM.from_config(plain_config(**sizes)).eval()
    plain.save_pretrained(tmp_path)
    config = config_class(**sizes, chain_gamma_learnable=True, **options)
    model, report = model_class.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not [text for text in warnings_of_transformers if "gamma" in text or "initialized" in text]
    assert model.get_gamma() == [[0.0] * 4] * 2
    ids, mask = padded()
    expected = plain(ids, attention_mask=mask).logits[mask.bool()]
    outputs = model(ids, attention_mask=mask, labels=ids)
    scale = max(expected.abs().max().item(), 1.0)
    torch.testing.assert_close(outputs.logits[mask.bool()], expected, rtol=0, atol=2e-6 * scale)
    fixed = model_class.from_pretrained(tmp_path, config=config_class(**sizes, chain_gamma=0.0, **options))
    assert torch.equal(outputs.logits, fixed(ids, attention_mask=mask).logits)
    assert len(gammas(model)) == 2
    outputs.loss.backward(retain_graph=True)
    down = torch.stack([p.grad.clone() for p in gammas(model).values()])
    model.zero_grad()
    (-outputs.loss).backward()
    up = torch.stack([p.grad for p in gammas(model).values()])
    if options.get("chain_diagonal") == "keep":
        # a gradient that leads out of the range is left out, the opposite one is there
        assert ((up < 0) ^ (down < 0)).all()
        assert torch.equal(torch.minimum(up, down), up + down)
    else:
        assert (down != 0).all()
        torch.testing.assert_close(up, -down)


@every_family
@every_variant
def test_they_start_where_the_config_says(family, options):
    model = learnable(family, gamma=SPREAD, **options)
    expected = torch.tensor([[0.5] * 4, SPREAD[1]])
    torch.testing.assert_close(torch.tensor(model.get_gamma()), expected, rtol=1e-6, atol=0)
    model_class, config_class, _, sizes = family
    fixed = model_class(config_class(**sizes, chain_gamma=SPREAD, **options))
    fixed.load_state_dict({name: p for name, p in model.state_dict().items() if ".gamma." not in name})
    ids = tokens()
    torch.testing.assert_close(model.eval()(ids).logits, fixed.eval()(ids).logits, rtol=0, atol=1e-5)
    # ... and when it is built elsewhere first
    with torch.device("meta"):
        empty = model_class(model.config)
    empty.to_empty(device="cpu")
    empty.init_weights()
    assert empty.get_gamma() == model.get_gamma()


def test_a_negative_start():
    model = learnable(FAMILIES["llama"], gamma=[-0.6, 0.0])
    torch.testing.assert_close(torch.tensor(model.get_gamma()[0]), torch.full((4,), -0.6))


@pytest.mark.parametrize("sizes", [SIZES, GROUPED], ids=["equal", "grouped"])
@pytest.mark.parametrize("diagonal", ["strict", "keep"])
def test_values_and_gradients_are_those_of_the_chacal_model(sizes, diagonal):
    model = ChacalLlamaForCausalLM(
        ChacalLlamaConfig(**sizes, chain_gamma=SPREAD, chain_gamma_learnable=True, chain_diagonal=diagonal)
    )
    own = ChacalForCausalLM(ChacalConfig(**sizes, gamma_learnable=True, diagonal=diagonal))
    own.load_state_dict(model.state_dict())
    ids, mask = padded()
    for each in (model, own):
        each(ids, attention_mask=mask, labels=ids).loss.backward()
    for name, parameter in own.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-6)


@every_family
def test_trained_discounts_are_saved(tmp_path, family):
    model, ids = learnable(family).train(), tokens(batch=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    assert all(value != 0 for layer in model.get_gamma() for value in layer)
    model.eval().save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {name for name in list(file.keys()) if "gamma" in name} == set(gammas(model))
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(loaded) is type(model)
    assert loaded.get_gamma() == model.get_gamma()
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_fixed_checkpoint_can_be_trained_on(tmp_path):
    model_class, config_class, _, sizes = FAMILIES["gpt2"]
    model = model_class(config_class(**sizes, chain_gamma=[0.2, [0.9, 0.0, -0.3, 0.7]]))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, chain_gamma_learnable=True)
    torch.testing.assert_close(torch.tensor(loaded.get_gamma()), torch.tensor(model.get_gamma()))
    assert len(gammas(loaded)) == 2


@every_family
def test_gradient_checkpointing_changes_nothing(family):
    ids, found = tokens(), []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = moved(learnable(family)).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model(ids, labels=ids, use_cache=False).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-6)


# tracing transformers takes seconds: the rest with -m slow
@pytest.mark.parametrize(
    ("name", "diagonal", "trained"),
    [
        pytest.param(*case, marks=() if case == ("llama grouped", "keep", True) else pytest.mark.slow)
        for case in itertools.product(FAMILIES, ("strict", "keep"), (False, True))
    ],
)
def test_compiles_in_one_graph(name, diagonal, trained):
    model_class, config_class, _, sizes = FAMILIES[name]
    options = {"chain_gamma": 0.0 if trained else 0.7, "chain_gamma_learnable": trained, "chain_diagonal": diagonal}
    model = model_class(config_class(**sizes, **options)).eval()
    ids, mask = padded()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = compiled(ids, attention_mask=mask, labels=ids, use_cache=False)
    outputs.loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected = model(ids, attention_mask=mask, labels=ids, use_cache=False)
    expected.loss.backward()
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=0, atol=1e-5)
    for parameter, p in model.named_parameters():
        torch.testing.assert_close(got[parameter], p.grad, rtol=1e-4, atol=1e-6)


@every_family
@every_variant
def test_cached_static_padded_beam_and_uncached_generation_agree(family, options):
    model = moved(learnable(family, **options))
    ids, mask = padded()
    for more in ({}, {"num_beams": 3}):
        inputs = {"input_ids": ids, "attention_mask": mask, **GREEDY, **more}
        expected = model.generate(**inputs, use_cache=False)
        assert torch.equal(model.generate(**inputs), expected)
        assert torch.equal(model.generate(**inputs, cache_implementation="static"), expected)


@every_family
def test_provenance_reads_them(family):
    model, ids = moved(learnable(family)), tokens()
    model_class, config_class, _, sizes = family
    fixed = model_class(config_class(**sizes, chain_gamma=model.get_gamma())).eval()
    fixed.load_state_dict({name: p for name, p in model.state_dict().items() if ".gamma." not in name})
    got, expected = provenance(model, ids), provenance(fixed, ids)
    for layer in range(2):
        torch.testing.assert_close(got.layer(layer).gamma, torch.tensor(model.get_gamma()[layer]))
        torch.testing.assert_close(got.weights(layer), expected.weights(layer), rtol=0, atol=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_they_can_be_set_and_scheduled(tmp_path, trained):
    model_class, config_class, _, sizes = FAMILIES["llama"]
    model, ids = model_class(config_class(**sizes, chain_gamma_learnable=trained)).eval(), tokens()
    before = model(ids).logits
    schedule = GammaSchedule(model, SPREAD, num_steps=2)
    for expected in ([[0.25] * 4, [0.45, 0.0, 0.15, 0.35]], [[0.5] * 4, SPREAD[1]]):
        schedule.step()
        torch.testing.assert_close(torch.tensor(model.get_gamma()), torch.tensor(expected))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_gamma() == model.get_gamma()
    for bad in (1.0, [0.5], [[0.5] * 3, 0.5], float("nan"), *([-1.0] if trained else [])):
        with pytest.raises(ValueError, match="chain_gamma"):
            model.set_gamma(bad)
    assert model.get_gamma() == loaded.get_gamma()
    model.set_gamma(0.0)
    assert torch.equal(model(ids).logits, before)


def test_keep_leaves_zero_upwards_only():
    gamma = ChacalGamma([0.0, 0.0, 0.3], True, "keep")
    gamma.reset_parameters()
    optimizer = torch.optim.SGD(gamma.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        values, prefactor = gamma(torch.device("cpu"))
        assert torch.equal(prefactor.flatten(), 1 - values)
        (values * torch.tensor([1.0, -1.0, 1.0])).sum().backward()
        optimizer.step()
    values = gamma(torch.device("cpu"))[0].tolist()
    assert values[0] == 0.0
    assert values[1] > 0.25
    assert 0.0 < values[2] < 0.1
    with torch.no_grad():
        gamma.weight += torch.tensor([-50.0, 50.0, 0.0])
    assert gamma(torch.device("cpu"))[0][:2].tolist() == [0.0, 1.0 - 2.0**-24]


def test_bad_settings(tmp_path):
    for gamma in (-1.0, [0.0, [0.0, 0.0, 0.0, -1.0]]):
        with pytest.raises(ValueError, match=r"`chain_gamma` must start inside \(-1, 1\)"):
            ChacalLlamaConfig(**SIZES, chain_gamma=gamma, chain_gamma_learnable=True)
    ChacalLlamaForCausalLM(ChacalLlamaConfig(**SIZES, chain_gamma=-1.0)).save_pretrained(tmp_path / "fixed")
    with pytest.raises(ValueError, match="must start inside"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "fixed", chain_gamma_learnable=True)
    model = LlamaForCausalLM._from_config(LlamaConfig(**SIZES), attn_implementation="chacal")
    model.config.chain_gamma, model.config.chain_gamma_learnable = 0.0, True
    with pytest.raises(ValueError, match="LlamaAttention has no discounts to train: use ChacalLlamaForCausalLM"):
        model(tokens())


@every_family
def test_convert_attention(tmp_path, family):
    _, _, plain_config, sizes = family
    plain = AutoModelForCausalLM.from_config(plain_config(**sizes)).bfloat16()
    plain.save_pretrained(tmp_path / "plain")
    report = convert_attention(tmp_path / "plain", tmp_path / "out", gamma_learnable=True)
    assert report.largest_difference <= 2e-6 * max(report.largest_logit, 1.0)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert loaded.config.chain_gamma_learnable
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        for name in gammas(loaded):
            assert file.get_tensor(name).tolist() == [0.0] * 4
    assert len(gammas(loaded)) == 2
