# SPDX-License-Identifier: Apache-2.0
"""Chained attention by Triton kernels: the blocked passes of `chain_blocked`, for CUDA.

The rows are cut into chunks of `CHUNK`. For each chunk one launch attends to all rows before it, parallel over tiles
of rows, and one solves the chunk, parallel over batch and heads; the backward pass mirrors this. Launches are ordered
by the stream alone: no program waits for another, so nothing can hang. Triton's interpreter runs the same kernels on
the CPU.
"""

import importlib.util
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .chain_blocked import Layout


# rows of a tile on the diagonal; larger ones take minutes to compile, and spill
TILE = 32
CHUNK = 512
# beyond, registers and shared memory do not suffice
LARGEST_HEAD = 128
# (I + N)(I + N^2)... ends when the power of the strictly triangular N reaches the size of the tile
DOUBLINGS = TILE.bit_length() - 1


@cache
def _kernels() -> Any:
    from . import chain_kernels

    return chain_kernels


def can_use_triton(query: Tensor, value: Tensor, past_seen: Tensor | None = None, required: bool = False) -> bool:
    """True on CUDA where Triton is installed, for float32, bfloat16 and float16 and heads of up to 128 features.

    Args:
        query, value: (B, H, n, D) and (B, H, n, E).
        past_seen: as in `chained_attention`; the kernels have no masks by row.
        required: raise instead of returning False; Triton's interpreter (TRITON_INTERPRET=1) then counts as a device.

    Raises:
        RuntimeError: naming what is missing, if `required`.
    """
    reason = None
    if not query.is_cuda and not (required and os.environ.get("TRITON_INTERPRET") == "1"):
        reason = f"the tensors are on {query.device}, not on a CUDA device"
    elif query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reason = f"{query.dtype} is not supported"
    elif max(query.shape[-1], value.shape[-1]) > LARGEST_HEAD:
        reason = f"heads have more than {LARGEST_HEAD} features"
    elif past_seen is not None:
        reason = "`past_seen` is not supported"
    elif importlib.util.find_spec("triton") is None:
        reason = "Triton is not installed (`pip install triton`)"
    if reason is not None and required:
        raise RuntimeError(f"`backend`='triton' cannot be used: {reason}. Use `backend`='torch' or 'auto'.")
    return reason is None


def _power_of_two(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _shared(query: Tensor, value: Tensor, gamma: Tensor, layout: Layout, scaling: float) -> dict[str, Any]:
    """The arguments that the kernels share."""
    length = query.shape[2]
    gamma = gamma.contiguous()
    # a pointer is always passed; without a mask it is never read
    bias = gamma if layout.bias is None else layout.bias.contiguous()
    segments = gamma if layout.segments is None else layout.segments.contiguous()
    exact = query.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return {
        "query": query,
        "gamma": gamma,
        "bias": bias,
        "segments": segments,
        "scaling": scaling,
        "heads": query.shape[1],
        "num_rows": length,
        "HAS_BIAS": layout.bias is not None,
        "HAS_SEGMENTS": layout.segments is not None,
        "D": query.shape[-1],
        "E": value.shape[-1],
        "BLOCK_D": _power_of_two(query.shape[-1]),
        "BLOCK_E": _power_of_two(value.shape[-1]),
        "PRECISION": "tf32x3" if exact else "tf32",
        "bias_width": layout.past + length,
        "num_warps": 4 if max(query.shape[-1], value.shape[-1]) <= 64 else 8,
        "num_stages": 1 if query.dtype == torch.float32 else 2,
    }


def _rectangle_tile(query: Tensor, value: Tensor) -> int:
    """Rows and columns of a tile off the diagonal: as many as shared memory has room for."""
    return 64 if query.dtype != torch.float32 and max(query.shape[-1], value.shape[-1]) <= 64 else 32


def _tiles(length: int, size: int) -> int:
    return -(-length // size)


def _chunks(length: int) -> list[tuple[int, int]]:
    return [(low, min(low + CHUNK, length)) for low in range(0, length, CHUNK)]


def triton_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    past_key: Tensor | None,
    past_chained: Tensor | None,
    layout: Layout,
    scaling: float,
    strict: bool,
    block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `blocked_forward`, in the dtype of the inputs with float32 sums; the tiles are empty, they are recomputed."""
    kernels = _kernels()
    batch, heads, length, _ = query.shape
    programs = batch * heads
    output = torch.empty(value.shape, dtype=torch.float32, device=value.device)
    chained = torch.empty_like(output)
    log_sum = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    common = {**_shared(query, value, gamma, layout, scaling), "output": output, "log_sum": log_sum}
    per_head = {"gamma": common.pop("gamma"), "STRICT": strict, "DOUBLINGS": DOUBLINGS, "TILE": TILE}
    tile = _rectangle_tile(query, value)
    has_past = past_key is not None
    if past_key is not None and past_chained is not None:
        past = past_key.shape[2]
        kernels.rectangle_kernel[(_tiles(length, tile), programs)](
            key=past_key.contiguous(),
            chained=past_chained.contiguous(),
            row_low=0,
            row_high=length,
            num_columns=past,
            column_high=past,
            bias_start=0,
            MERGE=False,
            TILE=tile,
            **{**common, "HAS_SEGMENTS": False},
        )
    for low, high in _chunks(length):
        if low:
            kernels.rectangle_kernel[(_tiles(high - low, tile), programs)](
                key=key,
                chained=chained,
                row_low=low,
                row_high=high,
                num_columns=length,
                column_high=low,
                bias_start=layout.past,
                MERGE=has_past,
                TILE=tile,
                **common,
            )
        kernels.solve_kernel[(programs,)](
            key=key,
            value=value,
            chained=chained,
            row_low=low,
            row_high=high,
            bias_start=layout.past,
            MERGE=has_past or low > 0,
            **per_head,
            **common,
        )
    return output, chained, log_sum, log_sum.new_empty(0)


def triton_backward(
    grad: Tensor,
    grad_chained: Tensor | None,
    query: Tensor,
    key: Tensor,
    chained: Tensor,
    output: Tensor,
    log_sum: Tensor,
    tiles: Tensor,
    gamma: Tensor,
    past_key: Tensor | None,
    past_chained: Tensor | None,
    layout: Layout,
    scaling: float,
    strict: bool,
    block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """As `blocked_backward`, with float32 gradients."""
    kernels = _kernels()
    batch, heads, length, _ = query.shape
    programs, device = batch * heads, query.device
    grad_query, grad_key = (torch.zeros(t.shape, dtype=torch.float32, device=device) for t in (query, key))
    if grad_chained is None:
        grad_value = torch.zeros_like(chained)
    else:
        grad_value = grad_chained.clone(memory_format=torch.contiguous_format)
    handed, delta = torch.empty_like(chained), torch.empty_like(log_sum)
    common = {
        **_shared(query, chained, gamma, layout, scaling),
        "log_sum": log_sum,
        "handed": handed,
        "delta": delta,
    }
    per_head = {"gamma": common.pop("gamma"), "STRICT": strict, "DOUBLINGS": DOUBLINGS, "TILE": TILE}
    tile = _rectangle_tile(query, chained)
    own = {"key": key, "chained": chained, "bias_start": layout.past}
    for low, high in reversed(_chunks(length)):
        kernels.solve_backward_kernel[(programs,)](
            output=output,
            grad=grad,
            grad_query=grad_query,
            grad_key=grad_key,
            grad_chained=grad_value,
            row_low=low,
            row_high=high,
            **per_head,
            **own,
            **common,
        )
        if low:
            kernels.columns_kernel[(_tiles(low, tile), programs)](
                grad_key=grad_key,
                grad_chained=grad_value,
                row_low=low,
                row_high=high,
                num_columns=length,
                column_high=low,
                TILE=tile,
                **own,
                **common,
            )
    # the tile on the diagonal is done: the rows of a program are those of one
    rows_grid = (_tiles(length, TILE), programs)
    kernels.rows_kernel[rows_grid](grad_query=grad_query, num_columns=length, PAST=False, TILE=TILE, **own, **common)
    grad_past_key = grad_past_chained = None
    if past_key is not None and past_chained is not None:
        past = past_key.shape[2]
        cached: dict[str, Any] = {"key": past_key.contiguous(), "chained": past_chained.contiguous(), "bias_start": 0}
        common["HAS_SEGMENTS"] = False
        grad_past_key, grad_past_chained = (
            torch.zeros(cached[name].shape, dtype=torch.float32, device=device) for name in ("key", "chained")
        )
        kernels.columns_kernel[(_tiles(past, tile), programs)](
            grad_key=grad_past_key,
            grad_chained=grad_past_chained,
            row_low=0,
            row_high=length,
            num_columns=past,
            column_high=past,
            TILE=tile,
            **cached,
            **common,
        )
        kernels.rows_kernel[rows_grid](
            grad_query=grad_query, num_columns=past, PAST=True, TILE=TILE, **cached, **common
        )
    grad_gamma = torch.linalg.vecdot(grad_value, output).sum((0, 2))
    if strict:
        scores = torch.linalg.vecdot(query.float(), key.float()) * scaling
        if layout.bias is not None:
            scores = scores + layout.bias[:, None, layout.past :]
        weights = (scores - log_sum).exp()
        grad_gamma -= (weights * torch.linalg.vecdot(grad_value, chained)).sum((0, 2))
    return grad_query, grad_key, grad_value, grad_gamma, grad_past_key, grad_past_chained
