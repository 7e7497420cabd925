# SPDX-License-Identifier: Apache-2.0
"""Training texts of Boxes: whole worlds, or the smaller ones inside them that a curriculum begins with.

From scratch a transformer learns to answer from the description of a few boxes within some hundred steps, and then
what one operation changes; from whole worlds (seven boxes, twelve operations) it learns neither in as many thousands.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..data.box_samples import BoxesSample, object_names, part_of_sample, renamed_sample, rows_of_sample
from .sequence_batches import EpochOrder
from .sequence_questions import Batch, encode_texts, packed_batch, row_batch
from .sequence_tasks import TrackingArguments, split_sample


# part of the seeds of these random numbers; those of `sequence_batches` are 0 to 2
_QUESTIONS = 3

__all__ = ["BoxTexts", "worlds_of_rows"]


class BoxTexts:
    """Worlds with several questions each, drawn anew each time.

    While `--curriculum grow` runs, half of the worlds of a step have the largest size that it has reached, the others
    fewer operations and boxes, mostly few: what was learnt is kept.

    Args:
        worlds: of files, in a new order every epoch; the last ones of an epoch that fill no batch are left out.
            None: fresh worlds for every step.

    Raises:
        ValueError: fewer worlds than a batch has.
    """

    def __init__(
        self,
        arguments: TrackingArguments,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        batch_size: int,
        worlds: Sequence[BoxesSample] | None = None,
    ) -> None:
        self.arguments, self.tokenizer, self.seed, self.batch_size = arguments, tokenizer, seed, batch_size
        self.worlds = worlds
        self.order = None if worlds is None else EpochOrder(len(worlds), batch_size, seed)
        self.steps_per_epoch = None if self.order is None else self.order.steps_per_epoch
        self.names = object_names(worlds) if worlds is not None and arguments.rename_objects else []
        self.task = None if worlds is not None else arguments.tasks()[0]

    def draw(self, step: int, progress: float, places: range) -> list[Any]:
        rows: list[dict[str, Any]] = []
        for place in places:
            number = self._number(step, place)
            rng = np.random.default_rng([self.seed, _QUESTIONS, step, place])
            sample = self._part(self._world(number), progress, rng)
            asked = self._questions(sample, rng)
            rows += rows_of_sample(self._renamed(sample, rng), asked, number)
        texts = encode_texts(self.arguments.ordered_answers(rows), self.tokenizer, self.arguments.text_key)
        return [(text.ids, text.questions) for text in texts]

    def length(self, sample: Any) -> int:
        return max(question.seen for question in sample[1])

    def collate(self, samples: Sequence[Any]) -> Batch:
        return packed_batch(samples) if self.arguments.questions else row_batch(samples)

    def _number(self, step: int, place: int) -> int:
        return step * self.batch_size + place if self.order is None else self.order.index(step, place)

    def _world(self, number: int) -> BoxesSample:
        if self.worlds is not None:
            return self.worlds[number]
        assert self.task is not None
        sample, _ = split_sample(self.task, number, "train", seed=self.seed, split_seed=self.arguments.split_seed)
        return sample

    def _part(self, sample: BoxesSample, progress: float, rng: np.random.Generator) -> BoxesSample:
        """The world, or while the curriculum grows a smaller one in it: from one of its operations on, with the boxes
        of that operation and some others, so that every kind of operation is seen inside the smallest worlds.
        """
        largest = len(sample.contents), len(sample.operations)
        size = self.arguments.world_size(*largest, progress)
        if size == largest:
            return sample
        if rng.random() < 0.5:
            size = self.arguments.size_with(largest[0], int((size[1] + 1) * rng.random() ** 2))
        # where as many operations follow
        start = int(rng.integers(max(largest[1] - size[1], 0) + 1))
        order = rng.permutation(largest[0]).tolist()
        if start < largest[1]:
            first = sample.operations[start]
            order.sort(key=lambda box: box not in (first.source, first.target))
        boxes = order[: size[0]]
        return part_of_sample(sample, rng.permutation(boxes).tolist(), size[1], start)

    def _renamed(self, sample: BoxesSample, rng: np.random.Generator) -> BoxesSample:
        if not self.names:
            return sample
        used = object_names([sample])
        others = rng.permutation(len(self.names))[: len(used)].tolist()
        return renamed_sample(sample, {name: self.names[other] for name, other in zip(used, others, strict=True)})

    def _questions(self, sample: BoxesSample, rng: np.random.Generator) -> set[tuple[int, int]]:
        """Steps and boxes to ask for, those of changed boxes `changed_weight` times as likely as others."""
        changes = sample.num_changes()
        first_step = len(sample.operations) if self.arguments.query_steps == "last" else 0
        weights = np.where(changes[first_step:] > 0, self.arguments.changed_weight or 1.0, 1.0).ravel()
        # drawn without replacement: the first of exponential clocks to ring
        chosen = np.argsort(rng.exponential(size=weights.size) / weights)[: max(self.arguments.questions, 1)]
        return {(first_step + place // changes.shape[1], place % changes.shape[1]) for place in chosen.tolist()}


def worlds_of_rows(rows: Iterable[Mapping[str, Any]]) -> list[BoxesSample]:
    """The worlds that Boxes rows ask for, in the order of their first rows."""
    longest: dict[int, str] = {}
    for row in rows:
        longest[row["sample_id"]] = max(longest.get(row["sample_id"], ""), row["prompt"], key=len)
    return [BoxesSample.of_text(prompt.rpartition(" Box ")[0]) for prompt in longest.values()]
