# SPDX-License-Identifier: Apache-2.0
"""PEFT: adapters on ChaCAL, and what an adapter, a hook or a wrapper does to a certificate."""

import copy
import types

import pytest
import torch
from torch.nn.utils import parametrize, prune
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from hf_lip import verify_checkpoint

from .tiny import chacal, images, lipschitz, pixels, tokens


REFUSED = "not what the model was built with"


def peft():
    return pytest.importorskip("peft")


def train(model, inputs, steps=5, lr=0.01):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize("fields", [{}, {"num_key_value_heads": 2, "diagonal": "keep"}], ids=["mixed", "grouped keep"])
def test_lora_on_chacal(tmp_path, fields):
    lora = peft()
    base, ids = chacal(**fields), tokens(batch=4)
    base.save_pretrained(tmp_path / "base")
    before = base(ids).logits
    model = lora.get_peft_model(
        base, lora.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    )
    # without biases an adapter starts at the model it adapts
    assert torch.equal(model.eval()(ids).logits, before)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    losses = train(model, {"input_ids": ids, "labels": ids}, steps=8, lr=0.03)
    assert losses[-1] < 0.9 * losses[0]
    assert len(frozen) > 10
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    adapted = model(ids).logits
    assert (adapted - before).abs().max() > 0.1
    model.save_pretrained(tmp_path / "adapter")
    loaded = lora.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    assert torch.equal(loaded.eval()(ids).logits, adapted)
    generated = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(
        generated, model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=False)
    )
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, adapted, rtol=0, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(again(ids).logits, merged(ids).logits)


def test_lora_with_gradient_checkpointing_and_trained_gamma():
    lora = peft()
    found = []
    for checkpointing in (False, True):
        model = chacal(gamma_learnable=True, gamma=0.5)
        if checkpointing:
            # the older supported versions of transformers have the older name only
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(
                {"use_reentrant": False}
            )
        torch.manual_seed(0)
        adapted = lora.get_peft_model(
            model, lora.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["gamma"])
        )
        ids = tokens()
        adapted.train()(input_ids=ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in adapted.named_parameters() if p.requires_grad})
    assert any("gamma" in name for name in found[0])
    for name, grad in found[0].items():
        assert grad is not None, name
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-6)


def lora_on_lipschitz(model, **fields):
    lora = peft()
    torch.manual_seed(0)
    config = lora.LoraConfig(r=2, lora_alpha=16, target_modules=[], init_lora_weights=False, **fields)
    return lora.get_peft_model(model, config).eval()


@pytest.mark.parametrize(
    "fields",
    [
        {"target_parameters": ["neck.blocks.0.layer.weight"]},
        {"target_parameters": ["classifier.weight"]},
        {"target_parameters": ["neck.blocks.1.layer.weight"], "modules_to_save": ["classifier"]},
    ],
    ids=["layer", "head", "new head"],
)
@pytest.mark.parametrize("block_type", ["cpl", "sll", "sr"])
def test_an_adapter_voids_the_certificate_until_it_is_merged(tmp_path, block_type, fields):
    model, x = lipschitz(block_type), pixels()
    before = model(x)
    constant = model.certificate.lipschitz_constant
    adapted = lora_on_lipschitz(model, **fields)
    assert model.certificate is None
    logits = adapted(x, output_certified_radius=False).logits
    assert (logits - before.logits).abs().max() > 1e-3
    for refused in (lambda: adapted(x), model.certify, lambda: model.save_pretrained(tmp_path / "adapted")):
        with pytest.raises(ValueError, match=REFUSED):
            refused()
    merged = adapted.merge_and_unload()
    after = merged(x)
    torch.testing.assert_close(after.logits, logits, rtol=1e-4, atol=1e-4)
    # what was certified before is false now
    assert stretch_below_the_constant(merged) > constant
    merged.save_pretrained(tmp_path / "merged")
    verify_checkpoint(tmp_path / "merged")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(loaded(x).certified_radius, after.certified_radius)


def stretch_below_the_constant(model):
    """The largest stretch found by moving pixels along its gradient, checked against the certified constant."""
    constant = model.certify().lipschitz_constant
    x = pixels(8).double()
    y = (x + 0.05 * torch.randn_like(x)).requires_grad_()
    optimizer = torch.optim.Adam([y], lr=0.02)
    reached = 0.0
    for _ in range(30):
        logits = [model.classifier(model.lipschitz_vision(side).pooler_output) for side in (x, y)]
        stretch = (logits[0] - logits[1]).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
        reached = max(reached, stretch.max().item())
        optimizer.zero_grad()
        (-stretch.log().sum()).backward()
        optimizer.step()
    assert reached <= constant * (1 + 1e-9)
    return reached


def test_an_adapter_trains_a_certified_model_and_unloads():
    model, x = lipschitz("sll"), pixels()
    rows = images(16)
    inputs = {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }
    before = model(x)
    adapted = lora_on_lipschitz(model, target_parameters=["neck.blocks.0.layer.weight"])
    losses = train(adapted, inputs, steps=10, lr=0.1)
    assert losses[-1] < losses[0]
    twin = copy.deepcopy(adapted)
    original = adapted.unload()
    assert torch.equal(original(x).certified_radius, before.certified_radius)
    merged = twin.merge_and_unload()
    # merging leaves the divisors of the old weights: certified for what it is, and tightened by freezing again
    loose = merged.certify().feature_constant
    merged.train().eval()
    assert merged.certify().feature_constant <= min(loose, 1.0 + 1e-6)
    stretch_below_the_constant(merged)


class Tenfold(torch.nn.Module):
    def forward(self, weight):
        return 10.0 * weight


def tenfold_forward(model):
    layer = model.lipschitz_vision.neck.blocks[0].layer
    plain = layer.forward
    layer.forward = lambda x: 10.0 * plain(x)


def tenfold_method(model):
    neck = model.lipschitz_vision.neck
    neck.forward = types.MethodType(lambda self, x: 10.0 * type(self).forward(self, x), neck)


def narrower_normalisation(model):
    model.lipschitz_vision.stem.std = [0.1, 0.1]


def pooled_twice(model):
    model.lipschitz_vision.neck.pool = torch.nn.Sequential(model.lipschitz_vision.neck.pool)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.lipschitz_vision.neck.register_forward_hook(lambda module, args, out: 10.0 * out),
        lambda model: model.classifier.register_forward_pre_hook(lambda module, args: (10.0 * args[0],)),
        lambda model: model.register_forward_pre_hook(lambda module, args: (args[0] ** 2,)),
        tenfold_forward,
        tenfold_method,
        narrower_normalisation,
        pooled_twice,
        lambda model: parametrize.register_parametrization(model.classifier, "weight", Tenfold()),
        lambda model: prune.l1_unstructured(model.lipschitz_vision.neck.blocks[0].layer, "weight", 0.3),
        lambda model: model.lipschitz_vision.stages.append(torch.nn.Identity()),
        lambda model: setattr(model.lipschitz_vision.stages[0].blocks[0], "layer", torch.nn.Identity()),
    ],
    ids=[
        "hook",
        "pre-hook",
        "pixel hook",
        "forward",
        "method",
        "settings",
        "wrapped",
        "parametrised",
        "pruned",
        "appended",
        "replaced",
    ],
)
def test_no_change_of_a_module_keeps_the_certificate(change):
    model, x = lipschitz(), pixels()
    model(x)
    change(model)
    assert model.certificate is None
    with pytest.raises(ValueError, match=REFUSED):
        model(x)
    assert model(x, output_certified_radius=False).certified_radius is None


def test_recording_hidden_states_and_removed_hooks_keep_it():
    model, x = lipschitz(), pixels()
    before = model(x)
    certificate = model.certificate
    assert len(model(x, output_hidden_states=True).hidden_states) == 3
    assert model.certificate is certificate
    handle = model.classifier.register_forward_hook(lambda module, args, out: None)
    assert model.certificate is None
    handle.remove()
    assert model.certificate is certificate
    assert torch.equal(model(x).certified_radius, before.certified_radius)


def test_layers_without_an_adapter_class_are_refused_by_peft():
    lora = peft()
    with pytest.raises(ValueError, match="not supported"):
        lora.get_peft_model(lipschitz(), lora.LoraConfig(target_modules=["layer"]))
