# SPDX-License-Identifier: Apache-2.0
import importlib.util
import json

import pytest
from accelerate.state import AcceleratorState, GradientState

from .runs import SCRIPT, SMALL_DATA, SMALL_MLP


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_image_classifier", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(script, tmp_path, monkeypatch):
    """Run the script in this process; returns its results."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run_in(name, *words, base=(*SMALL_MLP, *SMALL_DATA)):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        output_dir = tmp_path / name
        script.main([*base, "--output_dir", str(output_dir), *map(str, words)])
        return json.loads((output_dir / "results.json").read_text())

    return run_in
