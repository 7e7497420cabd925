# SPDX-License-Identifier: Apache-2.0
"""Random convolutions of every kind, and their operators written out by torch's own functions and numpy's paddings."""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor


CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
# numpy's names of the padding modes
PADDINGS = {"circular": "wrap", "reflect": "reflect", "replicate": "edge"}
MODES = ("zeros", *PADDINGS)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# columns and rows of the largest explicit operator
MOST_ENTRIES = 160 * 160


@dataclass(frozen=True)
class Convolution:
    """A weight, the size of its input, and the keywords that `hf_lip.spectral_norm` takes for it."""

    weight: Tensor
    size: tuple[int, ...]
    keywords: dict[str, Any]

    @property
    def pads(self) -> tuple[tuple[int, int], ...]:
        padding = self.keywords["padding"]
        spans = self.spans
        if padding is None:
            same = self.keywords["padding_mode"] == "circular"
            return tuple((k // 2, k - 1 - k // 2 if same else k // 2) for k in spans)
        if isinstance(padding, int):
            return ((padding, padding),) * len(spans)
        return tuple(p if isinstance(p, tuple) else (p, p) for p in padding)

    @property
    def spans(self) -> tuple[int, ...]:
        return tuple(d * (k - 1) + 1 for d, k in zip(self.keywords["dilation"], self.weight.shape[2:]))

    @property
    def output_size(self) -> tuple[int, ...]:
        ends = list(zip(self.size, self.pads, self.spans, self.keywords["stride"]))
        if self.keywords["transposed"]:
            extra = self.keywords["output_padding"]
            return tuple((n - 1) * s + k - sum(pad) + e for (n, pad, k, s), e in zip(ends, extra))
        return tuple((n + sum(pad) - k) // s + 1 for n, pad, k, s in ends)

    def is_possible(self) -> bool:
        """Whether there is an output, which an input pixel reaches, and what reflect padding reads exists."""
        mode = self.keywords["padding_mode"]
        pads = list(zip(self.size, self.pads, self.spans))
        if min(self.output_size) < 1:
            return False
        if self.keywords["transposed"]:
            return all(p[0] < (n - 1) * s + k for (n, p, k), s in zip(pads, self.keywords["stride"]))
        if any(n + sum(p) < k for n, p, k in pads):
            return False
        return mode != "reflect" or all(max(p) < n for n, p, _ in pads)

    @property
    def channels(self) -> tuple[int, int]:
        """(in, out)."""
        first, second = self.weight.shape[0], self.weight.shape[1] * self.keywords["groups"]
        return (first, second) if self.keywords["transposed"] else (second, first)


def padded_indices(size: int, before: int, after: int, mode: str) -> np.ndarray:
    """Which pixel each pixel of the padded line reads; `size` where it reads a zero."""
    if mode == "zeros":
        return np.pad(np.arange(size), (before, after), constant_values=size)
    return np.pad(np.arange(size), (before, after), mode=PADDINGS[mode])  # type: ignore[call-overload]


def explicit_operator(case: Convolution) -> Tensor:
    """The operator as a float64 matrix, a column a pixel of the input."""
    channels = case.channels[0]
    keywords, dimensions = case.keywords, len(case.size)
    count = channels * int(np.prod(case.size))
    images = torch.eye(count, dtype=torch.float64).reshape(count, channels, *case.size)
    shared = {"stride": keywords["stride"], "dilation": keywords["dilation"], "groups": keywords["groups"]}
    weight = case.weight.double()
    if keywords["transposed"]:
        # padding takes pixels away from the full output, on both sides; torch itself knows equal sides only
        full = TRANSPOSED[dimensions](images, weight, **shared)
        extra = keywords["output_padding"]
        crop = [(-before, e - after) for (before, after), e in zip(case.pads, extra)]
        return F.pad(full, [c for pair in reversed(crop) for c in pair]).flatten(1).T
    for axis, (size, (before, after)) in enumerate(zip(case.size, case.pads), start=2):
        index = torch.from_numpy(padded_indices(size, before, after, keywords["padding_mode"]))
        zero = images.narrow(axis, 0, 1) * 0
        images = torch.cat([images, zero], dim=axis).index_select(axis, index)
    return CONVOLUTIONS[dimensions](images, weight, **shared).flatten(1).T


def exact_norm(case: Convolution) -> float:
    return torch.linalg.svdvals(explicit_operator(case))[0].item()


def _values(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "signs":
        return weight.sign()
    if kind == "positive":
        return weight.abs()
    if kind == "one entry":
        return torch.zeros_like(weight).index_put_(
            [torch.tensor([seed % n]) for n in shape], torch.tensor(1.0).double()
        )
    if kind == "uneven":
        return weight * torch.exp(4 * torch.randn((shape[0], *[1] * (len(shape) - 1)), generator=generator).double())
    if kind == "smooth":
        return weight.mean(dim=tuple(range(2, len(shape))), keepdim=True).expand(shape) + 0.1 * weight
    return weight


@st.composite
def convolutions(draw: st.DrawFn, transposed: bool | None = None, modes: tuple[str, ...] = MODES) -> Convolution:
    """Convolutions in one to three dimensions whose explicit operator is small."""
    dimensions = draw(st.integers(1, 3))
    most_taps, most_pixels = {1: (9, 24), 2: (5, 8), 3: (3, 4)}[dimensions]

    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dimensions))

    is_transposed = draw(st.booleans()) if transposed is None else transposed
    groups = draw(st.sampled_from((1, 1, 1, 2, 3)))
    most_channels = 4 if groups == 1 else 2
    first = groups * draw(st.integers(1, most_channels))
    kernel, size = sizes(1, most_taps), sizes(1, most_pixels)
    stride, dilation = draw(st.sampled_from(((1, 1), (1, 3), (3, 1), (4, 3))))
    stride, dilation = sizes(1, stride), sizes(1, dilation)
    mode = "zeros" if is_transposed else draw(st.sampled_from(modes))
    kind = draw(st.sampled_from(("same", "one int", "ints", "pairs")))
    largest = most_taps + 1
    padding: Any = None
    if kind == "one int":
        padding = draw(st.integers(0, largest))
    elif kind == "ints":
        padding = sizes(0, largest)
    elif kind == "pairs":
        padding = tuple((draw(st.integers(0, largest)), draw(st.integers(0, largest))) for _ in range(dimensions))
    extra = (0,) * dimensions
    if is_transposed:
        extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation))
    dtype = draw(st.sampled_from(DTYPES))
    exponents = {torch.float16: (-4, 3), torch.bfloat16: (-30, 30), torch.float32: (-30, 30), torch.float64: (-30, 30)}
    scale = 10.0 ** draw(st.sampled_from((0, 0, *exponents[dtype])))
    values = draw(st.sampled_from(("gaussian", "gaussian", "signs", "positive", "one entry", "uneven", "smooth")))
    shape = (first, draw(st.integers(1, most_channels)), *kernel)
    weight = (_values(values, shape, draw(st.integers(0, 2**32 - 1))).clamp(-60, 60) * scale).to(dtype)
    keywords = {
        "stride": stride,
        "dilation": dilation,
        "groups": groups,
        "padding": padding,
        "padding_mode": mode,
        "transposed": is_transposed,
        "output_padding": extra,
    }
    case = Convolution(weight, size, keywords)
    assume(case.is_possible())
    pixels = np.prod(size) * case.channels[0], np.prod(case.output_size) * case.channels[1]
    assume(np.prod(pixels) <= MOST_ENTRIES)
    return case


def sizes_around(case: Convolution) -> list[tuple[int, ...]]:
    """A few sizes at and below the case's own, for bounds that hold for every size."""
    return list(itertools.product(*[sorted({1, (n + 1) // 2, n}) for n in case.size]))
