# SPDX-License-Identifier: Apache-2.0
"""Chained attention in blocks, forward and backward, on any device: no n x n matrix is ever held.

O = A Z with (I - gamma A') Z = V, where A is causal softmax attention and A' its strictly lower part (`strict`) or A
itself (`keep`). The rows are halved again and again: the weights of the lower half on the upper half form a rectangle
of ordinary attention over values Z that are known by then, and only tiles on the diagonal are solved (chacal 2.6). The
backward pass runs the same list from its end, with the transposed solves (chacal 2.7). Memory is O(n (d + block)).
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .chain_tiles import (
    MASKED,
    NOTHING_SEEN,
    merge_,
    rectangle_backward,
    rectangle_forward,
    solve_lower,
    solve_upper,
    tile_system,
)


# rows whose diagonal tiles are worked on at once
TILE_ROWS = 1024


@dataclass(frozen=True)
class Step:
    """One entry of the schedule: the rows `low` to `high`, and for a rectangle its columns, else None."""

    low: int
    high: int
    columns: tuple[int, int] | None
    first: bool  # nothing was accumulated for these rows before


@dataclass(frozen=True)
class Layout:
    """What a row may see besides the causal order.

    Attributes:
        past: columns before the first row (cached tokens).
        bias: None or (B, past + n), 0 for keys that are seen and `MASKED` for padding.
        segments: None or (B, n), the number of the packed sequence a token belongs to, never decreasing.
        past_seen: None or (B, n), how many of the columns before the first row a token sees.
    """

    past: int
    bias: Tensor | None
    segments: Tensor | None
    past_seen: Tensor | None = None

    def rectangle(self, low: int, high: int, first: int, last: int) -> Tensor | None:
        """Mask of rows low:high over columns first:last, both counted without the past: (B, 1, 1 or rows, columns)."""
        mask = None
        if self.bias is not None:
            mask = self.bias[:, None, None, self.past + first : self.past + last]
        if self.segments is not None:
            other = self.segments[:, low:high, None] != self.segments[:, None, first:last]
            apart = other.unsqueeze(1) * MASKED
            mask = apart if mask is None else torch.minimum(mask, apart)
        return mask

    def tiles(self, low: int, high: int, size: int) -> Tensor | None:
        """Mask of the diagonal tiles of `size` rows in low:high: (B, 1, tiles, 1 or size, size)."""
        mask = None
        if self.bias is not None:
            mask = self.bias[:, self.past + low : self.past + high].unflatten(1, (-1, 1, size)).unsqueeze(1)
        if self.segments is not None:
            numbers = self.segments[:, low:high].unflatten(1, (-1, size))
            apart = (numbers.unsqueeze(-1) != numbers.unsqueeze(-2)).unsqueeze(1) * MASKED
            mask = apart if mask is None else torch.minimum(mask, apart)
        return mask

    def past_mask(self) -> Tensor | None:
        """Mask of all rows over the columns before the first: (B, 1, 1 or n, past)."""
        mask = None if self.bias is None else self.bias[:, None, None, : self.past]
        if self.past_seen is not None:
            columns = torch.arange(self.past, device=self.past_seen.device)
            later = (columns >= self.past_seen[:, None, :, None]) * MASKED
            mask = later if mask is None else torch.minimum(mask, later)
        return mask


@lru_cache(maxsize=256)
def halving_schedule(length: int, block: int) -> tuple[Step, ...]:
    """Tiles and rectangles in an order in which each finds the Z it needs: O(length / block) entries."""
    steps: list[Step] = []

    def visit(low: int, high: int) -> None:
        blocks = -(-(high - low) // block)
        if blocks <= 1:
            steps.append(Step(low, high, None, first=low == 0))
            return
        middle = low + block * ((blocks + 1) // 2)
        visit(low, middle)
        steps.append(Step(middle, high, (low, middle), first=low == 0))
        visit(middle, high)

    visit(0, length)
    return tuple(steps)


def row_schedule(length: int, block: int, starts: list[int]) -> list[Step]:
    """For packed sequences: each block of rows takes all its earlier columns at once, from `starts` on."""
    steps = []
    for index, low in enumerate(range(0, length, block)):
        high, start = min(low + block, length), starts[index]
        if start < low:
            steps.append(Step(low, high, (start, low), first=True))
        steps.append(Step(low, high, None, first=start >= low))
    return steps


def _schedule(length: int, block: int, segments: Tensor | None):
    if segments is None:
        return halving_schedule(length, block)
    # the first column of any sequence that reaches into a block of rows
    new = torch.ones_like(segments, dtype=torch.bool)
    new[:, 1:] = segments[:, 1:] != segments[:, :-1]
    position = torch.arange(length, device=segments.device)
    starts = torch.where(new, position, 0).cummax(1).values.amin(0)[::block]
    return row_schedule(length, block, [start // block * block for start in starts.tolist()])


def _tile_runs(length: int, block: int) -> list[tuple[int, int, int]]:
    """Diagonal tiles that are worked on at once: (low, high, rows of a tile), the shorter last tile by itself."""
    whole = length // block * block
    step = max(TILE_ROWS // block, 1) * block
    runs = [(low, min(low + step, whole), block) for low in range(0, whole, step)]
    return runs if whole == length else [*runs, (whole, length, length - whole)]


def _tile_weights(query: Tensor, key: Tensor, scaling: float, layout: Layout, block: int) -> tuple[Tensor, Tensor]:
    """Softmax inside the diagonal tiles, each row over the columns of its tile: (B H, n, block), and the
    log-sum-exp of the scores (B H, n)."""
    flat, length, _ = query.shape
    weights, log_sum = query.new_empty(flat, length, block), query.new_empty(flat, length)
    causal = torch.full((block, block), -math.inf, dtype=query.dtype, device=query.device).triu_(1)
    for low, high, size in _tile_runs(length, block):
        rows, columns = _as_tiles(query, low, high, size), _as_tiles(key, low, high, size)
        scores = torch.baddbmm(causal[:size, :size], rows, columns.mT, alpha=scaling)
        mask = layout.tiles(low, high, size)
        if mask is not None:
            scores.view(mask.shape[0], -1, mask.shape[2], size, size).add_(mask)
        top = scores.amax(-1, keepdim=True)
        total = scores.sub_(top).exp_().sum(-1, keepdim=True)
        torch.div(_as_rows(scores, flat), _as_rows(total, flat), out=weights[:, low:high, :size])
        log_sum[:, low:high] = total.log_().add_(top).view(flat, -1)
    return weights, log_sum


def _add_tile_gradients(
    grad_query: Tensor,
    grad_key: Tensor,
    query: Tensor,
    key: Tensor,
    chained: Tensor,
    handed: Tensor,
    seen: Tensor,
    skipped: Tensor | None,
    tiles: Tensor,
    scaling: float,
) -> None:
    """Add what the diagonal tiles give to the gradients of query and key; all are (B H, n, .).

    Args:
        skipped: (B H, n), what the gradient of a row's weight on itself has less than others; None for nothing.
    """
    flat, length, _ = query.shape
    delta = torch.linalg.vecdot(handed, seen).unsqueeze(-1)
    for low, high, size in _tile_runs(length, tiles.shape[-1]):
        grad_scores = torch.bmm(_as_tiles(handed, low, high, size), _as_tiles(chained, low, high, size).mT)
        if skipped is not None:
            grad_scores.diagonal(dim1=-2, dim2=-1).sub_(skipped[:, low:high].reshape(-1, size))
        grad_scores.sub_(_as_tiles(delta, low, high, size))
        rows = _as_rows(grad_scores, flat)
        rows.mul_(tiles[:, low:high, :size]).mul_(scaling)
        grad_query[:, low:high] += _as_rows(grad_scores @ _as_tiles(key, low, high, size), flat)
        grad_key[:, low:high] += _as_rows(grad_scores.mT @ _as_tiles(query, low, high, size), flat)


def _own_weights(tiles: Tensor) -> Tensor:
    """The weight of every row on itself (B H, n), from the diagonal tiles (B H, n, block)."""
    row = torch.arange(tiles.shape[1], device=tiles.device)
    return tiles[:, row, row % tiles.shape[2]]


def _as_tiles(tensor: Tensor, low: int, high: int, size: int) -> Tensor:
    """Rows low:high of (B H, n, D) as (B H tiles, size, D)."""
    return tensor[:, low:high].reshape(-1, size, tensor.shape[-1])


def _as_rows(tiles: Tensor, flat: int) -> Tensor:
    return tiles.view(flat, -1, tiles.shape[-1])


def blocked_forward(
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
    """Forward pass.

    Args:
        query, key: (B, H, n, D), value: (B, H, n, E), contiguous, float32 or float64.
        gamma: (H,).
        past_key, past_chained: None, or (B, H, p, D) and (B, H, p, E), p >= 1: keys and Z of earlier tokens.
        layout: padding and packing.
        scaling: factor of the scores.
        strict: leave the diagonal out of the solve.
        block: rows of a tile.

    Returns:
        O (B, H, n, E); Z (B, H, n, E); the log-sum-exp of every row (B, H, n), infinite where a row sees no key; the
        weights of the diagonal tiles (B H, n, block).
    """
    batch, heads, length, _ = query.shape
    output, chained = torch.empty_like(value), torch.empty_like(value)
    log_sum = query.new_empty(batch, heads, length)
    flat_query, flat_key, flat_value, flat_output, flat_chained = (
        tensor.flatten(0, 1) for tensor in (query, key, value, output, chained)
    )
    flat_sum = log_sum.flatten(0, 1)
    factor = gamma.repeat(batch)[:, None, None]
    tiles, tile_sum = _tile_weights(flat_query, flat_key, scaling, layout, min(block, length))
    has_past = past_key is not None
    if past_key is not None and past_chained is not None:
        past_output, past_sum = rectangle_forward(query, past_key, past_chained, scaling, layout.past_mask())
        output.copy_(past_output)
        log_sum.copy_(past_sum)
    for step in _schedule(length, block, layout.segments):
        low, high, fresh = step.low, step.high, step.first and not has_past
        if step.columns is not None:
            first, last = step.columns
            rows, columns = (
                (slice(None), slice(None), slice(low, high)),
                (slice(None), slice(None), slice(first, last)),
            )
            part, part_sum = rectangle_forward(
                query[rows], key[columns], chained[columns], scaling, layout.rectangle(low, high, first, last)
            )
            if fresh:
                output[rows].copy_(part)
                log_sum[rows].copy_(part_sum)
            else:
                merge_(output[rows], log_sum[rows], part, part_sum)
            continue
        tile, total = tiles[:, low:high, : high - low], tile_sum[:, low:high]
        past, row_sum = flat_output[:, low:high], flat_sum[:, low:high]
        if not fresh:
            total = torch.logaddexp(total, row_sum)
        if layout.bias is not None:
            total = total.masked_fill(total < NOTHING_SEEN, math.inf)
        tile.mul_((tile_sum[:, low:high] - total).exp_().unsqueeze(-1))
        if fresh:
            past.zero_()
        else:
            past.mul_(row_sum.sub(total).exp_().unsqueeze(-1))
        row_sum.copy_(total)
        right = torch.addcmul(flat_value[:, low:high], past, factor)
        solved = flat_chained[:, low:high]
        solve_lower(tile_system(tile, factor, strict), right, strict, out=solved)
        # in place on a slice, the product would be done one head at a time
        past.copy_(torch.baddbmm(past, tile, solved))
    return output, chained, log_sum, tiles


def blocked_backward(
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
    """Backward pass.

    With G = dL/dO, U = dL/dV solves (I - gamma A'^T) U = A^T G + dL/dZ from the last row to the first; W = G + gamma U
    is the gradient that a row hands to the values Z it has read; the softmax backward follows (chacal 2.7, without its
    prefactor 1 - gamma).

    Args:
        grad: G (B, H, n, E), contiguous.
        grad_chained: gradient of Z, or None.
        chained, output, log_sum, tiles: as `blocked_forward` returned them. The rest as there.

    Returns:
        The gradients of query, key, value, gamma (H,), past_key and past_chained (None without a past).
    """
    batch, heads, length, _ = query.shape
    grad_query, grad_key = torch.zeros_like(query), torch.zeros_like(key)
    if grad_chained is None:
        grad_value = torch.zeros_like(chained)
    else:
        grad_value = grad_chained.clone(memory_format=torch.contiguous_format)
    handed = torch.empty_like(chained)
    # the output as the softmax backward needs it: <handed, seen> is the row sum of A * dA
    seen = torch.empty_like(output) if strict else output
    # <U_t, Z_t> and the weight a_tt of every row on itself, which the strict solve leaves out
    own = log_sum.new_empty(batch * heads, length) if strict else None
    on_itself = _own_weights(tiles) if strict else None
    flat = tuple(tensor.flatten(0, 1) for tensor in (grad, query, key, chained, output, handed, seen))
    flat_grad, flat_query, flat_key, flat_chained, flat_output, flat_handed, flat_seen = flat
    flat_grad_query, flat_grad_key, flat_grad_value = (
        tensor.flatten(0, 1) for tensor in (grad_query, grad_key, grad_value)
    )
    factor = gamma.repeat(batch)[:, None, None]
    flat_factor = factor[:, :, 0]
    for step in reversed(_schedule(length, block, layout.segments)):
        low, high = step.low, step.high
        if step.columns is not None:
            first, last = step.columns
            rows, columns = (
                (slice(None), slice(None), slice(low, high)),
                (slice(None), slice(None), slice(first, last)),
            )
            parts = rectangle_backward(
                handed[rows],
                query[rows],
                key[columns],
                chained[columns],
                seen[rows],
                log_sum[rows],
                scaling,
                layout.rectangle(low, high, first, last),
            )
            grad_query[rows] += parts[0]
            grad_key[columns] += parts[1]
            grad_value[columns] += parts[2]
            continue
        tile = tiles[:, low:high, : high - low]
        values, row_grad = flat_chained[:, low:high], flat_grad[:, low:high]
        right = torch.baddbmm(flat_grad_value[:, low:high], tile.mT, row_grad)
        solved = flat_grad_value[:, low:high]
        solve_upper(tile_system(tile, factor, strict), right, strict, out=solved)
        row_handed = torch.addcmul(row_grad, solved, factor, out=flat_handed[:, low:high])
        if own is not None and on_itself is not None:
            row_own = torch.linalg.vecdot(solved, values)
            own[:, low:high] = row_own
            row_own.mul_(on_itself[:, low:high]).mul_(flat_factor)
            _shifted_output(row_handed, flat_output[:, low:high], row_own, flat_seen[:, low:high])
    skipped = None if own is None else own * flat_factor
    _add_tile_gradients(
        flat_grad_query,
        flat_grad_key,
        flat_query,
        flat_key,
        flat_chained,
        flat_handed,
        flat_seen,
        skipped,
        tiles,
        scaling,
    )
    grad_past_key = grad_past_chained = None
    if past_key is not None and past_chained is not None:
        part, grad_past_key, grad_past_chained = rectangle_backward(
            handed, query, past_key, past_chained, seen, log_sum, scaling, layout.past_mask()
        )
        grad_query += part
    grad_gamma = torch.linalg.vecdot(grad_value, output).sum((0, 2))
    if own is not None and on_itself is not None:
        # what <U, O> counts of the diagonal
        grad_gamma -= torch.linalg.vecdot(own, on_itself).view(batch, heads).sum(0)
    return grad_query, grad_key, grad_value, grad_gamma, grad_past_key, grad_past_chained


def _shifted_output(handed: Tensor, output: Tensor, own: Tensor, out: Tensor) -> None:
    """Write an `out` with <handed, out> = <handed, output> - own into the last argument.

    A fused attention backward takes its row sums as <gradient, output>; for the strict diagonal they are `own` less.
    """
    own = own.unsqueeze(-1)
    largest = handed.abs().amax(-1, keepdim=True)
    # a row that hands on exactly nothing still needs its row sum: a gradient too small to be seen carries it
    lift = torch.where(largest == 0, own.abs() * 1e-16, 0.0)
    handed[..., :1] += lift
    largest = (largest + lift).clamp_min_(torch.finfo(handed.dtype).tiny)
    unit = handed / largest
    # at least 1, except for rows of zeros, where `own` is zero too
    square = torch.linalg.vecdot(unit, unit).unsqueeze(-1).clamp_min_(1.0)
    scale = own / square.mul_(largest)
    torch.addcmul(output, unit, scale, value=-1, out=out)
