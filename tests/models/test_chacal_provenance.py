# SPDX-License-Identifier: Apache-2.0
"""Provenance: effective weights and contributions are exact, for every architecture, and point to the root."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

import hf_lip  # noqa: F401, registers the attention function
from hf_lip.data import tracking_dataset
from hf_lip.models.chacal.effective import EffectiveRecorder
from hf_lip.models.chacal.interface import ChainedCache
from hf_lip.models.chacal.provenance import provenance

from .handmade_chains import GAMMA, TASK, handmade_model, written_places
from .test_chacal import causal_lm, config, every_variant, tokens
from .test_chacal_converted import FAMILIES, every_family


ROWS = [19, 7, -8, -1]


def attention_modules(model):
    if hasattr(model, "transformer"):
        return [block.attn for block in model.transformer.h]
    return [layer.self_attn for layer in model.base_model.layers]


def outputs_of(modules, run):
    """What each module returned first while `run` ran."""
    found = {}
    hooks = [
        module.register_forward_hook(lambda module, inputs, output, i=i: found.__setitem__(i, output[0]))
        for i, module in enumerate(modules)
    ]
    run()
    for hook in hooks:
        hook.remove()
    return [found[i] for i in range(len(modules))]


def require_exact(model, ids, mask, atol=2e-5):
    """The summands of every layer add up to its output; weights and contributions are those of the summands."""
    got = provenance(model, ids, mask, positions=ROWS)
    modules = attention_modules(model)
    outputs = outputs_of(modules, lambda: model(ids, attention_mask=mask, use_cache=False))
    assert got.positions == (19, 7, 12, 19)
    for index, (module, output) in enumerate(zip(modules, outputs)):
        weights, values = got.weights(index), got.layers[index].projected_values()
        assert weights.shape == (2, 4, 4, 20)
        parts = torch.einsum("bhrj,bhjw->bhrjw", weights, values)
        bias = getattr(getattr(module, "o_proj", None) or module.c_proj, "bias", None)
        expected = output[:, list(got.positions)] - (0.0 if bias is None else bias)
        torch.testing.assert_close(parts.sum((1, 3)), expected, rtol=0, atol=atol)
        torch.testing.assert_close(got.contributions(index), parts.sum(1).norm(dim=-1), rtol=0, atol=atol)
        torch.testing.assert_close(got.contributions(index, per_head=True), parts.norm(dim=-1), rtol=0, atol=atol)
        # nothing comes from later tokens or from padding
        later = torch.arange(20) > torch.tensor(got.positions)[:, None]
        assert not weights[:, :, later].any()
        if mask is not None:
            assert not weights[0, :, :, :6].any()
    logits = model(ids, attention_mask=mask).logits[:, list(got.positions)]
    torch.testing.assert_close(got.logits, logits)
    share = got.rollout_estimate()
    assert share.shape == (2, 4, 20)
    assert (share >= 0).all()
    torch.testing.assert_close(share.sum(-1), torch.ones(2, 4))


@every_variant
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_the_summands_add_up_to_the_output(options, padded):
    ids, mask = tokens(), torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    require_exact(causal_lm(**options, attention_bias=True), ids, mask if padded else None)


@every_family
@pytest.mark.parametrize("more", [{}, {"chain_diagonal": "keep"}, {"chain_normalize": True}])
@torch.no_grad()
def test_of_converted_models_too(family, more):
    model_class, config_class, _, sizes = family
    model = model_class(config_class(**sizes, chain_gamma=[0.9, [0.5, -0.2, 0.99, 0.0]] if not more else 0.9, **more))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)  # biases are zero at the start
    ids, mask = tokens(), torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    require_exact(model.eval(), ids, mask)


@every_variant
def test_output_effective_weights(options):
    model, ids = causal_lm(**options), tokens()
    assert model(ids).effective_weights is None
    outputs = model(ids, output_effective_weights=[-1, 3])
    assert [weights.shape for weights in outputs.effective_weights] == [(2, 4, 2, 20)] * 2
    expected = provenance(model, ids, positions=[19, 3])
    for index, weights in enumerate(outputs.effective_weights):
        assert torch.equal(weights, expected.weights(index))
        assert not weights.requires_grad
    assert torch.equal(outputs.logits, model(ids).logits)
    base = model.model(ids, output_effective_weights=True)
    for index, weights in enumerate(base.effective_weights):
        assert weights.shape == (2, 4, 20, 20)
        torch.testing.assert_close(weights[:, :, [19, 3]], expected.weights(index), rtol=0, atol=1e-6)
        assert not weights.triu(1).any()
    as_tuple = model(ids, output_effective_weights=[0], return_dict=False, use_cache=False)
    assert [weights.shape for weights in as_tuple[-1]] == [(2, 4, 1, 20)] * 2


def test_packed_sequences_have_nothing_from_each_other():
    model, ids = causal_lm(), tokens(length=20)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    got = provenance(model, ids, position_ids=positions, positions=[7, 19])
    assert not got.weights(0)[:, :, 1, :8].any()
    alone = provenance(model, ids[:, 8:], positions=[11])
    torch.testing.assert_close(got.weights(0)[:, :, 1:, 8:], alone.weights(0), rtol=0, atol=1e-6)


def test_ordinary_layers_have_their_softmax_weights():
    model, ids = causal_lm(layer_types=["full_attention", "chained_attention"]), tokens()
    model.set_attn_implementation("eager")
    expected = model(ids, output_attentions=True).attentions[0]
    got = provenance(model, ids, positions=range(20))
    torch.testing.assert_close(got.weights(0), expected, rtol=0, atol=1e-6)
    assert got.layer_types == ("full_attention", "chained_attention")
    assert got.chained_layers == (1,)


def test_memory_is_that_of_the_rows():
    model, ids = causal_lm(max_position_embeddings=2048), tokens(batch=1, length=1500)
    sizes = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            tensors = result if isinstance(result, tuple) else (result,)
            sizes.extend(t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor))
            return result

    with Recorder():
        got = provenance(model, ids, positions=[-1])
        got.weights(), got.contributions(0)
    # 4 heads of 128 floats a row; an n x n matrix of one head would be 9 MB
    assert max(sizes) <= 1500 * 128 * 4 * 4


def test_embeddings_base_models_and_classifiers():
    model, ids = causal_lm(), tokens()
    got = provenance(model, ids)
    assert torch.equal(got.weights(), provenance(model, inputs_embeds=model.model.embed_tokens(ids)).weights())
    base = provenance(model.model, ids)
    assert base.logits is None
    assert torch.equal(got.weights(), base.weights())
    classifier = AutoModelForSequenceClassification.from_config(config(num_labels=3)).eval()
    assert provenance(classifier, ids).logits is None


def test_bf16():
    model, ids = causal_lm(gamma=0.99), tokens(length=64)
    exact = provenance(model, ids).weights()
    low = provenance(model.bfloat16(), ids)
    assert low.weights().dtype == torch.float32
    assert (low.weights() - exact).abs().max() <= 0.05 * exact.max()
    assert torch.isfinite(low.rollout_estimate()).all()


@pytest.mark.parametrize("diagonal", ["strict", "keep"])
def test_provenance_is_the_chain_and_its_root(diagonal):
    """A model that follows hard pointers: its answers are right, and all of each comes from the root of its chain."""
    model, tokenizer = handmade_model(diagonal=diagonal)
    for row in tracking_dataset(TASK, 12, "test"):
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        answer = model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :]
        assert tokenizer.decode(answer) == f"{row['answer']} <eos>"
        got = provenance(model, ids)
        places = written_places(row["prompt"])
        assert len(places) == row["num_state_changes"] + 1
        # the table of chacal 2.2: every place on the chain by its hops, and the place where chains end
        weights = got.weights(1)[0, 0, 0]
        last = GAMMA ** len(places)
        expected = torch.zeros_like(weights)
        expected[places] = (1 - GAMMA) * GAMMA ** torch.arange(len(places))
        # <bos> reads itself: with `keep` all that is left ends there
        expected[0] = last if diagonal == "keep" else (1 - GAMMA) * last
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)
        # only the root's place holds a value
        contributions = got.contributions(1)[0, 0]
        assert contributions.nonzero().flatten().tolist() == [places[-1]]
        assert tokenizer.convert_ids_to_tokens(ids[0].tolist())[places[-1] - 2] == row["answer"]
        # through both layers: besides the question itself, the root's statement, of which the literal was copied
        question = ids.shape[1] - 1
        share = got.rollout_estimate()[0, 0]
        others = [place for place in share.argsort(descending=True).tolist() if place < question - 2]
        assert set(others[:3]) == {places[-1] - 2, places[-1] - 1, places[-1]}
        assert share[others[3]] < 1e-6


# what is refused


def test_bad_arguments():
    model, ids = causal_lm(), tokens()
    for positions in ([20], [-21], [1.5]):
        with pytest.raises(ValueError, match="positions"):
            provenance(model, ids, positions=positions)
    with pytest.raises(ValueError, match="empty"):
        provenance(model, ids, positions=[])
    with pytest.raises(ValueError, match="input_ids"):
        provenance(model)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        provenance(causal_lm().train(), ids)
    with pytest.raises(ValueError, match=r"`layer` must lie in \[-2, 1\]"):
        provenance(model, ids).weights(2)
    for asked in (3, "all"):
        with pytest.raises(ValueError, match="output_effective_weights"):
            model(ids, output_effective_weights=asked)
    with pytest.raises(ValueError, match="output_effective_weights"):
        model(ids, output_effective_weights=[20])
    with pytest.raises(ValueError, match="0 everywhere"):
        provenance(model, ids, torch.zeros(2, 20))


def test_models_that_cannot_say():
    plain = LlamaForCausalLM(LlamaConfig(**FAMILIES["llama"][3])).eval()
    with pytest.raises(ValueError, match=r"without chained attention.*convert_attention"):
        provenance(plain, tokens())
    plain.set_attn_implementation("chacal")
    plain.config.chain_gamma = 0.9
    assert provenance(plain, tokens()).weights().shape == (2, 4, 1, 20)
    # one layer that does not call the attention function
    plain.model.layers[1].self_attn.config = LlamaConfig(**FAMILIES["llama"][3], attn_implementation="eager")
    with pytest.raises(ValueError, match="of whose 2 layers 1 recorded"):
        provenance(plain, tokens())


def test_an_output_projection_of_another_name():
    model = causal_lm()
    found = provenance(model, tokens())
    attention = found.layers[0].module
    attention.other = attention.o_proj
    del attention.o_proj
    assert found.weights(0).shape == (2, 4, 1, 20)
    with pytest.raises(ValueError, match="ChacalAttention has no o_proj or c_proj"):
        found.contributions(0)


@torch.no_grad()
def test_a_past_is_refused():
    model, ids = causal_lm(), tokens()
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="use_cache=False"):
        model(ids[:, :1], past_key_values=cache, output_effective_weights=[0])
    model_class, config_class, _, sizes = FAMILIES["llama grouped"]
    converted = model_class(config_class(**sizes, chain_gamma=0.9)).eval()
    cache = ChainedCache(converted.config)
    converted(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="use_cache=False"):
        converted(ids[:, :1], past_key_values=cache, effective_recorder=EffectiveRecorder())
