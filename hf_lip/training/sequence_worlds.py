# SPDX-License-Identifier: Apache-2.0
"""Training texts of Boxes: whole worlds, or the smaller ones, made by the same rules, that a curriculum begins with.

From scratch a transformer learns to answer from the description of a few boxes within some hundred steps, and then
what one operation changes; from whole worlds (seven boxes, twelve operations) it learns neither in as many thousands.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..data import BoxesTask
from ..data.box_samples import BoxesSample, object_names, renamed_sample, rows_of_sample
from ..data.generation import split_of
from .sequence_batches import EpochOrder
from .sequence_questions import Batch, encode_texts, packed_batch, row_batch
from .sequence_tasks import TrackingArguments, accepted_sample, split_sample


# part of the seeds of these random numbers; those of `sequence_batches` are 0 to 2
_QUESTIONS = 3

__all__ = ["BoxTexts", "worlds_of_rows"]


class BoxTexts:
    """Worlds with several questions each, drawn anew each time.

    With `--curriculum grow`, half of the worlds of a step have the largest size that it has reached and the others
    fewer operations and boxes, to its end and after it: what is learnt is kept, and steps cost less. Worlds of
    fewer boxes are generated.

    Args:
        worlds: of files, in a new order every epoch; the last ones of an epoch that fill no batch are left out.
            None: fresh worlds for every step.

    Raises:
        ValueError: fewer worlds than a batch has, or a curriculum or fresh operations for files with too few objects
            to make worlds of.
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
        self.names = [] if worlds is None else object_names(worlds)
        # by which worlds are made: of files, the smaller ones of a curriculum and fresh operations
        self.task: Any = None
        if worlds is None:
            self.task = arguments.tasks()[0]
        elif arguments.curriculum != "none" or arguments.fresh_operations:
            self.task = BoxesTask(num_boxes=max(len(world.contents) for world in worlds), objects=tuple(self.names))

    def draw(self, step: int, progress: float, places: range) -> list[Any]:
        rows: list[dict[str, Any]] = []
        for place in places:
            number = self._number(step, place)
            rng = np.random.default_rng([self.seed, _QUESTIONS, step, place])
            sample = self._world(number, progress, rng)
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

    def _world(self, number: int, progress: float, rng: np.random.Generator) -> BoxesSample:
        if self.arguments.curriculum != "none":
            grown = self.arguments.grown(progress) * (1.0 if rng.random() < 0.5 else rng.random())
            if grown < 1.0:
                return self._smaller_world(number, grown, rng)
        if self.worlds is not None:
            return self._of_files(number, len(self.worlds[number].operations), rng)
        return split_sample(self.task, number, "train", seed=self.seed, split_seed=self.arguments.split_seed)[0]

    def _smaller_world(self, number: int, grown: float, rng: np.random.Generator) -> BoxesSample:
        largest = self.task.num_boxes, self.task.num_operations
        if self.worlds is not None:
            largest = len(self.worlds[number].contents), len(self.worlds[number].operations)
        size = self.arguments.world_size(*largest, grown)
        if self.worlds is not None and size[0] == largest[0]:
            # initial counts of all boxes are what splits of files differ in: only those of the files are seen
            return self._of_files(number, size[1], rng)
        task = replace(self.task, num_boxes=size[0], num_operations=size[1])
        # splits differ in the initial counts of all boxes: with fewer boxes all counts may be seen, and have to be,
        # as there are so few of them that places in the text would be learnt by heart
        split_seed = self.arguments.split_seed
        return accepted_sample(task, rng, lambda key: size[0] < largest[0] or split_of(key, split_seed) == "train")

    def _of_files(self, number: int, num_operations: int, rng: np.random.Generator) -> BoxesSample:
        """A world of the files with its first operations, or with fresh ones."""
        assert self.worlds is not None
        world = self.worlds[number]
        if not self.arguments.fresh_operations:
            return replace(world, operations=world.operations[:num_operations])
        task = replace(self.task, num_boxes=len(world.contents), num_operations=num_operations)
        found = task.sample_from(world.contents, rng)
        assert found is not None, "what is inside can be removed, what is outside be put in"
        return found

    def _renamed(self, sample: BoxesSample, rng: np.random.Generator) -> BoxesSample:
        if not self.arguments.rename_objects:
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
