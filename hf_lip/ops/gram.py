# SPDX-License-Identifier: Apache-2.0
"""Gram iteration: a deterministic upper bound of the spectral norm (Delattre et al., ICML 2023, arXiv 2305.16173).

After N products G <- G* G, rescaled by their Frobenius norms, the bound is the Schatten norm of order 2^(N+1). It
decreases with N, doubly exponentially fast where the top singular value is simple and by half the error per iteration
where it is not (orthogonal weights, for instance). In floating point the value may end below the norm by rounding;
`hf_lip.ops.certified` is the one to use for certificates.
"""

from typing import Any

import torch
from torch import Tensor


def _nonzero(value: Tensor) -> Tensor:
    return torch.where(value == 0, torch.ones_like(value), value)


def _frobenius(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True)


def _schatten_norm(weight: Tensor, num_iterations: int) -> Tensor:
    # a first division by the largest entry, since the squares in the frobenius norm may over- or underflow
    top = _nonzero(weight.abs().amax(dim=(-2, -1), keepdim=True))
    iterate = weight / top
    norm = _frobenius(iterate)
    bound = top * norm
    for step in range(1, num_iterations + 1):
        iterate = iterate / _nonzero(norm)
        iterate = iterate.mH @ iterate
        norm = _frobenius(iterate)
        # the norm of a squared unit iterate is in [r^-1/2, 1]: the bound is a product of ever higher roots
        bound = bound * norm.pow(0.5**step)
    return bound[..., 0, 0]


def _schatten_gradient(weight: Tensor, bound: Tensor, num_iterations: int) -> Tensor:
    """Gradient G A^(2^N - 1) b / tr(A^(2^N)) of the Schatten norm b, A = G* G; the powers may be scaled freely."""
    unit = weight / _nonzero(bound)[..., None, None]
    if num_iterations == 0:
        return unit
    gram = unit.mH @ unit
    power, square = gram, gram
    for _ in range(num_iterations - 1):
        square = square @ square
        square = square / _nonzero(_frobenius(square))
        power = power @ square
        power = power / _nonzero(_frobenius(power))
    trace = (power * gram.conj()).sum(dim=(-2, -1), keepdim=True).real
    return unit @ power / _nonzero(trace)


class _GramIteration(torch.autograd.Function):
    """Saves the weight and the result only and recomputes the iterates, so that memory does not grow with N."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, num_iterations: int) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            bound = _schatten_norm(weight, num_iterations)
        ctx.save_for_backward(weight, bound)
        ctx.num_iterations = num_iterations
        return bound

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        weight, bound = ctx.saved_tensors
        with torch.autocast(weight.device.type, enabled=False):
            gradient = _schatten_gradient(weight, bound, ctx.num_iterations)
        return grad_outputs[0][..., None, None] * gradient, None


def _check(weight: Tensor, num_iterations: int) -> None:
    if not (weight.is_floating_point() or weight.is_complex()):
        raise TypeError(f"weight must be a floating point or complex tensor, but its dtype is {weight.dtype}.")
    if weight.ndim < 2 or 0 in weight.shape:
        raise ValueError(
            f"weight must be non-empty with at least two dimensions, but its shape is {tuple(weight.shape)}."
        )
    if not isinstance(num_iterations, int) or num_iterations < 0:
        raise ValueError(f"num_iterations must be an int of at least 0, but got {num_iterations!r}.")


def _as_tall(weight: Tensor) -> Tensor:
    if weight.dtype in (torch.float16, torch.bfloat16):
        weight = weight.float()
    return weight.mT if weight.shape[-2] < weight.shape[-1] else weight


def gram_iteration(weight: Tensor, num_iterations: int = 6) -> Tensor:
    """Schatten norm of order 2^(N+1), an upper bound of the spectral norm at most r^(2^-(N+1)) times too large.

    Args:
        weight: (..., m, n), real or complex; r = min(m, n). Half precision is computed, and returned, in float32.
        num_iterations: number N >= 0 of Gram products; 0 is the Frobenius norm.

    Returns:
        (...) real. The gradient is exact and explicit, its memory independent of N; value and gradient are 0 at 0.

    Raises:
        TypeError: weight is neither floating point nor complex.
        ValueError: fewer than two dimensions, an empty matrix, or a negative number of iterations.
    """
    _check(weight, num_iterations)
    weight = _as_tall(weight)
    bound: Tensor = _GramIteration.apply(weight, num_iterations)
    return bound


def gram_interval(weight: Tensor, rtol: float = 1e-3, max_iterations: int = 24) -> tuple[Tensor, Tensor, int]:
    """Two-sided interval of the largest spectral norm in a batch, by as many Gram products as `rtol` asks for.

    With M the iterate of side r, m = tr(M) / r and v = |M - m I|_F^2 / r, its largest eigenvalue lies between
    |M|_F^2 / tr(M) and m + sqrt((r - 1) v) (Wolkowicz and Styan 1980), which is exact where all singular values agree
    and never above the Frobenius norm. Matrices whose upper end falls below the best lower end are dropped. Holds in
    exact arithmetic: float rounding may leave the norm outside by about 1e-6 in float32.

    Args:
        weight: (..., m, n), real or complex, any device; half precision is computed in float32.
        rtol: relative width to reach.
        max_iterations: number of Gram products after which to stop all the same.

    Returns:
        lower and upper, scalar tensors, and the number of products spent.

    Raises:
        TypeError, ValueError: as `gram_iteration`; rtol or max_iterations out of range.
    """
    if not isinstance(max_iterations, int) or max_iterations < 1:
        raise ValueError(f"max_iterations must be an int of at least 1, but got {max_iterations!r}.")
    _check(weight, max_iterations)
    if not 0.0 < rtol < 1.0:
        raise ValueError(f"rtol must be in (0, 1), but got {rtol!r}.")
    weight = _as_tall(weight.detach()).flatten(0, -3) if weight.ndim > 2 else _as_tall(weight.detach())[None]
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        top = _nonzero(weight.abs().amax())
        if not torch.isfinite(top):
            raise ValueError("weight has entries that are not finite, no bound exists.")
        iterate = weight / top
        norm = _frobenius(iterate)
        scale = top * norm[:, 0, 0]
        lower, upper = torch.zeros_like(scale).amax(), scale.amax()
        side = weight.shape[-1]
        identity = torch.eye(side, dtype=weight.dtype, device=weight.device)
        for step in range(1, max_iterations + 1):
            iterate = iterate / _nonzero(norm)
            iterate = iterate.mH @ iterate
            trace = iterate.diagonal(dim1=-2, dim2=-1).real.sum(dim=-1)
            norm = _frobenius(iterate)
            square = norm[:, 0, 0].square()
            mean = trace / side
            spread = _frobenius(iterate - mean[:, None, None] * identity)[:, 0, 0].square() / side
            low = scale * (square / _nonzero(trace)).pow(0.5**step)
            high = scale * (mean + ((side - 1) * spread).sqrt()).minimum(norm[:, 0, 0]).pow(0.5**step)
            lower, upper = torch.maximum(lower, low.amax()), torch.minimum(upper, high.amax())
            if upper - lower <= rtol * upper:
                break
            # the root of the next norm applies to matrices that stay
            kept = high >= lower
            iterate, norm = iterate[kept], norm[kept]
            scale = scale[kept] * norm[:, 0, 0].pow(0.5**step)
    return lower, upper, step
