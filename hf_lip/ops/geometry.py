# SPDX-License-Identifier: Apache-2.0
"""Geometry of convolutions in one to three dimensions: sizes, paddings, strides, dilations, groups.

Every convolution here becomes a stride-1 circular convolution on a torus that contains it (arXiv 2402.00240, with
exact sizes): strides by polyphase regrouping, dilation by taps set apart, groups as a batch, padding by its size.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


Size = int | Sequence[int]
Padding = Size | Sequence[Sequence[int]]

PADDING_MODES = ("zeros", "circular", "reflect", "replicate")


class ConvGeometry(NamedTuple):
    """Sizes of one convolution; every tuple has one entry a spatial dimension.

    Attributes:
        input_size: size of the input image.
        output_size: size of the output image.
        stride: step between outputs.
        pads: pixels added (before, after) along each axis.
        torus: size of a torus whose circular convolution contains the operator as a submatrix, up to repeated rows.
        torus_stride: stride of that circular convolution, it divides `torus`.
        copies: largest number of times one row of the circular convolution occurs in the operator (1 but for circular
            padding with more outputs than pixels); the operator's norm is at most sqrt(copies) times the circular one.
    """

    input_size: tuple[int, ...]
    output_size: tuple[int, ...]
    stride: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    torus: tuple[int, ...]
    torus_stride: tuple[int, ...]
    copies: int


def as_tuple(value: Size, dimensions: int, name: str, minimum: int) -> tuple[int, ...]:
    """Read an int or one int a dimension, each at least `minimum`; raises ValueError naming the argument otherwise."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * dimensions
    if len(values) != dimensions or any(not isinstance(v, int) or isinstance(v, bool) or v < minimum for v in values):
        many = "a pair of ints" if dimensions == 2 else f"{dimensions} ints"
        raise ValueError(f"{name} must be an int or {many}, each at least {minimum}, but got {value!r}.")
    return values


def as_pads(padding: Padding | None, spans: Sequence[int], circular: bool) -> tuple[tuple[int, int], ...]:
    """Pixels added (before, after) along each axis; None is "same" padding.

    "same" is k // 2 on both sides, and for circular padding of an even kernel one pixel less on the far side, so that
    the output is the torus again.
    """
    if padding is None:
        return tuple((k // 2, k - 1 - k // 2 if circular else k // 2) for k in spans)
    if isinstance(padding, Sequence) and any(isinstance(entry, Sequence) for entry in padding):
        pairs = tuple(as_tuple(entry, 2, "padding", 0) for entry in padding)
        if len(pairs) != len(spans):
            raise ValueError(f"padding must hold {len(spans)} pairs (before, after), but got {padding!r}.")
        return tuple((before, after) for before, after in pairs)
    return tuple((p, p) for p in as_tuple(padding, len(spans), "padding", 0))  # type: ignore[arg-type]


def check_kernel(weight: Tensor, dimensions: Sequence[int] = (2,)) -> None:
    """Raise ValueError unless `weight` is a non-empty kernel (out, in, *k) of one of these spatial dimensions."""
    if weight.ndim - 2 not in dimensions or weight.numel() == 0:
        form = "(out, in, kh, kw)" if tuple(dimensions) == (2,) else "(out, in, *k) with one to three sizes k"
        raise ValueError(
            f"weight must be a non-empty kernel of shape {form}, but its shape is {tuple(weight.shape)}. "
            "Give matrices to the dense functions."
        )


def conv_geometry(
    kernel_size: Size,
    input_size: Size,
    *,
    padding_mode: str = "zeros",
    padding: Padding | None = None,
    stride: Size = 1,
    dilation: Size = 1,
) -> ConvGeometry:
    """Work out the output size and the embedding torus of a convolution.

    Zero padding by p on n pixels embeds in every torus of size m >= n + p (p capped at k - 1, further outputs are
    zero); with stride s the smallest multiple of s is taken. Circular padding lives on the torus n, with stride
    gcd(s, n): the rows at multiples of s, modulo n, are rows of that operator.

    Args:
        kernel_size: one size a dimension; an int stands for a square kernel of two dimensions.
        input_size: image size, int or one a dimension.
        padding_mode: "zeros" or "circular".
        padding: pixels added on each side, int, one a dimension, or pairs (before, after). None means "same", see
            `as_pads`.
        stride: int or one a dimension.
        dilation: int or one a dimension; the kernel then spans dilation * (k - 1) + 1 pixels.

    Raises:
        ValueError: unknown or unsupported padding mode, sizes out of range, or no output pixel at all.
    """
    if padding_mode in ("reflect", "replicate"):
        raise ValueError(
            f"padding_mode={padding_mode!r} is not supported here: pixels near the border are read several times, so "
            "the padding map itself has a norm above 1 and the bounds do not hold. Use 'zeros' or 'circular', or "
            "hf_lip.spectral_norm, which counts the padding."
        )
    if padding_mode not in ("zeros", "circular"):
        raise ValueError(f"padding_mode must be 'zeros' or 'circular', but got {padding_mode!r}.")
    dimensions = len(kernel_size) if isinstance(kernel_size, Sequence) else 2
    kernel = as_tuple(kernel_size, dimensions, "kernel_size", 1)
    sizes = as_tuple(input_size, dimensions, "input_size", 1)
    strides = as_tuple(stride, dimensions, "stride", 1)
    dilations = as_tuple(dilation, dimensions, "dilation", 1)
    spans = tuple(d * (k - 1) + 1 for d, k in zip(dilations, kernel))
    pads = as_pads(padding, spans, circular=padding_mode == "circular")

    outputs, torus, torus_stride, copies = [], [], [], 1
    for n, k, s, (before, after) in zip(sizes, spans, strides, pads):
        if n + before + after < k:
            raise ValueError(
                f"input_size {sizes} with padding {pads} is smaller than the kernel's span {spans}: "
                "there is no output. Give a larger input_size or padding."
            )
        out = (n + before + after - k) // s + 1
        if padding_mode == "zeros":
            step = s
            size = -(-(n + min(max(before, after), k - 1)) // s) * s
        else:
            step = math.gcd(s, n)
            size = n
            copies *= -(-out * step // n)
        # one tap per phase: every frequency gives the same block, one is enough
        torus.append(step if k <= step else size)
        torus_stride.append(step)
        outputs.append(out)
    return ConvGeometry(sizes, tuple(outputs), strides, pads, tuple(torus), tuple(torus_stride), copies)


def dilate_kernel(weight: Tensor, dilation: Sequence[int]) -> Tensor:
    """Set the taps of (out, in, *k) apart by `dilation`, zeros between them."""
    for axis, step in enumerate(dilation, start=2):
        if step > 1 and weight.shape[axis] > 1:
            taps = weight.shape[axis]
            spread = torch.stack([weight] + [torch.zeros_like(weight)] * (step - 1), dim=axis + 1)
            weight = spread.flatten(axis, axis + 1).narrow(axis, 0, step * (taps - 1) + 1)
    return weight


def polyphase_kernel(weight: Tensor, stride: Size) -> Tensor:
    """Regroup a strided kernel into a stride-1 kernel on the s-fold coarser grid.

    Args:
        weight: (out, in, *k).
        stride: int or one a dimension.

    Returns:
        (out, in * prod(s), *ceil(k / s)).
    """
    dimensions = weight.ndim - 2
    strides = as_tuple(stride, dimensions, "stride", 1)
    if all(s == 1 for s in strides):
        return weight
    taps = [-(-k // s) for k, s in zip(weight.shape[2:], strides)]
    spill = [t * s - k for t, s, k in zip(taps, strides, weight.shape[2:])]
    weight = F.pad(weight, [pad for size in reversed(spill) for pad in (0, size)])
    split = weight.reshape(*weight.shape[:2], *(size for pair in zip(taps, strides) for size in pair))
    phases = [3 + 2 * axis for axis in range(dimensions)]
    regrouped = split.permute(0, 1, *phases, *(axis - 1 for axis in phases))
    return regrouped.reshape(weight.shape[0], -1, *taps)


def fold_kernel(weight: Tensor, sizes: Sequence[int]) -> Tensor:
    """Wrap the taps of (out, in, *k) onto a torus of these sizes; taps that fall together are added."""
    for axis, size in enumerate(sizes, start=2):
        taps = weight.shape[axis]
        if taps > size:
            index = torch.arange(taps, device=weight.device) % size
            shape = list(weight.shape)
            shape[axis] = size
            weight = weight.new_zeros(shape).index_add(axis, index, weight)
    return weight


class TorusProblem(NamedTuple):
    """A stride-1 circular convolution whose norm, times sqrt(copies), bounds the convolution it was made from.

    Attributes:
        kernel: (groups, out / groups, in * prod(s) / groups, *taps): the norm is the largest of the groups' norms.
        grid: size of the torus, or None where the bound is meant for every size.
        copies: largest number of times one pixel is read through the padding, or one row repeated; 1 for the usual.
        exact: whether it is the operator itself, and not just an operator that contains it.
        circular: whether the seam of the torus is one of the operator's own; if not, signs may change across it.
    """

    kernel: Tensor
    grid: tuple[int, ...] | None
    copies: int
    exact: bool
    circular: bool


def _padding_copies(mode: str, pads: Sequence[tuple[int, int]], sizes: Sequence[int] | None) -> int:
    """Largest number of copies of one pixel in the padded image."""
    copies = 1
    for axis, (before, after) in enumerate(pads):
        n = None if sizes is None else sizes[axis]
        if before == after == 0:
            continue
        if mode == "replicate":
            copies *= 1 + (before + after if n in (None, 1) else max(before, after))
        else:
            if n is not None and max(before, after) >= n:
                raise ValueError(f"reflect padding {pads} needs more than {max(before, after)} pixels, but got {n}.")
            # the left and the right reflection share a pixel only if they overlap
            both = before > 0 and after > 0
            apart = not both or (n is not None and min(before, n - 2) < max(1, n - 1 - after))
            copies *= 2 if apart else 3
    return copies


def torus_problem(
    weight: Tensor,
    input_size: Size | None = None,
    *,
    padding_mode: str = "zeros",
    padding: Padding | None = None,
    stride: Size = 1,
    dilation: Size = 1,
    groups: int = 1,
) -> TorusProblem:
    """Turn a convolution of any kind into a circular one of stride 1.

    Args:
        weight: (out, in / groups, *k), one to three spatial dimensions; values are moved, never changed.
        input_size: image size; None for a bound that holds for every size.
        padding_mode: "zeros", "circular", "reflect" or "replicate"; of the last two, `copies` is the squared norm of
            the padding map.
        padding, stride, dilation: as in `conv_geometry`.
        groups: number of channel groups.

    Raises:
        ValueError: shapes, sizes or modes that make no convolution; circular padding of more pixels than "same" for
            every size, whose norm has no bound.
    """
    check_kernel(weight, (1, 2, 3))
    dimensions = weight.ndim - 2
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode must be one of {', '.join(PADDING_MODES)}, but got {padding_mode!r}.")
    if not isinstance(groups, int) or groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups must divide the {weight.shape[0]} output channels, but got {groups!r}.")
    strides = as_tuple(stride, dimensions, "stride", 1)
    dilations = list(as_tuple(dilation, dimensions, "dilation", 1))
    spans = [d * (k - 1) + 1 for d, k in zip(dilations, weight.shape[2:])]
    pads = list(as_pads(padding, spans, circular=padding_mode == "circular"))
    sizes = None if input_size is None else list(as_tuple(input_size, dimensions, "input_size", 1))

    copies = 1
    if padding_mode in ("reflect", "replicate"):
        # a convolution without padding of the padded image
        copies = _padding_copies(padding_mode, pads, sizes)
        if sizes is not None:
            sizes = [n + before + after for n, (before, after) in zip(sizes, pads)]
        pads = [(0, 0)] * dimensions
    circular = padding_mode == "circular"
    if sizes is not None:
        # refuses what has no output
        geometry = conv_geometry(
            weight.shape[2:],
            sizes,
            padding_mode="circular" if circular else "zeros",
            padding=pads,
            stride=strides,
            dilation=dilations,
        )
    if not circular or sizes is None:
        # without stride a dilated convolution falls apart into undilated ones, one a phase, of d-fold smaller images
        for axis, (s, d) in enumerate(zip(strides, dilations)):
            if d > 1 and s == 1:
                dilations[axis] = 1
                if not circular:
                    pads[axis] = (-(-pads[axis][0] // d), -(-pads[axis][1] // d))
                if sizes is not None:
                    sizes[axis] = -(-sizes[axis] // d)
    kernel = dilate_kernel(weight, dilations)

    exact = False
    if sizes is None:
        if circular and any(sum(pair) > span - 1 for pair, span in zip(pads, spans)):
            raise ValueError(
                f"circular padding by {pads} gives more outputs than pixels on small images: give input_size."
            )
        # a stride that does not divide the image reads rows of the convolution without stride
        steps: tuple[int, ...] = (1,) * dimensions if circular else strides
        grid = None
    else:
        kernel_size = kernel.shape[2:]
        if circular:
            steps, torus = geometry.torus_stride, geometry.torus
            copies *= geometry.copies
            exact = (
                geometry.copies == 1
                and steps == strides
                and math.prod(geometry.output_size) == math.prod(m // s for m, s in zip(geometry.torus, steps))
            )
        else:
            steps = strides
            ends = [min(max(pair), k - 1) for pair, k in zip(pads, kernel_size)]
            torus = tuple(
                s if k <= s else -(-(n + p) // s) * s for n, p, k, s in zip(sizes, ends, kernel_size, strides)
            )
        grid = tuple(m // s for m, s in zip(torus, steps))
    # a kernel shorter than the stride leaves some phases unread
    kernel = polyphase_kernel(kernel, [min(s, k) for s, k in zip(steps, kernel.shape[2:])])
    return TorusProblem(kernel.reshape(groups, -1, *kernel.shape[1:]), grid, copies, exact, circular)
