# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels, compiled for GPUs without one: what the interpreter can not tell about them."""

import importlib.util
import os
from types import SimpleNamespace

import pytest
import torch

from hf_lip.ops import chain_triton
from hf_lip.ops.chain_blocked import Layout


pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled"),
]
KERNELS = ("rectangle_kernel", "solve_kernel", "columns_kernel", "solve_backward_kernel", "rows_kernel")
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
# what a program may take of it on the devices with the least, compute capability 8.6
SHARED_MEMORY = 99 * 1024


class Launches(list):
    """Stands where a kernel is launched, and keeps the arguments."""

    def kernel(self, name):
        return {"__getitem__": lambda _, grid: lambda **arguments: self.append((name, arguments))}

    def kernels(self):
        return SimpleNamespace(**{name: type(name, (), self.kernel(name))() for name in KERNELS})


def launches_of(monkeypatch, dtype, size, pasts):
    """Arguments of every launch of both passes, with padding, and packing or a past of some tokens."""
    found = Launches()
    monkeypatch.setattr(chain_triton, "_kernels", found.kernels)
    length = chain_triton.CHUNK + 10
    for past in pasts:
        query, key, value = (torch.zeros(1, 2, length, size, dtype=dtype) for _ in range(3))
        past_key = torch.zeros(1, 2, past, size, dtype=dtype) if past else None
        past_chained = torch.zeros(1, 2, past, size) if past else None
        segments = None if past else torch.zeros(1, length, dtype=torch.int64)
        shared = (past_key, past_chained, Layout(past, torch.zeros(1, past + length), segments), 0.1, True, 128)
        gamma = torch.full((2,), 0.5)
        output, chained, log_sum, tiles = chain_triton.triton_forward(query, key, value, gamma, *shared)
        chain_triton.triton_backward(output, None, query, key, chained, output, log_sum, tiles, gamma, *shared)
    return found


def compiled(launches, capability):
    """Each kernel with each set of types and constants, compiled once: (name, the result)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hf_lip.ops import chain_kernels

    done = set()
    for name, arguments in launches:
        kernel = getattr(chain_kernels, name)
        options = {option: arguments[option] for option in ("num_warps", "num_stages")}
        signature, constants = {}, {}
        for parameter in kernel.params:
            value = arguments[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = TYPES[value.dtype]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        case = (name, *signature.values(), *constants.values())
        if case not in done:
            done.add(case)
            source = ASTSource(kernel, signature=signature, constexprs=constants)
            yield name, triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def check(monkeypatch, dtype, size, capability, pasts):
    names = set()
    for name, result in compiled(launches_of(monkeypatch, dtype, size, pasts), capability):
        names.add(name)
        assert result.asm["cubin"]
        assert result.metadata.shared <= SHARED_MEMORY, name
    assert names == set(KERNELS)


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch, tmp_path):
    # compiled anew each time, and within the time limit: code unrolled too far took minutes
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def test_compiles(monkeypatch):
    check(monkeypatch, torch.bfloat16, 64, 90, pasts=[3])


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("size", [16, 64, chain_triton.LARGEST_HEAD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_compiles_in_all_sizes(monkeypatch, dtype, size, capability):
    check(monkeypatch, dtype, size, capability, pasts=[0, 3])
