# SPDX-License-Identifier: Apache-2.0
"""Batches of entity tracking as functions of the step: the data do not depend on resumes, processes or workers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from ..data import BoxesTask
from ..data.tracking_tokenizer import IGNORED, PAD_ID
from .sequence_questions import Batch, Question, SharedText, encode_texts, packed_batch, row_batch
from .sequence_tasks import TrackingArguments, sample_rows


# parts of the seeds of different random numbers
_ORDER, _QUESTIONS, _CURRICULUM = range(3)

__all__ = ["FileTexts", "GeneratedSamples", "Samples", "StepBatches", "dense_batch"]


class Samples(Protocol):
    """Where training samples come from."""

    def draw(self, step: int, progress: float, places: range) -> list[Any]:
        """The samples at some places, 0 to batch_size - 1, of the batch of a step.

        Args:
            progress: share of training done after the step.
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
    ) -> None:
        self.samples, self.num_steps, self.batch_size = samples, num_steps, batch_size
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
        drawn = self.samples.draw(step, (step + 1) / self.num_steps, places)
        drawn.sort(key=self.samples.length)
        count = len(drawn) // self.num_micro_batches
        return [self.samples.collate(drawn[first : first + count]) for first in range(0, len(drawn), count)]


class GeneratedSamples:
    """Fresh samples for every step: dense, or texts with one question or with several.

    Args:
        tokenizer: of the texts; None for dense samples.
    """

    def __init__(
        self, arguments: TrackingArguments, seed: int, batch_size: int, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        self.arguments, self.seed, self.batch_size, self.tokenizer = arguments, seed, batch_size, tokenizer
        self.task = arguments.tasks()[0]
        if isinstance(self.task, BoxesTask):
            asked = min(max(arguments.questions, 1), self.task.num_queries())
            self.task = replace(self.task, queries_per_world=asked)

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
        return packed_batch(samples) if self.arguments.questions else row_batch(samples)


class FileTexts:
    """Texts of files in a new order every epoch; the last samples of an epoch that fill no batch are left out.

    Args:
        questions: asked of a text each time, drawn anew; 0 for all questions as samples of their own.
        renamed: tokens in order. Those in a text become others of them in the same order, drawn anew each time.
        last_step: of the share of training done: the largest `step` of a question that is asked. Every text has to
            have such a question.

    Raises:
        ValueError: fewer samples than a batch has.
    """

    def __init__(
        self,
        texts: Sequence[SharedText],
        questions: int,
        seed: int,
        batch_size: int,
        *,
        renamed: Sequence[int] = (),
        last_step: Callable[[float], int] | None = None,
    ) -> None:
        self.texts, self.questions, self.seed, self.batch_size = texts, questions, seed, batch_size
        self.renamed, self.last_step = np.array(renamed, dtype=np.int64), last_step
        self.samples: list[tuple[int, int | None]] = (
            [(place, None) for place in range(len(texts))]
            if questions
            else [(place, other) for place, text in enumerate(texts) for other in range(len(text.questions))]
        )
        self.steps_per_epoch = len(self.samples) // batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"--train_batch_size is {batch_size}, more than the {len(self.samples)} samples to train on."
            )
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def draw(self, step: int, progress: float, places: range) -> list[Any]:
        epoch, position = divmod(step, self.steps_per_epoch)
        order = self._epoch_order(epoch)
        pairs: list[Any] = []
        for place in places:
            text_place, chosen = self.samples[order[position * self.batch_size + place]]
            text = self.texts[text_place]
            rng = np.random.default_rng([self.seed, _QUESTIONS, epoch, text_place])
            if chosen is not None:
                pairs.append(self._rename(text.ids, [text.questions[chosen]], rng))
                continue
            known = list(text.questions)
            if self.last_step is not None:
                last = self.last_step(progress)
                known = [question for question in known if question.row["step"] <= last]
            asked = sorted(rng.permutation(len(known))[: self.questions].tolist())
            pairs.append(self._rename(text.ids, [known[number] for number in asked], rng))
        return pairs

    def _rename(self, ids: NDArray[np.int64], questions: list[Question], rng: np.random.Generator) -> tuple[Any, Any]:
        """A text and its questions with other names; their rows keep the old ones."""
        if not self.renamed.size:
            return ids, questions
        tokens = np.concatenate([ids, *(question.ids for question in questions)])
        used = self.renamed[np.isin(self.renamed, tokens)]
        names = np.arange(1 + max(self.renamed.max(), tokens.max()))
        # answers are sorted: they stay so
        names[used] = self.renamed[np.sort(rng.permutation(len(self.renamed))[: len(used)])]
        return names[ids], [replace(question, ids=names[question.ids]) for question in questions]

    def length(self, sample: Any) -> int:
        return max(question.seen for question in sample[1])

    def collate(self, samples: Sequence[Any]) -> Batch:
        return packed_batch(samples) if self.questions else row_batch(samples)

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, _ORDER, epoch]).permutation(len(self.samples))
        return self._order[1]


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
