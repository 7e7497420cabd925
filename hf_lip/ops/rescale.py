# SPDX-License-Identifier: Apache-2.0
"""Spectral rescaling: per-channel factors that make a linear map 1-Lipschitz (Delattre et al. 2024, arXiv 2402.00240).

One iteration is AOL (Prach and Lampert, 2022) and, with weights q, SLL (Araujo et al., ICLR 2023). With A = W W^T,
M = A^(2^(N-1)) and D the diagonal of row sums of |M| weighted by q, D - M is diagonally dominant, so M <= D, and
operator monotonicity of the root gives A <= D^(2^-(N-1)) = diag(R)^2. For convolutions M is the kernel of the
iterated autocorrelation on the infinite grid, which covers zero padding, circular padding whose output is no larger
than the image, every stride and every image size, but not reflect or replicate padding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


# multiplications up to which the last spatial correlation beats the fourier transform: measured on one cpu thread with
# the backward pass; torch unfolds float64 convolutions, which costs it the rest
_DIRECT_LIMIT = {torch.float32: 2**30, torch.float64: 2**22}


def _autocorrelation(kernel: Tensor) -> Tensor:
    """Full correlation of all pairs of rows: (c, d, h, w) -> (c, c, 2h - 1, 2w - 1)."""
    return F.conv2d(kernel, kernel, padding=(kernel.shape[2] - 1, kernel.shape[3] - 1))


def _iterate_direct(kernel: Tensor, num_iterations: int) -> tuple[Tensor, Tensor]:
    scale = torch.ones((), dtype=kernel.dtype, device=kernel.device)
    iterate = _autocorrelation(kernel)
    for step in range(1, num_iterations):
        norm = _positive(iterate.detach().abs().amax())
        iterate = _autocorrelation(iterate / norm)
        scale = scale * norm.pow(0.5**step)
    return iterate, scale


def _iterate_fourier(kernel: Tensor, num_iterations: int) -> tuple[Tensor, Tensor]:
    # support of the last iterate, so that nothing wraps round
    grid = tuple(2**num_iterations * (k - 1) + 1 for k in kernel.shape[2:])
    scale = torch.ones((), dtype=kernel.dtype, device=kernel.device)
    blocks = torch.fft.rfft2(kernel, s=grid).permute(2, 3, 0, 1)
    blocks = blocks @ blocks.mH
    for step in range(1, num_iterations):
        norm = _positive(torch.linalg.vector_norm(blocks.detach(), dim=(-2, -1)).amax())
        blocks = blocks / norm
        blocks = blocks @ blocks
        scale = scale * norm.pow(0.5**step)
    return torch.fft.irfft2(blocks.permute(2, 3, 0, 1), s=grid), scale


def _iterate_dense(weight: Tensor, num_iterations: int) -> tuple[Tensor, Tensor]:
    scale = torch.ones((), dtype=weight.dtype, device=weight.device)
    iterate = weight @ weight.mT
    for step in range(1, num_iterations):
        norm = _positive(torch.linalg.vector_norm(iterate.detach()))
        iterate = iterate / norm
        iterate = iterate @ iterate
        scale = scale * norm.pow(0.5**step)
    return iterate, scale


def _positive(value: Tensor) -> Tensor:
    return torch.where(value > 0, value, torch.ones_like(value))


def _direct_is_cheaper(shape: torch.Size, dtype: torch.dtype, num_iterations: int) -> bool:
    if num_iterations == 1:
        return True
    side = shape[0]
    sizes = [2 ** (num_iterations - 1) * (k - 1) + 1 for k in shape[2:]]
    taps = sizes[0] * sizes[1]
    return side**3 * taps * 4 * taps <= _DIRECT_LIMIT[dtype]


def iterated_row_sums(weight: Tensor, num_iterations: int, q: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Absolute row sums of the iterated Gram matrix or autocorrelation, with the overall scale kept apart.

    Args:
        weight: (c, d) or (c, d, kh, kw), float32 or float64 or half precision (computed in float32).
        num_iterations: N >= 1.
        q: optional positive (c,); entry (i, j) is then weighted by q_j / q_i.

    Returns:
        sums (c,) and a scalar scale; the weighted absolute row sums of (W W^T)^(2^(N-1)) are sums * scale ** 2**N.
        A zero row has sum 0; nothing over- or underflows whatever the size of the weights. Differentiable.

    Raises:
        TypeError: weight is not a real floating point tensor.
        ValueError: wrong shape, num_iterations < 1, or a q of the wrong shape.
    """
    if not weight.is_floating_point():
        raise TypeError(f"weight must be a real floating point tensor, but its dtype is {weight.dtype}.")
    if weight.ndim not in (2, 4) or weight.numel() == 0:
        raise ValueError(
            "weight must be a non-empty matrix (out, in) or kernel (out, in, kh, kw), "
            f"but its shape is {tuple(weight.shape)}."
        )
    if not isinstance(num_iterations, int) or num_iterations < 1:
        raise ValueError(f"num_iterations must be an int of at least 1, but got {num_iterations!r}.")
    if q is not None and q.shape != weight.shape[:1]:
        raise ValueError(f"q must have shape {tuple(weight.shape[:1])}, one weight a row, but got {tuple(q.shape)}.")
    if weight.dtype in (torch.float16, torch.bfloat16):
        weight = weight.float()

    with torch.autocast(weight.device.type, enabled=False):
        # the result does not depend on these normalisers, so the gradient is exact although they are detached
        scale = _positive(weight.detach().abs().amax())
        normalized = weight / scale
        if weight.ndim == 2:
            iterate, factor = _iterate_dense(normalized, num_iterations)
        elif _direct_is_cheaper(weight.shape, weight.dtype, num_iterations):
            iterate, factor = _iterate_direct(normalized, num_iterations)
        else:
            iterate, factor = _iterate_fourier(normalized, num_iterations)
        absolute = iterate.abs()
        if weight.ndim == 4:
            absolute = absolute.sum(dim=(2, 3))
        if q is None:
            sums = absolute.sum(dim=1)
        else:
            q = q.to(absolute.dtype)
            sums = (absolute @ q) / q
        # a row far smaller than the others may underflow, and its factor must stay on the safe side
        lost = torch.finfo(sums.dtype).tiny * iterate.numel() * 4.0**num_iterations
        nonzero = (weight.detach() != 0).flatten(1).any(dim=1)
        sums = torch.where(nonzero, sums + lost, torch.zeros_like(sums))
    return sums, scale * factor


def rescaling_factors(
    weight: Tensor, num_iterations: int = 1, *, side: str = "output", q: Tensor | None = None
) -> Tensor:
    """Factors R such that diag(1/R) W (side "output") or W diag(1/R) (side "input") has norm at most 1.

    R_i = (sum_j |(W W^T)^(2^(N-1))|_ij q_j / q_i) ^ (2^-N) on the output side, the same of W^T on the input side; for
    kernels the sum also runs over the taps of the iterated autocorrelation (arXiv 2402.00240, with each axis padded by
    its own size - 1). R ** 2 is the diagonal T >= K K^T of the residual layers. N = 1 is AOL or SLL, N -> infinity
    divides by the spectral norm. Computed in the precision of the weight: freeze the factors in float64, and check
    them with `certified`, before calling a layer 1-Lipschitz.

    Args:
        weight: (out, in) or (out, in, kh, kw); half precision is computed, and returned, in float32.
        num_iterations: N >= 1.
        side: "output" gives `out` factors, "input" gives `in` factors.
        q: optional positive weights, one per factor. They change R and keep the bound.

    Returns:
        (c,) positive; factor 1 for zero rows, whose gradient is zero. Differentiable in weight and q.

    Raises:
        TypeError: weight is not a real floating point tensor.
        ValueError: wrong shapes, side or number of iterations.
    """
    if side not in ("output", "input"):
        raise ValueError(f"side must be 'output' or 'input', but got {side!r}.")
    if side == "input" and weight.ndim in (2, 4):
        weight = weight.transpose(0, 1)
    sums, scale = iterated_row_sums(weight, num_iterations, q)
    nonzero = sums > 0
    roots = torch.where(nonzero, sums, torch.ones_like(sums)).pow(0.5**num_iterations)
    return torch.where(nonzero, roots * scale, torch.ones_like(roots))
