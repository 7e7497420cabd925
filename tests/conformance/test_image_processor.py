# SPDX-License-Identifier: Apache-2.0
"""Transformers' common tests on the image processor, which the image models share."""

import unittest

import pytest

from hf_lip.models.lipschitz_vision.image_processing_pil_lipschitz_vision import LipschitzVisionImageProcessorPil

from .common import leave_out
from .upstream import load


pytestmark = pytest.mark.conformance
upstream = load()

LEFT_OUT = {
    "test_call_numpy_4_channels": "`num_channels` is 1 or 3, as the model has them; arrays with others are refused",
    "test_new_models_require_torchvision_backend": "a rule of the library's own repository; ours needs no torchvision",
}


class LipschitzVisionImageProcessingTester(upstream.ImageProcessingTester):
    def __init__(self, parent, **kwargs):
        kwargs.setdefault("size", {"height": 18, "width": 18})
        super().__init__(parent, **kwargs)

    def _get_image_processing_classes(self):
        return {"pil": LipschitzVisionImageProcessorPil}


@leave_out(LEFT_OUT)
class LipschitzVisionImageProcessingTest(upstream.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = LipschitzVisionImageProcessingTester
