# SPDX-License-Identifier: Apache-2.0
"""Intervals of convolutions: lower <= norm of the operator written out <= upper, for convolutions of every kind."""

import math
import warnings
from collections import defaultdict
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hf_lip import spectral_norm
from hf_lip.ops import conv_frequency_blocks, conv_interval, conv_matrix, exact_conv_norm, symbol
from hf_lip.ops.conv_interval import conv_norm
from hf_lip.ops.conv_operator import ConvArguments, operator_matrix, part_of_large_image, stretch_lower_bound
from hf_lip.ops.geometry import as_tuple, dilate_kernel, polyphase_kernel

from .explicit_operators import MODES, Convolution, convolutions, exact_norm, explicit_operator, sizes_around
from .test_certified import is_positive_definite, proves_norm_below, rationals


DOUBLE = torch.float64
# of the reference, a float64 svd
TOLERANCE = 1e-13
TOLERANCES = st.sampled_from((0.0, 1e-6, 1e-3, 1e-3, 0.1))
# "explicit" is what small operators take by themselves, "frequencies" what all others do
PATHS = {"explicit": conv_interval._EXPLICIT_SIDE, "frequencies": 0}


def drawn(cases: int):
    return settings(
        max_examples=cases,
        derandomize=True,
        deadline=None,
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


def checked(case: Convolution, rtol: float):
    """The interval of a case, after a look at both of its ends and at its width."""
    exact = exact_norm(case)
    found = spectral_norm(case.weight, case.size, rtol=rtol, **case.keywords)
    assert found.certified
    assert found.lower <= exact * (1 + TOLERANCE)
    assert found.upper >= exact * (1 - TOLERANCE)
    assert math.isfinite(found.upper)
    assert found.relative_width <= max(rtol, 1e-7) or found.reason
    return found


@pytest.mark.parametrize(("path", "cases"), [("explicit", 650), ("frequencies", 700)])
def test_interval_holds_the_norm_of_the_explicit_operator(path, cases, monkeypatch):
    monkeypatch.setattr(conv_interval, "_EXPLICIT_SIDE", PATHS[path])
    methods = set()

    @drawn(cases)
    @given(convolutions(), TOLERANCES)
    def holds(case, rtol):
        methods.add(checked(case, rtol).method)

    holds()
    wanted = {"cholesky", "torus cholesky"} | (
        {"explicit cholesky"} if path == "explicit" else {"twisted torus cholesky"}
    )
    assert wanted <= methods


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_interval_holds_in_ten_thousand_cases(path, monkeypatch):
    monkeypatch.setattr(conv_interval, "_EXPLICIT_SIDE", PATHS[path])
    widths = defaultdict(list)
    count = 0

    @drawn(8_000)
    @given(convolutions(), st.just(1e-3))
    def holds(case, rtol):
        nonlocal count
        count += 1
        found = checked(case, rtol)
        mode = "transposed" if case.keywords["transposed"] else case.keywords["padding_mode"]
        widths[mode, found.method].append(found.relative_width)

    holds()
    print(f"\n{path}: {count} cases, no violation; relative widths for rtol 1e-3")
    for (mode, method), values in sorted(widths.items()):
        quantiles = torch.tensor(values, dtype=DOUBLE).quantile(torch.tensor([0.5, 0.9, 1.0], dtype=DOUBLE)).tolist()
        share = sum(width <= 1e-3 for width in values) / len(values)
        print(
            f"  {mode:10s} {method:24s} {len(values):5d}   median {quantiles[0]:.1e}   90 % {quantiles[1]:.1e}   "
            f"largest {quantiles[2]:.1e}   within rtol {share:.0%}"
        )
    assert count >= 8_000


def laurent_ceiling(case: Convolution) -> float:
    """An upper bound of the norm on the infinite grid: 48 frequencies an axis, the cosines divided off."""
    strides, groups = case.keywords["stride"], case.keywords["groups"]
    weight = dilate_kernel(case.weight.double(), case.keywords["dilation"])
    kernels = polyphase_kernel(weight, strides).unflatten(0, (groups, -1))
    taps = kernels.shape[3:]
    top = max(torch.linalg.svdvals(conv_frequency_blocks(k, (48,) * len(taps))).amax().item() for k in kernels)
    return top / math.prod(math.cos((t - 1) * math.pi / 96) for t in taps)


def check_all_sizes(case: Convolution, rtol: float) -> None:
    keywords = dict(case.keywords)
    if keywords["padding_mode"] == "circular" and any(sum(p) > k - 1 for p, k in zip(case.pads, case.spans)):
        with pytest.raises(ValueError, match="give input_size"):
            spectral_norm(case.weight, None, **keywords)
        return
    found = spectral_norm(case.weight, None, rtol=rtol, **keywords)
    assert found.certified
    assert found.relative_width <= max(rtol, 1e-7) or found.reason
    assert found.lower <= laurent_ceiling(case) * (1 + TOLERANCE)
    for size in sizes_around(case):
        other = Convolution(case.weight, size, keywords)
        if other.is_possible():
            assert found.upper >= exact_norm(other) * (1 - TOLERANCE)


@drawn(150)
@given(convolutions(), st.sampled_from((1e-3, 0.1)))
def test_bound_for_all_sizes_is_above_every_size(case, rtol):
    check_all_sizes(case, rtol)


@pytest.mark.slow
@drawn(2_000)
@given(convolutions(), TOLERANCES)
def test_bound_for_all_sizes_is_above_every_size_in_thousands_of_cases(case, rtol):
    check_all_sizes(case, rtol)


@drawn(100)
@given(convolutions())
def test_operator_matrix_is_what_torch_computes(case):
    keywords, groups = case.keywords, case.keywords["groups"]
    if keywords["transposed"]:
        return
    arguments = ConvArguments(case.pads, keywords["padding_mode"], keywords["stride"], keywords["dilation"], groups)
    weight = case.weight.double()
    matrix = torch.block_diag(*operator_matrix(weight, case.size, arguments))
    scale = weight.abs().max().item()
    torch.testing.assert_close(matrix, explicit_operator(case), rtol=1e-13, atol=1e-13 * scale)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("mode", "stride"), [("circular", 1), ("circular", 2), ("zeros", 1), ("zeros", 2)])
def test_both_ends_are_proved_over_the_rationals(mode, stride, path, monkeypatch):
    monkeypatch.setattr(conv_interval, "_EXPLICIT_SIDE", PATHS[path])
    for _ in range(4):
        weight = torch.randn(2, 1, 3).to(torch.bfloat16)
        options = {"padding_mode": mode, "padding": (0, 1), "stride": (1, stride)}
        # with one more axis, for the reference
        matrix = conv_matrix(weight[:, :, None], (1, 6), **options)
        found = conv_norm(weight, 6, padding_mode=mode, padding=1, stride=stride, rtol=0.0)
        assert proves_norm_below(matrix, found.upper)
        assert not proves_norm_below(matrix, found.lower)


def test_norm_known_exactly_is_inside():
    # all taps positive: on a torus and on the infinite grid the norm is the sum of the taps, 45/8
    weight = torch.arange(1, 10).reshape(1, 1, 3, 3) / 8
    for size, mode in ((3, "circular"), (5, "circular"), (None, "zeros"), (None, "circular"), (300, "circular")):
        found = conv_norm(weight, size, padding_mode=mode, rtol=1e-9)
        assert found.lower <= 45 / 8 <= found.upper
        assert found.relative_width < 1e-8


@pytest.mark.parametrize("rtol", [0.0, 1e-9, 1e-6, 1e-3, 0.2])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((3, 4, 3, 3), {"input_size": 6, "padding_mode": "circular"}),
        ((3, 4, 3, 3), {"input_size": 5, "padding_mode": "zeros"}),
        ((3, 4, 3, 3), {"input_size": None}),
        ((40, 30, 3, 3), {"input_size": 8, "padding_mode": "circular"}),
        ((4, 2, 5), {"input_size": None, "stride": 2}),
        ((6, 3, 4, 4), {"input_size": 224, "stride": 4, "padding": 0}),
    ],
)
def test_width_asked_for_is_reached(shape, options, rtol):
    weight = torch.randn(shape)
    found = conv_norm(weight, **options, rtol=rtol)
    assert found.reason is None
    assert found.relative_width <= max(rtol, 1e-7)


def test_widths_that_cannot_be_had_come_with_a_reason():
    weight = torch.randn(64, 32, 3, 3)
    for mode in ("zeros", "reflect", "replicate"):
        found = conv_norm(weight, 6, padding_mode=mode)
        assert found.relative_width > 1e-3
        assert mode in found.reason
    assert "padding reads a pixel 9 times" in conv_norm(weight, None, padding_mode="replicate", padding=1).reason
    strided = conv_norm(torch.ones(1, 1, 2), None, stride=2, padding_mode="circular")
    assert "stride does not divide" in strided.reason


def test_lower_end_for_all_sizes_of_a_strided_circular_convolution_is_reached():
    # windows overlap at the seam only: no size comes near the norm without stride, which is 2
    weight = torch.ones(1, 1, 2)
    found = conv_norm(weight, None, stride=2, padding_mode="circular")
    norms = [exact_conv_norm(weight[:, :, None], (1, n), padding_mode="circular", stride=(1, 2)) for n in range(2, 12)]
    assert found.lower <= max(norms) <= found.upper
    assert found.lower >= math.sqrt(2) * (1 - 1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_one_tap_kernels_are_matrices(mode, monkeypatch):
    monkeypatch.setattr(conv_interval, "_EXPLICIT_SIDE", 0)
    weight = torch.randn(20, 30, 1, 1)
    exact = torch.linalg.svdvals(weight[..., 0, 0].double())[0].item()
    for options in ({}, {"stride": 2}, {"dilation": 3}):
        found = conv_norm(weight, 7, padding_mode=mode, **options)
        assert found.method == "cholesky"
        assert found.reason is None
        assert found.lower <= exact <= found.upper <= exact * (1 + 1e-3)
    patches = torch.randn(8, 3, 4, 4)
    exact = torch.linalg.svdvals(patches.flatten(1).double())[0].item()
    for size, stride in ((16, 4), (17, 4), (None, 4), (None, 6)):
        found = conv_norm(patches, size, stride=stride, padding=0)
        assert (found.method, found.reason) == ("cholesky", None)
        assert found.lower <= exact <= found.upper


def test_twist_brings_zero_padding_closer():
    # all taps positive: the norm lies at frequency 0, which the plain torus has and the twisted one has not
    weight = torch.rand(20, 20, 3, 3)
    found = conv_norm(weight, 9)
    assert found.method == "twisted torus cholesky"
    torus = torch.linalg.svdvals(conv_frequency_blocks(weight.double(), 10)).amax().item()
    assert found.upper < torus * (1 - 1e-2)
    assert found.lower <= exact_conv_norm(weight[:, :1], 9) * 20


@pytest.mark.parametrize("twist", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_every_twisted_torus_contains_the_zero_padded_operator(twist):
    # the image n + p at the corner of a torus of that size, signs changing across the seams
    for _ in range(30):
        kernel = torch.randn(2, 2, *torch.randint(1, 6, (2,)).tolist(), dtype=DOUBLE)
        size, stride = torch.randint(1, 6, (2,)).tolist(), torch.randint(1, 4, (2,)).tolist()
        pads = tuple(tuple(torch.randint(0, 7, (2,)).tolist()) for _ in range(2))
        case = Convolution(kernel, tuple(size), {
            "padding_mode": "zeros", "padding": pads, "stride": tuple(stride), "dilation": (1, 1), "groups": 1,
            "transposed": False, "output_padding": (0, 0),
        })  # fmt: skip
        if not case.is_possible():
            continue
        problem = conv_interval.torus_problem(kernel, size, padding=pads, stride=stride)
        blocks = symbol.Symbol(problem.kernel).grams(*symbol.grid_frequencies(problem.grid, twist))
        assert torch.linalg.eigvalsh(blocks).amax().clamp_min(0).sqrt().item() >= exact_norm(case) * (1 - 1e-10)


@pytest.mark.parametrize("entries", [1, 50, 700])
@pytest.mark.parametrize("options", [{"padding_mode": "circular"}, {"padding_mode": "zeros"}, {"input_size": None}])
def test_frequencies_in_small_chunks_give_the_same_interval(entries, options, monkeypatch):
    monkeypatch.setattr(conv_interval, "_EXPLICIT_SIDE", 0)
    weight = torch.randn(6, 3, 3, 3)
    options = {"input_size": 7, **options}
    whole = [conv_norm(weight, **options, groups=groups, rtol=1e-9) for groups in (1, 2)]
    monkeypatch.setattr(conv_interval, "_CHUNK_ENTRIES", entries)
    for groups, expected in zip((1, 2), whole):
        found = conv_norm(weight, **options, groups=groups, rtol=1e-9)
        assert found.upper == pytest.approx(expected.upper, rel=1e-8)


def test_branch_and_bound_that_runs_out_stays_above(monkeypatch):
    weight = torch.randn(4, 3, 3, 3)
    tight = conv_norm(weight, None, rtol=1e-6)
    for limits in ({"_CELL_WORK": 0.0}, {"_MOST_CELLS": 1}, {"_CELL_WORK": 2e5}):
        with monkeypatch.context() as patch:
            for name, value in limits.items():
                patch.setattr(conv_interval, name, value)
            found = conv_norm(weight, None, rtol=1e-6)
        assert found.lower <= tight.upper
        assert found.upper >= tight.lower
        assert "work limit" in found.reason
        assert found.relative_width < 0.3


def test_flat_symbols_end_soon():
    # a shift: every frequency has norm 1, no cell can be closed early
    for shape in ((1, 1, 3, 3), (1, 1, 7, 7), (1, 1, 3, 3, 3), (4, 4, 3, 3)):
        weight = torch.zeros(shape)
        for channel in range(shape[0]):
            weight[(channel, channel, *(0 for _ in shape[2:]))] = 1
        found = conv_norm(weight, None, rtol=1e-2)
        assert found.lower <= 1 <= found.upper <= 1.02
        assert found.relative_width <= 1e-2 or "work limit" in found.reason


@pytest.mark.parametrize("mode", MODES)
def test_large_images_take_the_branch_and_bound(mode):
    weight = torch.randn(4, 3, 3, 3)
    everywhere = conv_norm(weight, None)
    found = conv_norm(weight, (300, 2000), padding_mode=mode)
    assert found.method == "frequency cells"
    if mode in ("zeros", "circular"):
        assert found.lower <= everywhere.upper
        assert found.relative_width <= 1e-3
        assert found.reason is None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stride", [1, 3])
def test_part_of_a_large_image_bounds_from_below(mode, stride, monkeypatch):
    monkeypatch.setattr("hf_lip.ops.conv_operator._MOST_PIXELS", 160)
    for seed in range(10):
        weight = torch.randn(2, 1, 3, 2, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
        arguments = ConvArguments(((2, 1), (0, 3)), mode, (stride, 1), (1, 1), 1)
        size = (21, 14 + seed)
        part, operator = part_of_large_image(weight, size, arguments)
        assert part != size
        keywords = {
            "padding_mode": mode, "padding": arguments.pads, "stride": arguments.stride, "dilation": (1, 1),
            "groups": 1, "transposed": False, "output_padding": (0, 0),
        }  # fmt: skip
        exact = exact_norm(Convolution(weight, size, keywords))
        inner = torch.linalg.svdvals(operator_matrix(weight, part, operator)[0])[0].item()
        assert inner <= exact * (1 + TOLERANCE)
        low = stretch_lower_bound(weight, part, operator, 12, math.inf, 30)
        assert inner * 0.99 <= low <= inner


def test_sizes_in_the_thousands_neither_overflow_nor_take_long():
    weight = torch.randn(3, 2, 3, 3)
    everywhere = conv_norm(weight, None)
    for size in ((4093, 4099), (1, 100_003), (65_536, 7)):
        for mode in ("zeros", "circular"):
            found = conv_norm(weight, size, padding_mode=mode)
            assert found.lower <= everywhere.upper
            assert found.lower > 0
    line = torch.randn(2, 2, 9)
    found = conv_norm(line, 1_000_003, padding_mode="circular")
    assert found.relative_width <= 1e-3
    volume = torch.randn(2, 2, 3, 3, 3)
    assert conv_norm(volume, (97, 101, 103)).relative_width <= 2e-3


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [None, 5])
@pytest.mark.parametrize("mode", ["zeros", "circular", "replicate"])
def test_norm_scales_with_the_weight(size, mode, path, monkeypatch):
    monkeypatch.setattr(conv_interval, "_EXPLICIT_SIDE", PATHS[path])
    weight = torch.randn(3, 2, 3, 3, dtype=DOUBLE)
    reference = conv_norm(weight, size, padding_mode=mode)
    for exponent in (-1030, -900, 900, 1010):
        half = 2.0 ** (exponent // 2)
        rest = 2.0 ** (exponent - exponent // 2)
        scaled = weight * half * rest
        found = conv_norm(scaled, size, padding_mode=mode)
        # compared as rationals: the numbers leave the range of floats
        factor = Fraction(half) * Fraction(rest)
        loss = Fraction(1, 10**9) if exponent > -1020 else Fraction(1, 10**2)
        for end in ("lower", "upper"):
            expected = Fraction(getattr(reference, end)) * factor
            assert abs(Fraction(getattr(found, end)) - expected) <= loss * expected
    assert conv_norm(torch.full((2, 2, 3, 3), 1.7e308, dtype=DOUBLE), size, padding_mode=mode).upper == math.inf
    smallest = torch.zeros(1, 1, 3, 3, dtype=DOUBLE)
    smallest[0, 0, 1, 1] = 5e-324
    found = conv_norm(smallest, size, padding_mode="zeros")
    assert 0 <= found.lower <= 5e-324 <= found.upper <= 2e-323


def test_groups_of_very_different_scales():
    weight = torch.randn(4, 2, 3, 3, dtype=DOUBLE)
    weight[2:] *= 1e-200
    for size in (None, 4, 12):
        found = conv_norm(weight, size, groups=2, padding_mode="circular")
        alone = conv_norm(weight[:2], size, padding_mode="circular")
        assert found.upper == pytest.approx(alone.upper, rel=1e-3)
    weight[:2] = 0
    found = conv_norm(weight, 4, groups=2, padding_mode="circular")
    assert found.upper == pytest.approx(conv_norm(weight[2:], 4, padding_mode="circular").upper, rel=1e-3)


def test_zero_kernels_are_exactly_zero():
    zero = torch.zeros(3, 4, 3, 3)
    for size, mode in ((None, "zeros"), (5, "circular"), (5, "replicate")):
        found = conv_norm(zero, size, padding_mode=mode)
        assert (found.lower, found.upper, found.reason) == (0.0, 0.0, None)
        assert found.relative_width == 0.0
    # a stride that jumps over the image: every output lies in the padding
    found = conv_norm(torch.randn(2, 3, 1), 1, stride=3, padding=1)
    assert (found.lower, found.upper, found.reason) == (0.0, 0.0, None)
    # taps that cancel at the only frequency are no zero kernel
    found = conv_norm(torch.tensor([[[[1.0, -1.0]]]]), 1, padding_mode="circular")
    assert 0.0 == found.lower <= found.upper < 1e-6
    assert "cancel" in found.reason


def test_bounds_do_not_depend_on_modes_threads_or_random_numbers():
    kernels = [(torch.randn(3, 4, 3, 3), 5), (torch.randn(30, 30, 3, 3), 32), (torch.randn(30, 2, 3, 3), None)]
    calls = [lambda k=k, n=n: conv_norm(k, n) for k, n in kernels]
    expected = [call() for call in calls]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert [call() for call in calls] == expected
    assert torch.equal(torch.get_rng_state(), state)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"), torch.inference_mode():
        assert [call() for call in calls] == expected
    with torch.inference_mode():
        inside = [(kernel.clone(), size) for kernel, size in kernels]
    assert [conv_norm(kernel, size) for kernel, size in inside] == expected
    parameter = torch.nn.Parameter(kernels[0][0])
    assert conv_norm(parameter, 5) == expected[0]


def test_memory_layout_does_not_matter():
    weight = torch.randn(6, 4, 3, 5)
    expected = conv_norm(weight, 9, padding=1)
    for other in (
        weight.to(memory_format=torch.channels_last),
        weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        torch.stack([weight, weight], dim=-1)[..., 0],
    ):
        assert not other.is_contiguous()
        found = conv_norm(other, 9, padding=1)
        assert found.upper == pytest.approx(expected.upper, rel=1e-9)


@pytest.mark.parametrize("garbage", ["zero", "nan", "infinite", "tiny", "huge", "orthogonal", "random"])
def test_bound_survives_vectors_that_are_garbage(garbage, monkeypatch):
    """Vectors only guide the search: whatever they are, the ends hold."""

    def useless(matrices, num_steps):
        count, side = matrices.shape[:2]
        vectors = torch.zeros(count, side, dtype=matrices.dtype)
        fill = {"nan": math.nan, "infinite": math.inf, "tiny": 1e-161, "huge": 1e200}
        if garbage in fill:
            vectors[:, 0] = fill[garbage]
        elif garbage == "orthogonal":
            vectors = torch.linalg.eigh(matrices).eigenvectors[..., 0]
        elif garbage == "random":
            vectors = torch.randn(count, side, dtype=matrices.dtype)
        return vectors

    kernels = [torch.randn(3, 2, 3, 3), torch.randn(26, 25, 2, 1)]
    tight = [[conv_norm(k, n, padding_mode=m) for n, m in ((6, "circular"), (None, "zeros"))] for k in kernels]
    # without a lower end no cell is closed early
    monkeypatch.setattr(conv_interval, "_MOST_CELLS", 200)
    for module in (conv_interval, "hf_lip.ops.eigenvalue"):
        target = f"{module}.top_eigenvectors" if isinstance(module, str) else f"{module.__name__}.top_eigenvectors"
        monkeypatch.setattr(target, useless)
    for kernel, (circular, everywhere) in zip(kernels, tight):
        for expected, found in (
            (circular, conv_norm(kernel, 6, padding_mode="circular")),
            (everywhere, conv_norm(kernel, None)),
        ):
            assert found.upper >= expected.lower
            assert found.lower <= expected.upper
            assert math.isfinite(found.upper)


def test_wrong_operator_estimates_cannot_break_the_lower_end(monkeypatch):
    weight = torch.randn(3, 2, 3, 3)
    arguments = ConvArguments(((1, 1), (1, 1)), "zeros", (1, 1), (1, 1), 1)
    exact = exact_conv_norm(weight, 6)
    eigh = torch.linalg.eigh

    def wrong(matrix):
        values, vectors = eigh(matrix)
        return values * 7, vectors.flip(-1)

    monkeypatch.setattr(torch.linalg, "eigh", wrong)
    assert 0 <= stretch_lower_bound(weight.double(), (6, 6), arguments, 1, math.inf, 5) <= exact
    monkeypatch.setattr(
        "hf_lip.ops.conv_operator._normal_map", lambda x, kernel, arguments: torch.full_like(x, math.nan)
    )
    assert 0 <= stretch_lower_bound(weight.double(), (6, 6), arguments, 1, math.inf, 5) <= exact


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(bad):
    weight = torch.ones(2, 3, 3, 3)
    weight[1, 1, 0, 2] = bad
    for size in (None, 4):
        with pytest.raises(ValueError, match="not finite"):
            conv_norm(weight, size)


def test_wrong_arguments_are_errors():
    weight = torch.ones(2, 3, 3, 3)
    cases = [
        (lambda: conv_norm(torch.ones(2, 3), 4), ValueError, "kernel of shape"),
        (lambda: conv_norm(torch.ones(2, 3, 0, 3), 4), ValueError, "kernel of shape"),
        (lambda: conv_norm(torch.ones(2, 1, 1, 1, 1, 1), 4), ValueError, "kernel of shape"),
        (lambda: conv_norm(weight, 4, padding_mode="same"), ValueError, "padding_mode must be one of zeros"),
        (lambda: conv_norm(weight, 4, groups=3), ValueError, "groups must divide"),
        (lambda: conv_norm(weight, 4, groups=0), ValueError, "groups"),
        (lambda: conv_norm(weight, 0), ValueError, "input_size"),
        (lambda: conv_norm(weight, (4, 4, 4)), ValueError, "input_size"),
        (lambda: conv_norm(weight, 2, padding=0), ValueError, "no output"),
        (lambda: conv_norm(weight, 4, padding=-1), ValueError, "padding"),
        (lambda: conv_norm(weight, 4, padding=((1, 1),)), ValueError, "pairs"),
        (lambda: conv_norm(weight, 4, stride=0), ValueError, "stride"),
        (lambda: conv_norm(weight, 4, dilation=1.5), ValueError, "dilation"),
        (lambda: conv_norm(weight, 2, padding=2, padding_mode="reflect"), ValueError, "reflect padding"),
        (lambda: conv_norm(weight, None, padding=3, padding_mode="circular"), ValueError, "give input_size"),
        (lambda: conv_norm(weight, 4, rtol=1.0), ValueError, "rtol"),
        (lambda: conv_norm(weight, 4, rtol=-1e-3), ValueError, "rtol"),
        (lambda: conv_norm(weight.long(), 4), TypeError, "floating point"),
        (lambda: conv_norm(weight.to(torch.float8_e4m3fn), 4), TypeError, "float8"),
        (lambda: conv_norm(weight.to("meta"), 4), TypeError, "meta device"),
        (lambda: conv_norm(weight.to_sparse(), 4), TypeError, "to_dense"),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)
    cases.append((lambda: conv_norm(quantised, 4), TypeError, "Dequantise"))
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


def test_certified_blocks_are_definite_over_the_rationals():
    """The chain of proof once more, at one frequency where everything is rational: w = 0."""
    weight = torch.randn(3, 2, 3).to(torch.bfloat16)
    found = conv_norm(weight, None, rtol=0.0)
    total = [[sum(Fraction(x) for x in taps) for taps in row] for row in weight.double().tolist()]
    gram = [[-sum(a * b for a, b in zip(x, y)) for y in total] for x in total]
    for index in range(3):
        gram[index][index] += Fraction(found.upper) ** 2
    assert is_positive_definite(gram)
    assert rationals(weight[..., 0])
    assert as_tuple(3, 1, "size", 1) == (3,)
