# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from hf_lip.training import LEARNING_RATE_SCHEDULES, linear_ramp, one_cycle, triangular
from hf_lip.training.schedules import stable_decay


@pytest.mark.parametrize(
    ("progress", "factor"), [(0.0, 0.0), (0.2, 0.5), (0.4, 1.0), (0.6, 0.525), (0.8, 0.05), (0.9, 0.025), (1.0, 0.0)]
)
def test_triangular_has_the_published_corners(progress, factor):
    assert triangular(progress) == pytest.approx(factor)


def test_one_cycle_equals_torch():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    steps = 101
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2.0, total_steps=steps)
    # torch ends its warm-up at step 0.3 * total - 1
    peak = (0.3 * steps - 1) / (steps - 1)
    for step in range(steps):
        expected = optimizer.param_groups[0]["lr"]
        assert 2.0 * one_cycle(step / (steps - 1), warmup_share=peak) == pytest.approx(expected, rel=1e-6, abs=1e-9)
        optimizer.step()
        if step < steps - 1:
            scheduler.step()


@pytest.mark.parametrize("name", LEARNING_RATE_SCHEDULES)
@pytest.mark.parametrize("progress", [-0.01, 1.01, float("nan")])
def test_progress_outside_the_run_is_an_error(name, progress):
    with pytest.raises(ValueError, match="`progress`"):
        LEARNING_RATE_SCHEDULES[name](progress)


@pytest.mark.parametrize("name", LEARNING_RATE_SCHEDULES)
def test_factors_stay_in_the_unit_interval(name):
    assert all(0.0 <= LEARNING_RATE_SCHEDULES[name](step / 1000) <= 1.0 for step in range(1001))


def test_linear_ramp_rises_over_its_share_then_stays():
    values = [linear_ramp(progress, 0.1, 3.0) for progress in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert values == pytest.approx([0.1, 1.55, 3.0, 3.0, 3.0])
    with pytest.raises(ValueError, match="`share`"):
        linear_ramp(0.5, 0.1, 3.0, share=0.0)


def test_stable_decay_falls_in_the_last_quarter():
    assert [stable_decay(progress) for progress in (0.0, 0.5, 0.75, 0.875, 1.0)] == [1.0, 1.0, 1.0, 0.5, 0.0]
