# SPDX-License-Identifier: Apache-2.0
"""The pace of a curriculum, by time and by what was learnt."""

import numpy as np
import pytest

from hf_lip.training.sequence_pace import LEAST_STEPS, STAGES, Pace
from hf_lip.training.sequence_tasks import TrackingArguments


def test_a_stage_that_is_learnt_makes_room_for_the_next():
    pace = Pace(0.5, 0.8, 2.0)
    for step in range(1, 2 * LEAST_STEPS):
        pace.after_step(step, 100_000, 0.4)
    assert pace.entered == [LEAST_STEPS]
    # one stage in ten, by a square root of the time
    assert pace.progress(0.0) == pytest.approx(0.8 * np.sqrt(1 / STAGES))
    assert pace.progress(0.7) == 0.7


def test_the_mean_of_recent_steps_counts_not_one():
    pace = Pace(0.5, 0.8, 1.0)
    for step in range(1, 400):
        pace.after_step(step, 100_000, 0.4 if step % 2 else 0.7)
    assert not pace.entered
    for step in range(400, 410):
        pace.after_step(step, 100_000, 0.4 if not pace.entered else 0.51)
    (first,) = pace.entered
    assert first > 402
    # losses of the stage before do not count
    for step in range(410, 600):
        pace.after_step(step, 100_000, 0.51)
    assert len(pace.entered) == 1


def test_what_is_never_learnt_goes_on_by_time():
    pace = Pace(0.5, 0.5, 1.0)
    for step in range(1, 1001):
        pace.after_step(step, 1000, 3.0)
    assert pace.entered == [50 * stage for stage in range(1, STAGES + 1)]
    arguments = TrackingArguments(task="boxes", curriculum="grow", curriculum_share=0.5, curriculum_loss=0.5)
    learnt = arguments.pace()
    for step in range(1, STAGES * LEAST_STEPS + 1):
        assert (arguments.grown(learnt.progress(0.0)) == 1.0) == (len(learnt.entered) == STAGES)
        learnt.after_step(step, 100_000, 0.1)
    # and stays there
    assert arguments.grown(learnt.progress(0.0)) == 1.0
    assert arguments.reached(1, 63, learnt.progress(0.0)) == 63


def test_it_goes_on_from_a_checkpoint_as_if_nothing_had_been():
    losses = np.random.default_rng(0).uniform(0.0, 1.0, 900)
    whole, first = Pace(0.5, 0.9, 1.0), Pace(0.5, 0.9, 1.0)
    for step, loss in enumerate(losses, 1):
        whole.after_step(step, 2000, float(loss))
        if step <= 333:
            first.after_step(step, 2000, float(loss))
    again = Pace(0.5, 0.9, 1.0)
    again.restore(first.state())
    for step, loss in enumerate(losses[333:], 334):
        again.after_step(step, 2000, float(loss))
    assert again.state() == whole.state()
    assert len(first.state()["entered"]) < len(whole.state()["entered"])
