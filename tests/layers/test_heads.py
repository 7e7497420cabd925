# SPDX-License-Identifier: Apache-2.0
"""Heads, and radii against exact distances to the decision boundary."""

import pytest
import torch

from hf_lip.layers import NormalizedRowsHead, SpectralNormalizedHead, TruncationHead, certified_radius


HEADS = {
    "lln": lambda: NormalizedRowsHead(12, 5),
    "spectral": lambda: SpectralNormalizedHead(12, 5),
    "truncation": lambda: TruncationHead(12, 5),
}


@pytest.mark.parametrize("name", HEADS)
def test_norm_and_pair_distances_are_upper_bounds(name):
    head = HEADS[name]().eval()
    rows = head.stored_weight()
    assert torch.linalg.matrix_norm(rows, 2).item() <= head.lipschitz_bound() <= 5**0.5
    distances = head.pair_distances()
    exact = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    assert (distances >= exact).all()
    torch.testing.assert_close(distances, exact, rtol=1e-9, atol=1e-9)
    features = torch.randn(3, 12, dtype=torch.float64)
    bias = getattr(head, "bias", None)
    torch.testing.assert_close(head(features), features @ rows.T + (0 if bias is None else bias.double()))


def test_row_and_spectral_normalisation():
    rows = NormalizedRowsHead(12, 5).eval().stored_weight().norm(dim=1)
    assert (rows <= 1).all()
    assert (rows > 1 - 1e-5).all()
    head = SpectralNormalizedHead(12, 5).eval()
    assert 1 - 1e-5 < head.lipschitz_bound() <= 1
    training = SpectralNormalizedHead(12, 5).train()
    training(torch.randn(3, 12)).sum().backward()
    assert training.weight.grad.isfinite().all()


def test_linear_classifier_radius_is_the_distance_to_the_boundary():
    head = NormalizedRowsHead(6, 4).eval()
    features = torch.randn(200, 6, dtype=torch.float64)
    prediction, radius = certified_radius(head(features), head.pair_distances(), 1.0, 0.0)
    rows, bias = head.stored_weight(), head.bias.double()
    logits = features @ rows.T + bias
    for index in range(len(features)):
        top = int(logits[index].argmax())
        gaps = [
            ((logits[index, top] - logits[index, j]) / (rows[top] - rows[j]).norm()).item()
            for j in range(4)
            if j != top
        ]
        assert int(prediction[index]) == top
        assert radius[index].item() <= min(gaps)
        assert radius[index].item() == pytest.approx(min(gaps), rel=1e-9)


def test_nearest_class_need_not_be_the_second():
    # class 1 is second but close in weight space; class 2, third, is far: per unit of distance it is reached first
    logits = torch.tensor([[1.0, 0.9, 0.85]], dtype=torch.float64)
    wide = torch.tensor([[0.0, 0.1, 2.0], [0.1, 0.0, 2.0], [2.0, 2.0, 0.0]], dtype=torch.float64)
    _, radius = certified_radius(logits, wide, 1.0, 0.0)
    assert radius.item() == pytest.approx(0.15 / 2.0, rel=1e-9)
    top_two_shortcut = 0.1 / 0.1
    assert radius.item() < top_two_shortcut


def test_constant_error_and_rounding_are_paid():
    logits = torch.tensor([[3.0, 1.0]], dtype=torch.float64)
    distances = torch.tensor([[0.0, 2.0], [2.0, 0.0]], dtype=torch.float64)
    assert certified_radius(logits, distances, 1.0, 0.0)[1].item() == pytest.approx(1.0)
    assert certified_radius(logits, distances, 4.0, 0.0)[1].item() == pytest.approx(0.25)
    assert certified_radius(logits, distances, 1.0, 0.25)[1].item() == pytest.approx(0.5)
    assert certified_radius(logits, distances, 1.0, 0.5)[1].item() == 0.0
    assert certified_radius(logits, distances, 1.0, 0.0, 2.0**-4, head_norm=4.0)[1].item() == pytest.approx(1.25 / 3.0)
    near = torch.tensor([[1.0 + 1e-8, 1.0]], dtype=torch.float64)
    assert certified_radius(near, distances, 1.0, 0.0)[1].item() > 0
    assert certified_radius(near, distances, 1.0, 0.0, output_roundoff=2.0**-24)[1].item() == 0.0


def test_logits_that_are_not_finite_are_not_certified():
    distances = torch.full((2, 2), 1.0, dtype=torch.float64)
    for value in (torch.nan, torch.inf, -torch.inf):
        logits = torch.tensor([[1.0, value]], dtype=torch.float64)
        assert certified_radius(logits, distances, 1.0, 0.0)[1].item() == 0.0
    with pytest.raises(ValueError, match="float64"):
        certified_radius(torch.zeros(1, 2), distances, 1.0, 0.0)


def test_truncation_needs_enough_features():
    with pytest.raises(ValueError, match="dense_size"):
        TruncationHead(4, 10)
