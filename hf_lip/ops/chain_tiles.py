# SPDX-License-Identifier: Apache-2.0
"""The two kinds of work of chained attention: rectangles of ordinary attention, and the small triangular solves.

A rectangle is softmax attention of some rows over some earlier columns whose chained values Z are known; it returns
its log-sum-exp, so that rectangles can be added up. None holds more than `PLAIN_ROWS` x `PLAIN_COLUMNS` scores a
head.
"""

import math

import torch
from torch import Tensor


# added to the score of a key that must not be seen: finite, so that a rectangle without any key has no NaN
MASKED = -1e30
# below this, a row's log-sum-exp says that it has seen no key at all
NOTHING_SEEN = -1e29
PLAIN_ROWS, PLAIN_COLUMNS = 256, 1024
# triangular solves below this size go to LAPACK, larger ones are split and joined by a matrix product
SOLVE_SIZE = 32
# what `scaled_dot_product_attention` runs on the CPU; called directly for the log-sum-exp
_fused_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def has_fused_rectangle(query: Tensor, value: Tensor) -> bool:
    """True if torch's fused CPU attention, which returns the log-sum-exp, can do these shapes."""
    return (
        query.device.type == "cpu"
        # not float16, in which MASKED is infinite
        and query.dtype in (torch.float32, torch.float64, torch.bfloat16)
        and query.dtype == value.dtype
        and query.shape[-1] == value.shape[-1]
    )


def rectangle_forward(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Softmax attention without causal mask.

    Args:
        query: (B, H, R, D).
        key, value: (B, H, C, D), C >= 1.
        scaling: factor of the scores.
        mask: None or added to the scores, broadcast from (B, 1, R or 1, C), finite.

    Returns:
        The output (B, H, R, D) and the log-sum-exp of the scores (B, H, R).
    """
    if has_fused_rectangle(query, value):
        if mask is not None:
            # the fused kernels read a mask of another dtype as garbage
            mask = mask.to(query.dtype).expand(-1, -1, query.shape[2], -1)
        return _fused_forward(query, key, value, 0.0, False, attn_mask=mask, scale=scaling)
    outputs, sums = [], []
    for rows, row_mask in _row_tiles(query, mask):
        output = value.new_zeros(*rows.shape[:3], value.shape[-1])
        total = value.new_full(rows.shape[:3], -math.inf)
        for columns in _column_tiles(key):
            scores = _scores(rows, key[:, :, columns], scaling, row_mask, columns)
            tile_sum = scores.logsumexp(-1)
            merge_(output, total, (scores - tile_sum.unsqueeze(-1)).exp() @ value[:, :, columns], tile_sum)
        outputs.append(output)
        sums.append(total)
    return torch.cat(outputs, 2), torch.cat(sums, 2)


def rectangle_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum: Tensor,
    scaling: float,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a rectangle of a larger softmax.

    With A = exp(scores - log_sum), which need not sum to 1 here, and delta = <grad, output> row by row, the gradient
    of the scores is A * (grad value^T - delta), that of the values A^T grad (chacal 2.7).

    Returns:
        The gradients of query, key and value.
    """
    if has_fused_rectangle(query, value):
        if mask is not None:
            # the fused kernels read a mask of another dtype as garbage
            mask = mask.to(query.dtype).expand(-1, -1, query.shape[2], -1)
        return _fused_backward(grad, query, key, value, output, log_sum, 0.0, False, attn_mask=mask, scale=scaling)
    grad_query, grad_key, grad_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    delta = (grad * output).sum(-1, keepdim=True)
    for start in range(0, query.shape[2], PLAIN_ROWS):
        rows = slice(start, start + PLAIN_ROWS)
        row_mask = mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]
        for columns in _column_tiles(key):
            scores = _scores(query[:, :, rows], key[:, :, columns], scaling, row_mask, columns)
            weights = (scores - log_sum[:, :, rows].unsqueeze(-1)).exp()
            grad_value[:, :, columns] += weights.mT @ grad[:, :, rows]
            grad_scores = grad[:, :, rows] @ value[:, :, columns].mT
            grad_scores.sub_(delta[:, :, rows]).mul_(weights).mul_(scaling)
            grad_query[:, :, rows] += grad_scores @ key[:, :, columns]
            grad_key[:, :, columns] += grad_scores.mT @ query[:, :, rows]
    return grad_query, grad_key, grad_value


def merge_(output: Tensor, log_sum: Tensor, other: Tensor, other_sum: Tensor) -> None:
    """Attention over the union of two sets of keys, from each set's output (..., R, D) and log-sum-exp (..., R),
    written into the first two."""
    output.lerp_(other, torch.sigmoid(other_sum - log_sum).unsqueeze(-1))
    torch.logaddexp(log_sum, other_sum, out=log_sum)


def tile_system(tile: Tensor, factor: Tensor, unit: bool) -> Tensor:
    """I - factor * tile as the solves take it: its diagonal is left as it is where they read it as 1 (`unit`)."""
    system = tile * -factor
    if not unit:
        system.diagonal(dim1=-2, dim2=-1).add_(1.0)
    return system


def solve_lower(system: Tensor, rhs: Tensor, unit: bool, out: Tensor) -> None:
    """Write X with (lower part of `system`) X = rhs to `out`, for batches (N, b, b) and (N, b, D).

    Args:
        system: of `tile_system`.
        unit: take the diagonal for 1 (strict).
    """
    size = rhs.shape[1]
    if size <= SOLVE_SIZE:
        # X^T M^T = rhs^T from the right: in this order LAPACK takes row-major memory as it is
        out.copy_(torch.linalg.solve_triangular(system.mT, rhs.mT, upper=True, left=False, unitriangular=unit).mT)
        return
    half = _half(size)
    top, bottom = out[:, :half], out[:, half:]
    solve_lower(system[:, :half, :half], rhs[:, :half], unit, top)
    rest = torch.baddbmm(rhs[:, half:], system[:, half:, :half], top, alpha=-1)
    solve_lower(system[:, half:, half:], rest, unit, bottom)


def solve_upper(system: Tensor, rhs: Tensor, unit: bool, out: Tensor) -> None:
    """As `solve_lower` with the transposed system."""
    size = rhs.shape[1]
    if size <= SOLVE_SIZE:
        out.copy_(torch.linalg.solve_triangular(system, rhs.mT, upper=False, left=False, unitriangular=unit).mT)
        return
    half = _half(size)
    top, bottom = out[:, :half], out[:, half:]
    solve_upper(system[:, half:, half:], rhs[:, half:], unit, bottom)
    rest = torch.baddbmm(rhs[:, :half], system[:, half:, :half].mT, bottom, alpha=-1)
    solve_upper(system[:, :half, :half], rest, unit, top)


def _half(size: int) -> int:
    return SOLVE_SIZE * ((size + 2 * SOLVE_SIZE - 1) // (2 * SOLVE_SIZE))


def _scores(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None, columns: slice) -> Tensor:
    scores = (query @ key.mT).mul_(scaling)
    return scores if mask is None else scores.add_(mask[..., columns])


def _row_tiles(query: Tensor, mask: Tensor | None):
    for start in range(0, query.shape[2], PLAIN_ROWS):
        rows = slice(start, start + PLAIN_ROWS)
        yield query[:, :, rows], mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]


def _column_tiles(key: Tensor):
    for start in range(0, key.shape[2], PLAIN_COLUMNS):
        yield slice(start, start + PLAIN_COLUMNS)
