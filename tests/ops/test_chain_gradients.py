# SPDX-License-Identifier: Apache-2.0
"""Chained attention: its hand-written backward pass against autograd, eager, under autocast and compiled."""

import pytest
import torch

from hf_lip.ops.chain import chained_attention, naive_chained_attention
from hf_lip.ops.chain_blocked import _shifted_output

from .test_chain import DIAGONALS, random_inputs


@pytest.mark.parametrize("diagonal", DIAGONALS)
@pytest.mark.parametrize("length", [63, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradients_equal_the_naive_ones(diagonal, length, dtype):
    gamma = torch.tensor([0.9, 0.0 if diagonal == "keep" else -0.6], dtype=torch.float64)
    inputs = [t.detach().to(dtype) for t in random_inputs(batch=1, heads=2, length=length)]
    weight = torch.randn(1, 2, length, 8, dtype=torch.float64).to(dtype)

    def run(function, kind, **options):
        leaves = [t.to(kind).requires_grad_() for t in inputs]
        discounts = gamma.to(torch.promote_types(kind, torch.float32)).requires_grad_()
        output = function(*leaves, discounts, diagonal=diagonal, **options)
        output = output.output if hasattr(output, "output") else output
        return output, torch.autograd.grad(output, [*leaves, discounts], weight.to(kind))

    expected, expected_grads = run(naive_chained_attention, torch.float64)
    got, grads = run(chained_attention, dtype, chunk_size=32)
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
    assert got.dtype == dtype
    for found, reference in zip((got, *grads), (expected, *expected_grads)):
        assert (found.double() - reference).abs().max() <= tolerance * reference.abs().max()


@pytest.mark.parametrize("diagonal", DIAGONALS)
@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(diagonal, normalize):
    inputs = random_inputs(batch=1, heads=2, length=11, size=3, requires_grad=True)
    gamma = torch.tensor([0.4, 0.95], dtype=torch.float64, requires_grad=True)

    def run(*tensors):
        return chained_attention(*tensors, diagonal=diagonal, normalize=normalize, chunk_size=4).output

    assert torch.autograd.gradcheck(run, (*inputs, gamma))


@pytest.mark.parametrize("diagonal", DIAGONALS)
def test_gradcheck_with_a_past_and_through_the_cached_values(diagonal):
    query, key, value = random_inputs(batch=1, heads=2, length=9, size=3)
    gamma = torch.tensor([0.4, 0.95], dtype=torch.float64, requires_grad=True)

    def run(query, key, value, gamma):
        first = chained_attention(
            query[:, :, :4], key[:, :, :4], value[:, :, :4], gamma, diagonal=diagonal, chunk_size=3
        )
        second = chained_attention(
            query[:, :, 4:],
            key[:, :, 4:],
            value[:, :, 4:],
            gamma,
            diagonal=diagonal,
            past_key=first.key,
            past_chained=first.chained,
            chunk_size=2,
        )
        return torch.cat([first.output, second.output], 2)

    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    assert torch.autograd.gradcheck(run, (*leaves, gamma))
    whole = chained_attention(query, key, value, gamma, diagonal=diagonal).output
    torch.testing.assert_close(run(query, key, value, gamma), whole, rtol=0, atol=1e-12)


def test_row_sums_are_kept_where_a_row_hands_on_nothing():
    # the fused backward takes row sums as <handed, output>: a row of zeros could not carry its own
    handed, output = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(3, 4, 5, dtype=torch.float64)
    handed[0, 1], handed[1, 2] = 0.0, 0.0
    own = torch.randn(3, 4, dtype=torch.float64)
    own[1, 2] = 0.0
    before, out = handed.clone(), torch.empty_like(output)
    _shifted_output(handed, output, own, out)
    expected = (before * output).sum(-1) - own
    torch.testing.assert_close((handed * out).sum(-1), expected, rtol=1e-12, atol=1e-12)
    assert (handed - before).abs().max() <= 1e-15


def test_values_of_another_size_and_views():
    query, key, _ = random_inputs(length=600)
    value = torch.randn(2, 600, 3, 5, dtype=torch.float64).transpose(1, 2)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    got = chained_attention(*leaves, 0.8).output
    expected = naive_chained_attention(*leaves, 0.8)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(got)
    grads = zip(torch.autograd.grad(got, leaves, weight), torch.autograd.grad(expected, leaves, weight))
    for found, reference in grads:
        torch.testing.assert_close(found, reference, rtol=0, atol=1e-10)


def test_autocast_does_not_lower_the_solve():
    query, key, value = random_inputs(length=90, dtype=torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    expected = chained_attention(*leaves, 0.9).output
    reference = torch.autograd.grad(expected.sum(), leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = chained_attention(*leaves, 0.9).output
        found = torch.autograd.grad(got.sum(), leaves)
    assert torch.equal(got, expected)
    assert all(torch.equal(a, b) for a, b in zip(found, reference))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
def test_compiled_without_graph_breaks(normalize, with_mask):
    query, key, value = (t.requires_grad_() for t in random_inputs(length=70, dtype=torch.float32))
    gamma = torch.tensor([0.2, 0.5, 0.9], requires_grad=True)
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[0, :5] = False

    def run(query, key, value, gamma):
        key_mask = mask if with_mask else None
        return chained_attention(query, key, value, gamma, normalize=normalize, key_mask=key_mask).output

    leaves = (query, key, value, gamma)
    expected = run(*leaves)
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    weight = torch.randn_like(got)
    for found, reference in zip(
        torch.autograd.grad(got, leaves, weight), torch.autograd.grad(expected, leaves, weight)
    ):
        torch.testing.assert_close(found, reference, rtol=0, atol=1e-5)
