# SPDX-License-Identifier: Apache-2.0
"""The pace of a curriculum: how far it is, by the time it was given and by what the model has learnt."""

from typing import Any


# sizes between the smallest samples and the largest
STAGES = 10
# a stage lasts at least so many steps; the mean loss is over about half as many
LEAST_STEPS = 40
_KEPT = 0.95

__all__ = ["LEAST_STEPS", "STAGES", "Pace"]


class Pace:
    """A curriculum that goes on as soon as a stage is learnt, and at the latest when its time has come.

    The loss that counts as learnt should lie above what is left when a task is learnt, as the order of an answer's
    words is if it cannot be known.

    Args:
        threshold: mean loss of recent steps (nats a token) below which a stage is learnt.
        share: of training, after which the samples have their full size whatever was learnt.
        power: the time after which stage k of K is begun is share * (k / K) ** (1 / power).

    Attributes:
        entered: the step after which each stage but the first was begun.
    """

    def __init__(self, threshold: float, share: float, power: float) -> None:
        self.threshold, self.share, self.power = threshold, share, power
        self.entered: list[int] = []
        self._steps, self._loss = 0, 0.0

    def progress(self, progress: float) -> float:
        """The share of training at which a curriculum by time would be as far as this one is."""
        return max(progress, self._due(len(self.entered)))

    def after_step(self, step: int, num_steps: int, loss: float) -> None:
        """Take note of the mean loss of step number `step`, from 1."""
        # by time it may be further: what is learnt there counts from there
        while len(self.entered) < STAGES and self._due(len(self.entered) + 1) <= step / num_steps:
            self._enter(step)
        if len(self.entered) == STAGES:
            return
        self._steps += 1
        # without the zero it starts from
        self._loss = _KEPT * self._loss + (1.0 - _KEPT) * loss
        recent = self._loss / (1.0 - _KEPT**self._steps)
        if self._steps >= LEAST_STEPS and recent < self.threshold:
            self._enter(step)

    def state(self) -> dict[str, Any]:
        """For a checkpoint: plain numbers."""
        return {"entered": list(self.entered), "steps": self._steps, "loss": self._loss}

    def restore(self, state: dict[str, Any]) -> None:
        self.entered, self._steps, self._loss = list(state["entered"]), state["steps"], state["loss"]

    def _enter(self, step: int) -> None:
        self.entered.append(step)
        self._steps, self._loss = 0, 0.0

    def _due(self, stage: int) -> float:
        return self.share * (stage / STAGES) ** (1.0 / self.power)
