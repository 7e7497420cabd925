# SPDX-License-Identifier: Apache-2.0
"""The guard of `tests/conftest.py` against calls of what is deprecated: it finds ours, and only ours."""

import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
from transformers.utils import logging as transformers_logging

from ..deprecations import deprecated_calls


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def nothing_deprecated():
    """In the place of the guard itself, which would fail what follows."""


def library(name: str, source: str) -> types.ModuleType:
    """A module that lies outside the project."""
    module = types.ModuleType(name)
    exec(compile(source, f"/somewhere/{name}.py", "exec"), module.__dict__)
    return module


@pytest.fixture
def quiet_transformers():
    """As the commands leave transformers that an earlier test ran in this process."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    yield
    assert transformers_logging.get_verbosity() == transformers_logging.ERROR
    transformers_logging.set_verbosity(verbosity)


OLD = """
import warnings
def old(category=FutureWarning, stacklevel=1):
    warnings.warn("`old` is deprecated", category, stacklevel)
def inner():
    old()
"""


@pytest.mark.parametrize("category", [FutureWarning, DeprecationWarning, PendingDeprecationWarning])
@pytest.mark.parametrize("stacklevel", [1, 2])
def test_our_call_is_found_wherever_the_library_says_it_was(category, stacklevel):
    with warnings.catch_warnings(record=True) as shown, deprecated_calls() as found:
        warnings.simplefilter("always")
        library("lib", OLD).old(category, stacklevel)
        library("lib", OLD).inner()
    assert len(found) == 2
    assert all(text.startswith("tests/integration/test_deprecations.py:") for text in found)
    assert [entry.category for entry in shown] == [category, FutureWarning]
    # the guard does not move what the warning is attributed to
    assert shown[0].filename == ("/somewhere/lib.py" if stacklevel == 1 else __file__)


def test_other_warnings_and_calls_of_libraries_among_themselves_are_not_ours():
    between = library("between", "def call(function):\n    function()")
    with warnings.catch_warnings(), deprecated_calls() as found:
        warnings.simplefilter("ignore")
        between.call(library("lib", OLD).old)
        library("lib", OLD).old(UserWarning)
        # on import, which we only happen to be the first to ask for
        library("lib", f"{OLD}\nold()")
    assert found == []


def test_what_transformers_logs_is_found_each_time(quiet_transformers):
    transformers = library("transformers", "def old(logger):\n    logger.warning_once('`x` is deprecated')")
    logger = transformers_logging.get_logger("transformers.models")
    for _ in range(2):
        with deprecated_calls() as found:
            transformers.old(logger)
            logger.warning("all is well")
        assert len(found) == 1
    with deprecated_calls() as found:
        library("between", "def call(function, logger):\n    function(logger)").call(transformers.old, logger)
    assert found == []


def test_importing_every_module_calls_nothing_deprecated():
    script = (
        "import importlib, pkgutil\n"
        "from tests.deprecations import deprecated_calls\n"
        "with deprecated_calls() as found:\n"
        "    import hf_lip\n"
        "    for module in pkgutil.walk_packages(hf_lip.__path__, 'hf_lip.'):\n"
        "        # kernels need Triton\n"
        "        if not module.name.endswith(('__main__', 'chain_kernels')):\n"
        "            importlib.import_module(module.name)\n"
        "assert not found, found\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, env=environment)
