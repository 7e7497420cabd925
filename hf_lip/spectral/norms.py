# SPDX-License-Identifier: Apache-2.0
"""One entry for the spectral norm of any layer or weight, as an interval."""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.conv import conv_frequency_blocks
from ..ops.conv_interval import conv_norm
from ..ops.geometry import Padding, Size, as_pads, as_tuple, torus_problem
from ..ops.gram import gram_interval
from ..ops.interval import SpectralNorm, dense_norms, low_rank_norm
from ..ops.rounding import check_plain_floats, down, exact_double, up


Item = nn.Module | Tensor | tuple[Tensor, Tensor]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# matrices of one shape up to this smaller side are proved in one batch, up to this many entries at once
_STACKED_SIDE, _STACKED_ENTRIES = 256, 2**23


def spectral_norm(
    layer_or_weight: Item,
    input_size: Size | None = None,
    *,
    stride: Size = 1,
    padding: Padding | None = None,
    padding_mode: str = "zeros",
    dilation: Size = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: Size = 0,
    rtol: float = 1e-3,
    certified: bool = True,
) -> SpectralNorm:
    """Interval of the spectral norm (l2 to l2 operator norm, biases left out) of a layer, a weight or a product.

    Args:
        layer_or_weight: a layer (linear, convolution, transposed convolution, embedding, normalisation; then the
            keywords up to `output_padding` are read from it and must be left out); a matrix (out, in); a kernel
            (out, in / groups, *k), or (in, out / groups, *k) if `transposed`; or a pair (B, A), for B @ A unformed.
            A batch normalisation counts with its running statistics; layer, group and root-mean-square normalisations
            with their global Lipschitz constant max|w| / sqrt(eps).
        input_size: image size, int or one a dimension; None for a bound that holds for every size.
        stride, padding, padding_mode, dilation, groups, transposed, output_padding: as in torch's convolutions;
            padding None is "same".
        rtol: relative width asked for; where it cannot be met the result's `reason` says why.
        certified: prove the interval, on the cpu in float64, for the weights as stored. False is for speed on a GPU:
            Gram iteration where the weight lies, exact but for its rounding.

    Returns:
        SpectralNorm(lower, upper, method, certified, reason).

    Raises:
        TypeError: a layer that has no spectral norm here, or values that are no plain floats.
        ValueError: wrong shapes, sizes or options, entries that are not finite.
    """
    keywords = {
        "stride": stride,
        "padding": padding,
        "padding_mode": padding_mode,
        "dilation": dilation,
        "groups": groups,
        "transposed": transposed,
        "output_padding": output_padding,
    }
    if isinstance(layer_or_weight, nn.Module):
        given = [name for name, value in keywords.items() if value != _DEFAULTS[name]]
        if given:
            raise ValueError(f"{', '.join(given)} must be left out for a layer: they are read from it.")
        if isinstance(layer_or_weight, (*_CONVOLUTIONS, *_TRANSPOSED)):
            keywords = _convolution_keywords(layer_or_weight)
            layer_or_weight = layer_or_weight.weight
        elif isinstance(layer_or_weight, (nn.Linear, nn.Embedding)) or _is_transformers_conv1d(layer_or_weight):
            layer_or_weight = layer_or_weight.weight
        else:
            return _normalisation_norm(layer_or_weight)
    if isinstance(layer_or_weight, tuple) and len(layer_or_weight) == 2:
        return low_rank_norm(*layer_or_weight, rtol=rtol)
    if not isinstance(layer_or_weight, Tensor):
        raise TypeError(
            f"layer_or_weight must be a layer, a tensor or a pair of tensors, got {type(layer_or_weight)}."
        )
    weight = layer_or_weight
    check_plain_floats(weight)
    if weight.ndim == 2:
        if not certified:
            return _gram_norm(weight[None], 1, rtol)
        return dense_norms([weight], rtol)[0]
    if weight.ndim not in (3, 4, 5):
        raise ValueError(
            f"weight must be a matrix or a kernel with one to three sizes, but its shape is {tuple(weight.shape)}."
        )
    if keywords.pop("transposed"):
        input_size = _transposed_output_size(weight, input_size, keywords)
    keywords.pop("output_padding")
    if certified:
        return conv_norm(weight, input_size, rtol=rtol, **keywords)  # type: ignore[arg-type]
    if input_size is None:
        raise ValueError("certified=False needs an input_size.")
    problem = torus_problem(weight if weight.dtype.itemsize >= 4 else weight.float(), input_size, **keywords)  # type: ignore[arg-type]
    assert problem.grid is not None
    blocks = torch.cat([conv_frequency_blocks(kernel, problem.grid) for kernel in problem.kernel])
    return _gram_norm(blocks, problem.copies, rtol, exact=problem.exact)


_DEFAULTS: dict[str, Any] = {
    "stride": 1,
    "padding": None,
    "padding_mode": "zeros",
    "dilation": 1,
    "groups": 1,
    "transposed": False,
    "output_padding": 0,
}


def spectral_norms(
    items: Iterable[tuple[Item, Size | None, dict[str, Any]]],
    *,
    rtol: float = 1e-3,
    progress: Callable[[int], None] | None = None,
) -> list[SpectralNorm]:
    """Certified spectral norms of many layers; small matrices of equal shapes are proved in one batch.

    Args:
        items: (layer or weight, input_size, keywords), as for `spectral_norm`.
        rtol: relative width asked for.
        progress: called with the number of items done since the last call.
    """
    items = list(items)
    results: list[SpectralNorm | None] = [None] * len(items)
    stacks: dict[tuple[int, ...], list[int]] = {}
    for index, (item, input_size, keywords) in enumerate(items):
        matrix = _matrix_of(item)
        if matrix is not None and not keywords and 0 < min(matrix.shape) <= _STACKED_SIDE:
            stacks.setdefault(tuple(sorted(matrix.shape)), []).append(index)
            continue
        results[index] = spectral_norm(item, input_size, rtol=rtol, **keywords)
        if progress is not None:
            progress(1)
    for shape, members in stacks.items():
        size = max(1, _STACKED_ENTRIES // shape[0] ** 2)
        for start in range(0, len(members), size):
            batch = members[start : start + size]
            for index, norm in zip(batch, dense_norms([_matrix_of(items[i][0]) for i in batch], rtol)):  # type: ignore[misc]
                results[index] = norm
            if progress is not None:
                progress(len(batch))
    return results  # type: ignore[return-value]


def _matrix_of(item: Item) -> Tensor | None:
    if isinstance(item, (nn.Linear, nn.Embedding)) or (isinstance(item, nn.Module) and _is_transformers_conv1d(item)):
        return item.weight  # type: ignore[return-value]
    return item if isinstance(item, Tensor) and item.ndim == 2 else None


def _is_transformers_conv1d(layer: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)


def _convolution_keywords(layer: Any) -> dict[str, Any]:
    padding: Any = layer.padding
    if padding == "valid":
        padding = 0
    elif padding == "same":
        # as torch splits it: the odd pixel goes to the far side
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size)]
        padding = tuple((total // 2, total - total // 2) for total in totals)
    transposed = isinstance(layer, _TRANSPOSED)
    return {
        "stride": layer.stride,
        "padding": padding,
        "padding_mode": layer.padding_mode,
        "dilation": layer.dilation,
        "groups": layer.groups,
        "transposed": transposed,
        "output_padding": layer.output_padding if transposed else 0,
    }


def _transposed_output_size(weight: Tensor, input_size: Size | None, keywords: dict[str, Any]) -> Size | None:
    """A transposed convolution is the adjoint of the convolution of images of its output size, with its weight."""
    if keywords["padding_mode"] != "zeros":
        raise ValueError("A transposed convolution takes padding_mode='zeros' only.")
    dimensions = weight.ndim - 2
    strides = as_tuple(keywords["stride"], dimensions, "stride", 1)
    dilations = as_tuple(keywords["dilation"], dimensions, "dilation", 1)
    extra = as_tuple(keywords["output_padding"], dimensions, "output_padding", 0)
    spans = [d * (k - 1) + 1 for d, k in zip(dilations, weight.shape[2:])]
    pads = as_pads(keywords["padding"], spans, circular=False)
    if any(e >= max(s, d) for e, s, d in zip(extra, strides, dilations)):
        raise ValueError(
            f"output_padding {extra} must be smaller than the stride {strides} or the dilation {dilations}."
        )
    if input_size is None:
        return None
    sizes = as_tuple(input_size, dimensions, "input_size", 1)
    ends = zip(sizes, strides, spans, pads, extra)
    outputs = tuple((n - 1) * s + k - sum(pad) + e for n, s, k, pad, e in ends)
    if min(outputs) < 1:
        raise ValueError(f"input_size {sizes} gives no output pixel: {outputs}.")
    # whole steps of output padding (dilation allows them) are pixels that no input reaches: the adjoint would start
    # windows of its own there
    beyond = [e // s * s for e, s in zip(extra, strides)]
    keywords["padding"] = tuple((before, max(0, after - b)) for (before, after), b in zip(pads, beyond))
    read = tuple(n - max(0, b - after) for n, (_, after), b in zip(outputs, pads, beyond))
    if min(read) < 1:
        raise ValueError(f"No pixel of input_size {sizes} reaches the output, which output_padding {extra} fills.")
    return read


def _gram_norm(matrices: Tensor, copies: int, rtol: float, exact: bool = True) -> SpectralNorm:
    lower, upper, products = gram_interval(matrices, rtol)
    if not math.isfinite(upper):
        raise ValueError("weight has entries that are not finite, or the norm overflows its dtype: no bound exists.")
    root = math.sqrt(copies)
    low, high = float(lower) if exact else 0.0, float(upper) * root
    reason = None
    if not exact:
        reason = "the torus only contains the operator, so its norm has no lower end here"
    elif high - low > rtol * high:
        reason = f"{products} Gram products do not separate the largest singular values"
    return SpectralNorm(low, high, f"gram iteration ({products} products)", certified=False, reason=reason)


def _normalisation_norm(layer: nn.Module) -> SpectralNorm:
    if isinstance(layer, _BATCH_NORMS):
        if layer.running_var is None:
            raise ValueError(
                "A batch normalisation without running statistics has no norm: its scale depends on the batch."
            )
        variance = exact_double(layer.running_var)
        if not (torch.isfinite(variance).all() and (variance + layer.eps > 0).all()):
            raise ValueError("running_var must be finite and not below -eps.")
        weight = torch.ones_like(variance) if layer.weight is None else exact_double(layer.weight)
        top = (weight.abs() / (variance + layer.eps).sqrt()).max().item()
        _check_finite(top)
        return SpectralNorm(down(top), up(top) if weight.any() else 0.0, "formula")
    name = type(layer).__name__
    # a class that has a forward of its own may do anything with its weight
    known = getattr(type(layer), "forward", None) in (nn.LayerNorm.forward, nn.GroupNorm.forward, nn.RMSNorm.forward)
    if not known and not name.endswith("RMSNorm"):
        raise TypeError(
            f"{name} has no spectral norm here: give a linear layer, convolution, embedding or normalisation layer, "
            "or a weight tensor."
        )
    eps = getattr(layer, "eps", None) or getattr(layer, "variance_epsilon", None)
    if eps is None:
        raise ValueError(f"{name} without eps, or with eps = 0, has no global Lipschitz constant: give it an eps.")
    weight_or_none = getattr(layer, "weight", None)
    top = 1.0
    if weight_or_none is not None:
        scales = exact_double(weight_or_none) + (0.0 if known else _weight_offset(layer, eps))
        top = scales.abs().max().item()
    _check_finite(top)
    constant = top / math.sqrt(eps)
    # the slope at 0, across the mean that layer and group normalisation subtract
    count = math.inf
    if isinstance(layer, nn.LayerNorm):
        count = math.prod(layer.normalized_shape)
    elif isinstance(layer, nn.GroupNorm):
        count = layer.num_channels // layer.num_groups
    lower = constant * math.sqrt(1 - 1 / count)
    reason = None if lower == constant else "centring removes one direction"
    return SpectralNorm(down(lower), up(constant) if constant else 0.0, "formula", reason=reason)


def _weight_offset(layer: nn.Module, eps: float) -> float:
    """What a class of root-mean-square normalisation adds to its weight, 0 or 1: seen from one small vector."""
    probe: Any = copy.deepcopy(layer).to(device="cpu", dtype=torch.float64)
    generator = torch.Generator(device="cpu").manual_seed(0)
    weight, vector = torch.rand(2, probe.weight.numel(), generator=generator, dtype=torch.float64, device="cpu")
    vector = vector * math.sqrt(eps)
    root = vector / (vector.square().mean() + eps).sqrt()
    with torch.no_grad():
        probe.weight.copy_(weight)
        output = probe(vector[None])[0]
    for offset in (0.0, 1.0):
        if torch.allclose(output, root * (weight + offset), rtol=1e-4, atol=1e-5):
            return offset
    raise TypeError(f"{type(layer).__name__} is no root-mean-square normalisation that is known here.")


def _check_finite(value: float) -> None:
    if not math.isfinite(value):
        raise ValueError("the layer's weight has entries that are not finite, no bound exists.")
