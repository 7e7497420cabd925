# SPDX-License-Identifier: Apache-2.0
"""Transformers' common tests on the CIFAR ResNets."""

import unittest

from hf_lip.models.cifar_resnet.configuration_cifar_resnet import CifarResNetConfig
from hf_lip.models.cifar_resnet.modeling_cifar_resnet import CifarResNetForImageClassification, CifarResNetModel

from .common import StrictVisionTests, leave_out, pixels
from .upstream import MARKS, load


pytestmark = MARKS
upstream = load()

LEFT_OUT = {"test_model_get_set_embeddings": "an image model has no token embeddings"}


class CifarResNetTester:
    batch_size, num_channels, image_size = 3, 3, 16
    hidden_shapes = ((8, 16, 16), (8, 16, 16), (8, 8, 8), (16, 4, 4))
    is_training = True

    def get_config(self):
        return CifarResNetConfig(
            image_size=self.image_size, num_blocks=[1, 1, 1], hidden_sizes=[8, 8, 16], num_labels=3
        )

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": pixels(self.batch_size, self.num_channels, self.image_size)}


@leave_out(LEFT_OUT)
class CifarResNetModelTest(StrictVisionTests, upstream.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (CifarResNetModel, CifarResNetForImageClassification)
    test_resize_embeddings = False
    test_can_init_all_missing_weights_before_2023 = True
    has_attentions = False

    def setUp(self):
        self.model_tester = CifarResNetTester()
        self.config_tester = upstream.ConfigTester(
            self,
            config_class=CifarResNetConfig,
            has_text_modality=False,
            common_properties=["num_channels", "hidden_sizes"],
        )
