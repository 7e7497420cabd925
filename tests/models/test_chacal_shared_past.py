# SPDX-License-Identifier: Apache-2.0
"""Several sequences that continue from one past, each from a beginning of it: as if each had been run by itself."""

import pytest
import torch

from hf_lip.models.chacal.attention import ChainContext
from hf_lip.ops.chain import chained_attention

from .test_chacal import causal_lm, tokens


PAST, LENGTHS, SEEN = 21, (5, 1, 9, 5), (21, 4, 0, 13)


def rows() -> list[slice]:
    ends = torch.tensor(LENGTHS).cumsum(0).tolist()
    return [slice(end - length, end) for end, length in zip(ends, LENGTHS)]


def layout(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which sequence a token belongs to, and how much of the past it sees: (B, n) each."""
    counts = torch.tensor(LENGTHS)
    return tuple(values.repeat_interleave(counts).repeat(batch, 1) for values in (torch.arange(4), torch.tensor(SEEN)))


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"chunk_size": 8}], ids=["", "normalize", "tiles"])
@pytest.mark.parametrize("diagonal", ["strict", "keep"])
def test_equals_one_by_one(diagonal, options):
    torch.manual_seed(0)
    total = PAST + sum(LENGTHS)
    leaves = [torch.randn(2, heads, total, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    gamma = torch.tensor([0.9, 0.5, 0.99, 0.1], dtype=torch.float64, requires_grad=True)
    settings = {"diagonal": diagonal, **options}
    segments, seen = layout(2)
    past = chained_attention(*(tensor[:, :, :PAST] for tensor in leaves), gamma, **settings)
    new = [tensor[:, :, PAST:] for tensor in leaves]
    together = chained_attention(
        *new,
        gamma,
        segment_ids=segments,
        past_key=past.key,
        past_chained=past.chained,
        past_seen=seen,
        **settings,
    ).output
    apart = []
    for part, count in zip(rows(), SEEN):
        columns = [
            torch.cat([tensor[:, :, :count], after[:, :, part]], 2) for tensor, after in zip(leaves, new, strict=True)
        ]
        apart.append(chained_attention(*columns, gamma, **settings).output[:, :, count:])
    separate = torch.cat(apart, 2)
    torch.testing.assert_close(together, separate, rtol=0, atol=1e-11)
    weight = torch.randn_like(together)
    found = [torch.autograd.grad((output * weight).sum(), [*leaves, gamma]) for output in (together, separate)]
    for got, expected in zip(*found):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_in_a_model_with_a_cache(implementation):
    model = causal_lm(layer_types=["chained_attention"] * 2)
    model.set_attn_implementation(implementation)
    eager = implementation == "eager"
    ids = tokens(length=PAST + sum(LENGTHS))
    segments, seen = layout(len(ids))
    order = torch.cat([torch.arange(length) + count for length, count in zip(LENGTHS, SEEN)])
    with torch.no_grad():
        cache = model(ids[:, :PAST]).past_key_values
        together = model(
            ids[:, PAST:],
            position_ids=order.expand(len(ids), -1),
            attention_mask={"chained_attention": ChainContext(PAST, segments=segments, past_seen=seen)},
            past_key_values=cache,
            output_attentions=eager,
        )
        for part, count in zip(rows(), SEEN):
            alone = model(torch.cat([ids[:, :count], ids[:, PAST:][:, part]], 1), output_attentions=eager)
            torch.testing.assert_close(together.logits[:, part], alone.logits[:, count:], rtol=0, atol=1e-5)
            if eager:
                one_hop = together.attentions[0][:, :, part]
                torch.testing.assert_close(one_hop[..., :count], alone.attentions[0][:, :, count:, :count])
                assert torch.allclose(one_hop.sum(-1), torch.ones(()))


def test_refusals():
    query, key, value = (torch.randn(1, 2, 6, 8) for _ in range(3))
    with pytest.raises(ValueError, match="come with a past"):
        chained_attention(query, key, value, 0.5, past_seen=torch.ones(1, 6, dtype=torch.int64))
    past = {"past_key": key, "past_chained": value}
    with pytest.raises(ValueError, match=r"`past_seen` must have shape \(1, 6\)"):
        chained_attention(query, key, value, 0.5, past_seen=torch.ones(1, 5, dtype=torch.int64), **past)
