# SPDX-License-Identifier: Apache-2.0
"""One thread, no network, fixed seeds: what the tests print can be printed again."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers import AutoImageProcessor

from .deprecations import deprecated_calls


torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_deprecated():
    """A test fails if this project calls what a library has deprecated, whatever the library does about it."""
    with deprecated_calls() as found:
        yield
    assert not found, "\n".join(found)


@pytest.fixture
def auto_image_processor():
    """AutoImageProcessor, which older supported versions of transformers have only together with torchvision."""
    if hasattr(AutoImageProcessor, "_backends"):
        pytest.skip("AutoImageProcessor of this transformers needs torchvision")
    return AutoImageProcessor
