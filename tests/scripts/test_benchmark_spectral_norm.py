# SPDX-License-Identifier: Apache-2.0
"""scripts/benchmarks/spectral_norm.py as a user runs it, on its quickest shape."""

import json
import subprocess
import sys
from pathlib import Path


SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmarks" / "spectral_norm.py"


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=300)


def test_table_and_json_say_who_is_no_bound(tmp_path):
    done = run(
        "--shapes", "depthwise96x7x7@56", "--rounds", "1", "--threads", "1", "--out", str(tmp_path / "norms.json")
    )
    assert done.returncode == 0, done.stderr
    assert "depthwise96x7x7@56 circular" in done.stdout
    assert "VIOLATED" in done.stdout
    report = json.loads((tmp_path / "norms.json").read_text())
    for mode in ("circular", "zeros"):
        found = report[f"depthwise96x7x7@56 {mode}"]
        methods = found["methods"]
        assert methods["ours (certified interval)"]["value"] >= found["exact"] * (1 - 1e-6)
        assert methods["torch spectral_norm x15"]["value"] < 0.99 * found["exact"]
    assert report["depthwise96x7x7@56 circular"]["our_width"] <= 1e-3


def test_unknown_shapes_are_named():
    done = run("--shapes", "7x7")
    assert done.returncode == 1
    assert "--shapes '7x7' must be of" in done.stderr
