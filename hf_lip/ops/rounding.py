# SPDX-License-Identifier: Apache-2.0
"""Arithmetic that the certified bounds rest on: exact casts, exact scalings, roundings towards the safe side."""

import math

import torch
from torch import Tensor


UNIT_ROUNDOFF = 2.0**-53
# the smallest positive number; compares equal to 0 where the processor flushes subnormal numbers
_SMALLEST = 2.0**-1074
# absolute error of one phase exp(i angle), |angle| <= pi: the angle is off by 3 u pi, sine and cosine by 4 u each
PHASE_ERROR = 32 * UNIT_ROUNDOFF


def gamma(count: int) -> float:
    """Higham's gamma_k = k u / (1 - k u): relative error of k roundings in float64."""
    return count * UNIT_ROUNDOFF / (1 - count * UNIT_ROUNDOFF)


def up(value: float) -> float:
    """A float above `value` and above the exact result of the few operations that gave it."""
    return math.nextafter(value * (1 + 8 * UNIT_ROUNDOFF), math.inf)


def down(value: float) -> float:
    """A float below `value` and below the exact result of the few operations that gave it; not below 0."""
    return max(0.0, math.nextafter(value * (1 - 8 * UNIT_ROUNDOFF), -math.inf))


def exact_double(weight: Tensor) -> Tensor:
    """The same real numbers in float64 on the cpu.

    Raises:
        TypeError: the stored values are no plain floats.
        RuntimeError: the processor has been told to take subnormal numbers for zeros.
    """
    check_plain_floats(weight)
    if _SMALLEST == 0.0:
        raise RuntimeError(
            "Subnormal numbers are taken for zeros here, so that nothing can be proved. "
            "Call torch.set_flush_denormal(False) first."
        )
    return weight.detach().to(device="cpu", dtype=torch.float64)


def check_plain_floats(weight: Tensor) -> None:
    """Raise TypeError unless the tensor stores real floating point numbers of 16 bits or more, one by one."""
    if weight.is_meta:
        raise TypeError("weight is on the meta device and has no values: load it first.")
    if weight.layout != torch.strided:
        raise TypeError(f"weight must be a dense tensor, but its layout is {weight.layout}: call to_dense() first.")
    if weight.is_quantized or not weight.is_floating_point() or weight.dtype.itemsize == 1:
        raise TypeError(
            f"weight must be a real floating point tensor of 16 bits or more, but its dtype is {weight.dtype}. "
            "Dequantise it first."
        )


def scaled(weight: Tensor) -> tuple[Tensor, int]:
    """Divide by a power of two, exactly, so that the largest entry is near 1; returns the exponent."""
    top = weight.abs().amax().item()
    if not math.isfinite(top):
        raise ValueError("weight has entries that are not finite, no bound exists.")
    # clamped so that the factor itself is a normal number; the largest entry is then between 2^-74 and 2^24
    exponent = min(max(math.frexp(top)[1], -1000), 1000)
    return weight * math.ldexp(1.0, -exponent), exponent


def unscaled(value: float, exponent: int, towards: float = math.inf) -> float:
    """value * 2^exponent, rounded up (or down); infinite where float64 overflows, which is still an upper bound."""
    half = exponent // 2
    result = value * math.ldexp(1.0, half) * math.ldexp(1.0, exponent - half)
    if math.isinf(result) and towards < 0:
        return math.nextafter(math.inf, 0.0)
    return max(0.0, math.nextafter(result, towards)) if result or towards > 0 else 0.0
