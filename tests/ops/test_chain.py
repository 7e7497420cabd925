# SPDX-License-Identifier: Apache-2.0
"""Chained attention: blocked against naive, gradients, masks, and the acceptance tests 1 to 7 and 9 of chacal 7.7."""

import pytest
import torch
from torch.nn import functional as F

from hf_lip.ops.chain import (
    attention_matrix,
    chain_system,
    chained_attention,
    effective_weights,
    naive_chained_attention,
    visible,
)


DIAGONALS = ("strict", "keep")


def random_inputs(batch=2, heads=3, length=37, size=8, dtype=torch.float64, kv_heads=None, requires_grad=False):
    shapes = (heads, kv_heads or heads, kv_heads or heads)
    return tuple(torch.randn(batch, h, length, size, dtype=dtype, requires_grad=requires_grad) for h in shapes)


def explicit(query, key, value, gamma, diagonal, key_mask=None):
    """(1 - gamma) A (I - gamma A')^-1 V by an explicit inverse, and the operator itself."""
    discounts = torch.as_tensor(gamma, dtype=query.dtype).expand(query.shape[1])
    weights = attention_matrix(query, key, query.shape[-1] ** -0.5, visible(query.shape[2], query.device, key_mask))
    inverse = torch.linalg.inv(chain_system(weights, discounts, diagonal == "strict"))
    operator = (1 - discounts)[:, None, None] * weights @ inverse
    return operator @ value, operator


@pytest.mark.parametrize("length", [1, 5, 64, 257])
def test_gamma_zero_is_softmax_attention(length):
    query, key, value = random_inputs(length=length, dtype=torch.float32)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    for diagonal in DIAGONALS:
        for normalize in (False, True):
            got = chained_attention(query, key, value, 0.0, diagonal=diagonal, normalize=normalize).output
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("diagonal", DIAGONALS)
@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99])
def test_solve_is_the_explicit_inverse(diagonal, gamma):
    query, key, value = random_inputs(length=97, size=16)
    expected, operator = explicit(query, key, value, gamma, diagonal)
    for chunk_size in (8, 32, 64, 97, 128):
        got = chained_attention(query, key, value, gamma, diagonal=diagonal, chunk_size=chunk_size).output
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    naive = naive_chained_attention(query, key, value, gamma, diagonal=diagonal)
    torch.testing.assert_close(naive, expected, rtol=0, atol=1e-12)
    sums = operator.sum(-1)
    if diagonal == "keep":
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-12)
    else:
        torch.testing.assert_close(sums[..., 0], torch.full_like(sums[..., 0], 1 - gamma), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("diagonal", DIAGONALS)
@pytest.mark.parametrize("normalize", [False, True])
def test_steps_equal_the_whole(dtype, diagonal, normalize):
    query, key, value = random_inputs(length=83, dtype=dtype, heads=4, kv_heads=2)
    gamma = torch.tensor([0.0, 0.5, 0.9, 0.99])
    options = {"diagonal": diagonal, "normalize": normalize, "chunk_size": 16}
    whole = chained_attention(query, key, value, gamma, **options)
    outputs, past_key, past_chained = [], None, None
    start = 0
    for count in (50, 7, 7, 7, 1, 1, 1, 2, 7):
        rows = slice(start, start + count)
        part = chained_attention(
            query[:, :, rows],
            key[:, :, rows],
            value[:, :, rows],
            gamma,
            past_key=past_key,
            past_chained=past_chained,
            **options,
        )
        outputs.append(part.output)
        past_key = part.key if past_key is None else torch.cat([past_key, part.key], 2)
        past_chained = part.chained if past_chained is None else torch.cat([past_chained, part.chained], 2)
        start += count
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(torch.cat(outputs, 2), whole.output, rtol=0, atol=tolerance)
    scale = float(whole.chained.abs().max())
    torch.testing.assert_close(past_chained, whole.chained, rtol=0, atol=tolerance * max(scale, 1.0))


@pytest.mark.parametrize("diagonal", DIAGONALS)
def test_causal(diagonal):
    query, key, value = random_inputs(length=70)
    before = chained_attention(query, key, value, 0.9, diagonal=diagonal, chunk_size=16).output
    changed = [tensor.clone() for tensor in (query, key, value)]
    for tensor in changed:
        tensor[:, :, 41] += 1.0
    after = chained_attention(*changed, 0.9, diagonal=diagonal, chunk_size=16).output
    assert torch.equal(before[:, :, :41], after[:, :, :41])
    assert not torch.allclose(before[:, :, 41:], after[:, :, 41:])


@pytest.mark.parametrize("diagonal", DIAGONALS)
@pytest.mark.parametrize("length", [20, 150])
def test_padding_changes_nothing(diagonal, length):
    query, key, value = random_inputs(batch=1, length=length)
    mask = torch.ones(3, length + 70, dtype=torch.long)
    mask[0, :70], mask[1, length:], mask[2, :33], mask[2, length + 33 :] = 0, 0, 0, 0
    starts = [70, 0, 33]
    padded = [torch.randn(3, 3, length + 70, 8, dtype=torch.float64) for _ in range(3)]
    for tensor, source in zip(padded, (query, key, value)):
        for row, start in enumerate(starts):
            tensor[row, :, start : start + length] = source[0]
    leaves = [tensor.requires_grad_() for tensor in padded]
    got = chained_attention(*leaves, 0.9, diagonal=diagonal, key_mask=mask, chunk_size=16).output
    alone = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    expected = chained_attention(*alone, 0.9, diagonal=diagonal).output
    weight = torch.randn_like(expected)
    total = sum((got[row, :, start : start + length] * weight[0]).sum() for row, start in enumerate(starts))
    grads = torch.autograd.grad(total, leaves)
    expected_grads = torch.autograd.grad((expected * weight).sum(), alone)
    for row, start in enumerate(starts):
        inside = slice(start, start + length)
        torch.testing.assert_close(got[row, :, inside], expected[0], rtol=0, atol=1e-12)
        for grad, reference in zip(grads, expected_grads):
            torch.testing.assert_close(grad[row, :, inside], reference[0], rtol=0, atol=1e-11)
            outside = grad[row].clone()
            outside[:, inside] = 0
            assert not outside.any()
    assert not got[0, :, :70].any()  # rows that see no key


def test_padding_in_the_cache():
    query, key, value = random_inputs(batch=2, length=30)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[0, :12] = False
    whole = chained_attention(query, key, value, 0.9, key_mask=mask, chunk_size=8)
    for first in (5, 12, 20):
        past = chained_attention(
            query[:, :, :first], key[:, :, :first], value[:, :, :first], 0.9, key_mask=mask[:, :first]
        )
        keys, chained = past.key, past.chained
        for count in (3, 1):
            rows = slice(first, first + count)
            part = chained_attention(
                query[:, :, rows],
                key[:, :, rows],
                value[:, :, rows],
                0.9,
                key_mask=mask[:, : first + count],
                past_key=keys,
                past_chained=chained,
            )
            torch.testing.assert_close(part.output, whole.output[:, :, rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize("diagonal", DIAGONALS)
def test_packed_sequences(diagonal):
    lengths = (30, 1, 77, 12)
    query, key, value = (tensor.requires_grad_() for tensor in random_inputs(length=sum(lengths)))
    ids = torch.repeat_interleave(torch.tensor([4, 9, 4, 9]), torch.tensor(lengths)).expand(2, -1)
    got = chained_attention(query, key, value, 0.9, diagonal=diagonal, segment_ids=ids, chunk_size=16).output
    parts = zip(*(tensor.split(lengths, 2) for tensor in (query, key, value)))
    expected = torch.cat([chained_attention(*part, 0.9, diagonal=diagonal).output for part in parts], 2)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(got)
    for found, reference in zip(
        torch.autograd.grad(got, (query, key, value), weight),
        torch.autograd.grad(expected, (query, key, value), weight),
    ):
        torch.testing.assert_close(found, reference, rtol=0, atol=1e-11)
    naive = naive_chained_attention(query, key, value, 0.9, diagonal=diagonal, segment_ids=ids)
    torch.testing.assert_close(got, naive, rtol=0, atol=1e-12)


@pytest.mark.parametrize("diagonal", DIAGONALS)
@pytest.mark.parametrize("hops", [1, 2, 5, 10, 20, 50])
@pytest.mark.parametrize("gamma", [0.9, 0.99])
def test_hard_pointer_chain(diagonal, hops, gamma):
    # token t looks at t - 1 only, token 0 at itself: the root's value after `hops` hops (the table of chacal 2.2)
    length = hops + 1
    query = torch.zeros(1, 1, length, length, dtype=torch.float64)
    key = torch.eye(length, dtype=torch.float64)[None, None]
    for token in range(length):
        query[0, 0, token, max(token - 1, 0)] = 1e4
    value = torch.zeros(1, 1, length, 1, dtype=torch.float64)
    value[0, 0, 0] = 1.0
    got = chained_attention(query, key, value, gamma, diagonal=diagonal, scaling=1.0).output[0, 0, -1, 0].item()
    factor = 1 - gamma if diagonal == "strict" else 1.0
    assert got == pytest.approx(factor * gamma ** (hops - 1), rel=1e-9)


@pytest.mark.parametrize("diagonal", DIAGONALS)
def test_bf16_is_near_float32(diagonal):
    query, key, value = random_inputs(batch=1, heads=4, length=512, size=64, dtype=torch.float32)
    exact = chained_attention(query, key, value, 0.9, diagonal=diagonal).output
    low = chained_attention(*(t.bfloat16() for t in (query, key, value)), 0.9, diagonal=diagonal).output
    assert (low.float() - exact).norm() <= 5e-3 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chained_in_float32", [False, True])
@pytest.mark.parametrize("diagonal", DIAGONALS)
@torch.no_grad()
def test_a_step_from_a_cache_of_half_precision(dtype, chained_in_float32, diagonal):
    query, key, value = (tensor.to(dtype) for tensor in random_inputs(length=1, heads=4, size=16))
    past_key, past_chained = (torch.randn(2, 4, 299, 16, dtype=torch.float64).to(dtype) for _ in range(2))
    mask = torch.ones(2, 300, dtype=torch.bool)
    mask[0, :250], mask[1] = False, False
    for key_mask in (None, mask):
        cached = past_chained.float() if chained_in_float32 else past_chained
        options = {"diagonal": diagonal, "key_mask": key_mask}
        got = chained_attention(query, key, value, 0.9, past_key=past_key, past_chained=cached, **options)
        exact = chained_attention(
            *(tensor.double() for tensor in (query, key, value)),
            0.9,
            past_key=past_key.double(),
            past_chained=past_chained.double(),
            **options,
        )
        assert got.output.dtype == dtype
        tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-3
        assert (got.output - exact.output).abs().max() <= tolerance * exact.output.abs().max()
        assert (got.chained - exact.chained).abs().max() <= tolerance * exact.chained.abs().max()
    assert not got.output[1].any()  # sees no key


@pytest.mark.parametrize("diagonal", DIAGONALS)
@pytest.mark.parametrize("normalize", [False, True])
def test_effective_weights_are_the_explicit_operator(diagonal, normalize):
    # grouped heads, more rows than a head has features and than are solved at a time, packed sequences
    query, key, _ = random_inputs(length=97, size=4, heads=4, kv_heads=2)
    ids = torch.repeat_interleave(torch.tensor([1, 2]), torch.tensor([40, 57])).expand(2, -1)
    for segment_ids in (None, ids):
        options = {"diagonal": diagonal, "normalize": normalize, "segment_ids": segment_ids}
        got = effective_weights(query, key, 0.9, list(range(97)), chunk_size=16, **options)
        unit = torch.eye(97, dtype=torch.float64).expand(2, 4, 97, 97)
        expected = naive_chained_attention(query, key.repeat_interleave(2, 1), unit, 0.9, **options)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        few = effective_weights(query, key, 0.9, [96, 3], chunk_size=16, **options)
        torch.testing.assert_close(few, expected[:, :, [96, 3]], rtol=0, atol=1e-12)
    assert effective_weights(query, key, 0.9, []).shape == (2, 4, 0, 97)


@pytest.mark.parametrize("diagonal", DIAGONALS)
@pytest.mark.parametrize("normalize", [False, True])
def test_effective_weights(diagonal, normalize):
    query, key, value = random_inputs(length=75, size=4)
    mask = torch.ones(2, 75, dtype=torch.bool)
    mask[1, :9] = False
    rows = [74, 0, 30, -2, 12, 9]
    options = {"diagonal": diagonal, "normalize": normalize, "key_mask": mask}
    got = effective_weights(query, key, 0.9, rows, chunk_size=16, **options)
    output = chained_attention(query, key, value, 0.9, **options).output
    torch.testing.assert_close(got @ value, output[:, :, rows], rtol=0, atol=1e-12)
    assert got.shape == (2, 3, 6, 75)
    assert not got[1, :, :, :9].any()
    if diagonal == "keep" or normalize:
        sums = got.sum(-1)[0]
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-12)


def test_strict_discount_of_one_and_negative_ones():
    query, key, value = random_inputs(length=50)
    for gamma in (1.0, -0.9):
        got = chained_attention(query, key, value, gamma, normalize=True, chunk_size=16).output
        naive = naive_chained_attention(query, key, value, gamma, normalize=True)
        torch.testing.assert_close(got, naive, rtol=0, atol=1e-12)
        ones = chained_attention(query, key, torch.ones_like(value), gamma, normalize=True).output
        torch.testing.assert_close(ones, torch.ones_like(ones), rtol=0, atol=1e-12)
    expected, _ = explicit(query, key, value, -1.0, "strict")
    torch.testing.assert_close(chained_attention(query, key, value, -1.0).output, expected, rtol=0, atol=1e-12)


def test_no_matrix_of_the_full_length_is_held():
    query, key, value = random_inputs(batch=1, heads=1, length=2048, size=8, dtype=torch.float32, requires_grad=True)
    sizes = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(
                t.untyped_storage().nbytes()
                for t in (result if isinstance(result, tuple) else (result,))
                if isinstance(t, torch.Tensor)
            )
            return result

    with Recorder():
        chained_attention(query, key, value, 0.9).output.sum().backward()
    # the tiles are the largest: 128 floats a row
    assert max(sizes) <= 2048 * 128 * 4
