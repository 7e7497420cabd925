# SPDX-License-Identifier: Apache-2.0
"""Scales that are moved, not lost: what takes up the divisors of the weights, so that predictions stay.

All divisors are powers of two. Multiplying a float by one changes its exponent and nothing else, so every sum and
product inside the network gives the same digits as before: the new logits are the old ones divided by one power of
two, bit by bit, and their argmax is the same. Values near the ends of a dtype's range are the exception: weights that
would lose digits there are an error; activations that do, as they may in float16, cannot be seen from here. The price
is that norms end in (C/2, C] instead of at C.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .rewrite import CheckpointCopy
from .scale_flow import Form, ScaleFlow


# int64, scalar or one a channel: the weight is divided by 2 ** exponent
Exponent = Tensor


def exponent_for(norms: Tensor, limit: float) -> Exponent:
    """Smallest integers e with norms / 2^e <= limit; norms float64, positive."""
    exponent = torch.ceil(torch.log2(norms) - torch.log2(torch.tensor(limit, dtype=torch.float64))).long()
    # the logarithms are rounded, the comparison with a power of two is not
    exponent = exponent + (norms * powers_of_two(-exponent) > limit).long()
    return exponent - (norms * powers_of_two(1 - exponent) <= limit).long()


def powers_of_two(exponent: Exponent) -> Tensor:
    """2 ** exponent in float64, exactly."""
    # torch.ldexp goes through float32
    return torch.as_tensor(np.ldexp(1.0, exponent.numpy()))


def scale_exactly(name: str, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast float64 values to a dtype that must hold them without rounding.

    Raises:
        ValueError: some values overflow or lose digits as subnormal numbers.
    """
    rounded = exact.to(dtype)
    lost = int((rounded.double() != exact).sum())
    if lost:
        raise ValueError(
            f"{lost} of {exact.numel()} values of {name} would leave the normal range of {dtype} when scaled by a "
            "power of two, and predictions would not be exactly the same. Convert the checkpoint to float32 first, "
            "choose a `to` closer to the present norms, leave the layer out with `layers`, or rescale without "
            "`preserve_logits`."
        )
    return rounded


def move_scales(
    copy: CheckpointCopy, flow: ScaleFlow, exponents: Mapping[str, Exponent], config: Mapping[str, Any]
) -> int:
    """Adapt biases and batch norms to weights that have been divided.

    Args:
        copy: its weights are divided already.
        flow: of the network.
        exponents: weight -> exponent of its divisor; weights that were left as they are may be missing.
        config: the model's.

    Returns:
        e such that the logits are the original's divided by 2 ** e.

    Raises:
        ValueError: values that leave the range of their dtype, or a regression, whose outputs must not be scaled.
    """
    for name, form in flow.biases.items():
        _multiply(copy, name, -_total(form, exponents))
    for name, form in flow.norms.items():
        total = _total(form, exponents)
        mean = f"{name.removesuffix('weight')}running_mean"
        if mean not in copy.stored:
            raise ValueError(f"The batch norm of {name} does not store {mean}, so that no scale can be moved into it.")
        _multiply(copy, mean, -total)
        _multiply(copy, name, total)
    # only a layer before a batch norm has an exponent a channel
    logits = int(_total(flow.logits, exponents))
    labels = config.get("num_labels", len(config.get("id2label") or {}) or None)
    if logits and (labels == 1 or config.get("problem_type") == "regression"):
        raise ValueError(
            "The model gives a number and no choice between classes (regression), so its outputs must not be divided: "
            "leave the last layers out with `layers`."
        )
    return logits


def _total(form: Form, exponents: Mapping[str, Exponent]) -> Exponent:
    total = torch.zeros((), dtype=torch.long)
    for name, count in form.items():
        if name in exponents:
            total = total + count * exponents[name]
    return total


def _multiply(copy: CheckpointCopy, name: str, exponent: Exponent) -> None:
    """Multiply a tensor of the copy by 2 ** exponent, exactly."""
    if not exponent.any():
        return
    value = copy.read(name)
    copy.write(name, scale_exactly(name, value.double() * powers_of_two(exponent), value.dtype))
