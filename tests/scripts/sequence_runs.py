# SPDX-License-Identifier: Apache-2.0
"""Runs of the scripts for sequence models, in this process and in others."""

import importlib.util
import json
import subprocess
import sys
from functools import cache

from accelerate.state import AcceleratorState, GradientState

from .runs import ROOT, subprocess_environment


@cache
def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(name, folder, *words):
    """Run a script in this process; returns its results."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    load_script(name).main(["--cpu", "--output_dir", str(folder), *map(str, words)])
    return json.loads((folder / "results.json").read_text())


def start_script(name, folder, *words, processes=1):
    """Start it in another process, or in several."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    script = str(ROOT / "scripts" / f"{name}.py")
    command = [sys.executable, *(launcher if processes > 1 else []), script, "--cpu", "--output_dir", str(folder)]
    return subprocess.Popen(
        [*command, *map(str, words)],
        env=subprocess_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """Wait for a started script; its errors are those of the test."""
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
