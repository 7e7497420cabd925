# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of chained attention. Imported by `chain_triton` only, and only where Triton is installed.

All tensors are contiguous, (B H, tokens, features). Scores are kept in float32 whatever the inputs are; tile solves
are products (I + N)(I + N^2)(I + N^4)..., exact because N is strictly triangular (chacal 2.6), in full float32.
"""

import triton
import triton.language as tl


NOTHING_SEEN = tl.constexpr(-1e29)
MASKED = tl.constexpr(-1e30)


@triton.jit
def _load(pointer, head, rows, num_rows, features, SIZE: tl.constexpr):
    """Rows of one head, zero beyond the last row and the last feature."""
    offsets = (head * num_rows + rows)[:, None] * SIZE + features[None, :]
    return tl.load(pointer + offsets, mask=(rows < num_rows)[:, None] & (features < SIZE)[None, :], other=0.0)


@triton.jit
def _store(pointer, values, head, rows, num_rows, features, SIZE: tl.constexpr):
    offsets = (head * num_rows + rows)[:, None] * SIZE + features[None, :]
    tl.store(pointer + offsets, values, mask=(rows < num_rows)[:, None] & (features < SIZE)[None, :])


@triton.jit
def _scores(
    query,
    key,
    scaling,
    rows,
    columns,
    bias,
    segments,
    batch,
    num_rows,
    bias_width,
    bias_start,
    HAS_BIAS: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scaling
    if HAS_BIAS:
        place = bias_start + columns
        scores += tl.load(bias + batch * bias_width + place, mask=place < bias_width, other=0.0)[None, :]
    if HAS_SEGMENTS:
        row_segment = tl.load(segments + batch * num_rows + rows, mask=rows < num_rows, other=0)
        column_segment = tl.load(segments + batch * num_rows + columns, mask=columns < num_rows, other=0)
        scores += tl.where(row_segment[:, None] == column_segment[None, :], 0.0, MASKED)
    return scores


@triton.jit
def _online(scores, values, top, total, sums, PRECISION: tl.constexpr):
    """One step of the online softmax: running maximum, denominator and numerator."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp(scores - new_top[:, None])
    shrink = tl.exp(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    return new_top, total, sums * shrink[:, None] + tl.dot(weights, values, input_precision=PRECISION)


@triton.jit
def _neumann(strict_part, right, DOUBLINGS: tl.constexpr):
    # not unrolled: it would take minutes to compile
    for _ in range(DOUBLINGS):
        right += tl.dot(strict_part, right, input_precision="tf32x3")
        strict_part = tl.dot(strict_part, strict_part, input_precision="tf32x3")
    return right


@triton.jit
def rectangle_kernel(
    query, key, chained, output, log_sum, bias, segments, scaling, heads, num_rows, row_low, row_high, num_columns,
    column_high, bias_width, bias_start,
    MERGE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEGMENTS: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    TILE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of the rows row_low:row_high over the columns 0:column_high, added to what `output` holds if MERGE."""
    head = tl.program_id(1).to(tl.int64)
    rows = row_low + tl.program_id(0) * TILE + tl.arange(0, TILE)
    feature_d, feature_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    row_query = _load(query, head, rows, num_rows, feature_d, D)
    if MERGE:
        top = tl.load(log_sum + head * num_rows + rows, mask=rows < num_rows, other=0.0)
        total = tl.full((TILE,), 1.0, tl.float32)
        sums = _load(output, head, rows, num_rows, feature_e, E)
    else:
        top = tl.full((TILE,), float("-inf"), tl.float32)
        total = tl.zeros((TILE,), tl.float32)
        sums = tl.zeros((TILE, BLOCK_E), tl.float32)
    for start in range(0, column_high, TILE):
        columns = start + tl.arange(0, TILE)
        scores = _scores(
            row_query, _load(key, head, columns, num_columns, feature_d, D), scaling, rows, columns, bias, segments,
            head // heads, num_rows, bias_width, bias_start, HAS_BIAS, HAS_SEGMENTS, PRECISION,
        )  # fmt: skip
        scores = tl.where((columns < column_high)[None, :], scores, float("-inf"))
        values = _load(chained, head, columns, num_columns, feature_e, E)
        top, total, sums = _online(scores, values, top, total, sums, PRECISION)
    kept = (rows < row_high)[:, None] & (feature_e < E)[None, :]
    tl.store(output + (head * num_rows + rows)[:, None] * E + feature_e[None, :], sums / total[:, None], mask=kept)
    tl.store(log_sum + head * num_rows + rows, top + tl.log(total), mask=rows < row_high)


@triton.jit
def solve_kernel(
    query, key, value, chained, output, log_sum, gamma, bias, segments, scaling, heads, num_rows, row_low, row_high,
    bias_width, bias_start,
    MERGE: tl.constexpr, STRICT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEGMENTS: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr, TILE: tl.constexpr, DOUBLINGS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Z, O and log-sum-exp of the rows row_low:row_high of one head, tile after tile, joined to `output` if MERGE."""
    head = tl.program_id(0).to(tl.int64)
    batch = head // heads
    discount = tl.load(gamma + head % heads)
    local = tl.arange(0, TILE)
    feature_d, feature_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    for start in range(row_low, row_high, TILE):
        rows = start + local
        row_query = _load(query, head, rows, num_rows, feature_d, D)
        if MERGE:
            top = tl.load(log_sum + head * num_rows + rows, mask=rows < num_rows, other=0.0)
            total = tl.full((TILE,), 1.0, tl.float32)
            sums = _load(output, head, rows, num_rows, feature_e, E)
        else:
            top = tl.full((TILE,), float("-inf"), tl.float32)
            total = tl.zeros((TILE,), tl.float32)
            sums = tl.zeros((TILE, BLOCK_E), tl.float32)
        for before in range(row_low, start, TILE):
            columns = before + local
            scores = _scores(
                row_query, _load(key, head, columns, num_rows, feature_d, D), scaling, rows, columns, bias, segments,
                batch, num_rows, bias_width, bias_start, HAS_BIAS, HAS_SEGMENTS, PRECISION,
            )  # fmt: skip
            values = _load(chained, head, columns, num_rows, feature_e, E)
            top, total, sums = _online(scores, values, top, total, sums, PRECISION)
        scores = _scores(
            row_query, _load(key, head, rows, num_rows, feature_d, D), scaling, rows, rows, bias, segments, batch,
            num_rows, bias_width, bias_start, HAS_BIAS, HAS_SEGMENTS, PRECISION,
        )  # fmt: skip
        scores = tl.where(local[:, None] >= local[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        whole = total * tl.exp(top - new_top) + tl.sum(tl.exp(scores - new_top[:, None]), 1)
        row_sum = new_top + tl.log(whole)
        row_sum = tl.where(row_sum < NOTHING_SEEN, float("inf"), row_sum)
        weights = tl.exp(scores - row_sum[:, None])
        past = sums * tl.exp(top - row_sum)[:, None]
        right = _load(value, head, rows, num_rows, feature_e, E).to(tl.float32) + discount * past
        inner = discount * tl.where(local[:, None] > local[None, :], weights, 0.0)
        if not STRICT:
            own = tl.sum(tl.where(local[:, None] == local[None, :], weights, 0.0), 1)
            factor = 1.0 / (1.0 - discount * own)
            right *= factor[:, None]
            inner *= factor[:, None]
        solved = _neumann(inner, right, DOUBLINGS)
        _store(chained, solved, head, rows, num_rows, feature_e, E)
        result = past + tl.dot(weights, solved, input_precision="tf32x3")
        _store(output, result, head, rows, num_rows, feature_e, E)
        tl.store(log_sum + head * num_rows + rows, row_sum, mask=rows < num_rows)
        # the next tile reads the Z that other threads of this program have written
        tl.debug_barrier()


@triton.jit
def _hand_back(
    row_query, row_handed, row_sum, delta, key, values, grad_key, grad_values, scores, scaling, PRECISION: tl.constexpr
):  # fmt: skip
    """Gradients that a tile of later rows hands to a tile of keys and values Z."""
    weights = tl.exp(scores - row_sum[:, None])
    grad_values += tl.dot(tl.trans(weights), row_handed, input_precision=PRECISION)
    grad_scores = tl.dot(row_handed, tl.trans(values), input_precision=PRECISION) - delta[:, None]
    grad_scores *= weights * scaling
    grad_key += tl.dot(tl.trans(grad_scores), row_query.to(tl.float32), input_precision=PRECISION)
    return grad_key, grad_values


@triton.jit
def columns_kernel(
    query, key, chained, handed, log_sum, delta, grad_key, grad_chained, bias, segments, scaling, heads, num_rows,
    row_low, row_high, num_columns, column_high, bias_width, bias_start,
    HAS_BIAS: tl.constexpr, HAS_SEGMENTS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, TILE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the rows row_low:row_high hand to one tile of the columns 0:column_high, added to its gradients."""
    head = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * TILE + tl.arange(0, TILE)
    feature_d, feature_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    column_key = _load(key, head, columns, num_columns, feature_d, D)
    values = _load(chained, head, columns, num_columns, feature_e, E)
    sum_key = _load(grad_key, head, columns, num_columns, feature_d, D)
    sum_values = _load(grad_chained, head, columns, num_columns, feature_e, E)
    for start in range(row_low, row_high, TILE):
        rows = start + tl.arange(0, TILE)
        row_query = _load(query, head, rows, num_rows, feature_d, D)
        scores = _scores(
            row_query, column_key, scaling, rows, columns, bias, segments, head // heads, num_rows, bias_width,
            bias_start, HAS_BIAS, HAS_SEGMENTS, PRECISION,
        )  # fmt: skip
        row_sum = tl.load(log_sum + head * num_rows + rows, mask=rows < row_high, other=float("inf"))
        row_delta = tl.load(delta + head * num_rows + rows, mask=rows < row_high, other=0.0)
        row_handed = _load(handed, head, rows, num_rows, feature_e, E)
        sum_key, sum_values = _hand_back(
            row_query,
            row_handed,
            row_sum,
            row_delta,
            column_key,
            values,
            sum_key,
            sum_values,
            scores,
            scaling,
            PRECISION,
        )
    _store(grad_key, sum_key, head, columns, num_columns, feature_d, D)
    _store(grad_chained, sum_values, head, columns, num_columns, feature_e, E)


@triton.jit
def solve_backward_kernel(
    query, key, chained, output, log_sum, grad, handed, delta, grad_query, grad_key, grad_chained, gamma, bias,
    segments, scaling, heads, num_rows, row_low, row_high, bias_width, bias_start,
    STRICT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEGMENTS: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    TILE: tl.constexpr, DOUBLINGS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """U, W, delta and the gradients inside the rows row_low:row_high of one head, from the last tile to the first."""
    head = tl.program_id(0).to(tl.int64)
    batch = head // heads
    discount = tl.load(gamma + head % heads)
    local = tl.arange(0, TILE)
    feature_d, feature_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    tiles = (row_high - row_low + TILE - 1) // TILE
    for index in range(0, tiles):
        start = row_low + (tiles - 1 - index) * TILE
        columns = start + local
        column_key = _load(key, head, columns, num_rows, feature_d, D)
        values = _load(chained, head, columns, num_rows, feature_e, E)
        sum_key = _load(grad_key, head, columns, num_rows, feature_d, D)
        sum_values = _load(grad_chained, head, columns, num_rows, feature_e, E)
        for later in range(start + TILE, row_high, TILE):
            rows = later + local
            row_query = _load(query, head, rows, num_rows, feature_d, D)
            scores = _scores(
                row_query, column_key, scaling, rows, columns, bias, segments, batch, num_rows, bias_width, bias_start,
                HAS_BIAS, HAS_SEGMENTS, PRECISION,
            )  # fmt: skip
            row_sum = tl.load(log_sum + head * num_rows + rows, mask=rows < num_rows, other=float("inf"))
            row_delta = tl.load(delta + head * num_rows + rows, mask=rows < num_rows, other=0.0)
            row_handed = _load(handed, head, rows, num_rows, feature_e, E)
            sum_key, sum_values = _hand_back(
                row_query, row_handed, row_sum, row_delta, column_key, values, sum_key, sum_values, scores, scaling,
                PRECISION,
            )  # fmt: skip
        own_query = _load(query, head, columns, num_rows, feature_d, D)
        scores = _scores(
            own_query, column_key, scaling, columns, columns, bias, segments, batch, num_rows, bias_width, bias_start,
            HAS_BIAS, HAS_SEGMENTS, PRECISION,
        )  # fmt: skip
        row_sum = tl.load(log_sum + head * num_rows + columns, mask=columns < num_rows, other=float("inf"))
        weights = tl.where(local[:, None] >= local[None, :], tl.exp(scores - row_sum[:, None]), 0.0)
        own = tl.sum(tl.where(local[:, None] == local[None, :], weights, 0.0), 1)
        row_grad = _load(grad, head, columns, num_rows, feature_e, E)
        right = sum_values + tl.dot(tl.trans(weights), row_grad, input_precision="tf32x3")
        inner = discount * tl.where(local[:, None] > local[None, :], weights, 0.0)
        if STRICT:
            solved = _neumann(tl.trans(inner), right, DOUBLINGS)
        else:
            factor = 1.0 / (1.0 - discount * own)
            solved = _neumann(tl.trans(inner * factor[:, None]), right, DOUBLINGS) * factor[:, None]
        row_handed = row_grad + discount * solved
        row_output = _load(output, head, columns, num_rows, feature_e, E)
        row_delta = tl.sum(row_handed * row_output, 1)
        grad_scores = tl.dot(row_handed, tl.trans(values), input_precision="tf32x3")
        if STRICT:
            diagonal = discount * tl.sum(solved * values, 1)
            grad_scores -= tl.where(local[:, None] == local[None, :], diagonal[:, None], 0.0)
            row_delta -= own * diagonal
        grad_scores = (grad_scores - row_delta[:, None]) * weights * scaling
        sum_key += tl.dot(tl.trans(grad_scores), own_query.to(tl.float32), input_precision="tf32x3")
        sum_query = tl.dot(grad_scores, column_key.to(tl.float32), input_precision="tf32x3")
        _store(grad_query, sum_query, head, columns, num_rows, feature_d, D)
        _store(grad_key, sum_key, head, columns, num_rows, feature_d, D)
        _store(grad_chained, solved, head, columns, num_rows, feature_e, E)
        _store(handed, row_handed, head, columns, num_rows, feature_e, E)
        tl.store(delta + head * num_rows + columns, row_delta, mask=columns < num_rows)
        # the next tile reads what other threads of this program have written
        tl.debug_barrier()


@triton.jit
def rows_kernel(
    query, key, chained, handed, log_sum, delta, grad_query, bias, segments, scaling, heads, num_rows, num_columns,
    bias_width, bias_start,
    PAST: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEGMENTS: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    TILE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries from the tiles before it, or from all of the PAST, added to `grad_query`."""
    head = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * TILE
    rows = first + tl.arange(0, TILE)
    feature_d, feature_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    row_query = _load(query, head, rows, num_rows, feature_d, D)
    row_handed = _load(handed, head, rows, num_rows, feature_e, E)
    row_sum = tl.load(log_sum + head * num_rows + rows, mask=rows < num_rows, other=float("inf"))
    row_delta = tl.load(delta + head * num_rows + rows, mask=rows < num_rows, other=0.0)
    sum_query = _load(grad_query, head, rows, num_rows, feature_d, D)
    last = num_columns if PAST else first
    for start in range(0, last, TILE):
        columns = start + tl.arange(0, TILE)
        column_key = _load(key, head, columns, num_columns, feature_d, D)
        values = _load(chained, head, columns, num_columns, feature_e, E)
        scores = _scores(
            row_query, column_key, scaling, rows, columns, bias, segments, head // heads, num_rows, bias_width,
            bias_start, HAS_BIAS, HAS_SEGMENTS, PRECISION,
        )  # fmt: skip
        weights = tl.where((columns < last)[None, :], tl.exp(scores - row_sum[:, None]), 0.0)
        grad_scores = tl.dot(row_handed, tl.trans(values), input_precision=PRECISION) - row_delta[:, None]
        grad_scores *= weights * scaling
        sum_query += tl.dot(grad_scores, column_key.to(tl.float32), input_precision=PRECISION)
    _store(grad_query, sum_query, head, rows, num_rows, feature_d, D)
