# SPDX-License-Identifier: Apache-2.0
"""Transformers' common tests on the lipschitz_vision family."""

import unittest

import torch

from hf_lip.models.lipschitz_vision.configuration_lipschitz_vision import LipschitzVisionConfig
from hf_lip.models.lipschitz_vision.modeling_lipschitz_vision import (
    LipschitzVisionBackbone,
    LipschitzVisionForImageClassification,
    LipschitzVisionModel,
)

from .common import StrictVisionTests, leave_out, pixels
from .upstream import MARKS, load


pytestmark = MARKS
upstream = load()

NO_TOKENS = "an image model has no token embeddings"
LEFT_OUT = {
    "test_model_get_set_embeddings": NO_TOKENS,
    "test_init_weights_can_init_buffers": (
        "the vector of the power iteration starts from the random weights, with which it is initialised; "
        "test_can_init_all_missing_weights compares both"
    ),
}


class LipschitzVisionTester:
    """Tiny config and inputs, as the mixins ask for them."""

    batch_size, num_channels, image_size = 3, 3, 16
    hidden_shapes = ((3, 16, 16), (8, 16, 16), (8, 8, 8), (12, 8, 8), (12, 4, 4))
    is_training = True
    block_type = "cpl"
    head_type = "lln"

    def get_config(self):
        return LipschitzVisionConfig(
            block_type=self.block_type,
            head_type=self.head_type,
            image_size=self.image_size,
            num_channels=self.num_channels,
            hidden_sizes=[8, 8, 12, 12],
            depths=[1, 1, 1, 1],
            downsample_factors=[1, 2, 1, 2],
            conv_hidden_size=6,
            pool_size=2,
            num_dense_layers=1,
            dense_hidden_size=16,
            num_labels=3,
            image_mean=[0.5, 0.4, 0.3],
            image_std=[0.25, 0.25, 0.25],
            out_features=["stage1", "stage3"],
        )

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": pixels(self.batch_size, self.num_channels, self.image_size)}


class SpectralRescalingTester(LipschitzVisionTester):
    block_type = "sr"
    head_type = "spectral"


@leave_out(LEFT_OUT)
class LipschitzVisionModelTest(StrictVisionTests, upstream.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (LipschitzVisionModel, LipschitzVisionForImageClassification, LipschitzVisionBackbone)
    test_resize_embeddings = False
    test_can_init_all_missing_weights_before_2023 = True
    has_attentions = False
    maker = LipschitzVisionTester

    def setUp(self):
        self.model_tester = self.maker()
        self.config_tester = upstream.ConfigTester(
            self,
            config_class=LipschitzVisionConfig,
            has_text_modality=False,
            common_properties=["num_channels", "hidden_sizes"],
        )

    def test_problem_types(self):
        """As upstream's, which asks for a single label: a classifier with a margin has at least two."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config.num_labels = 2
        labels = {
            "single_label_classification": torch.tensor([0, 1, 1]),
            "multi_label_classification": torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]),
            "regression": torch.rand(3, 2),
        }
        for problem_type, target in labels.items():
            with self.subTest(problem_type):
                config.problem_type = problem_type
                model = LipschitzVisionForImageClassification(config).train()
                model(**inputs, labels=target).loss.backward()
                assert all(parameter.grad is not None for parameter in model.parameters())


class SpectralRescalingModelTest(LipschitzVisionModelTest):
    """Linear blocks with MaxMin in place of residual ones, and another head."""

    maker = SpectralRescalingTester


class LipschitzVisionBackboneTest(upstream.BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (LipschitzVisionBackbone,)
    config_class = LipschitzVisionConfig
    has_attentions = False

    def setUp(self):
        self.model_tester = LipschitzVisionTester()
