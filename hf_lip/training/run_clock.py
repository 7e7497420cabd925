# SPDX-License-Identifier: Apache-2.0
"""How long a run has taken, with its parts before interruptions."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["RunClock"]


class RunClock:
    """Starts when it is made.

    Args:
        seconds, cpu_seconds: of earlier parts of the run, the second of all processes together.
        cpu_time: seconds of the processor that this process has used.
    """

    def __init__(
        self,
        accelerator: "Accelerator",
        seconds: float,
        cpu_seconds: float,
        cpu_time: Callable[[], float] = time.process_time,
    ) -> None:
        self.accelerator, self.cpu_time = accelerator, cpu_time
        self.started, self.cpu_started, self.cpu_before = time.perf_counter() - seconds, cpu_time(), cpu_seconds

    def seconds(self) -> float:
        """By the clock on the wall."""
        return time.perf_counter() - self.started

    def cpu_seconds(self) -> float:
        """Of all processes together; to be called by every one of them."""
        own = torch.tensor(self.cpu_time() - self.cpu_started, dtype=torch.float64, device=self.accelerator.device)
        return self.cpu_before + self.accelerator.reduce(own, reduction="sum").item()
