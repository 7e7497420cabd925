# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against the torch path: on a CUDA device where there is one, else in Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from hf_lip.ops import chain_triton
from hf_lip.ops.chain import chained_attention


CUDA = torch.cuda.is_available()
# Triton reads it when it is first imported, which in this process may have happened: hence the process of its own
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA else "cpu"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
runs_kernels = pytest.mark.skipif(not CUDA and not INTERPRETED, reason="run by test_in_the_interpreter")


@pytest.mark.skipif(CUDA or INTERPRETED, reason="the kernels run in this process")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert " passed" in result.stdout


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    # several tiles a chunk, so that short sequences meet every kernel
    monkeypatch.setattr(chain_triton, "CHUNK", 128)


def inputs(length, batch=1, heads=2, size=8, value_size=None, dtype=torch.float32):
    sizes = (size, size, value_size or size)
    return [torch.randn(batch, heads, length, s, dtype=dtype, device=DEVICE) for s in sizes]


def compare(tensors, gamma, weight_dtype=torch.float32, tolerance=2e-5, **options):
    gamma = torch.tensor(gamma, device=DEVICE)
    found = []
    for backend in ("torch", "triton"):
        leaves = [tensor.clone().requires_grad_() for tensor in (*tensors, gamma)]
        result = chained_attention(*leaves, backend=backend, **options)
        torch.manual_seed(5)
        weight = torch.randn(result.output.shape, device=DEVICE, dtype=weight_dtype)
        chained_weight = torch.randn(result.chained.shape, device=DEVICE)
        loss = (result.output * weight).sum() + (result.chained * chained_weight).sum()
        found.append((result.output, result.chained, *torch.autograd.grad(loss, leaves)))
    for expected, got in zip(*found):
        scale = max(float(expected.detach().abs().max()), 1.0)
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * scale)


@runs_kernels
@pytest.mark.parametrize("diagonal", ["strict", "keep"])
@pytest.mark.parametrize("length", [1, 64, 203])
def test_equals_the_torch_path(diagonal, length):
    compare(inputs(length), [0.9, 0.3 if diagonal == "keep" else -0.5], diagonal=diagonal)


@runs_kernels
def test_padding_and_other_value_size():
    mask = torch.ones(2, 150, dtype=torch.bool, device=DEVICE)
    mask[0, :70], mask[1, 140:] = False, False
    compare(inputs(150, batch=2, value_size=20), [0.9, 0.5], key_mask=mask)
    compare(inputs(80, batch=2), [0.9, 0.5], key_mask=mask[:, :80], normalize=True)


@runs_kernels
def test_packed_sequences():
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor([50, 3, 90, 17]))[None].to(DEVICE)
    compare(inputs(160), [0.9, 0.5], segment_ids=ids)


@runs_kernels
@pytest.mark.parametrize("diagonal", ["strict", "keep"])
def test_past(diagonal):
    query, key, value = inputs(190)
    mask = torch.ones(1, 190, dtype=torch.bool, device=DEVICE)
    mask[0, :5] = False
    found = []
    for backend in ("torch", "triton"):
        leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        parts = [[tensor[:, :, rows] for tensor in leaves] for rows in (slice(0, 50), slice(50, 190))]
        options = {"diagonal": diagonal, "backend": backend}
        first = chained_attention(*parts[0], 0.9, key_mask=mask[:, :50], **options)
        second = chained_attention(
            *parts[1], 0.9, key_mask=mask, past_key=first.key, past_chained=first.chained, **options
        )
        output = torch.cat([first.output, second.output], 2)
        found.append((output, *torch.autograd.grad(output.square().sum(), leaves)))
    for expected, got in zip(*found):
        scale = max(float(expected.detach().abs().max()), 1.0)
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * scale)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    if not CUDA and dtype == torch.bfloat16:
        pytest.skip("the interpreter runs on numpy, which has no bfloat16")
    compare(inputs(130, dtype=dtype), [0.9, 0.5], tolerance=3e-2, weight_dtype=dtype)


@runs_kernels
def test_refusals():
    query, key, value = inputs(8)
    with pytest.raises(RuntimeError, match="float64"):
        chained_attention(query.double(), key.double(), value.double(), 0.5, backend="triton")
    wide = inputs(8, size=300)
    with pytest.raises(RuntimeError, match="128 features"):
        chained_attention(*wide, 0.5, backend="triton")


@pytest.mark.skipif(CUDA, reason="needs a machine without CUDA")
def test_needs_cuda_or_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="not on a CUDA device"):
        chained_attention(*inputs(8), 0.5, backend="triton")
