# SPDX-License-Identifier: Apache-2.0
"""Decoding with the chacal family: cached = uncached = static = beams = padded = assisted."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from .test_chacal import VARIANTS, causal_lm, every_variant, fresh_compiler, some_variants, tokens  # noqa: F401


GREEDY = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@every_variant
def test_cached_static_padded_and_uncached_agree(options):
    model, ids = causal_lm(**options), tokens()
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, **GREEDY}
    expected = model.generate(**inputs, use_cache=False)
    assert torch.equal(model.generate(**inputs), expected)
    assert torch.equal(model.generate(**inputs, cache_implementation="static"), expected)
    assert torch.equal(model.generate(**inputs, prefill_chunk_size=7), expected)
    alone = model.generate(ids[:1, 6:], **GREEDY)
    assert torch.equal(alone[0], expected[0, 6:])


@every_variant
def test_beams(options):
    model, ids = causal_lm(**options), tokens()
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "num_beams": 3, "num_return_sequences": 2, **GREEDY}
    expected = model.generate(**inputs, use_cache=False)
    assert torch.equal(model.generate(**inputs), expected)
    assert torch.equal(model.generate(**inputs, cache_implementation="static"), expected)


@every_variant
def test_sampling_with_a_seed(options):
    model, ids = causal_lm(**options), tokens()
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        found.append(model.generate(ids, **{**GREEDY, "do_sample": True, "top_k": 10}, use_cache=use_cache))
    assert torch.equal(*found)


@every_variant
def test_assisted_decoding(options):
    model, ids = causal_lm(**options), tokens(batch=1)
    expected = model.generate(ids, **GREEDY)
    helper = causal_lm(**options)
    for ours, theirs in zip(helper.parameters(), model.parameters()):
        ours.data = theirs.data + 0.03 * torch.randn_like(theirs)  # mostly right, so that some tokens are cropped
    assert torch.equal(model.generate(ids, assistant_model=helper, **GREEDY), expected)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY), expected)


@every_variant
@pytest.mark.parametrize("static", [False, True])
def test_logits_of_every_way_to_cut_a_sequence(options, static):
    model, ids = causal_lm(**options), tokens(length=40)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    expected = model(ids, attention_mask=mask, use_cache=False).logits[:, 4:]
    for cuts in ([40], [25, 7, 1, 1, 6], [1] * 40, [2, 38]):
        cache = StaticCache(config=model.config, max_cache_len=48) if static else DynamicCache(config=model.config)
        logits, start = [], 0
        # the padded sequence must have a token from the first call on
        for count in [6, *cuts] if cuts[0] < 6 else cuts:
            end = min(start + count, 40)
            if start == end:
                break
            with torch.no_grad():
                outputs = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
            logits.append(outputs.logits)
            start = end
        torch.testing.assert_close(torch.cat(logits, 1)[:, 4:], expected, rtol=0, atol=2e-5)


@every_variant
def test_cache_can_be_cropped_copied_and_reordered(options):
    model, ids = causal_lm(**options), tokens(length=30)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, -1]
        cache = model(ids[:, :20], use_cache=True).past_key_values
        kept = copy.deepcopy(cache)
        model(tokens(length=9), past_key_values=cache)
        cache.crop(-9)
        got = model(ids[:, 20:], past_key_values=cache).logits[:, -1]
        kept.reorder_cache(torch.tensor([1, 0]))
        swapped = model(ids.flip(0)[:, 20:], past_key_values=kept).logits[:, -1]
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(swapped.flip(0), expected, rtol=0, atol=2e-5)


@some_variants
def test_compiled_static_step(options):
    model, ids = causal_lm(**options), tokens(length=23)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        model(ids[:, :20], attention_mask=mask[:, :20], past_key_values=cache)
        for start, end in ((20, 21), (21, 22), (22, 23)):
            inputs = model.prepare_inputs_for_generation(
                ids[:, start:end], past_key_values=cache, attention_mask=mask[:, :end], use_cache=True
            )
            got = compiled(**inputs, position_ids=torch.arange(start, end)[None]).logits
            torch.testing.assert_close(got, expected[:, start:end], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["strict", "keep", "normalize"])
def test_bf16_cache(name):
    model, ids = causal_lm(**VARIANTS[name]).bfloat16(), tokens(length=40)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, 20:].float()
        cache = model(ids[:, :20], use_cache=True).past_key_values
        got = [model(ids[:, t : t + 1], past_key_values=cache).logits.float() for t in range(20, 40)]
    assert cache.layers[0].keys.dtype == torch.bfloat16
    assert cache.layers[0].values.dtype == (torch.float32 if name == "keep" else torch.bfloat16)
    assert (torch.cat(got, 1) - expected).norm() <= 0.03 * expected.norm()


def test_gradients_flow_through_the_cache():
    model, ids = causal_lm(), tokens(length=24)
    grads = []
    for cut in (24, 13):
        model.zero_grad()
        cache = DynamicCache(config=model.config)
        logits = [
            model(part, past_key_values=cache, use_cache=True).logits
            for part in ids.split([cut, 24 - cut], 1)
            if part.shape[1]
        ]
        torch.cat(logits, 1).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for whole, cut in zip(*grads):
        torch.testing.assert_close(cut, whole, rtol=1e-3, atol=1e-6)
