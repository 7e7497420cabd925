# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
from pathlib import Path

import numpy as np

from hf_lip.smoothing.intervals import clopper_pearson_lower
from hf_lip.smoothing.radii import mono_radius


SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmarks" / "adaptive_sampling.py"


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def test_table_of_a_log(tmp_path):
    rng = np.random.default_rng(0)
    n = 2000
    radii = mono_radius(clopper_pearson_lower(rng.integers(900, n + 1, 40), n, 0.001), 0.5)
    rows = [f"{i}\t1\t{1 if r > 0 else -1}\t{r:.4f}\t{int(r > 0)}\t1.0" for i, r in enumerate(radii)]
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "sigma_0.50").write_text("\n".join(["idx\tlabel\tpredict\tradius\tcorrect\ttime", *rows]))
    result = run("--logs", str(tmp_path), "--match", "mine", "--n", str(n), "--n0", "50", "--targets", "1.0")
    assert result.returncode == 0, result.stderr
    assert "sigma_0.50" in result.stdout
    assert "loss of ACR" in result.stdout
    assert result.stdout.count("x") >= 3


def test_no_log_is_an_error(tmp_path):
    result = run("--logs", str(tmp_path))
    assert result.returncode == 1
    assert "No log named sigma_*" in result.stderr
