# SPDX-License-Identifier: Apache-2.0
"""Chained attention as one differentiable operation, eager and in compiled graphs, on the backend of the device.

Eager code runs a `torch.autograd.Function` around the blocked passes. In a compiled graph each pass is an opaque node,
so that its Python loop over blocks is neither traced nor specialised to a length.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chain_blocked import Layout, blocked_backward, blocked_forward
from .chain_triton import triton_backward, triton_forward


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    past_key: Tensor | None,
    past_chained: Tensor | None,
    bias: Tensor | None,
    segments: Tensor | None,
    past_seen: Tensor | None,
    scaling: float,
    strict: bool,
    block: int,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layout = Layout(0 if past_key is None else past_key.shape[2], bias, segments, past_seen)
    run = triton_forward if triton else blocked_forward
    with torch.autocast(query.device.type, enabled=False):
        return run(query, key, value, gamma, past_key, past_chained, layout, scaling, strict, block)


def _backward(
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
    bias: Tensor | None,
    segments: Tensor | None,
    past_seen: Tensor | None,
    scaling: float,
    strict: bool,
    block: int,
    triton: bool,
) -> list[Tensor]:
    layout = Layout(0 if past_key is None else past_key.shape[2], bias, segments, past_seen)
    run = triton_backward if triton else blocked_backward
    with torch.autocast(query.device.type, enabled=False):
        gradients = run(
            grad.contiguous(),
            grad_chained,
            query,
            key,
            chained,
            output,
            log_sum,
            tiles,
            gamma,
            past_key,
            past_chained,
            layout,
            scaling,
            strict,
            block,
        )
    return [gradient for gradient in gradients if gradient is not None]


_forward_node = torch.library.custom_op("hf_lip::chained_attention_forward", _forward, mutates_args=())
_backward_node = torch.library.custom_op("hf_lip::chained_attention_backward", _backward, mutates_args=())


@_forward_node.register_fake
def _(query, key, value, gamma, past_key, past_chained, bias, segments, past_seen, scaling, strict, block, triton):
    batch, heads, length, _ = query.shape
    kept = value.new_empty(value.shape, dtype=gamma.dtype)
    tiles = (0,) if triton else (batch * heads, length, min(block, length))
    log_sum = query.new_empty((batch, heads, length), dtype=gamma.dtype)
    return kept, torch.empty_like(kept), log_sum, query.new_empty(tiles, dtype=gamma.dtype)


@_backward_node.register_fake
def _(grad, grad_chained, query, key, chained, output, log_sum, tiles, gamma, past_key, past_chained, *rest):
    like = [query, key, chained, gamma]
    if past_key is not None:
        like += [past_key, past_chained]
    return [torch.empty(tensor.shape, dtype=gamma.dtype, device=tensor.device) for tensor in like]


class ChainedAttentionFunction(torch.autograd.Function):
    """(query, key, value, gamma, past_key, past_chained, ...) -> O and Z, differentiable in all six; once only."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gamma: Tensor,
        past_key: Tensor | None,
        past_chained: Tensor | None,
        bias: Tensor | None,
        segments: Tensor | None,
        past_seen: Tensor | None,
        scaling: float,
        strict: bool,
        block: int,
        triton: bool,
    ) -> tuple[Tensor, Tensor]:
        run = _forward_node if torch.compiler.is_compiling() else _forward
        output, chained, log_sum, tiles = run(
            query, key, value, gamma, past_key, past_chained, bias, segments, past_seen, scaling, strict, block, triton
        )
        ctx.save_for_backward(
            query, key, chained, output, log_sum, tiles, gamma, past_key, past_chained, bias, segments, past_seen
        )
        ctx.arguments = (scaling, strict, block, triton)
        inputs = (query, key, value, gamma, past_key, past_chained)
        ctx.dtypes = [tensor.dtype for tensor in inputs if tensor is not None]
        ctx.set_materialize_grads(False)
        return output, chained

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_chained: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, chained, output, *rest = ctx.saved_tensors
        if grad is None:
            grad = torch.zeros_like(output)
        run = _backward_node if torch.compiler.is_compiling() else _backward
        gradients = run(grad, grad_chained, query, key, chained, output, *rest, *ctx.arguments)
        gradients = [gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes)]
        return (*gradients, *([None] * (13 - len(gradients))))
