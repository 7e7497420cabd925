# SPDX-License-Identifier: Apache-2.0
"""Norms of convolutions against explicit operators, and the explicit operators against torch's own layers."""

import itertools
import math

import pytest
import torch
from torch import nn

from hf_lip.ops import (
    conv_frequency_blocks,
    conv_grid_norm,
    conv_kernel_norm,
    conv_matrix,
    conv_spectral_norm,
    exact_conv_norm,
    exact_spectral_norm,
)
from hf_lip.ops.conv_interval import conv_norm
from hf_lip.ops.geometry import conv_geometry


DOUBLE = torch.float64


def randint(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


def random_kernel(max_channels: int = 3, max_taps: int = 5) -> torch.Tensor:
    shape = (randint(1, max_channels), randint(1, max_channels), randint(1, max_taps), randint(1, max_taps))
    return torch.randn(shape, dtype=DOUBLE)


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "groups"),
    [
        ((3, 3), 1, (1, 1), 1, 1),
        ((5, 3), 2, (2, 1), 1, 1),
        ((3, 5), (1, 3), (0, 2), 1, 2),
        ((2, 2), 1, (1, 0), 2, 1),
        ((3, 3), 1, (2, 2), 2, 2),
        ((4, 4), 4, (0, 0), 1, 1),
    ],
)
def test_explicit_matrix_is_the_torch_layer(mode, kernel, stride, padding, dilation, groups):
    layer = nn.Conv2d(4, 6, kernel, stride, padding, dilation, groups, bias=False, padding_mode=mode, dtype=DOUBLE)
    image = torch.randn(1, 4, 7, 8, dtype=DOUBLE)
    matrix = conv_matrix(
        layer.weight,
        (7, 8),
        padding_mode=mode,
        padding=padding,
        stride=stride,
        dilation=dilation,
        groups=groups,
    )
    torch.testing.assert_close(matrix @ image.flatten(), layer(image).detach().flatten(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "n"),
    [
        ((16, 16, 3, 3), 32),
        ((64, 64, 3, 3), 32),
        ((64, 3, 7, 7), 56),
        ((128, 64, 3, 3), 16),
        ((64, 128, 3, 3), 16),
        ((64, 64, 5, 5), 12),
    ],
)
def test_circular_bound_meets_the_exact_frequencies(shape, n):
    weight = torch.randn(shape, dtype=DOUBLE)
    padded = torch.zeros(*shape[:2], n, n, dtype=DOUBLE)
    padded[..., : shape[2], : shape[3]] = weight
    blocks = torch.fft.fft2(padded)[..., : n // 2 + 1].permute(2, 3, 0, 1)
    gram = blocks @ blocks.mH if shape[0] <= shape[1] else blocks.mH @ blocks
    exact = math.sqrt(torch.linalg.eigvalsh(gram).max().item())
    bound = conv_spectral_norm(weight, n, padding_mode="circular", num_iterations=8).item()
    assert bound == pytest.approx(exact, rel=1e-6)
    assert bound >= exact * (1 - 1e-12)


@pytest.mark.parametrize("size", [2, 3, 5, 8, (4, 7), (6, 3)])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 2), (1, 1), (4, 3), (3, 5), (9, 1)])
def test_circular_norm_is_that_of_the_circulant_matrix(size, kernel):
    weight = torch.randn(3, 4, *kernel, dtype=DOUBLE)
    exact = exact_conv_norm(weight, size, padding_mode="circular")
    bound = conv_spectral_norm(weight, size, padding_mode="circular", num_iterations=14).item()
    assert bound == pytest.approx(exact, rel=1e-4)
    assert bound >= exact * (1 - 1e-12)


@pytest.mark.parametrize("grid", [4, 5, (6, 3), (1, 2)])
@pytest.mark.parametrize("stride", [1, (1, 1)])
def test_half_spectrum_has_the_singular_values_of_the_full_one(grid, stride):
    weight = torch.randn(3, 2, 3, 3, dtype=DOUBLE)
    half = torch.linalg.svdvals(conv_frequency_blocks(weight, grid, stride)).amax()
    full = torch.linalg.svdvals(conv_frequency_blocks(weight, grid, stride, half=False)).amax()
    torch.testing.assert_close(half, full, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("grid", "stride"), [((6, 6), 2), ((6, 4), (3, 1)), ((8, 4), 4), ((3, 6), 3)])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (5, 1), (7, 7)])
def test_polyphase_blocks_carry_every_singular_value_of_the_strided_operator(grid, stride, kernel):
    weight = torch.randn(3, 2, *kernel, dtype=DOUBLE)
    blocks = conv_frequency_blocks(weight, grid, stride, half=False)
    found = torch.linalg.svdvals(blocks).flatten().sort(descending=True).values
    exact = torch.linalg.svdvals(conv_matrix(weight, grid, padding_mode="circular", stride=stride))
    count = min(found.numel(), exact.numel())
    torch.testing.assert_close(found[:count], exact[:count], rtol=1e-10, atol=1e-10)


def test_zero_padding_bounds_hold_and_the_same_size_torus_does_not():
    violations = 0
    for _ in range(300):
        weight = random_kernel(2, 4)
        n = randint(2, 9)
        exact = exact_conv_norm(weight, n)
        assert conv_spectral_norm(weight, n, num_iterations=8).item() >= exact * (1 - 1e-12)
        assert conv_kernel_norm(weight, num_iterations=randint(1, 4)).item() >= exact * (1 - 1e-12)
        violations += exact_spectral_norm_on_torus(weight, n) < exact * (1 - 1e-9)
    # this is why the torus is enlarged by the padding
    assert violations > 0


def exact_spectral_norm_on_torus(weight: torch.Tensor, size: int) -> float:
    return torch.linalg.svdvals(conv_frequency_blocks(weight, size)).amax().item()


def test_two_tap_difference_is_larger_under_zero_padding_than_on_its_own_torus():
    weight = torch.tensor([1.0, -1.0], dtype=DOUBLE).reshape(1, 1, 1, 2)
    exact = exact_conv_norm(weight, (1, 7), padding=(0, 1))
    torus = exact_conv_norm(weight, (1, 7), padding_mode="circular")
    assert torus < exact * (1 - 1e-3)
    assert conv_spectral_norm(weight, (1, 7), padding=(0, 1), num_iterations=12).item() >= exact
    assert conv_grid_norm(weight, (1, 7), num_iterations=12).item() >= exact
    assert conv_kernel_norm(weight, 1).item() >= exact


def test_strided_and_unusual_convolutions_are_bounded():
    beyond = 0
    for index in range(200):
        weight = random_kernel(3, 5)
        size = (randint(1, 7), randint(1, 7))
        stride = (randint(1, 4), randint(1, 4))
        mode = ("zeros", "circular")[index % 2]
        padding = (randint(0, 5), randint(0, 5)) if index % 3 else None
        try:
            exact = exact_conv_norm(weight, size, padding_mode=mode, padding=padding, stride=stride)
        except ValueError:
            with pytest.raises(ValueError, match="no output"):
                conv_spectral_norm(weight, size, padding_mode=mode, padding=padding, stride=stride)
            continue
        bound = conv_spectral_norm(
            weight, size, padding_mode=mode, padding=padding, stride=stride, num_iterations=10
        ).item()
        assert bound >= exact * (1 - 1e-12)
        beyond += bound > conv_spectral_norm(weight, size, num_iterations=10).item() * (1 + 1e-9)
    # circular padding by more than the kernel repeats rows, which no stride-1 bound covers
    assert beyond > 0


def test_wide_circular_padding_repeats_rows():
    weight = torch.ones(1, 1, 1, 1, dtype=DOUBLE)
    exact = exact_conv_norm(weight, 3, padding_mode="circular", padding=3)
    assert exact == pytest.approx(3.0)
    assert conv_spectral_norm(weight, 3, padding_mode="circular", padding=3).item() == pytest.approx(3.0)
    assert conv_geometry((1, 1), 3, padding_mode="circular", padding=3).copies == 9


def test_corrected_grid_bounds_every_frequency():
    fine_size = 40
    for index in range(400):
        weight = random_kernel(2, 7)
        grid = (weight.shape[2] + index % 5, weight.shape[3] + (index // 5) % 5)
        fine = torch.linalg.svdvals(conv_frequency_blocks(weight, fine_size)).amax().item()
        assert conv_grid_norm(weight, grid, num_iterations=12).item() >= fine * (1 - 1e-12)


def test_corrected_grid_is_within_0_3_percent_for_3x3_on_64():
    weight = torch.randn(4, 4, 3, 3, dtype=DOUBLE)
    blocks = torch.linalg.svdvals(conv_frequency_blocks(weight, 64)).amax().item()
    assert blocks <= conv_grid_norm(weight, 64, num_iterations=16).item() <= blocks * 1.003


@pytest.mark.parametrize("stride", [2, 3, (1, 2)])
def test_corrected_grid_covers_strides_and_sizes(stride):
    for _ in range(30):
        weight = random_kernel(2, 5)
        bound = conv_grid_norm(weight, 8, num_iterations=8, stride=stride).item()
        for size in (5, 8):
            assert bound >= exact_conv_norm(weight, size, stride=stride) * (1 - 1e-12)
        assert bound >= exact_conv_norm(weight, 6, padding_mode="circular", stride=stride) * (1 - 1e-12)


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_kernel_norm_needs_no_size(mode):
    for _ in range(40):
        weight = random_kernel(3, 4)
        bound = conv_kernel_norm(weight, 3).item()
        for size, stride in ((2, 1), (5, 1), (6, 2), (5, 3)):
            assert bound >= exact_conv_norm(weight, size, padding_mode=mode, stride=stride) * (1 - 1e-12)


def test_kernel_norm_tends_to_the_norm_on_the_infinite_grid():
    weight = torch.randn(4, 6, 3, 3, dtype=DOUBLE)
    limit = torch.linalg.svdvals(conv_frequency_blocks(weight, 256)).amax().item()
    errors = [conv_kernel_norm(weight, n).item() / limit - 1 for n in range(1, 6)]
    assert all(later < 0.75 * earlier for earlier, later in itertools.pairwise(errors))
    assert 0 < errors[-1] < 0.05


def test_zero_kernels_and_extreme_scales():
    zero = torch.zeros(2, 3, 3, 3)
    assert conv_kernel_norm(zero).item() == conv_spectral_norm(zero, 4).item() == conv_grid_norm(zero, 8).item() == 0.0
    weight = torch.randn(2, 3, 3, 3, dtype=DOUBLE)
    for scale in (1e-100, 1e100):
        for norm in (
            lambda w: conv_kernel_norm(w, 5),
            lambda w: conv_spectral_norm(w, 4),
            lambda w: conv_grid_norm(w, 8),
        ):
            assert norm(weight * scale).item() == pytest.approx(norm(weight).item() * scale, rel=1e-12)


@pytest.mark.parametrize(
    "norm",
    [
        lambda w: conv_spectral_norm(w, 5, num_iterations=3),
        lambda w: conv_spectral_norm(w, (4, 6), padding_mode="circular", stride=2, num_iterations=3),
        lambda w: conv_grid_norm(w, 8, 3),
        lambda w: conv_kernel_norm(w, 2),
    ],
)
def test_norms_are_differentiable(norm):
    weight = torch.randn(2, 3, 3, 2, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (weight,))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "size", "options"),
    [
        ((5,), 9, {"dilation": 2}),
        ((3, 2), (6, 5), {"stride": (2, 1), "padding": ((1, 0), (2, 1))}),
        ((3, 3), 7, {"padding_mode": "circular", "dilation": 2}),
        ((2, 3, 2), 4, {"stride": 2, "padding": 1}),
        ((3, 3), 6, {"dilation": 3, "stride": 2}),
    ],
)
def test_norm_holds_in_any_dimension_with_groups_and_dilation(kernel, size, options, groups):
    weight = torch.randn(2 * groups, 3, *kernel, dtype=DOUBLE, requires_grad=True)
    bound = conv_spectral_norm(weight, size, groups=groups, num_iterations=8, **options)
    exact = conv_norm(weight, size, groups=groups, rtol=1e-6, **options)
    assert exact.lower <= bound.item() * (1 + 1e-12)
    assert bound.item() <= 2.5 * exact.upper
    bound.backward()
    assert torch.isfinite(weight.grad).all()
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_paddings_that_read_pixels_twice_are_counted_or_refused(mode):
    with pytest.raises(ValueError, match=rf"{mode}.*norm above 1"):
        conv_geometry((3, 3), 4, padding_mode=mode)
    # a shift by one pixel has norm 1, under these paddings the border is read twice
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False, padding_mode=mode, dtype=DOUBLE)
    weight = torch.zeros(1, 1, 3, 3, dtype=DOUBLE)
    weight[0, 0, 1, 0] = 1
    with torch.no_grad():
        layer.weight.copy_(weight)
        columns = layer(torch.eye(16, dtype=DOUBLE).reshape(16, 1, 4, 4)).flatten(1)
    exact = exact_spectral_norm(columns)
    assert exact > 1.4 > conv_kernel_norm(weight).item()
    assert conv_spectral_norm(weight, 4, padding_mode=mode).item() >= exact


def test_wrong_arguments_are_errors():
    kernel = torch.ones(2, 3, 3, 3)
    cases = [
        (lambda: conv_spectral_norm(torch.ones(2, 3), 4), "kernel of shape"),
        (lambda: conv_spectral_norm(torch.ones(2, 0, 3, 3), 4), "kernel of shape"),
        (lambda: conv_spectral_norm(kernel, 0), "input_size"),
        (lambda: conv_spectral_norm(kernel, (4, 4, 4)), "input_size"),
        (lambda: conv_spectral_norm(kernel, 4.0), "input_size"),
        (lambda: conv_spectral_norm(kernel, 4, padding=-1), "padding"),
        (lambda: conv_spectral_norm(kernel, 4, stride=0), "stride"),
        (lambda: conv_spectral_norm(kernel, 2, padding=0), "no output"),
        (lambda: conv_spectral_norm(kernel, 4, padding_mode="same"), "padding_mode"),
        (lambda: conv_frequency_blocks(kernel, 5, stride=2), "multiple of the stride"),
        (lambda: conv_grid_norm(kernel, 2), "too coarse"),
        (lambda: conv_kernel_norm(kernel, 0), "num_iterations"),
        (lambda: conv_matrix(torch.ones(3, 3), 4), "kernel"),
        (lambda: conv_matrix(kernel, 4, groups=4), "groups"),
        (lambda: conv_matrix(torch.ones(64, 64, 1, 1), 64), "more than"),
        (lambda: exact_spectral_norm(torch.ones(3)), "matrix"),
    ]
    for call, message in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            call()
