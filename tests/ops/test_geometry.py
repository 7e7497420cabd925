# SPDX-License-Identifier: Apache-2.0
"""Every convolution lies on its torus: sizes, paddings, strides, dilations, groups against operators written out."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

from hf_lip.ops import conv_frequency_blocks
from hf_lip.ops.conv_operator import pad_image
from hf_lip.ops.geometry import (
    _padding_copies,
    as_pads,
    as_tuple,
    conv_geometry,
    dilate_kernel,
    fold_kernel,
    polyphase_kernel,
    torus_problem,
)

from .explicit_operators import MODES, Convolution, convolutions, exact_norm, padded_indices
from .test_conv_interval import drawn


DOUBLE = torch.float64


def torus_norm(problem) -> float:
    """Norm of the circular convolution that a problem names, by its Fourier blocks."""
    return max(torch.linalg.svdvals(conv_frequency_blocks(k, problem.grid)).amax().item() for k in problem.kernel)


@drawn(300)
@given(convolutions(transposed=False))
def test_torus_contains_the_operator(case):
    keywords = {key: value for key, value in case.keywords.items() if key not in ("transposed", "output_padding")}
    problem = torus_problem(case.weight.double(), case.size, **keywords)
    bound = torus_norm(problem) * math.sqrt(problem.copies)
    exact = exact_norm(case)
    assert bound >= exact * (1 - 1e-12)
    if problem.exact:
        assert bound <= exact * (1 + 1e-12)
    if keywords["padding_mode"] in ("zeros", "circular") and case.keywords["padding"] is None:
        assert problem.copies == 1


@drawn(200)
@given(convolutions(transposed=False, modes=("zeros", "circular")))
def test_geometry_is_that_of_torch(case):
    keywords = case.keywords
    found = conv_geometry(
        case.weight.shape[2:],
        case.size,
        padding_mode=keywords["padding_mode"],
        padding=keywords["padding"],
        stride=keywords["stride"],
        dilation=keywords["dilation"],
    )
    assert found.output_size == case.output_size
    assert found.pads == case.pads
    assert all(m % s == 0 for m, s in zip(found.torus, found.torus_stride))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("mode", MODES)
def test_paddings_are_those_of_numpy_and_torch(mode, size):
    line = torch.randn(1, 1, size)
    for before, after in itertools.product(range(10), repeat=2):
        if mode == "reflect" and max(before, after) >= size:
            continue
        expected = torch.cat([line[0, 0], torch.zeros(1)])[padded_indices(size, before, after, mode)]
        assert torch.equal(pad_image(line, ((before, after),), mode)[0, 0], expected)
        torch_mode = "constant" if mode == "zeros" else mode
        if mode != "circular" or max(before, after) <= size:
            assert torch.equal(F.pad(line, (before, after), mode=torch_mode)[0, 0], expected)


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_padding_copies_are_the_squared_norm_of_the_padding(mode):
    for n, before, after in itertools.product(range(1, 9), range(8), range(8)):
        if mode == "reflect" and max(before, after) >= n:
            with pytest.raises(ValueError, match="needs more than"):
                _padding_copies(mode, [(before, after)], [n])
            continue
        counts = np.bincount(padded_indices(n, before, after, mode), minlength=n).max()
        assert _padding_copies(mode, [(before, after)], [n]) == counts
        assert _padding_copies(mode, [(before, after)], None) >= counts
    pairs, sizes = [(1, 2), (0, 1), (3, 3)], [5, 4, 9]
    product = math.prod(_padding_copies(mode, [pair], [n]) for pair, n in zip(pairs, sizes))
    assert _padding_copies(mode, pairs, sizes) == product


def test_same_padding():
    assert as_pads(None, (3, 4, 1), circular=False) == ((1, 1), (2, 2), (0, 0))
    assert as_pads(None, (3, 4, 1), circular=True) == ((1, 1), (2, 1), (0, 0))
    assert as_pads(2, (3, 4), circular=False) == ((2, 2), (2, 2))
    assert as_pads((1, 2), (3, 4), circular=False) == ((1, 1), (2, 2))
    assert as_pads(((1, 2), (0, 3)), (3, 4), circular=False) == ((1, 2), (0, 3))
    assert as_pads([[1, 2]], (3,), circular=False) == ((1, 2),)


def test_kernel_transformations_move_values_only():
    weight = torch.randn(2, 3, 3, 4)
    dilated = dilate_kernel(weight, (2, 3))
    assert dilated.shape == (2, 3, 5, 10)
    assert torch.equal(dilated[:, :, ::2, ::3], weight)
    assert dilated.count_nonzero() == weight.count_nonzero()
    phases = polyphase_kernel(weight, (2, 1))
    assert phases.shape == (2, 6, 2, 4)
    assert torch.equal(phases[:, ::2, :, :][:, :, 0], weight[:, :, 0])
    assert torch.equal(phases[:, 1::2, 0], weight[:, :, 1])
    assert not phases[:, 1::2, 1].any()
    folded = fold_kernel(weight, (2, 8))
    torch.testing.assert_close(folded[:, :, 0], weight[:, :, 0] + weight[:, :, 2])
    assert torch.equal(folded[:, :, 1], weight[:, :, 1])


def test_dilation_without_stride_is_no_larger_than_the_phases():
    """Why dilated convolutions are bounded on a smaller torus: they fall apart into interleaved ones."""
    for size, dilation, pads in itertools.product((1, 4, 7, 10), (2, 3), ((0, 0), (2, 2), (5, 1), (0, 7))):
        weight = torch.randn(2, 2, 3, dtype=DOUBLE)
        keywords = {
            "padding_mode": "zeros", "padding": (pads,), "stride": (1,), "dilation": (dilation,), "groups": 1,
            "transposed": False, "output_padding": (0,),
        }  # fmt: skip
        case = Convolution(weight, (size,), keywords)
        if not case.is_possible():
            continue
        problem = torus_problem(weight, size, padding=(pads,), dilation=dilation)
        assert problem.kernel.shape[3:] == (3,)
        assert problem.grid[0] <= math.ceil(size / dilation) + 2
        assert torus_norm(problem) >= exact_norm(case) * (1 - 1e-12)


def test_wrong_arguments_are_errors():
    weight = torch.ones(4, 3, 3, 3)
    cases = [
        (lambda: as_tuple((1, 2, 3), 2, "size", 1), "size must be an int or a pair of ints"),
        (lambda: as_tuple(True, 2, "size", 1), "size must be an int"),
        (lambda: as_tuple("33", 2, "size", 1), "size must be an int"),
        (lambda: as_tuple(0, 3, "size", 1), "3 ints, each at least 1"),
        (lambda: as_pads(((1, 1),), (3, 3), circular=False), "padding must hold 2 pairs"),
        (lambda: as_pads(((1, 1), (1, -1)), (3, 3), circular=False), "padding must be"),
        (lambda: conv_geometry(3, 4, padding_mode="wrap"), "'zeros' or 'circular'"),
        (lambda: conv_geometry(3, 1, padding=0), "no output"),
        (lambda: torus_problem(weight, 5, padding_mode="wrap"), "one of zeros, circular, reflect, replicate"),
        (lambda: torus_problem(weight, 5, groups=3), "groups must divide the 4 output channels"),
        (lambda: torus_problem(weight, 5, groups=2.0), "groups"),
        (lambda: torus_problem(weight[0, 0], 5), "kernel of shape"),
        (lambda: torus_problem(weight, 2, padding_mode="reflect", padding=2), "reflect padding"),
        (lambda: torus_problem(weight, None, padding_mode="circular", padding=2), "give input_size"),
        (lambda: polyphase_kernel(weight, 0), "stride"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
