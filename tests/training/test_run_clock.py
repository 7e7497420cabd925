# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys
from pathlib import Path

import pytest


PROGRAM = """
from pathlib import Path

from accelerate import Accelerator
from hf_lip.training.run_clock import RunClock

accelerator = Accelerator(cpu=True)
readings = iter([10.0, 13.0, 14.0] if accelerator.is_main_process else [100.0, 120.0, 127.0])
clock = RunClock(accelerator, seconds=1000.0, cpu_seconds=500.0, cpu_time=lambda: next(readings))
found = f"{clock.cpu_seconds()} {clock.cpu_seconds()} {clock.seconds() >= 1000.0}"
Path(__file__).with_name(f"{accelerator.process_index}.txt").write_text(found)
accelerator.end_training()
"""


@pytest.mark.parametrize(("processes", "line"), [(1, "503.0 504.0 True"), (2, "523.0 531.0 True")])
def test_counts_every_process_and_what_came_before(processes, line, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    result = subprocess.run(
        [*command, str(tmp_path / "program.py")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert [path.read_text() for path in sorted(tmp_path.glob("*.txt"))] == [line] * processes
