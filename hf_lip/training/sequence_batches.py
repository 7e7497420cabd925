# SPDX-License-Identifier: Apache-2.0
"""Batches of entity tracking as functions of the step: the data do not depend on resumes, processes or workers."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from ..data.tracking_tokenizer import IGNORED, PAD_ID
from .sequence_pace import Pace
from .sequence_questions import Batch, SharedText, encode_texts, packed_batch, row_batch
from .sequence_tasks import TrackingArguments, sample_rows


# parts of the seeds of different random numbers
_ORDER, _QUESTIONS, _CURRICULUM = range(3)

__all__ = ["EpochOrder", "FileTexts", "GeneratedSamples", "Samples", "StepBatches", "dense_batch"]


class Samples(Protocol):
    """Where training samples come from."""

    def draw(self, step: int, progress: float, places: range) -> list[Any]:
        """The samples at some places, 0 to batch_size - 1, of the batch of a step.

        Args:
            progress: share of training done after the step, or for a curriculum as far as if it were.
        """

    def length(self, sample: Any) -> int:
        """Its tokens."""

    def collate(self, samples: Sequence[Any]) -> Batch:
        """Samples as a batch."""


class StepBatches(Dataset):
    """Entry `step` is the micro-batches of this process at that step, samples of like length together.

    Args:
        samples: what to train on.
        num_steps: of the run.
        batch_size: samples of a step, over all processes and micro-batches.
        pace: of a curriculum that depends on what was learnt. It knows nothing of steps to come, so batches have to
            be made when they are asked for, without workers.
    """

    def __init__(
        self,
        samples: Samples,
        num_steps: int,
        batch_size: int,
        *,
        num_micro_batches: int = 1,
        process_index: int = 0,
        num_processes: int = 1,
        pace: Pace | None = None,
    ) -> None:
        self.samples, self.num_steps, self.batch_size, self.pace = samples, num_steps, batch_size, pace
        self.num_micro_batches, self.process_index, self.num_processes = (
            num_micro_batches,
            process_index,
            num_processes,
        )

    def __len__(self) -> int:
        return self.num_steps

    def from_step(
        self, step: int, position: dict[str, int] | None, num_workers: int
    ) -> Iterator[tuple[list[Batch], dict[str, int] | None]]:
        """The micro-batches of every step from `step` on, and the position in a stream, which there is not."""
        rest = range(step, self.num_steps)
        for parts in DataLoader(self, sampler=rest, batch_size=None, num_workers=num_workers):
            yield parts, position

    def __getitem__(self, step: int) -> list[Batch]:
        places = range(self.process_index, self.batch_size, self.num_processes)
        progress = (step + 1) / self.num_steps
        drawn = self.samples.draw(step, progress if self.pace is None else self.pace.progress(progress), places)
        drawn.sort(key=self.samples.length)
        count = len(drawn) // self.num_micro_batches
        return [self.samples.collate(drawn[first : first + count]) for first in range(0, len(drawn), count)]


class GeneratedSamples:
    """Fresh samples for every step: dense, or texts with one question.

    Args:
        tokenizer: of the texts; None for dense samples.
    """

    def __init__(
        self, arguments: TrackingArguments, seed: int, batch_size: int, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        self.arguments, self.seed, self.batch_size, self.tokenizer = arguments, seed, batch_size, tokenizer
        self.task = arguments.tasks()[0]

    def draw(self, step: int, progress: float, places: range) -> list[Any]:
        arguments = self.arguments
        drawn = float(np.random.default_rng([self.seed, _CURRICULUM, step]).random())
        task = arguments.task_of_step(self.task, progress, drawn)
        options: dict[str, Any] = {"seed": self.seed, "split_seed": arguments.split_seed}
        indices = (step * self.batch_size + place for place in places)
        rows = [row for index in indices for row in sample_rows(task, index, "train", **options)]
        if self.tokenizer is None:
            return rows
        texts = encode_texts(rows, self.tokenizer, arguments.text_key)
        return [(text.ids, text.questions) for text in texts]

    def length(self, sample: Any) -> int:
        return len(sample["labels"] if self.tokenizer is None else sample[0])

    def collate(self, samples: Sequence[Any]) -> Batch:
        if self.tokenizer is None:
            return dense_batch(samples)
        return row_batch(samples)


class EpochOrder:
    """Places of data that end, in a new order every epoch; the last ones, which fill no batch, are left out.

    Raises:
        ValueError: fewer samples than a batch has.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.steps_per_epoch = count // batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(f"--train_batch_size is {batch_size}, more than the {count} samples to train on.")
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def index(self, step: int, place: int) -> int:
        """Which sample is at a place, 0 to batch_size - 1, of the batch of a step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, _ORDER, epoch]).permutation(self.count)
        return int(self._order[1][position * self.batch_size + place])


class FileTexts:
    """Texts of files in a new order every epoch.

    Args:
        questions: asked of a text each time, drawn anew; 0 for all questions as samples of their own.

    Raises:
        ValueError: fewer samples than a batch has.
    """

    def __init__(self, texts: Sequence[SharedText], questions: int, seed: int, batch_size: int) -> None:
        self.texts, self.questions, self.seed = texts, questions, seed
        self.samples: list[tuple[int, int | None]] = (
            [(place, None) for place in range(len(texts))]
            if questions
            else [(place, other) for place, text in enumerate(texts) for other in range(len(text.questions))]
        )
        self.order = EpochOrder(len(self.samples), batch_size, seed)
        self.steps_per_epoch = self.order.steps_per_epoch

    def draw(self, step: int, progress: float, places: range) -> list[Any]:
        pairs: list[Any] = []
        for place in places:
            text_place, chosen = self.samples[self.order.index(step, place)]
            text = self.texts[text_place]
            if chosen is not None:
                asked = [chosen]
            else:
                rng = np.random.default_rng([self.seed, _QUESTIONS, step // self.steps_per_epoch, text_place])
                asked = sorted(rng.permutation(len(text.questions))[: self.questions].tolist())
            pairs.append((text.ids, [text.questions[number] for number in asked]))
        return pairs

    def length(self, sample: Any) -> int:
        return max(question.seen for question in sample[1])

    def collate(self, samples: Sequence[Any]) -> Batch:
        return packed_batch(samples) if self.questions else row_batch(samples)


def dense_batch(rows: Sequence[dict[str, Any]]) -> Batch:
    """Rows of a dense task, right-padded: `statement_ids` (B, n, 3) or `input_ids` (B, n), `labels` and `hops`."""
    words = "statement_ids" if "statement_ids" in rows[0] else "input_ids"
    length = max(len(row["labels"]) for row in rows)
    batch = {}
    for name, filler in ((words, PAD_ID), ("labels", IGNORED), ("hops", -1)):
        arrays = [np.array(row[name], dtype=np.int64) for row in rows]
        padded = np.full((len(rows), length, *arrays[0].shape[1:]), filler, dtype=np.int64)
        for place, array in enumerate(arrays):
            padded[place, : len(array)] = array
        batch[name] = torch.from_numpy(padded)
    return batch
