# SPDX-License-Identifier: Apache-2.0
"""Transformers' common tests on the image processor, which the image models share."""

import unittest

from transformers import AutoImageProcessor

from hf_lip.models.lipschitz_vision.image_processing_pil_lipschitz_vision import LipschitzVisionImageProcessorPil

from .common import leave_out
from .upstream import MARKS, load


pytestmark = MARKS
upstream = load()

LEFT_OUT = {
    "test_call_numpy_4_channels": "`num_channels` is 1 or 3, as the model has them; arrays with others are refused",
    "test_new_models_require_torchvision_backend": "a rule of the library's own repository; ours needs no torchvision",
}
if hasattr(AutoImageProcessor, "_backends"):
    LEFT_OUT["test_image_processor_save_load_with_autoimageprocessor"] = (
        "AutoImageProcessor of this version of transformers needs torchvision"
    )


class ImageProcessorTester(upstream.ImageProcessingTester):
    """Sizes of the images and the processor, as the mixin of every supported version asks for them."""

    num_channels, batch_size = 3, 5
    min_resolution, max_resolution = 12, 40
    size = {"height": 18, "width": 18}  # noqa: RUF012

    def __init__(self):
        pass  # upstream's looks for the processor in the folder of a model of the library

    def prepare_image_processor_dict(self):
        return {"size": self.size, "num_channels": self.num_channels, "do_rescale": True}

    def prepare_processor_inputs(self, **kwargs):
        return {"images": self.prepare_image_inputs(**kwargs)}


@leave_out(LEFT_OUT)
class LipschitzVisionImageProcessingTest(upstream.ImageProcessingTestMixin, unittest.TestCase):
    image_processing_classes = {"pil": LipschitzVisionImageProcessorPil}  # noqa: RUF012

    def setUp(self):
        self.image_processor_tester = ImageProcessorTester()

    @property
    def image_processor_dict(self):
        return self.image_processor_tester.prepare_image_processor_dict()
