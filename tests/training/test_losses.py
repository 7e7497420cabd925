# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from hf_lip.training import emma_loss, margin_cross_entropy, multi_margin_loss, pairwise_row_distances


def log_sum_exp(*values):
    return math.log(sum(math.exp(value) for value in values))


class TestMarginCrossEntropy:
    def test_equals_the_formula_worked_by_hand(self):
        logits = torch.tensor([[1.0, 0.5, -0.25], [0.0, 0.25, 0.5]])
        labels = torch.tensor([0, 2])
        # offset 0.5, temperature 1/4: the label's logit loses 0.5, then all are multiplied by 4
        first = log_sum_exp(2.0, 2.0, -1.0) - 2.0
        second = log_sum_exp(0.0, 1.0, 0.0) - 0.0
        loss = margin_cross_entropy(logits, labels, offset=0.5, temperature=0.25)
        assert loss.item() == pytest.approx(0.25 * (first + second) / 2, rel=1e-6)

    def test_without_offset_at_temperature_one_is_cross_entropy(self):
        logits, labels = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)), torch.arange(7) % 4
        loss = margin_cross_entropy(logits, labels, offset=0.0, temperature=1.0)
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, labels))

    def test_gradient_is_softmax_minus_onehot_whatever_the_temperature(self):
        logits = torch.tensor([[0.3, -0.2, 0.1]], requires_grad=True)
        margin_cross_entropy(logits, torch.tensor([1]), offset=0.4, temperature=0.1).backward()
        shifted = torch.tensor([0.3, -0.6, 0.1]) / 0.1
        expected = torch.softmax(shifted, 0) - torch.tensor([0.0, 1.0, 0.0])
        torch.testing.assert_close(logits.grad[0], expected)

    def test_half_precision_logits_are_taken_to_float32(self):
        logits = torch.tensor([[1.0, 0.5]], dtype=torch.bfloat16)
        assert margin_cross_entropy(logits, torch.tensor([0]), offset=0.1, temperature=0.25).dtype == torch.float32

    @pytest.mark.parametrize(("offset", "temperature", "name"), [(-0.1, 1.0, "offset"), (0.0, 0.0, "temperature")])
    def test_bad_arguments_are_named(self, offset, temperature, name):
        with pytest.raises(ValueError, match=f"`{name}`"):
            margin_cross_entropy(torch.zeros(1, 2), torch.tensor([0]), offset=offset, temperature=temperature)


class TestMultiMargin:
    def test_equals_the_formula_worked_by_hand(self):
        logits = torch.tensor([[1.0, 0.5, 0.9]])
        # hinges 0.7 - 1 + 0.5 = 0.2 and 0.7 - 1 + 0.9 = 0.6, divided by three classes
        assert multi_margin_loss(logits, torch.tensor([0]), margin=0.7).item() == pytest.approx(0.8 / 3, rel=1e-6)

    def test_is_zero_beyond_the_margin(self):
        assert multi_margin_loss(torch.tensor([[1.0, 0.2]]), torch.tensor([0]), margin=0.7).item() == 0.0

    def test_margin_must_be_positive(self):
        with pytest.raises(ValueError, match="`margin`"):
            multi_margin_loss(torch.zeros(1, 2), torch.tensor([0]), margin=0.0)


class TestPairwiseRowDistances:
    def test_distances_and_gradients(self):
        rows = torch.tensor([[3.0, 0.0], [0.0, 4.0], [3.0, 0.0]], requires_grad=True)
        distances = pairwise_row_distances(rows)
        torch.testing.assert_close(distances, torch.tensor([[0.0, 5, 0], [5, 0, 5], [0, 5, 0]]))
        # rows 0 and 2 coincide: no NaN from the square root at zero
        distances.sum().backward()
        torch.testing.assert_close(rows.grad, torch.tensor([[1.2, -1.6], [-2.4, 3.2], [1.2, -1.6]]))


class TestEmma:
    constants = torch.tensor([[0.0, 2.0, 1.0], [2.0, 0.0, 1.5], [1.0, 1.5, 0.0]])

    def test_radii_are_clipped_to_what_each_class_can_threaten(self):
        # gaps to the label 0: 0.4 / 2 = 0.2 inside [0.005, 0.5]; 3 / 1 = 3 clipped to 0.5
        logits = torch.tensor([[1.0, 0.6, -2.0]])
        loss = emma_loss(logits, torch.tensor([0]), self.constants, epsilon=0.5)
        assert loss.item() == pytest.approx(log_sum_exp(1.0, 0.6 + 0.2 * 2, -2.0 + 0.5) - 1.0, rel=1e-6)

    def test_misclassified_images_keep_the_least_radius(self):
        logits = torch.tensor([[0.0, 1.0, 0.0]])
        loss = emma_loss(logits, torch.tensor([0]), self.constants, epsilon=0.5)
        assert loss.item() == pytest.approx(log_sum_exp(0.0, 1.0 + 0.01, 0.0 + 0.005), rel=1e-6)

    def test_temperature_scales_as_in_the_margin_loss(self):
        logits = torch.tensor([[1.0, 0.6, -2.0]])
        loss = emma_loss(logits, torch.tensor([0]), self.constants, epsilon=0.5, temperature=0.25)
        expected = 0.25 * (log_sum_exp(4.0, 4.0, -6.0) - 4.0)
        assert loss.item() == pytest.approx(expected, rel=1e-6)

    def test_gradient_reaches_logits_and_head_but_not_through_the_radii(self):
        logits = torch.tensor([[1.0, 0.6, -2.0]], requires_grad=True)
        constants = self.constants.clone().requires_grad_()
        emma_loss(logits, torch.tensor([0]), constants, epsilon=0.5).backward()
        softmax = torch.softmax(torch.tensor([1.0, 1.0, -1.5]), 0)
        torch.testing.assert_close(logits.grad[0], softmax - torch.tensor([1.0, 0.0, 0.0]))
        # d loss / d L_0j = softmax_j * eps_j
        torch.testing.assert_close(constants.grad[0, 1:], softmax[1:] * torch.tensor([0.2, 0.5]))

    def test_bad_arguments_are_named(self):
        logits, labels = torch.zeros(1, 3), torch.tensor([0])
        with pytest.raises(ValueError, match="`epsilon`"):
            emma_loss(logits, labels, self.constants, epsilon=0.0)
        with pytest.raises(ValueError, match="`temperature`"):
            emma_loss(logits, labels, self.constants, epsilon=1.0, temperature=-1.0)
        with pytest.raises(ValueError, match="`pair_constants`"):
            emma_loss(logits, labels, self.constants[:2, :2], epsilon=1.0)


@pytest.mark.parametrize("labels", [torch.tensor([0, 1]), torch.tensor(0)], ids=["too-many", "scalar"])
def test_labels_must_fit_the_logits(labels):
    with pytest.raises(ValueError, match="`logits` must be"):
        multi_margin_loss(torch.zeros(1, 3), labels)
