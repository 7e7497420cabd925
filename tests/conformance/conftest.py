# SPDX-License-Identifier: Apache-2.0
"""Finds transformers' own tests when, and only when, `-m conformance` asks for them."""

import pytest

from . import upstream


def selected(config) -> bool:
    """Whether `-m` asks for this job."""
    return "conformance" in config.getoption("markexpr").replace("not conformance", "")


def pytest_configure(config):
    if selected(config):
        for name in upstream.prepare():
            config.addinivalue_line("markers", f"{name}: of transformers' own tests")


def pytest_ignore_collect(collection_path, config):
    # importing the test modules needs the source distribution
    return None if selected(config) else True


@pytest.fixture(autouse=True)
def nothing_deprecated():
    """In the place of the check in all other tests: what upstream's call through our methods is their choice."""
