# SPDX-License-Identifier: Apache-2.0
"""Memory of growing caches: the same as joining tensors, whatever was held in between, and written in place."""

import copy
import random

import pytest
import torch
from transformers import DynamicCache

from hf_lip.models.chacal.cache_chacal import ChainedDynamicLayer
from hf_lip.models.chacal.interface import ChainedCacheLayer
from hf_lip.models.chacal.memory_chacal import TokenMemory

from .test_chacal import causal_lm, tokens


def token(length: int = 1, batch: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, 3, length, 4).to(dtype)


@torch.no_grad()
def test_tokens_are_written_where_the_others_are():
    memory = TokenMemory()
    held = memory.extended(None, token(5))
    places = set()
    for _ in range(32):
        held = memory.extended(held, token())
        places.add(held.data_ptr())
    assert held.shape[2] == 37
    assert len(places) == 1
    # all room is used: the next one moves, and nothing is lost
    before = held.clone()
    held = memory.extended(held, token())
    assert held.data_ptr() not in places
    assert torch.equal(held[:, :, :37], before)


@pytest.mark.parametrize("seed", range(5))
@torch.no_grad()
def test_any_state_can_be_gone_back_to(seed):
    """A random walk over states that are cropped, reordered, copied and set again."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    memory = TokenMemory()
    states: list[tuple[torch.Tensor, torch.Tensor]] = []  # as held, and what it must be
    first = token(3)
    states.append((memory.extended(None, first), first.clone()))
    for _ in range(200):
        held, expected = draw.choice(states[-3:]) if draw.random() < 0.3 else states[-1]
        kind = draw.choice(["grow", "grow", "grow", "crop", "reorder", "copy", "several"])
        if kind == "crop" and held.shape[2] > 2:
            held, expected = held[:, :, :-2], expected[:, :, :-2]
        elif kind == "reorder":
            order = torch.tensor([1, 0])
            held, expected = held[order], expected[order]
        elif kind == "copy":
            memory, held = copy.deepcopy((memory, held))
        new = token(draw.choice([2, 40]) if kind == "several" else 1)
        states.append((memory.extended(held, new), torch.cat([expected, new], 2)))
        for found, wanted in states[-6:]:
            assert torch.equal(found, wanted)


def test_what_is_recorded_is_not_written_over():
    memory = TokenMemory()
    first, second = token(3).requires_grad_(), token()
    held = memory.extended(None, first)
    longer = memory.extended(held, second)
    longer.square().sum().backward()
    assert torch.equal(first.grad, 2 * first.detach())
    with torch.no_grad():
        assert torch.equal(memory.extended(longer, second)[:, :, :4], longer)


def test_queries_are_trained_on_a_cache_of_frozen_keys():
    """The keys need no gradient, but autograd keeps those of the past for the gradient of the queries."""
    model, ids = causal_lm(layer_types=["chained_attention"] * 2), tokens()
    model.requires_grad_(False)
    query = model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :9], past_key_values=cache)
    copied = copy.deepcopy(cache)
    gradients = []
    for used in (cache, copied):
        query.grad = None
        loss = model(ids[:, 9:], past_key_values=used).logits.square().sum()
        with torch.no_grad():
            model(ids[:, :1], past_key_values=used)
        loss.backward()
        gradients.append(query.grad.clone())
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


def test_inference_mode_and_outside_of_it():
    memory = TokenMemory()
    with torch.inference_mode():
        held = memory.extended(memory.extended(None, token(3)), token())
    before = held.clone()
    with torch.no_grad():
        assert torch.equal(memory.extended(held, token())[:, :, :4], before)


@torch.no_grad()
def test_another_dtype_is_joined_as_cat_joins_it():
    memory = TokenMemory()
    held = memory.extended(None, token(3, dtype=torch.bfloat16))
    assert memory.extended(held, token()).dtype == torch.float32


@pytest.mark.parametrize("layer", [ChainedDynamicLayer, ChainedCacheLayer])
@torch.no_grad()
def test_resetting_gives_the_memory_back(layer):
    found = layer()
    update = found.update if layer is ChainedDynamicLayer else lambda key, value: found.extended("keys", key)
    if layer is ChainedCacheLayer:
        found.lazy_initialization(token(), token())
    update(token(4), token(4))
    assert found._memory["keys"]._memory is not None
    found.reset()
    assert all(memory._memory is None for memory in found._memory.values())
    assert found.get_seq_length() == 0


def test_decoding_copies_no_token_that_was_cached():
    model, ids = causal_lm(layer_types=["chained_attention"] * 2), tokens()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        places = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
        for _ in range(5):
            model(ids[:, :1], past_key_values=cache)
    assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers] == places
